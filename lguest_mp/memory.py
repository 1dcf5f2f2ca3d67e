"""Guest memory: one shared anonymous mapping that every process of a guest inherits.

The mapping is what the guest calls its RAM. Below 3 GiB a guest-physical address *is* the offset into the mapping;
what a larger guest has beyond that continues at 4 GiB, because the 1 GiB in between belongs to the devices' registers
(the PCI window, the I/O APIC, the local APIC). An inaccessible page lies on both sides, so that a run past either end
by native code is a fault and never somebody else's memory. The kernel gives out pages as they are touched: a guest of
4 GiB costs what it uses.

Three kinds of number occur, and they are never mixed silently:

- a *guest-physical address* (``gpa``) is what the guest writes into a descriptor;
- an *offset* counts from the start of the mapping; :meth:`GuestMemory.offset` is the only way from one to the other,
  and the only bounds check there is;
- a *host address* is a pointer in this process, ``GuestMemory.address + offset``.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from operator import add

from lguest_mp.errors import GuestAddressError, LguestError

PAGE_SIZE = 4096
GIB = 1 << 30
#: RAM ends here at the latest and continues at ``HIGH_RAM_BASE``.
LOW_RAM_LIMIT = 3 * GIB
HIGH_RAM_BASE = 4 * GIB
#: Linux's mman.h on x86-64; Python's mmap module knows it from 3.13 on.
MAP_NORESERVE = 0x4000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@dataclass(frozen=True)
class RamRegion:
    """A run of RAM: ``size`` bytes at guest-physical ``base``, at ``offset`` in the mapping."""

    base: int
    size: int
    offset: int


class GuestMemory:
    """The RAM of one guest, ``size`` bytes (a multiple of the page size)."""

    def __init__(self, size: int) -> None:
        if size <= 0 or size % PAGE_SIZE:
            raise LguestError(f"guest memory of {size} bytes is not a whole number of {PAGE_SIZE}-byte pages")
        self.size = size
        low = min(size, LOW_RAM_LIMIT)
        regions = [RamRegion(0, low, 0)]
        if size > low:
            regions.append(RamRegion(HIGH_RAM_BASE, size - low, low))
        self.regions = tuple(regions)
        self._low_size = low
        try:
            self._mapping = mmap.mmap(
                -1, size + 2 * PAGE_SIZE, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | MAP_NORESERVE
            )
        except (OSError, OverflowError, ValueError) as error:
            raise LguestError(f"cannot map {size >> 20} MiB of guest memory: {error}; ask for less") from error
        #: The whole mapping without its guard pages, bytes, indexed by offset.
        self.view = memoryview(self._mapping)[PAGE_SIZE : PAGE_SIZE + size]
        #: The host address of offset 0 (the same in every process that inherits the mapping).
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping)) + PAGE_SIZE
        for guard in (self.address - PAGE_SIZE, self.address + size):
            if _libc.mprotect(guard, PAGE_SIZE, 0) != 0:
                raise LguestError(f"cannot protect a guard page: errno {ctypes.get_errno()}")

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
        self._mapping.madvise(mmap.MADV_REMOVE, PAGE_SIZE, self.size)

    def unmap_touched(self) -> None:
        """Drops what *this process* has mapped of the guest's pages; their contents stay, for it and for all others.

        Whoever only prepares the memory and does not use it afterwards (the supervisor) keeps no page tables for it,
        and none of the pages counts as its own.
        """
        self._mapping.madvise(mmap.MADV_DONTNEED, PAGE_SIZE, self.size)
