"""Whether this host's KVM is one for stock kernels: found out by a child, while its parent does something else.

The child runs a guest of a few bytes (``cpu/kvm/probe.py``). It is a process of its own so that all it takes, imports
and the making and unmaking of a virtual machine, costs the launcher neither time nor memory, and so that the worst a
strange KVM can do is to it.
"""

from __future__ import annotations

import os
import signal
from typing import NoReturn

from lguest_mp.record import Value

PATH = "/dev/kvm"


class Verdict(Value):
    """``file``: the opened device, close-on-exec, for whoever asked; None: it cannot be opened.

    ``reason``: why it is not to be used for a stock kernel; empty: it is.
    """

    file: int | None
    reason: str = ""

    def discard(self) -> None:
        """Closes the device."""
        if self.file is not None:
            os.close(self.file)


class Probe:
    """A look at the host's KVM that is under way."""

    def __init__(self, file: int | None, reason: str = "", child: int = 0, answer: int = -1) -> None:
        self._file = file
        self._reason = reason
        self._child = child
        self._answer = answer

    def verdict(self) -> Verdict:
        """Waits for the end of it. To be asked once."""
        if self._file is None:
            return Verdict(None, self._reason)
        with os.fdopen(self._answer, "rb") as answer:
            said = answer.read().decode(errors="replace")
        _, status = os.waitpid(self._child, 0)
        return Verdict(self._file, said if status == 0 else "a look at it failed")


def start() -> Probe:
    """Opens the device, and begins to look."""
    try:
        file = os.open(PATH, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return Probe(None, f"there is no {PATH}")
    except PermissionError:
        return Probe(None, f"{PATH} is not for this user; it usually is for the group kvm")
    except OSError as error:
        return Probe(None, f"{PATH}: {error.strerror}")
    try:
        answer, child_answer = os.pipe()
        try:
            child = os.fork()
            if child == 0:
                _look(file, child_answer)
        except OSError:
            os.close(answer)
            raise
        finally:
            os.close(child_answer)
    except OSError as error:
        os.close(file)
        return Probe(None, f"a look at it failed: {error.strerror}")
    return Probe(file, child=child, answer=answer)


def _look(file: int, answer: int) -> NoReturn:
    """The child: says why not, or nothing, and ends with status 0."""
    status = 1
    try:
        signal.alarm(5)  # nobody waits for ever, whatever happens here
        from lguest_mp.cpu.kvm.probe import judge  # noqa: PLC0415 -- in this process only

        os.write(answer, (judge(file) or "").encode())
        status = 0
    finally:
        os._exit(status)
