"""The one lock of the board, and the kick that follows it.

What the CPU's thread and the events' thread both touch (the APICs, the devices' interrupts, the serial port)
changes under one lock, held for microseconds. An interrupt that becomes pending meanwhile has to reach the CPU,
which may be executing the guest or sleeping. Kicking it is a system call, during which the CPU's thread can already
be on its way to take the interrupt: it would find the lock held, and go to sleep for it. So the kick is noted under
the lock and given when the lock has been let go.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from types import TracebackType


class BoardLock:
    """A lock for ``with``. Not reentrant."""

    def __init__(self) -> None:
        self._lock = Lock()
        #: Tells the CPU that an interrupt is pending. From any thread, without the lock.
        self.kick: Callable[[], None] = _nobody
        #: Set, with the lock held, when the CPU has to be kicked.
        self.kick_wanted = False

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        wanted, self.kick_wanted = self.kick_wanted, False
        self._lock.release()
        if wanted:
            self.kick()

    def locked(self) -> bool:
        """Whether anybody holds it."""
        return self._lock.locked()


def _nobody() -> None:
    """Before the CPU is there."""
