"""Signals, as events of the supervisor's loop.

A handler only notes that its signal came; Python's wakeup descriptor makes the loop look. What the launcher's parent
chose to ignore (``nohup``, a shell's background job) stays ignored, and everything is put back at the end, because
handlers and masks outlive an exec.

Children get none of it: see :func:`reset_in_child`.
"""

from __future__ import annotations

import contextlib
import signal
import socket
from types import FrameType, TracebackType
from typing import Any, Self

#: These stop the guest: orderly teardown, and then the launcher dies by the same signal.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_NOTED = (*STOPPING, signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT, signal.SIGUSR1)
#: The terminal sends these to every process in its foreground; the supervisor decides what becomes of the others.
_TERMINAL = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTSTP)


class Signals:
    """The signals of this process, while it is entered; ``fd`` is readable when one came."""

    def __init__(self) -> None:
        self._pending: set[int] = set()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for signum in _NOTED:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                self._before[signum] = signal.signal(signum, self._note)
        # An ignored SIGCHLD, which exec hands down, would have Linux reap our children behind our back.
        self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._mask_before = signal.pthread_sigmask(signal.SIG_UNBLOCK, self._before)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask_before)
        self._reader.close()
        self._writer.close()

    @property
    def fd(self) -> int:
        """To be waited for."""
        return self._reader.fileno()

    def take(self) -> set[int]:
        """The signals that came since the last call."""
        with contextlib.suppress(BlockingIOError):
            while self._reader.recv(512):
                pass
        taken = set(self._pending)
        self._pending -= taken
        return taken

    def stop_process(self) -> None:
        """Stops this process as SIGTSTP does by default; returns when it is continued."""
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._pending.add(signum)


def reset_in_child() -> None:
    """Makes a forked child's signals its own. Call it with all signals blocked, as they were when it was forked."""
    signal.set_wakeup_fd(-1)
    for signum in (*_NOTED, signal.SIGCHLD):
        signal.signal(signum, signal.SIG_IGN if signum in _TERMINAL else signal.SIG_DFL)
