"""What a process says about itself to Linux through prctl(2).

Constants: include/uapi/linux/prctl.h.
"""

from __future__ import annotations

import ctypes
import os
import signal

from lguest_mp import steps
from lguest_mp.steps import Step

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
#: A comm has 15 characters and a zero byte (TASK_COMM_LEN).
COMM_LENGTH = 15

_SYS_PRCTL = 157


def step(option: int, argument: object, forgiven: tuple[int, ...] = ()) -> Step:
    """prctl(option, argument, 0, 0, 0)."""
    return Step(f"prctl({option})", (_SYS_PRCTL, option, argument, 0, 0, 0), forgiven)


def call(option: int, argument: int) -> None:
    """The same at once; OSError."""
    steps.make((step(option, argument),))


def comm(name: str) -> Step:
    """Sets the name that ``top`` shows; what is longer than 15 bytes is cut."""
    return step(PR_SET_NAME, ctypes.c_char_p(name.encode(errors="replace")[:COMM_LENGTH]))


def set_comm(name: str) -> None:
    """The same at once."""
    steps.make((comm(name),))


#: Has Linux kill the process when its parent ends. Whose parent that is, is to be looked at afterwards.
DIE_WITH_PARENT = step(PR_SET_PDEATHSIG, int(signal.SIGKILL))


def die_with_parent(parent: int) -> bool:
    """Has Linux kill this process when its parent, process ``parent``, ends; False if it has ended already.

    Linux forgets the request when the process changes its user or group: make it afterwards.
    """
    steps.make((DIE_WITH_PARENT,))
    return os.getppid() == parent
