"""The ways in which a guest ends: what the user reads, and what the launcher's parent gets as its exit status."""

from __future__ import annotations

import os
import signal
from enum import IntEnum
from typing import NoReturn

from lguest_mp.record import Value


class ExitStatus(IntEnum):
    """The launcher's exit status."""

    POWERED_OFF = 0
    FAILED = 1
    USAGE = 2
    GUEST_DIED = 3
    WORKER_DIED = 4


class Exit(Value):
    """The launcher exits with this status; ``line`` says why."""

    status: ExitStatus
    line: str | None = None


class Signalled(Value):
    """The launcher was told to stop by this signal; it dies by it, so that its parent knows."""

    signum: int


class Rebooting(Value):
    """The guest starts afresh."""


Ending = Exit | Signalled | Rebooting


def powered_off() -> Ending:
    return Exit(ExitStatus.POWERED_OFF)


def failed(reason: str) -> Ending:
    return Exit(ExitStatus.FAILED, reason)


def guest_died(reason: str) -> Ending:
    return Exit(ExitStatus.GUEST_DIED, f"the guest died: {reason}")


def worker_died(name: str, how: str) -> Ending:
    return Exit(ExitStatus.WORKER_DIED, f"the worker {name} {how}; the guest is stopped")


def cannot_reboot(left_behind: list[str]) -> Ending:
    """What these had begun may still be done, to a memory and a disk that would be another guest's by then."""
    return failed(f"the guest cannot reboot: {', '.join(left_behind)} cannot be ended, and may still write")


def interrupted() -> Ending:
    return Signalled(signal.SIGINT)


def in_words(how: Ending) -> str:
    """How a guest ended, for those who watched it from elsewhere."""
    match how:
        case Exit(_, line):
            return line or "it switched itself off"
        case Signalled(signum):
            return f"it was stopped by {signal.Signals(signum).name}"
        case Rebooting():
            return "it reboots"


def die_by(signum: int) -> NoReturn:
    """Ends this process by the signal, as if it had never been handled."""
    signal.signal(signum, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signum})
    os.kill(os.getpid(), signum)
    os._exit(128 + signum)  # the first process of a PID namespace cannot kill itself
