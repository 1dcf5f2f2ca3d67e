"""How often a worker may be replaced: intensity, period and back-off, as Erlang's supervisors have them.

A worker that ends is replaced at once. One that ends each time before it has completed anything is in a loop, and there
its successors wait longer and longer. One that ends too often is not worth replacing, whatever it did in between.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lguest_mp.config import CrashPolicy

#: How long, in seconds, the second successor in a loop waits, and the longest wait there is; each waits twice as long
#: as the one before.
FIRST_DELAY = 0.05
LONGEST_DELAY = 5.0


class Restarts:
    """Those of one queue's workers."""

    def __init__(self, policy: CrashPolicy) -> None:
        self._policy = policy
        self._recent: deque[float] = deque()
        self._fruitless = 0

    def delay(self, now: float, *, fruitful: bool) -> float | None:
        """A worker has ended at ``now`` (time.monotonic): how long (seconds) its successor waits, None: for ever.

        ``fruitful``: it had completed something, or had nothing to do.
        """
        recent, policy = self._recent, self._policy
        while recent and recent[0] <= now - policy.period:
            recent.popleft()
        if len(recent) >= policy.intensity:
            return None
        recent.append(now)
        self._fruitless = 0 if fruitful else self._fruitless + 1
        if self._fruitless <= 1:
            return 0.0
        return float(min(LONGEST_DELAY, FIRST_DELAY * 2 ** min(self._fruitless - 2, 16)))

    def forget(self) -> None:
        """Somebody has seen to it: begins anew."""
        self._recent.clear()
        self._fruitless = 0
