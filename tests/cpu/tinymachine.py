"""A machine of a few bytes around an engine: flat 64-bit mode, an IDT, ports that are remembered."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

import pytest

from lguest_mp.codemap import CodeMap
from lguest_mp.cpu.engine import CpuidResult, Engine, EntryState
from lguest_mp.cpu.unicorn.engine import UnicornEngine
from lguest_mp.memory import GuestMemory

RAM = 16 << 20
GDT, IDT, PAGE_TABLES, CODE, DATA, STACK = 0x1000, 0x2000, 0x4000, 0x1_0000, 0x2_0000, 0x8_0000
#: The first 1 GiB is mapped here once more, not executable (once EFER.NXE is on), as Linux maps all memory.
ALIAS = 1 << 30
#: Writing this port ends the run; the value is kept.
EXIT_PORT = 0x600


class Exit(Exception):
    """The guest wrote EXIT_PORT."""


class RecordingPlatform:
    """Remembers what the guest does; interrupts are what the test queues."""

    def __init__(self) -> None:
        self.outputs: list[tuple[int, int, int]] = []
        self.mmio_writes: list[tuple[int, int, int]] = []
        self.msrs: dict[int, int] = {0x1B: 0xFEE0_0900}
        self.interrupts: list[int] = []
        self.on_output: dict[int, Callable[[int], None]] = {}
        self.exit_value: int | None = None

    def port_read(self, port: int, size: int) -> int:
        return (port * 0x0101_0101) & ((1 << 8 * size) - 1)

    def port_write(self, port: int, size: int, value: int) -> None:
        if port == EXIT_PORT:
            self.exit_value = value
            raise Exit
        self.outputs.append((port, size, value))
        if port in self.on_output:
            self.on_output[port](value)

    def mmio_read(self, address: int, size: int) -> int:
        return address & ((1 << 8 * size) - 1)

    def mmio_write(self, address: int, size: int, value: int) -> None:
        self.mmio_writes.append((address, size, value))

    def cpuid(self, leaf: int, subleaf: int, native: CpuidResult) -> CpuidResult:
        return (leaf, subleaf, 0x1234, native[3]) if leaf == 0x4000_0000 else native

    def msr_read(self, index: int) -> int | None:
        return self.msrs.get(index)

    def msr_write(self, index: int, value: int) -> bool:
        if index >= 0x4B56_4D00:
            self.msrs[index] = value
            return True
        return False

    def idle(self, wake: int) -> None:
        os.eventfd_read(wake)

    def interrupt_pending(self) -> bool:
        return bool(self.interrupts)

    def take_interrupt(self) -> int | None:
        return self.interrupts.pop(0) if self.interrupts else None


class TinyMachine:
    """Memory and platform of one test; the engine is whatever a subclass or the test makes."""

    def __init__(self, ram: int = RAM, *, huge_pages: bool = False) -> None:
        self.memory = GuestMemory(ram, huge_pages=huge_pages)
        self.platform = RecordingPlatform()
        write_tables(self.memory)

    def set_gate(self, vector: int, handler: int, dpl: int = 0) -> None:
        """An interrupt gate."""
        set_gate(self.memory, vector, handler, dpl)

    def load(self, code: bytes, at: int = CODE) -> None:
        self.memory.write(at, code)

    def run_on(self, engine: Engine, at: int = CODE) -> int:
        """Runs from an address until the guest writes EXIT_PORT; the value it wrote."""
        engine.enter(EntryState(at, 0, PAGE_TABLES, GDT, 0x47))
        with pytest.raises(Exit):
            engine.run()
        assert self.platform.exit_value is not None
        return self.platform.exit_value


class Machine(TinyMachine):
    """The same with the embedded CPU."""

    def __init__(self, ram: int = RAM, *, huge_pages: bool = False) -> None:
        super().__init__(ram, huge_pages=huge_pages)
        self.code_map = CodeMap(self.memory, 0)
        self.engine = UnicornEngine(self.memory, self.platform, self.code_map)

    def kick(self) -> None:
        """As a thread does that sleeps next."""
        self.engine.kick()
        self.engine.settle()

    def call(self, job: Callable[[], None]) -> None:
        """The same with a job."""
        self.engine.call(job)
        self.engine.settle()

    def run(self, at: int = CODE) -> int:
        """Runs from an address until the guest writes EXIT_PORT; the value it wrote."""
        return self.run_on(self.engine, at)


def write_tables(memory: GuestMemory) -> None:
    """GDT, TSS and page tables: the first GiB at its own addresses, and once more at ALIAS; 2 to 5 GiB at theirs."""
    write = memory.write
    # Selectors: 0x10/0x18 kernel code/data, 0x20/0x28/0x30 user code32/data/code64 (SYSRET's order), 0x38 TSS.
    gdt = [0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFFB000000FFFF, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF]
    tss = 0x3000
    gdt += [0x67 | (tss & 0xFFFFFF) << 16 | 0x89 << 40, 0]
    write(GDT, struct.pack(f"<{len(gdt)}Q", *gdt))
    write(tss, struct.pack("<IQ", 0, STACK) + bytes(90) + struct.pack("<H", 0x68))
    pml4, pdpt, directory = PAGE_TABLES, PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2000
    write(pml4, struct.pack("<Q", pdpt | 7))
    # Not every host's processor has pages of 1 GiB.
    others = {gib: directory + 0x1000 * (gib - 1) for gib in (2, 3, 4)}
    write(pdpt, struct.pack("<5Q", directory | 7, directory | 7 | 1 << 63, *(table | 7 for table in others.values())))
    for gib, table in {0: directory, **others}.items():
        write(table, b"".join(struct.pack("<Q", gib << 30 | page << 21 | 0x87) for page in range(512)))


def set_gate(memory: GuestMemory, vector: int, handler: int, dpl: int = 0) -> None:
    """An interrupt gate."""
    low = (handler & 0xFFFF) | 0x10 << 16 | (0x8E | dpl << 5) << 40 | (handler >> 16 & 0xFFFF) << 48
    memory.write(IDT + 16 * vector, struct.pack("<QQ", low, handler >> 32))
