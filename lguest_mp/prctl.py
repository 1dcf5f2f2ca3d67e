"""What a process says about itself to Linux through prctl(2), by ctypes.

Constants: include/uapi/linux/prctl.h.
"""

from __future__ import annotations

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
#: A comm has 15 characters and a zero byte (TASK_COMM_LEN).
COMM_LENGTH = 15

_libc = ctypes.CDLL(None, use_errno=True)


def call(option: int, argument: int) -> None:
    """prctl(option, argument, 0, 0, 0), of the options that take a number; OSError."""
    _prctl(option, ctypes.c_ulong(argument))


def _prctl(option: int, argument: ctypes.c_ulong | ctypes.c_char_p) -> None:
    unused = ctypes.c_ulong(0)
    if _libc.prctl(option, argument, unused, unused, unused) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"prctl({option}): {os.strerror(errno)}")


def set_comm(name: str) -> None:
    """Sets the name that ``top`` shows; what is longer than 15 bytes is cut."""
    _prctl(PR_SET_NAME, ctypes.c_char_p(name.encode(errors="replace")[:COMM_LENGTH]))


def die_with_parent(parent: int) -> bool:
    """Has Linux kill this process when its parent, process ``parent``, ends; False if it has ended already.

    Linux forgets the request when the process changes its user or group: make it afterwards.
    """
    call(PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent
