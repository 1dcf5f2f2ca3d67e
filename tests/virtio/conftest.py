"""What the tests of virtio share."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

import pytest
from mockdriver import HANGS, DriverFactory, MockDriver
from packeddriver import PACKED, new_driver_of

from lguest_mp import core


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    """Fails a test that would wait for ever."""

    def bark(number: int, frame: FrameType | None) -> NoReturn:
        raise TimeoutError(f"nothing happened for {HANGS} s")

    previous = signal.signal(signal.SIGALRM, bark)
    signal.alarm(HANGS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out packed rings where a test is marked ``split``."""
    items[:] = [item for item in items if not (item.get_closest_marker("split") and _is_packed(item))]


def _is_packed(item: pytest.Item) -> bool:
    return isinstance(item, pytest.Function) and item.callspec.params.get("of") == PACKED


@pytest.fixture(scope="session", params=["python", "compiled", PACKED])
def of(request: pytest.FixtureRequest) -> str:
    """What serves a driver: a core, with split rings; or the one in Python, with packed ones.

    Each test that asks for it, or for a driver, is made for all of them.
    """
    if request.param == "compiled" and (lacks := core.missing()):
        pytest.skip(f"the compiled core {lacks}")
    return str(request.param)


@pytest.fixture
def new_driver(of: str) -> Iterator[DriverFactory]:
    """Makes drivers (as MockDriver does), and closes their eventfds after the test."""
    drivers: list[MockDriver] = []

    def new(*arguments: object, **keywords: object) -> MockDriver:
        drivers.append(new_driver_of(of)(*arguments, **keywords))
        return drivers[-1]

    yield new
    for driver in drivers:
        driver.close()


@pytest.fixture
def driver(new_driver: DriverFactory) -> MockDriver:
    """A driver of a queue of 16, with EVENT_IDX and INDIRECT_DESC."""
    return new_driver()
