"""What all tests share: how hypothesis runs on machines of any speed, what children think of signals, and a cache."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType

import pytest
from hypothesis import settings

from guestkit.cache import cache_directory
from lguest_mp import core

# How long an example takes says more about the machine than about the code.
settings.register_profile("lguest", deadline=None)
settings.load_profile("lguest")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with what takes longest, so that nobody has to wait for it at the end."""
    items.sort(key=lambda item: item.path.parent.name != "nested")


@pytest.fixture(scope="session", autouse=True)
def _no_ignored_signals() -> None:
    """Has children start with signals as a shell's foreground has them, wherever the tests run.

    What runs in the background of a shell ignores SIGINT and SIGQUIT, under nohup SIGHUP, and so does every program
    that it executes. A handler that does nothing is as good here, and executed programs do not inherit it.
    """

    def ignore(_number: int, _frame: FrameType | None) -> None:
        pass

    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, ignore)


@pytest.fixture(scope="session", params=["python", "compiled"])
def core_kind(request: pytest.FixtureRequest) -> str:
    """Each test that asks for it, or for what is made of it, is made for both cores."""
    if request.param == "compiled" and (lacks := core.missing()):
        pytest.skip(f"the compiled core {lacks}")
    return str(request.param)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Has launchers keep their kernels where the tests are, and not with the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LGUEST_CACHE", str(cache_directory()))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
