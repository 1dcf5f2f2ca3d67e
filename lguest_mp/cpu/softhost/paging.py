"""The guest's page tables, which the CPU walks itself, and why that is safe.

In Linux the host shadows the guest's page tables, because the guest's physical addresses are not the machine's. Here
they are the embedded CPU's. So the CPU uses the guest's page tables as they are. Only the directory is the host's own,
a copy: its last entry maps the host's page, and every other one has been looked at.

A guest can write anything into its page tables at any time. What keeps it in its memory is checked where it can not be
avoided: a directory entry when it is copied (so the CPU never takes anything but guest memory for a page table), and
the address that comes out of a walk when it is about to enter the TLB (``set_page`` in native.S).

The guest says what it changes: SET_PTE, SET_PGD, FLUSH_TLB, NEW_PGTABLE. What it adds to its directory it need not say,
since the host in Linux would find it at the next fault; so do we (:meth:`PageTables.find`). A bad entry is not copied,
and kills the guest when it is used, not before.
"""

from __future__ import annotations

from typing import Protocol

from lguest_mp.cpu.lguest_host import GuestDied
from lguest_mp.cpu.softhost.abi import DIRECTORY_SHIFT, PAGE_SHIFT, PAGE_SIZE, RESERVED_BASE, RESERVED_INDEX
from lguest_mp.cpu.softhost.tables import HostPages
from lguest_mp.memory import GuestMemory

_PRESENT, _WRITABLE, _ACCESSED, _DIRTY, _LARGE = 1, 2, 1 << 5, 1 << 6, 1 << 7
#: What a directory entry may have set beside its page: present, writable, user, accessed, dirty.
_DIRECTORY_FLAGS = 0x67
_FLAGS = 0xFFF
_OFFSET = PAGE_SIZE - 1
_TABLE_INDEX = 1023
_BAD_ENTRY = "bad page table entry"

_DIRECTORY_BYTES = 4 * RESERVED_INDEX
#: A directory is checked as one number of 1023 lanes of 32 bits: this has a 1 in each.
_LANES = sum(1 << 32 * lane for lane in range(RESERVED_INDEX))
_BAD_FLAGS = (_FLAGS & ~_DIRECTORY_FLAGS) * _LANES
_PAGE_NUMBERS = 0xF_FFFF * _LANES


class Tlb(Protocol):
    """What the CPU keeps of translations."""

    def flush(self) -> None:
        """Forgets all."""

    def flush_page(self, virtual: int) -> None:
        """Forgets that of an address."""


