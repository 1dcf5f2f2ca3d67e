"""A child in a jail, and what becomes of what it tries."""

from __future__ import annotations

import errno
import faulthandler
import os
import signal
from collections.abc import Callable, Sequence

from lguest_mp.jail import Plan
from lguest_mp.supervisor import children

#: Exit statuses of a prisoner: it did what it wanted; it was told no (the error number is added).
SUCCEEDED, REFUSED, CANNOT_ENTER = 0, 1, 255


def fate(plan: Plan, attempt: Callable[[], object], files: Sequence[int] = ()) -> str:
    """What becomes of a child that enters the jail with no files but ``files``, and then tries something.

    ``did it``; the name of the error that it got; or that of the signal that killed it.
    """
    null = os.open(os.devnull, os.O_RDWR)
    try:
        pid = os.fork()
        if pid == 0:
            _be_prisoner(plan, attempt, files, null)
        _, status = os.waitpid(pid, 0)
    finally:
        os.close(null)
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    code = os.WEXITSTATUS(status)
    if code == SUCCEEDED:
        return "did it"
    return "it cannot enter" if code == CANNOT_ENTER else errno.errorcode.get(code - REFUSED, f"status {code}")


def _be_prisoner(plan: Plan, attempt: Callable[[], object], files: Sequence[int], null: int) -> None:
    status = CANNOT_ENTER
    try:
        faulthandler.disable()
        signal.alarm(20)
        os.dup2(null, 2)
        children.keep_only(files, null)
        plan.enter()
        attempt()
        status = SUCCEEDED
    except OSError as error:
        status = REFUSED + (error.errno or 0)
    finally:
        os._exit(status)
