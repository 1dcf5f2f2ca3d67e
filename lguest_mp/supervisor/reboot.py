"""A guest's reboot: the launcher executes itself again, with the command line that it was given.

Everything is as it was at the first start then: the images are opened anew (a new kernel boots), and nothing can leak
from one life into the next. The PID stays, files are closed by exec, signals and terminal were put back on the way
here. Counters in the environment are all that the new launcher knows of the old.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

from lguest_mp.errors import LguestError

_COUNTER = "LGUEST_REBOOTS"
#: ``block0/requestq=2,net0/receiveq=1``
_RESTARTS = "LGUEST_RESTARTS"


def count() -> int:
    """How often this process has rebooted by exec."""
    value = os.environ.get(_COUNTER, "")
    return int(value) if value.isascii() and value.isdecimal() else 0


def restarts() -> dict[str, int]:
    """How often the workers of each queue were replaced before that, by name."""
    pairs = (entry.rpartition("=") for entry in os.environ.get(_RESTARTS, "").split(","))
    return {name: int(value) for name, _, value in pairs if name and value.isascii() and value.isdecimal()}


def keep(restarted: dict[str, int]) -> None:
    """Has the next launcher find these by :func:`restarts`."""
    os.environ[_RESTARTS] = ",".join(f"{name}={value}" for name, value in restarted.items())


def execute_again() -> NoReturn:
    """Replaces this program by itself; LguestError if the host no longer has it."""
    os.environ[_COUNTER] = str(count() + 1)
    # Python ignores these for itself; its own start will find them as ours did.
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGPIPE, signal.SIGXFSZ)}
    try:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    except OSError as error:
        for number, handler in before.items():
            signal.signal(number, handler)
        raise LguestError(f"cannot reboot: {sys.executable}: {error.strerror}") from error
