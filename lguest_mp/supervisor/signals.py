"""Signals, as events of the supervisor's loop.

While the guest lives they are blocked, and read from a file descriptor (signalfd(2)): no handler runs, so none has to
be put back. What the launcher's parent chose to ignore (``nohup``, a shell's background job) stays ignored.

Children inherit the block, and that is what is wanted: the terminal sends ^C and hang-ups to every process in its
foreground, and the supervisor alone decides what becomes of the others. It ends them by SIGTERM, which they unblock
(:data:`UNBLOCK_IN_CHILD`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from types import TracebackType
from typing import Self

from lguest_mp.steps import Step

#: These stop the guest: orderly teardown, and then the launcher dies by the same signal.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_NOTED = (*STOPPING, signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT, signal.SIGUSR1)

#: struct signalfd_siginfo begins with the signal's number, u32 (include/uapi/linux/signalfd.h).
_SIGINFO = struct.Struct("I124x")
#: sizeof(sigset_t) of glibc; the system call looks at the first 64 bits.
_SIGSET_BYTES = 128

#: rt_sigprocmask(2), which takes Linux's own sigset_t: 64 bits.
_SYS_RT_SIGPROCMASK = 14
_KERNEL_SIGSET_BYTES = 8

_libc = ctypes.CDLL(None, use_errno=True)

_TERM = ctypes.c_uint64(1 << signal.SIGTERM - 1)
#: Lets a forked child be ended.
UNBLOCK_IN_CHILD = Step(
    "sigprocmask",
    (_SYS_RT_SIGPROCMASK, int(signal.SIG_UNBLOCK), ctypes.byref(_TERM), None, _KERNEL_SIGSET_BYTES),
)


class Signals:
    """The signals of this process, while it is entered; ``fd`` is readable when one came."""

    def __enter__(self) -> Self:
        noted = [signum for signum in _NOTED if signal.getsignal(signum) is not signal.SIG_IGN]
        # An ignored SIGCHLD, which exec hands down, would have Linux reap our children behind our back.
        self._child_before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, noted)
        self.fd = _signalfd(noted)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        late = self.take()  # what is not taken would have its default effect now, and SIGUSR1's is death
        os.close(self.fd)
        signal.signal(signal.SIGCHLD, self._child_before)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask_before)
        for signum in late.intersection(STOPPING):
            os.kill(os.getpid(), signum)

    def take(self) -> set[int]:
        """The signals that came since the last call."""
        taken: set[int] = set()
        while True:
            try:
                infos = os.read(self.fd, 16 * _SIGINFO.size)
            except BlockingIOError:
                return taken
            taken |= {signum for (signum,) in _SIGINFO.iter_unpack(infos)}

    def stop_process(self) -> None:
        """Stops this process as SIGTSTP does by default; returns when it is continued."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTSTP})
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTSTP})


def _signalfd(signums: list[signal.Signals]) -> int:
    bits = sum(1 << (signum - 1) for signum in signums)
    mask = bits.to_bytes(_SIGSET_BYTES, "little")
    fd: int = _libc.signalfd(-1, mask, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"signalfd: {os.strerror(errno)}")
    return fd
