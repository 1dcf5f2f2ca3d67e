"""What of a kernel has to be written to memory that is zeros: its segments, without longer runs of zeros in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lguest_mp.boot.elf import Segment

#: Runs of zeros are left out in steps of this many bytes.
ZEROS = bytes(64 << 10)


def pieces(segments: Iterable[Segment], stream: Iterable[bytes]) -> Iterator[tuple[int, memoryview]]:
    """What of an unpacked image goes where: guest-physical addresses, and what is there, without longer runs of zeros.

    Whoever lets go of each before asking for the next has them all in the same memory.
    """
    start = 0
    for chunk in stream:
        view = memoryview(chunk)
        for segment in segments:
            first = max(segment.offset - start, 0)
            last = min(segment.offset + segment.size - start, len(chunk))
            for at, until in _runs(chunk, first, last):
                yield segment.address + start + at - segment.offset, view[at:until]
        start += len(chunk)
        del chunk, view


def _runs(chunk: bytes, first: int, last: int) -> Iterator[tuple[int, int]]:
    """The parts of ``chunk[first:last]`` that are not zeros."""
    begin = at = first
    while at < last:
        step = min(len(ZEROS), last - at)
        if chunk.startswith(ZEROS if step == len(ZEROS) else ZEROS[:step], at):
            if begin < at:
                yield begin, at
            begin = at + step
        at += step
    if begin < at:
        yield begin, at
