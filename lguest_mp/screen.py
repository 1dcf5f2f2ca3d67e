"""The screen: what a guest's console has shown of late, in memory that its writers and its readers share.

The processes that put a guest's output on the launcher's terminal put it here, too, and whoever attaches to the console
reads it here: first what was kept, then what is new. Nobody waits for a reader, and the supervisor is not in between.

Two processes write, and they know nothing of each other: the machine (its serial port) and the worker of the console's
transmitq. So each has a :class:`Track` of its own: a ring of bytes, and a position, which counts all bytes that were
ever written to it. The writer stores bytes first and then the position (x86 does not reorder stores), and that is all:
it may be killed at any instruction, and what it was about to write is not there. Its successor goes on at the position.

**In which order** the bytes of the two tracks were written is not in the rings. A writer that finds that the other one
has written something since it last did leaves a *mark*: from here on, mine come after what you have written up to
there. The reader puts the bytes together by the marks.

**A reader never holds up a writer**, so it may be overtaken. It looks at the position again when it has copied, and
throws away what may have been written over meanwhile; since bytes come before the position, that is ``PIECE`` more than
the position says. What it lost is lost: a screen is not a file.

**Nobody trusts anybody.** A worker that is no longer itself can write anything here, and shrink nothing, since the file
is sealed. A reader takes whatever numbers it finds: it may show nonsense, but copies no more than there is and returns.

Whoever has written adds 1 to an eventfd, the *news*, which nobody ever reads: it is watched edge-triggered (EPOLLIN and
EPOLLET), where every addition is an event. Its counter ends somewhere, which only a worker gone mad can reach: then
there is no news any more, so look at the screen every now and then, too.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from enum import IntEnum

from lguest_mp import legacy
from lguest_mp.errors import LguestError
from lguest_mp.record import Value

#: Bytes that are kept of each track: its ring. A power of two.
RING = 256 << 10
#: A writer moves its position after so many bytes at the latest.
PIECE = 16 << 10
#: What a reader can rely on finding of a track.
KEPT = RING - PIECE
#: Marks that are kept of each track.
MARKS = 128

_PAGE = mmap.PAGESIZE
# A page of 64-bit fields: for each track position and number of marks ever made, on a cache line of its own.
_POSITION, _MARKED = 0, 1
_FIELDS = 8
# Behind it the marks, two 64-bit numbers each: one's own position and the other's. Then the rings.
_MARKS_BYTES = MARKS * 16
_RINGS = _PAGE + 2 * _MARKS_BYTES
SIZE = _RINGS + 2 * RING
_LAST = (1 << 64) - 1
#: How often a reader looks for a moment in which nobody wrote.
_TRIES = 8


class Track(IntEnum):
    """Who writes."""

    SERIAL = 0
    CONSOLE = 1


_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
#: Names the screen that is handed on.
_VARIABLE = "LGUEST_SCREEN"


def create() -> int:
    """A screen: a file descriptor, closed on exec. It is the one that was handed on, or a new one. OSError."""
    left = legacy.take_sealed(_VARIABLE, _SEALS)
    if left is not None and os.fstat(left).st_size == SIZE:
        return left
    fd = os.memfd_create("lguest-screen", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, SIZE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def hand_on(fd: int) -> None:
    """Leaves the screen to the program that this process executes next; ``fd`` itself stays its owner's. OSError."""
    legacy.leave(_VARIABLE, os.dup(fd))


class ScreenWriter:
    """The one writer of a track of the screen ``fd``; tells the eventfd ``news``, which does not block. OSError."""

    def __init__(self, fd: int, news: int, track: Track) -> None:
        view = memoryview(mmap.mmap(fd, SIZE))
        self._fields = view[:_PAGE].cast("Q")
        marks = _PAGE + track * _MARKS_BYTES
        self._marks = view[marks : marks + _MARKS_BYTES].cast("Q")
        ring = _RINGS + track * RING
        self._ring = view[ring : ring + RING]
        self._news = news
        self._mine = _FIELDS * track + _POSITION
        self._marked = _FIELDS * track + _MARKED
        self._others = _FIELDS * (1 - track) + _POSITION
        self._position = self._fields[self._mine]
        self._seen = 0

    def append(self, *pieces: bytes | memoryview) -> None:
        """Puts bytes on the screen. Never waits."""
        others = self._fields[self._others]
        if others != self._seen:
            self._seen = others
            self._mark(others)
        for piece in pieces:
            if len(piece) <= PIECE:
                self._put(piece)
            else:
                for start in range(0, len(piece), PIECE):
                    self._put(piece[start : start + PIECE])
        try:
            os.eventfd_write(self._news, 1)
        except BlockingIOError:
            return  # a worker gone mad has used it up

    def append_byte(self, byte: int) -> None:
        """The same for one byte, the serial port's unit, in two thirds of the time."""
        others = self._fields[self._others]
        if others != self._seen:
            self._seen = others
            self._mark(others)
        position = self._position
        self._ring[position % RING] = byte
        self._position = self._fields[self._mine] = position + 1 & _LAST
        try:
            os.eventfd_write(self._news, 1)
        except BlockingIOError:
            return

    def _mark(self, others: int) -> None:
        number = self._fields[self._marked]
        slot = 2 * (number % MARKS)
        self._marks[slot] = self._position
        self._marks[slot + 1] = others
        self._fields[self._marked] = number + 1 & _LAST

    def _put(self, piece: bytes | memoryview) -> None:
        start = self._position % RING
        end = start + len(piece)
        if end <= RING:
            self._ring[start:end] = piece
        else:
            fitting = RING - start
            self._ring[start:] = piece[:fitting]
            self._ring[: end - RING] = piece[fitting:]
        self._position = self._position + len(piece) & _LAST
        self._fields[self._mine] = self._position


