"""What all tests share: how hypothesis runs on machines of any speed, and what children think of signals."""

from __future__ import annotations

import signal
from types import FrameType

import pytest
from hypothesis import settings

# How long an example takes says more about the machine than about the code.
settings.register_profile("lguest", deadline=None)
settings.load_profile("lguest")


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
