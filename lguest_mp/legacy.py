"""What a program leaves to the one that the same process executes next: file descriptors, named in the environment.

A reboot is such an exec (``supervisor/reboot.py``). Whoever takes what was left checks that it is what it should be,
since the environment is anybody's, and a number in it may be any file of this process.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress


def leave(variable: str, *fds: int) -> None:
    """The next program finds these by :func:`take`, in this order. They are not this one's any more."""
    for fd in fds:
        os.set_inheritable(fd, True)
    os.environ[variable] = ",".join(map(str, fds))


def take(variable: str) -> tuple[int, ...]:
    """What was left under this name, once; nothing, if nothing was. Nobody that is executed from here on has it."""
    try:
        fds = tuple(map(int, os.environ.pop(variable, "").split(",")))
        for fd in fds:
            os.set_inheritable(fd, False)
    except (ValueError, OverflowError, OSError):
        return ()
    return fds


def take_sealed(variable: str, seals: int) -> int | None:
    """The file that was left under this name, if it is a memfd with just these seals; None: it is not, or was not."""
    for fd in take(variable):
        with suppress(OSError):  # somebody else's file
            if fcntl.fcntl(fd, fcntl.F_GET_SEALS) == seals:
                return fd
    return None
