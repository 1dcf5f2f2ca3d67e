"""Guest memory: one shared anonymous mapping that every process of a guest inherits.

The mapping is what the guest calls its RAM. Below 3 GiB a guest-physical address *is* the offset into the mapping;
what a larger guest has beyond that continues at 4 GiB, because the 1 GiB in between belongs to the devices' registers
(the PCI window, the I/O APIC, the local APIC). On both sides lies at least a page of addresses where nothing is, so
that a run past either end by native code is a fault and never somebody else's memory. The kernel gives out pages as
they are touched: a guest of 4 GiB costs what it uses.

Those pages have 4 KiB each: Linux gives huge ones to shared memory only if an administrator says so. But from 6.1 on it
puts a block together when it is asked (madvise(2), ``MADV_COLLAPSE``; :meth:`GuestMemory.make_huge`). A block is 2 MiB
that begin at a multiple of that both in the mapping and in the address space, so offset 0 is at such an address. In
guest-physical addresses it begins at one, too.

Three kinds of number occur, and they are never mixed silently:

- a *guest-physical address* (``gpa``) is what the guest writes into a descriptor;
- an *offset* counts from the start of the mapping; :meth:`GuestMemory.offset` is the only way from one to the other,
  and the only bounds check there is;
- a *host address* is a pointer in this process, ``GuestMemory.address + offset``.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import weakref
from collections.abc import Sequence
from operator import add

from lguest_mp.errors import GuestAddressError, LguestError
from lguest_mp.record import Value

PAGE_SIZE = 4096
GIB = 1 << 30
#: RAM ends here at the latest and continues at ``HIGH_RAM_BASE``.
LOW_RAM_LIMIT = 3 * GIB
HIGH_RAM_BASE = 4 * GIB
#: What a huge page holds.
BLOCK_SIZE = 2 << 20

#: Linux's mman.h on x86-64: what Python's mmap module does not know, or only from 3.13 on.
_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MADV_POPULATE_WRITE = 23
_MADV_COLLAPSE = 25
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class RamRegion(Value):
    """A run of RAM: ``size`` bytes at guest-physical ``base``, at ``offset`` in the mapping."""

    base: int
    size: int
    offset: int


class GuestMemory:
    """The RAM of one guest, ``size`` bytes (a multiple of the page size).

    ``huge_pages``: whether :meth:`make_huge` does anything. It becomes False, in the process that finds out, when the
    host has none.
    """

    def __init__(self, size: int, *, huge_pages: bool = False) -> None:
        if size <= 0 or size % PAGE_SIZE:
            raise LguestError(f"guest memory of {size} bytes is not a whole number of {PAGE_SIZE}-byte pages")
        self.size = size
        low = min(size, LOW_RAM_LIMIT)
        regions = [RamRegion(0, low, 0)]
        if size > low:
            regions.append(RamRegion(HIGH_RAM_BASE, size - low, low))
        self.regions = tuple(regions)
        self._low_size = low
        self.huge_pages = huge_pages
        try:
            # Addresses first, with room to choose the place, and a page on both sides.
            length = size + BLOCK_SIZE + 2 * PAGE_SIZE
            start = _map(None, length, _PROT_NONE, mmap.MAP_PRIVATE)
            #: The host address of offset 0 (the same in every process that inherits the mapping).
            self.address = -(-(start + PAGE_SIZE) // BLOCK_SIZE) * BLOCK_SIZE
            ram = (ctypes.c_ubyte * size).from_address(self.address)
            weakref.finalize(ram, _libc.munmap, start, length).atexit = False
            _map(self.address, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED)
        except OSError as error:
            raise LguestError(f"cannot map {size >> 20} MiB of guest memory: {error.strerror}; ask for less") from error
        #: The whole mapping, bytes, indexed by offset. It lives as long as anybody has a view of it.
        self.view = memoryview(ram).cast("B")

    def offset(self, gpa: int, length: int) -> int:
        """The offset of ``length`` bytes of RAM at ``gpa``, all of them in one region, or GuestAddressError.

        Python's integers do not wrap, so neither does the check. A range of no bytes has to lie in (or at the end
        of) RAM all the same.
        """
        if gpa >= 0 and length >= 0:
            # The first region is where the offset is the address, and where nearly everything lies.
            if gpa + length <= self._low_size:
                return gpa
            for region in self.regions[1:]:
                if region.base <= gpa and gpa + length <= region.base + region.size:
                    return gpa - region.base + region.offset
        raise GuestAddressError(gpa, length)

    def offsets(self, gpas: Sequence[int], lengths: Sequence[int]) -> Sequence[int]:
        """The same for many ranges at once, whose numbers are unsigned: where each begins.

        Nearly always all of them lie in low RAM, and then one look at the furthest end is a look at all.
        """
        if max(map(add, gpas, lengths)) <= self._low_size:
            return gpas
        return list(map(self.offset, gpas, lengths))

    def slice(self, gpa: int, length: int) -> memoryview:
        """A writable view of ``length`` bytes of RAM at ``gpa``."""
        start = self.offset(gpa, length)
        return self.view[start : start + length]

    def read(self, gpa: int, length: int) -> bytes:
        """A copy of ``length`` bytes at ``gpa``."""
        return bytes(self.slice(gpa, length))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copies ``data`` to ``gpa``."""
        self.slice(gpa, len(data))[:] = data

    def clear(self) -> None:
        """Gives every page back to the host: the guest's RAM reads as zeros again."""
        _advise(self.address, self.size, mmap.MADV_REMOVE)

    def unmap_touched(self) -> None:
        """Drops what *this process* has mapped of the guest's pages; their contents stay, for it and for all others.

        Whoever only prepares the memory and does not use it afterwards (the supervisor) keeps no page tables for it,
        and none of the pages counts as its own.
        """
        _advise(self.address, self.size, mmap.MADV_DONTNEED)

    def make_huge(self, gpa: int, length: int) -> None:
        """Has the host put each block that lies wholly within ``length`` bytes at ``gpa`` into a huge page, if it can.

        What is in them stays, and so does what others write there meanwhile. A block takes 2 MiB of the host's memory
        from then on, however little of it is used.
        """
        offset = self.offset(gpa, length)
        start, end = -(-offset // BLOCK_SIZE) * BLOCK_SIZE, (offset + length) // BLOCK_SIZE * BLOCK_SIZE
        if start >= end or not self.huge_pages:
            return
        try:
            # The kernel puts together what is there already: it wants to find a page of each block at least.
            for block in range(start, end, BLOCK_SIZE):
                _advise(self.address + block, PAGE_SIZE, _MADV_POPULATE_WRITE)
            _advise(self.address + start, end - start, _MADV_COLLAPSE)
        except OSError as error:
            # Somebody held one of the pages: that block is left as it is. Whatever else there is (a kernel that knows
            # none of this, memory in pieces, a limit that is reached) would be so the next time.
            if error.errno != errno.EAGAIN:
                self.huge_pages = False


def _map(address: int | None, length: int, protection: int, flags: int) -> int:
    if length > sys.maxsize:  # which ctypes would cut off
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    start = _libc.mmap(address, length, protection, flags | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
    if start == _MAP_FAILED:
        raise _error()
    assert isinstance(start, int)
    return start


def _advise(address: int, length: int, advice: int) -> None:
    if _libc.madvise(address, length, advice) != 0:
        raise _error()


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