class PageTables:
    """The host's directory, kept after the guest's."""

    def __init__(self, memory: GuestMemory, pages: HostPages, tlb: Tlb) -> None:
        self._view = memory.view
        self._words = memory.view.cast("I")
        self._pages = pages
        self._directory = pages.directory
        self._flush, self._flush_page = tlb.flush, tlb.flush_page
        self._limit = self._device_limit = self._excess = 0
        self._base: int | None = None
        self._copied = b""
        #: From here on all of the guest's directories are the same.
        self.kernel_address = 0

    def set_limits(self, limit: int, device_limit: int) -> None:
        """The guest's memory ends at page ``limit``; up to ``device_limit`` its page tables may lead to devices."""
        self._limit = limit
        self._device_limit = device_limit
        #: Brings the number of a page beyond the limit to 1 << 20.
        self._excess = ((1 << 20) - limit) * _LANES

    def new_directory(self, address: int) -> None:
        """NEW_PGTABLE: the directory at guest-physical ``address`` from now on. GuestDied: not in guest memory."""
        self._base = address
        self._copied = b""
        self.flush()

    def flush(self) -> None:
        """FLUSH_TLB: whatever the guest changed counts from now on."""
        if self._base is not None:
            self._copy(self._base)
        self._flush()

    def _copy(self, base: int) -> None:
        if base + PAGE_SIZE > self._limit << PAGE_SHIFT:
            raise GuestDied(f"bad read address {base:#x} len {PAGE_SIZE}")
        raw = bytes(self._view[base : base + _DIRECTORY_BYTES])
        if raw == self._copied:
            return
        self._copied = raw
        entries = int.from_bytes(raw, "little")
        present = entries & _LANES
        entries &= (present << 32) - present
        if entries & _BAD_FLAGS or (((entries >> PAGE_SHIFT) & _PAGE_NUMBERS) + self._excess) & (_LANES << 20):
            raw = self._without_bad_ones(raw)
        self._pages.directory_bytes[:] = raw

    def _without_bad_ones(self, raw: bytes) -> bytes:
        entries = memoryview(raw).cast("I")
        return b"".join((entry if self._good(entry) else 0).to_bytes(4, "little") for entry in entries)

    def _good(self, entry: int) -> bool:
        return not entry & _FLAGS & ~_DIRECTORY_FLAGS and entry >> PAGE_SHIFT < self._limit

    def set_directory_entry(self, address: int, index: int) -> None:
        """SET_PGD: an entry of the directory at ``address`` was changed."""
        if index >= RESERVED_INDEX or address != self._base:
            return
        entry = self._guest_entry(index)
        self._copied = b""
        self._directory[index] = entry if self._good(entry) else 0
        self._flush()

    def set_entry(self, address: int, virtual: int, entry: int) -> None:
        """SET_PTE: the entry for ``virtual`` below the directory at ``address`` was changed. GuestDied."""
        if virtual >= RESERVED_BASE:
            raise GuestDied("attempt to access switcher pages")
        if entry & _PRESENT and entry & (_ACCESSED | _DIRTY):
            if entry & _LARGE:
                raise GuestDied(_BAD_ENTRY)
            self.check_device(entry)
        if virtual >= self.kernel_address or address == self._base:
            self._flush_page(virtual)

    def check_device(self, physical: int) -> None:
        """A page table leads out of the guest's memory to ``physical``. GuestDied: nor is that where devices are."""
        if physical >> PAGE_SHIFT >= self._device_limit:
            raise GuestDied(_BAD_ENTRY)

    def _guest_entry(self, index: int) -> int:
        assert self._base is not None
        place = self._base + 4 * index
        return int.from_bytes(self._view[place : place + 4], "little")

    def find(self, virtual: int) -> bool:
        """After a page fault because nothing is there: whether the guest's directory knows better than its copy.

        GuestDied: it does, and the guest must not have it.
        """
        if self._base is None:
            if virtual >= RESERVED_BASE:
                raise GuestDied("attempt to access switcher pages")
            return False
        index = virtual >> DIRECTORY_SHIFT
        entry = self._guest_entry(index)
        if not entry & _PRESENT:
            return False
        if index == RESERVED_INDEX:
            raise GuestDied("attempt to access switcher pages")
        if not self._good(entry):
            raise GuestDied("bad page directory entry")
        if self._directory[index] & _PRESENT:
            return False
        self._copied = b""
        self._directory[index] = entry
        return True

    def physical(self, virtual: int, *, writable: bool = False) -> int | None:
        """The guest-physical address behind a virtual one; None: there is none in guest memory."""
        if self._base is None:
            return virtual if virtual >> PAGE_SHIFT < self._limit else None
        index = virtual >> DIRECTORY_SHIFT
        table = self._directory[index]
        if not table & _PRESENT and index != RESERVED_INDEX:
            table = self._guest_entry(index)
        if index == RESERVED_INDEX or not table & _PRESENT or not self._good(table):
            return None
        entry = self._words[(table & ~_FLAGS) >> 2 | virtual >> PAGE_SHIFT & _TABLE_INDEX]
        wanted = _PRESENT | _WRITABLE if writable else _PRESENT
        if entry & table & wanted != wanted or entry >> PAGE_SHIFT >= self._limit:
            return None
        return entry & ~_FLAGS | virtual & _OFFSET
