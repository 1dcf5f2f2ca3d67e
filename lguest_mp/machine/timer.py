"""One timer of the host's, as a file descriptor that the event loop waits for.

The guest sets its timer up to thousands of times a second, on the CPU's thread, and the thread that will see it expire
sleeps in epoll. A timerfd joins the two without either waking the other: setting it is one system call, about a
microsecond, and the loop notices nothing until it expires. Python 3.11 has no timerfd, so the calls go through ctypes,
with the argument prepared once; and through ``PyDLL``, which keeps the interpreter's lock, because giving it up and
taking it back would cost more than the call.

A timer that is set again forgets an expiry that nobody has read yet. Whoever sets and reads it under one lock therefore
never takes an old expiry for a new one.
"""

from __future__ import annotations

import ctypes
import os
import time

from lguest_mp.errors import LguestError

#: uapi/linux/timerfd.h.
_TFD_TIMER_ABSTIME = 1
_NS = 1_000_000_000
#: Further than this (about 292 years) is never, and would not fit a signed 64-bit number of nanoseconds.
_NEVER = (1 << 63) - 1


class HostTimer:
    """A timer on CLOCK_MONOTONIC. LguestError: the host has none to give."""

    def __init__(self) -> None:
        libc = ctypes.PyDLL(None, use_errno=True)
        libc.timerfd_create.argtypes = (ctypes.c_int, ctypes.c_int)
        self._settime = libc.timerfd_settime
        self._settime.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
        #: struct itimerspec: the interval's seconds and nanoseconds, then the first expiry's.
        self._spec = (ctypes.c_int64 * 4)()
        self._spec_address = ctypes.addressof(self._spec)
        self._interval = 0
        #: Readable once the timer has expired.
        self.fd: int = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            raise LguestError(f"cannot make a timer: {os.strerror(ctypes.get_errno())}")

    def arm(self, deadline: int, interval: int = 0) -> None:
        """Expires at ``deadline`` (nanoseconds of CLOCK_MONOTONIC; the past: at once), then every ``interval`` ns."""
        spec = self._spec
        if interval != self._interval:
            self._interval = interval
            spec[0], spec[1] = divmod(interval, _NS)
        # A time of zero would mean "off".
        spec[2], spec[3] = divmod(min(max(deadline, 1), _NEVER), _NS)
        self._settime(self.fd, _TFD_TIMER_ABSTIME, self._spec_address, None)

    def disarm(self) -> None:
        """Forgets the deadline, and an expiry that was not taken."""
        self._interval = 0
        self._spec[:] = [0, 0, 0, 0]
        self._settime(self.fd, 0, self._spec_address, None)

    def take_expiry(self) -> bool:
        """Whether the timer expired since it was armed or last asked."""
        try:
            os.read(self.fd, 8)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Gives the descriptor back."""
        os.close(self.fd)
