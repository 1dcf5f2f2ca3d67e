"""The host's own pages in the guest: its GDT, IDT and TSS, and the page directory that the CPU walks.

They lie in memory of ours, which the CPU finds at physical addresses where the guest has nothing. Only the first page
is mapped for the guest, at the start of the 4 MiB that it knows to be reserved, and only for reading: the CPU needs it
there when it loads a segment or goes through the IDT.

What the guest asks for comes in here checked, and changed as the host in Linux changes it: no segment has privilege
level 0, every segment is "accessed" (so that the CPU never has to write that), and what the guest must not have is not
there: system descriptors (call gates, TSSs, LDTs), and the entries that are the host's.
"""

from __future__ import annotations

import ctypes
import mmap
import struct

from lguest_mp.cpu.lguest_host import GuestDied
from lguest_mp.cpu.softhost.abi import (
    GDT_ENTRIES,
    HYPERCALL_VECTOR,
    IDT_ENTRIES,
    KERNEL_CS,
    KERNEL_LEVEL,
    PAGE_SIZE,
    RESERVED_BASE,
    RESERVED_INDEX,
    SYSCALL_VECTOR,
    TLS_ENTRIES,
    TLS_FIRST,
)
from lguest_mp.record import Value

#: Where the CPU finds the pages: the tables' one, the page directory, the page table of the reserved 4 MiB.
PHYSICAL_BASE = RESERVED_BASE
DIRECTORY_PHYSICAL = PHYSICAL_BASE + PAGE_SIZE
_RESERVED_TABLE_PHYSICAL = PHYSICAL_BASE + 2 * PAGE_SIZE
PAGES = 3

# In the first page; virtual addresses are RESERVED_BASE + these.
GDT_OFFSET = 0
TSS_OFFSET = 0x100
IDT_OFFSET = 0x800
#: A 32-bit TSS that ends before its I/O permission map: no port is anybody's.
TSS_LIMIT = 0x67
_TSS_ESP1, _TSS_SS1, _TSS_IO_MAP = 0x0C, 0x10, 0x66

#: Page table entry: present, accessed, dirty; for the kernel, not writable.
_READ_ONLY = 0x61
#: Page directory entry: present, writable, accessed.
_TABLE = 0x23
#: The same for a page of 4 MiB, which is its own table.
_LINEAR = 0xE3

#: Entries that never reach the CPU: the host's code and data, its TSS, and the double fault's.
_HOST_ENTRIES = frozenset((10, 11, 16, 31))

# High word of a segment descriptor.
_ACCESSED = 1 << 8
_WRITABLE = 1 << 9
_CODE = 1 << 11
_SEGMENT = 1 << 12
_LEVEL = 3 << 13
_PRESENT = 1 << 15
_GRANULAR = 1 << 23

#: Vectors that are never the guest's: NMI, double fault, spurious interrupt, hypercall.
_IGNORED_VECTORS = frozenset((2, 8, 15, HYPERCALL_VECTOR))
#: Vectors that the host has to see even behind a trap gate: FPU, #GP, page fault.
_INDIRECT_VECTORS = frozenset((7, 13, 14, HYPERCALL_VECTOR))
_INTERRUPT_GATE, _TRAP_GATE = 0xE, 0xF

#: SegmentCache (target/i386/cpu.h): selector, base, limit, flags. The flags are the descriptor's high word.
CACHE = struct.Struct("<IxxxxQII")


class Gate(Value):
    """Where a vector goes: an entry of the guest's IDT that is present."""

    offset: int
    level: int
    #: An interrupt gate, which disables interrupts.
    disables: bool


class Segment(Value):
    """A segment as the CPU holds it: its cache, and what of it the CPU's hidden flags repeat."""

    cache: bytes
    base: int
    big: bool


