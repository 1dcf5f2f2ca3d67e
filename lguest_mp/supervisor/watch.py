"""Finding workers that live and do not work.

A worker that has something to do and gets nothing done, for longer than anybody should wait, is as good as dead: it was
stopped by a signal, it is blocked in a disk that does not answer, it spins. Whether it is so is told by its queue's
ledger (what it does, how much it has completed), by its notifications that nobody reads, and by Linux, which tells a
parent of children that are stopped. What it is that it does instead is asked of psutil, for the person who reads it.

Waiting is not working: a worker that waits for its driver, for a key to be typed, for a frame, or for a terminal to
take output, may do so for ever. One that is *stopped* meanwhile is stuck all the same: nothing that comes can wake it,
and something may have come already, between its waking up and its saying so.

The supervisor may have been stopped itself, with everybody else or alone. Then all is forgotten and begins anew.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from lguest_mp.record import Record
from lguest_mp.supervisor import processes
from lguest_mp.supervisor.loop import is_readable
from lguest_mp.supervisor.workers import Worker, WorkerLife
from lguest_mp.virtio.ledger import Phase

if TYPE_CHECKING:
    from lguest_mp.supervisor.loop import Loop

#: How often (seconds) is looked at the most, and how many looks a worker gets before it is stuck.
_LONGEST_INTERVAL = 5.0
_LOOKS = 4
#: How late (seconds) a look may be because the host is busy, and not because we were stopped.
_BUSY = 1.0


class _Suspicion(Record):
    """A worker that had something to do, and what it had completed, ``since`` (time.monotonic)."""

    progress: tuple[int, int]
    since: float
    #: How much CPU time (seconds) it had used; None: not known.
    cpu_time: float | None = None
    is_asked: bool = False


class Watch:
    """Looks at ``workers()`` again and again, and tells ``found`` of those that are stuck, and why, in words."""

    def __init__(
        self,
        loop: Loop,
        workers: Callable[[], Iterable[Worker]],
        patience: float,
        found: Callable[[Worker, str], None],
    ) -> None:
        """``patience``: how long (seconds) a worker may take for nothing."""
        self._loop = loop
        self._workers = workers
        self._patience = patience
        self._found = found
        self._interval = min(_LONGEST_INTERVAL, patience / _LOOKS)
        self._suspicions: dict[Worker, _Suspicion] = {}
        self._last = time.monotonic()
        loop.later(self._interval, self._look)

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._last > 2 * self._interval + _BUSY:
            self._suspicions.clear()
        self._last = now
        before, self._suspicions = self._suspicions, {}
        for each in self._workers():
            if each.life in {WorkerLife.STARTING, WorkerLife.SERVING} and each.verdict is None and _has_work(each):
                self._suspect(each, before.get(each), now)
        self._loop.later(self._interval, self._look)

    def _suspect(self, each: Worker, before: _Suspicion | None, now: float) -> None:
        account = each.post.account.account()
        progress = (account.progress, account.requests)
        if before is None or before.progress != progress:
            self._suspicions[each] = _Suspicion(progress, now)
            return
        self._suspicions[each] = before
        if not before.is_asked:  # the second look in a row: worth asking
            before.is_asked = True
            before.since = min(before.since, now)
            before.cpu_time = processes.look_at(each.child.name, each.child.pid).seconds
        elif now - before.since >= self._patience:
            del self._suspicions[each]
            self._found(each, _describe(each, before))


def _has_work(each: Worker) -> bool:
    phase = each.post.account.account().phase
    if phase is Phase.SERVING or (phase is Phase.IDLE and is_readable(each.post.kick)):
        return True
    return _is_stopped(each)


def _is_stopped(each: Worker) -> bool:
    """Whether it is stopped by a signal (or a debugger) now. Works without /proc, for a parent."""
    try:
        told = os.waitid(os.P_PIDFD, each.child.pidfd, os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # it has ended in this moment
        return False
    return told is not None


def _describe(each: Worker, suspicion: _Suspicion) -> str:
    """What a stuck worker does, in words that continue "it"."""
    if _is_stopped(each):
        return "is stopped by a signal"
    seen = processes.look_at(each.child.name, each.child.pid)
    used = "" if seen.seconds is None else f", with {seen.seconds - (suspicion.cpu_time or 0.0):.1f} s of CPU time"
    match seen.state:
        case "disk-sleep":
            return "is blocked in the host, which does not answer (uninterruptible sleep)"
        case "running":
            return f"spins{used}"
        case None:
            return "hangs"
    return f"hangs ({seen.state}{used})"