class _Found(Value):
    """New bytes of one track: ``data`` begins at position ``start``; ``marks``: (own position, the other's)."""

    start: int
    data: bytes
    marks: list[tuple[int, int]]

    @property
    def end(self) -> int:
        return self.start + len(self.data)


class ScreenReader:
    """Reads the screen ``fd``, for as long as it likes. LguestError: that is no screen."""

    def __init__(self, fd: int) -> None:
        try:
            if os.fstat(fd).st_size != SIZE:
                raise LguestError("this is no console's screen, or another version's")
            view = memoryview(mmap.mmap(fd, SIZE, prot=mmap.PROT_READ))
        except OSError as error:
            raise LguestError(f"cannot read the console's screen: {error.strerror}") from error
        self._fields = view[:_PAGE].cast("Q")
        self._marks = view[_PAGE:_RINGS].cast("Q")
        self._rings = [view[_RINGS + track * RING :][:RING] for track in Track]
        #: Up to where each track is read.
        self._read = [0 for _ in Track]

    def read_new(self) -> bytes:
        """What was written since the last call, as far as it is still there; at first all that was kept."""
        found = [self._find(track, position) for track, position in enumerate(self._positions())]
        self._read = [each.end for each in found]
        return _merge(*found)

    def _positions(self) -> list[int]:
        """Of both tracks at one moment, so that nothing is found without what was written before it."""
        positions = [0, 0]
        for _ in range(_TRIES):
            positions = [self._fields[_FIELDS * track + _POSITION] for track in Track]
            if self._fields[_FIELDS * Track.SERIAL + _POSITION] == positions[Track.SERIAL]:
                break
        return positions

    def _find(self, track: int, position: int) -> _Found:
        start = max(position - KEPT, 0)
        if start < self._read[track] <= position:
            start = self._read[track]
        data = self._copy(self._rings[track], start, position)
        marks = self._find_marks(track)
        # What the writer has written meanwhile, or is about to, has taken the place of the oldest.
        late = self._fields[_FIELDS * track + _POSITION] - KEPT - start
        if late > 0:
            data = data[late:]
            start = min(start + late, position)
        return _Found(start, data, marks)

    @staticmethod
    def _copy(ring: memoryview, start: int, end: int) -> bytes:
        first, last = start % RING, end % RING
        if start == end:
            return b""
        return bytes(ring[first:last]) if first < last else bytes(ring[first:]) + bytes(ring[:last])

    def _find_marks(self, track: int) -> list[tuple[int, int]]:
        field, base = _FIELDS * track + _MARKED, track * MARKS * 2
        count = self._fields[field]
        numbers = range(max(0, count - MARKS + 1), count)
        slots = [base + 2 * (number % MARKS) for number in numbers]
        marks = [(self._marks[slot], self._marks[slot + 1]) for slot in slots]
        late = self._fields[field] - MARKS + 1 - numbers.start
        return marks[max(0, late) :]


def _merge(serial: _Found, console: _Found) -> bytes:
    """The bytes of both in the order of the marks; where those make no sense, in any."""
    both = (serial, console)
    at = [each.start for each in both]
    merged = []
    progress = True
    while progress:
        progress = False
        for mine, found in enumerate(both):
            others = at[1 - mine]
            held = [own for own, after in found.marks if own >= at[mine] and min(after, both[1 - mine].end) > others]
            end = min([found.end, *held])
            if end > at[mine]:
                merged.append(found.data[at[mine] - found.start : end - found.start])
                at[mine] = end
                progress = True
    merged += [found.data[at[mine] - found.start :] for mine, found in enumerate(both)]
    return b"".join(merged)
