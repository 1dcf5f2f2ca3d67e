"""A child that is watched at each of its machine instructions: every moment at which it could be killed.

What a killed worker leaves behind is what it shares with others. So it need not be killed again and again: between two
instructions that change nothing of that, the one death is as the other. ``moments`` runs a child once, one instruction
at a time (ptrace(2)), and gives everything that was to be found meanwhile.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import pytest

from lguest_mp.prctl import die_with_parent

#: include/uapi/linux/ptrace.h
_TRACEME, _SINGLESTEP = 0, 9
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long
_libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Places:
    """Memory that others see, as it is now and as it was when last looked at."""

    def __init__(self, views: Sequence[memoryview]) -> None:
        self._parts = [(view, ctypes.create_string_buffer(view.nbytes)) for view in views]
        self._compared = [
            (ctypes.addressof(ctypes.c_char.from_buffer(view)), ctypes.addressof(copy), len(copy))
            for view, copy in self._parts
        ]

    def look(self) -> bool:
        """Whether something has changed since the last look."""
        compare = _libc.memcmp
        return any(compare(*part) for part in self._compared)

    def take(self) -> tuple[bytes, ...]:
        """What is there now."""
        for view, copy in self._parts:
            ctypes.memmove(copy, view.tobytes(), len(copy))
        return tuple(bytes(copy) for _, copy in self._parts)


def moments(
    job: Callable[[], object], views: Sequence[memoryview], host: Callable[[], int] = lambda: 0
) -> Iterator[tuple[tuple[bytes, ...], int]]:
    """Runs ``job`` in a child: the contents of ``views`` whenever one has changed, and what ``host`` says then.

    ``views`` are contiguous, writable and shared with the child. The first moment is the one at which the child calls
    :func:`watch_me`, the last one that of its end.
    """
    places = Places(views)
    pid = _stopped(job)
    try:
        yield places.take(), host()
        while _step(pid):
            if places.look():
                yield places.take(), host()
    finally:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def watch_me() -> None:
    """From here on."""
    os.kill(os.getpid(), signal.SIGSTOP)


def _stopped(job: Callable[[], object]) -> int:
    """A child that has begun with ``job``, up to :func:`watch_me`."""
    parent = os.getpid()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            faulthandler.disable()
            die_with_parent(parent)
            if _libc.ptrace(_TRACEME, 0, None, None) == 0:
                job()
                status = 0
        finally:
            os._exit(status)
    if not os.WIFSTOPPED(os.waitpid(pid, 0)[1]):
        pytest.skip("this host lets nobody trace its own children")
    return pid


def _step(pid: int) -> bool:
    """One instruction further; False: it has ended, as it should."""
    _libc.ptrace(_SINGLESTEP, pid, None, None)
    _, status = os.waitpid(pid, 0)
    if os.WIFSTOPPED(status):
        assert os.WSTOPSIG(status) in (signal.SIGTRAP, signal.SIGSTOP), signal.Signals(os.WSTOPSIG(status)).name
        return True
    assert os.waitstatus_to_exitcode(status) == 0, status
    return False
