"""What outlives a worker, besides guest memory: a page for each queue, on which its worker keeps account.

A worker may be killed between any two instructions, and its successor has to go on where it stopped. The rings say
which buffers are completed, but only as far as they are published; how far the worker was beyond that, and whether it
held something of the host's that cannot be had again, stands here. The supervisor makes a ledger for every queue before
anything is forked; a worker inherits its own queue's and no other's, and the guest has none.

Whoever writes a field does so by one store, and each field is true by itself at any moment. All are 64 bits wide:

- :data:`PROGRESS` is what a successor goes by. In it, from the low end: 16 bits, the position in the ring up to
  which buffers are completed, perhaps not published (see ``Queue.push``); 16 bits, 1 where that says anything at all;
  20 bits, how much the worker has taken from the host into the next buffers without having completed them (a frame,
  typed characters), 0 for nothing; 12 bits, a number of the device's own that goes with it.
- :data:`PUBLISHED` says up to where buffers are published, for a packed ring, which does not say so itself; how many
  bytes were written into those that are only completed, and more of them, stands in ``completions`` (``packed.py``).
- :data:`PHASE`, :data:`REQUESTS`, :data:`BYTES`, :data:`MOMENT` are for whoever watches. They count for the life of the
  guest, whoever serves the queue.

The rest of the ledger is ``scratch``: memory for what the device does not want to lose with its worker.
"""

from __future__ import annotations

import mmap
from enum import IntEnum
from types import TracebackType

from lguest_mp.memory import PAGE_SIZE
from lguest_mp.record import Value

PROGRESS = 0
#: What the worker does now, a :class:`Phase`.
PHASE = 1
#: How many requests it has completed, and how many bytes of data were in them.
REQUESTS = 2
BYTES = 3
#: When it last published some (nanoseconds of CLOCK_MONOTONIC), 0: never.
MOMENT = 4
#: Up to where a packed ring's buffers are published, a position.
PUBLISHED = 5
_FIELDS = 6

#: Of PROGRESS: the position below says something.
VALID = 1 << 16
_COUNTS_LIMIT = 1 << 63
TAKEN_SHIFT = 32
TAKEN_LIMIT = 1 << 20
MARK_SHIFT = 52
MARK_LIMIT = 1 << 12

#: Room for the longest frame, and more; costs nothing before it is used.
SCRATCH = 128 << 10
#: Where the completions begin: behind the fields, so that those of an ordinary queue are in the same page.
_COMPLETIONS = 64
#: As many as the largest queue has descriptors, 64 bits each; what is not used costs nothing.
MAX_COMPLETIONS = 32768
_SIZE = -(-(_COMPLETIONS + 8 * MAX_COMPLETIONS) // PAGE_SIZE) * PAGE_SIZE


class Phase(IntEnum):
    """What a worker does."""

    #: It waits for the driver.
    IDLE = 0
    #: It works on a buffer.
    SERVING = 1
    #: It waits for something that may not come for long: input, a terminal that takes output.
    WAITING = 2


class Account(Value):
    """What a ledger says at one moment. ``moment`` is None before the first request."""

    phase: Phase
    progress: int
    requests: int
    bytes: int
    moment: float | None


class Ledger:
    """One queue's."""

    def __init__(self) -> None:
        self._mapping = mmap.mmap(-1, _SIZE + SCRATCH, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        self._mapping.madvise(mmap.MADV_DONTFORK)
        view = memoryview(self._mapping)
        #: The fields, to be read and written by their numbers.
        self.fields = view[: 8 * _FIELDS].cast("Q")
        #: What a packed ring's worker has completed, by the descriptor that will say so.
        self.completions = view[_COMPLETIONS : _COMPLETIONS + 8 * MAX_COMPLETIONS].cast("Q")
        #: Bytes for the device.
        self.scratch = view[_SIZE:]

    def inherited(self) -> Inherited:
        """What is forked within it has this ledger, too. Any other child must not touch it."""
        return Inherited(self._mapping)

    def open(self) -> None:
        """The queue is a new one: nothing in its rings is anybody's yet."""
        self.fields[PROGRESS] = 0
        self.fields[PHASE] = Phase.SERVING

    def counts(self) -> tuple[int, int]:
        """Requests and bytes, to go on counting; from 0 where they would run over soon, which no honest worker's do."""
        requests, count = self.fields[REQUESTS], self.fields[BYTES]
        return (requests, count) if max(requests, count) < _COUNTS_LIMIT else (0, 0)

    def account(self) -> Account:
        """What it says now. What does not make sense, as of a worker that is not itself any more, is taken for work."""
        phase, moment = self.fields[PHASE], self.fields[MOMENT]
        return Account(
            Phase(phase) if phase <= Phase.WAITING else Phase.SERVING,
            self.fields[PROGRESS],
            self.fields[REQUESTS],
            self.fields[BYTES],
            moment / 1e9 if moment else None,
        )


class Inherited:
    """While it is entered, ``mapping`` is inherited."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self._mapping = mapping

    def __enter__(self) -> None:
        self._mapping.madvise(mmap.MADV_DOFORK)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mapping.madvise(mmap.MADV_DONTFORK)


def done(progress: int) -> int | None:
    """Up to where buffers are completed; None: it does not say."""
    return progress & 0xFFFF if progress & VALID else None


def taken(progress: int) -> tuple[int, int]:
    """How many bytes were taken from the host and not completed, and the device's number with it."""
    return progress >> TAKEN_SHIFT & TAKEN_LIMIT - 1, progress >> MARK_SHIFT & MARK_LIMIT - 1
