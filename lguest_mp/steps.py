"""System calls that are put together before a fork and made after it.

A forked process shares all memory with its parent until one of them writes to a page, and Python writes to whatever it
looks at: reference counts, the interpreter's caches. Each function that a child calls, each module it looks into, each
object that it makes costs it a page or more. So what a child asks of Linux on its way to its own work is no code but
data: a list of :class:`Step`, which one loop makes.

Numbers: arch/x86/entry/syscalls/syscall_64.tbl.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from typing import NamedTuple

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
#: By themselves, since looking into a module or an object costs pages, too.
_syscall, _get_errno = _libc.syscall, ctypes.get_errno


class Step(NamedTuple):
    """A system call: its number and arguments, ints of 32 bits or what ctypes passes as it is.

    ``what`` it is, is for a person. The errors in ``forgiven`` are none. Its result goes ``into`` a place, which may be
    an argument of a later one, or a part of what that points to.
    """

    what: str
    call: tuple[object, ...]
    forgiven: tuple[int, ...] = ()
    into: ctypes.c_int | ctypes.c_uint32 | None = None


def make(steps: Iterable[Step]) -> None:
    """Makes the calls, one after the other. OSError."""
    for what, call, forgiven, into in steps:
        result = _syscall(*call)
        if result < 0:
            number = _get_errno()
            if number not in forgiven:
                raise OSError(number, f"{what}: {os.strerror(number)}")
        elif into is not None:
            into.value = result
