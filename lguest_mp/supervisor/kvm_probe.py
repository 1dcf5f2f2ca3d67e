"""Whether this host's KVM is one for stock kernels: found out by a child, while its parent does something else.

The child runs a guest of a few bytes (``cpu/kvm/probe.py``). It is a process of its own so that all it takes, imports
and the making and unmaking of a virtual machine, costs the launcher neither time nor memory, and so that the worst a
strange KVM can do is to it.
"""

from __future__ import annotations

import os
import signal

from lguest_mp.aside import Aside
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

    def __init__(self, file: int | None, look: Aside | str) -> None:
        """``look``: what the child finds out about the device; or why there is nothing to look at."""
        self._file = file
        self._look = look

    def verdict(self) -> Verdict:
        """Waits for the end of it. To be asked once."""
        if isinstance(self._look, str):
            return Verdict(self._file, self._look)
        said = self._look.answer()
        return Verdict(self._file, "a look at it failed" if said is None else said.decode(errors="replace"))


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
        return Probe(file, Aside(lambda: _look(file)))
    except OSError as error:
        os.close(file)
        return Probe(None, f"a look at it failed: {error.strerror}")


def _look(file: int) -> bytes:
    """Why not to use it, or nothing. In the child."""
    signal.alarm(5)  # nobody waits for ever, whatever happens here
    from lguest_mp.cpu.kvm.probe import judge  # noqa: PLC0415 -- in this process only

    return (judge(file) or "").encode()
