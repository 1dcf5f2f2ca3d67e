"""Three ^C within a second: how the person at a raw terminal ends the guest.

The terminal is the guest's, ^C too: one of them reaches the guest's shell as it should. Three in a row are a request
to the launcher, as in the original lguest. Each has to arrive in a read of its own, so that pasting a file full of
them does nothing, and all three within about a second, so that three unhurried ones do nothing either.
"""

from __future__ import annotations

import time
from collections.abc import Callable

#: What ^C is on a raw terminal (ASCII ETX).
CONTROL_C = 3


class AbortKeys:
    """Watches what is typed. ``clock`` gives seconds; it is an argument for the sake of tests."""

    PRESSES = 3
    WITHIN = 1.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: list[float] = []

    def typed(self, length: int, first: int) -> bool:
        """Takes note of one read of ``length`` bytes beginning with ``first``: True asks for the guest's end."""
        if length != 1 or first != CONTROL_C:
            self._times.clear()
            return False
        now = self._clock()
        self._times.append(now)
        if len(self._times) < self.PRESSES:
            return False
        started = self._times.pop(0)
        if now - started > self.WITHIN:
            return False
        self._times.clear()
        return True
