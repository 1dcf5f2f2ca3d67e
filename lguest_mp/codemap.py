"""Which pages of guest memory hold translated code, and how a worker has the translations dropped.

The embedded CPU does not execute the guest's bytes: it translates them once and executes the translation. It notices
the guest's own stores to such bytes, but not what another process writes there; and a page that the guest executed
from is soon the page a disk is read into. So each page of RAM has one byte, in memory shared by all processes: 1 while
the CPU holds translations of code in that page, kept exact by the CPU's process (``cpu/unicorn``).

A worker that has filled guest memory looks at the bytes of the pages it wrote before it tells the guest (the used
index; the guest may poll it, so the interrupt would be too late). Nearly always there is no hit, and the look was all
it cost. On a hit it names the pages to the machine process over a socket of its queue's, and waits for the answer: the
translations are gone.

The look needs no fence. A mark that matters was made before the guest offered the buffer, by the same thread of the
host's that then executed the offer; x86 shows stores to others in their order, so whoever sees the offer sees the
mark. What is translated from a buffer while a device fills it is a race of the guest with itself.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
from collections.abc import Sequence
from typing import Protocol

from lguest_mp.memory import PAGE_SIZE, GuestMemory

#: A request or an answer: its number, then (first page, last page) pairs; little-endian u32 each.
_HEADER = struct.Struct("<I")
_RANGE = struct.Struct("<II")
#: A datagram names at most this many runs of pages; a worker with more sends several.
MAX_RANGES = 512
MAX_DATAGRAM = _HEADER.size + MAX_RANGES * _RANGE.size


class WriteWatch(Protocol):
    """What a virtqueue tells after it wrote guest memory."""

    def written(self, ranges: Sequence[tuple[int, int]]) -> None:
        """``(offset, length)`` ranges of guest memory were just written by this process; no stale code is left."""


class CodeMap:
    """One byte for each page of guest memory, and a channel for each of ``workers`` queues; made before any fork."""

    def __init__(self, memory: GuestMemory, workers: int) -> None:
        self.pages = memory.size // PAGE_SIZE
        #: Shared by every process of the guest; all zero: no code is translated.
        self.marks = mmap.mmap(-1, self.pages, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(workers)]
        self._worker_ends = tuple(pair[0] for pair in pairs)
        #: The ends on which the machine process hears and answers.
        self.machine_ends = tuple(pair[1] for pair in pairs)

    @property
    def files(self) -> tuple[int, ...]:
        """The file descriptors that the machine process keeps."""
        return tuple(end.fileno() for end in self.machine_ends)

    def worker_files(self, worker: int) -> tuple[int, ...]:
        """The file descriptors that worker ``worker`` keeps."""
        return (self._worker_ends[worker].fileno(),)

    def writer(self, worker: int) -> CodeWatch:
        """For worker ``worker`` (0, 1, ...), in its process."""
        return CodeWatch(self, self._worker_ends[worker])

    def close(self) -> None:
        """Closes the channels in this process, and gives the map back."""
        for end in (*self._worker_ends, *self.machine_ends):
            end.close()
        self.marks.close()


class CodeWatch:
    """A worker's side: a WriteWatch over the map and the worker's end of its queue's channel."""

    def __init__(self, code_map: CodeMap, channel: socket.socket) -> None:
        #: A byte for each page of guest memory, 1 where it matters what is written there: for who looks by himself.
        self.marks = code_map.marks
        self._channel = channel
        self._number = 0

    def written(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Looks at the pages of the ranges, and has the machine process forget what it translated there."""
        # Nearly always each range lies in one page, and no page has a mark.
        firsts = [offset // PAGE_SIZE for offset, _ in ranges]
        lasts = [(offset + length - 1) // PAGE_SIZE for offset, length in ranges]
        if firsts == lasts and 1 not in map(self.marks.__getitem__, firsts):
            return
        find = self.marks.find
        hits = [
            (first, last)
            for first, last in zip(firsts, lasts, strict=True)
            if first <= last and find(b"\x01", first, last + 1) >= 0
        ]
        for start in range(0, len(hits), MAX_RANGES):
            self._forget(hits[start : start + MAX_RANGES])

    def _forget(self, pages: list[tuple[int, int]]) -> None:
        # A predecessor of this worker may have been killed between asking and reading its answer: the number tells
        # the answers apart. Numbers start anywhere, so that two workers' do not agree by chance.
        self._number = (self._number + 1) & 0xFFFF_FFFF if self._number else int.from_bytes(os.getrandom(4), "little")
        request = _HEADER.pack(self._number) + b"".join(_RANGE.pack(*run) for run in pages)
        self._channel.send(request)
        while True:
            answer = self._channel.recv(_HEADER.size)
            if not answer:
                raise ConnectionError("the machine process is gone")
            if _HEADER.unpack(answer)[0] == self._number:
                return


def parse_request(datagram: bytes, pages: int) -> tuple[bytes, list[tuple[int, int]]] | None:
    """The machine's side: what to answer, and the runs of pages to forget; None when this is no request.

    The sender is a worker, which may not be itself any more: every page number is checked.
    """
    if len(datagram) < _HEADER.size or (len(datagram) - _HEADER.size) % _RANGE.size:
        return None
    runs: list[tuple[int, int]] = list(_RANGE.iter_unpack(datagram[_HEADER.size :]))
    if not all(first <= last < pages for first, last in runs):
        return None
    return datagram[: _HEADER.size], runs