class HostPages:
    """The pages, and what the guest has put into them."""

    def __init__(self) -> None:
        self._mapping = mmap.mmap(-1, PAGES * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        #: The host address of the first page.
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        view = memoryview(self._mapping)
        self._words = view[:PAGE_SIZE].cast("I")
        #: The directory's entries.
        self.directory = view[PAGE_SIZE : 2 * PAGE_SIZE].cast("I")
        #: The same without the last one, as bytes.
        self.directory_bytes = view[PAGE_SIZE : 2 * PAGE_SIZE - 4]
        reserved = view[2 * PAGE_SIZE : 3 * PAGE_SIZE].cast("I")
        reserved[0] = PHYSICAL_BASE | _READ_ONLY
        self.directory[RESERVED_INDEX] = _RESERVED_TABLE_PHYSICAL | _TABLE
        struct.pack_into("<H", self._mapping, TSS_OFFSET + _TSS_IO_MAP, TSS_LIMIT + 1)
        self._gates: list[Gate | None] = [None] * IDT_ENTRIES
        #: The stack on entry to the guest's kernel from user level.
        self.stack_selector = self.stack_pointer = 0
        #: The guest's kernel's segments of code, and of the stack on entry; None: not usable.
        self.kernel_code: Segment | None = None
        self.kernel_stack: Segment | None = None

    def mapped(self) -> bytes:
        """What the guest can read: GDT, TSS, IDT."""
        return bytes(self._words)

    def map_linear(self) -> None:
        """Virtual addresses are physical ones, as before the guest has page tables."""
        for index in range(RESERVED_INDEX):
            self.directory[index] = index << 22 | _LINEAR

    # --- segments ---

    def set_descriptor(self, index: int, low: int, high: int) -> None:
        """LOAD_GDT_ENTRY. GuestDied: there is no such entry."""
        if index >= GDT_ENTRIES:
            raise GuestDied(f"too many gdt entries {index}")
        self._set_descriptor(index, low, high)
        self._segments_changed()

    def set_tls(self, descriptors: bytes) -> None:
        """LOAD_TLS: the three descriptors of a thread."""
        words = struct.unpack(f"<{2 * TLS_ENTRIES}I", descriptors)
        for entry in range(TLS_ENTRIES):
            self._set_descriptor(TLS_FIRST + entry, words[2 * entry], words[2 * entry + 1])
        if TLS_FIRST <= self.stack_selector >> 3 < TLS_FIRST + TLS_ENTRIES:
            self._segments_changed()

    def _set_descriptor(self, index: int, low: int, high: int) -> None:
        if index in _HOST_ENTRIES:
            return
        if not high & _SEGMENT or index == 0:
            low = high = 0
        else:
            if not high & _LEVEL:
                high |= KERNEL_LEVEL << 13
            high |= _ACCESSED
        place = GDT_OFFSET // 4 + 2 * index
        self._words[place] = low
        self._words[place + 1] = high

    def _segments_changed(self) -> None:
        code = self.segment(KERNEL_CS)
        self.kernel_code = code if code is not None and _flags(code) & _CODE else None
        stack = self.segment(self.stack_selector)
        usable = stack is not None and _flags(stack) & (_CODE | _WRITABLE) == _WRITABLE
        self.kernel_stack = stack if usable else None

    def segment(self, selector: int) -> Segment | None:
        """What the CPU makes of a selector of the guest's kernel; None: nothing that it could use."""
        index = selector >> 3
        if index >= GDT_ENTRIES or selector & 4:
            return None
        low, high = self._words[GDT_OFFSET // 4 + 2 * index], self._words[GDT_OFFSET // 4 + 2 * index + 1]
        if high & (_PRESENT | _SEGMENT | _LEVEL) != _PRESENT | _SEGMENT | KERNEL_LEVEL << 13:
            return None
        base = low >> 16 | (high & 0xFF) << 16 | high & 0xFF00_0000
        limit = low & 0xFFFF | high & 0xF_0000
        if high & _GRANULAR:
            limit = limit << 12 | 0xFFF
        return Segment(CACHE.pack(selector, base, limit, high), base, bool(high & 1 << 22))

    def set_stack(self, selector: int, pointer: int) -> None:
        """SET_STACK: where a trap from user level puts its frame. GuestDied: not a segment of the guest's kernel."""
        if selector & 3 != KERNEL_LEVEL:
            raise GuestDied(f"bad stack segment {selector}")
        selector &= 0xFFFF
        self.stack_pointer = pointer
        self._words[(TSS_OFFSET + _TSS_ESP1) // 4] = pointer
        if selector != self.stack_selector:
            self.stack_selector = selector
            self._words[(TSS_OFFSET + _TSS_SS1) // 4] = selector
            self._segments_changed()

    # --- gates ---

    def set_gate(self, vector: int, low: int, high: int) -> bool:
        """LOAD_IDT_ENTRY. Whether the vector goes straight to the guest. GuestDied: no such vector, or kind of gate."""
        if vector in _IGNORED_VECTORS:
            return False
        if vector >= IDT_ENTRIES:
            raise GuestDied(f"Setting idt entry {vector}")
        gate: Gate | None = None
        kind = high >> 8 & 0xF
        if high & _PRESENT:
            if kind not in (_INTERRUPT_GATE, _TRAP_GATE):
                raise GuestDied(f"bad IDT type {kind}")
            gate = Gate(low & 0xFFFF | high & 0xFFFF_0000, high >> 13 & 3, kind == _INTERRUPT_GATE)
        self._gates[vector] = gate
        direct = (
            gate is not None
            and not gate.disables
            and vector not in _INDIRECT_VECTORS
            and (vector < 32 or vector == SYSCALL_VECTOR)
        )
        place = IDT_OFFSET // 4 + 2 * vector
        self._words[place] = KERNEL_CS << 16 | low & 0xFFFF if direct else 0
        self._words[place + 1] = high & 0xFFFF_EF00 if direct else 0
        return direct

    def gate(self, vector: int) -> Gate | None:
        """The guest's gate for a vector."""
        return self._gates[vector]

    def software_level(self, vector: int) -> int:
        """The highest privilege level from which INT may be used for a vector."""
        if vector == HYPERCALL_VECTOR:
            return KERNEL_LEVEL
        gate = self._gates[vector]
        if gate is None or vector in _INDIRECT_VECTORS or (vector >= 32 and vector != SYSCALL_VECTOR):
            return 0
        return gate.level


def _flags(segment: Segment) -> int:
    flags: int = CACHE.unpack(segment.cache)[3]
    return flags
