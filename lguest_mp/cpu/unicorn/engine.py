"""The embedded CPU as an Engine: one thread inside Unicorn, which calls the platform and sleeps in HLT.

How it is run, kicked and put to sleep is ``core.py``'s; here is what a 64-bit machine has around its CPU: ports, device
memory, CPUID and MSRs, all of them the platform's, and how its first instruction finds it.
"""

from __future__ import annotations

import ctypes
from threading import get_ident
from typing import Any

from lguest_mp.codemap import CodeMap
from lguest_mp.cpu.engine import Engine, EntryState, GuestFault, GuestHalted, Platform
from lguest_mp.cpu.unicorn import features
from lguest_mp.cpu.unicorn import library as uc_library
from lguest_mp.cpu.unicorn.core import CPU_INTERRUPT_HARD, TRANSLATION_BYTES, UnicornCore
from lguest_mp.cpu.unicorn.internals import Internals
from lguest_mp.cpu.unicorn.library import MmioRead, MmioWrite
from lguest_mp.memory import HIGH_RAM_BASE, GuestMemory

#: The CPU model has 40 bits of physical address; what is not RAM below that goes to the platform.
PHYSICAL_LIMIT = 1 << 40

_IF = 1 << 9
_RAX, _RCX, _RDX, _RBX = 0, 1, 2, 3

_Take = ctypes.CFUNCTYPE(ctypes.c_int)
_In = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32)
_Out = ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32)
_Cpuid = ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32)
_Rdmsr = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint32)
_Wrmsr = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint32, ctypes.c_uint64)


class UnicornEngine(UnicornCore, Engine):
    """One virtual CPU (an AMD EPYC without what Unicorn lacks: AVX, nested paging's host side, a second core)."""

    def __init__(self, memory: GuestMemory, platform: Platform, code_map: CodeMap) -> None:
        self._platform = platform
        super().__init__(Internals(uc_library.UC_CPU_X86_EPYC, TRANSLATION_BYTES), memory, code_map)
        self._connect_callbacks()
        self._map(memory)

    # --- making ---

    def _connect_callbacks(self) -> None:
        platform, internals, fail = self._platform, self._internals, self._fail
        registers, msr_value = internals.registers, internals.msr_value
        request = internals.interrupt_request
        port_read, port_write = platform.port_read, platform.port_write

        def take() -> int:
            try:
                request.value = 0
                vector = platform.take_interrupt()
                if vector is None:
                    return -1
                # A job that came since the library looked for one left its mark before ours was cleared.
                if platform.interrupt_pending() or self._jobs:
                    request.value = CPU_INTERRUPT_HARD
            except BaseException as error:
                fail(error)
                return -1
            return vector

        def port_in(port: int, size: int) -> int:
            try:
                return port_read(port, size)
            except BaseException as error:
                fail(error)
                return 0

        def port_out(port: int, size: int, value: int) -> None:
            try:
                port_write(port, size, value)
            except BaseException as error:
                fail(error)

        def cpuid(leaf: int, subleaf: int) -> None:
            try:
                native = (registers[_RAX], registers[_RBX], registers[_RCX], registers[_RDX])
                result = platform.cpuid(leaf, subleaf, features.native(leaf, subleaf, native))
                registers[_RAX], registers[_RBX], registers[_RCX], registers[_RDX] = result
            except BaseException as error:
                fail(error)

        def rdmsr(index: int) -> int:
            try:
                value = platform.msr_read(index)
                if value is None:
                    return 0
                msr_value.value = value
            except BaseException as error:
                fail(error)
            return 1

        def wrmsr(index: int, value: int) -> int:
            try:
                return platform.msr_write(index, value)
            except BaseException as error:
                fail(error)
                return 1

        for name, prototype, function in (
            ("python_take", _Take, take),
            ("python_in", _In, port_in),
            ("python_out", _Out, port_out),
            ("python_cpuid", _Cpuid, cpuid),
            ("python_rdmsr", _Rdmsr, rdmsr),
            ("python_wrmsr", _Wrmsr, wrmsr),
        ):
            self._connect(name, prototype, function)

    def _map(self, memory: GuestMemory) -> None:
        dll, uc = self._library.dll, self._internals.uc
        for region in memory.regions:
            error = dll.uc_mem_map_ptr(
                uc, region.base, region.size, uc_library.UC_PROT_ALL, memory.address + region.offset
            )
            self._library.check(error, "mapping RAM")
        low, high = memory.regions[0], memory.regions[-1]
        holes = [(low.base + low.size, HIGH_RAM_BASE)]
        holes.append((max(HIGH_RAM_BASE, high.base + high.size), PHYSICAL_LIMIT))
        for start, end in holes:
            read, write = self._mmio_callbacks(start)
            self._callbacks += [read, write]
            self._map_hole(start, end - start, read, write)

    def _map_hole(self, start: int, size: int, read: Any, write: Any, data: int | None = None) -> None:
        """Has the library call ``read`` and ``write`` where there is no RAM; ``write`` is given ``data``."""
        error = self._library.dll.uc_mmio_map(self._internals.uc, start, size, read, None, write, data)
        self._library.check(error, "mapping device memory")

    def _mmio_callbacks(self, base: int) -> tuple[Any, Any]:
        fail, mmio_read, mmio_write = self._fail, self._platform.mmio_read, self._platform.mmio_write

        def read(_uc: int, offset: int, size: int, _data: int) -> int:
            try:
                return mmio_read(base + offset, size)
            except BaseException as error:
                fail(error)
                return 0

        def write(_uc: int, offset: int, size: int, value: int, _data: int) -> None:
            try:
                mmio_write(base + offset, size, value)
            except BaseException as error:
                fail(error)

        return MmioRead(read), MmioWrite(write)

    def enter(self, state: EntryState) -> None:
        """Long mode, paging on, flat segments, as the 64-bit boot protocol wants it."""
        internals = self._internals
        write = internals.write_register
        internals.write_gdtr(state.gdt_base, state.gdt_limit)
        write(uc_library.UC_X86_REG_CR3, state.cr3)
        write(uc_library.UC_X86_REG_CR4, 1 << 5)  # PAE
        internals.write_msr(0xC000_0080, 0x500)  # EFER: LME, LMA
        write(uc_library.UC_X86_REG_CR0, 0x8000_0033)  # PG, NE, ET, MP, PE
        write(uc_library.UC_X86_REG_CS, state.code_selector)
        for register in (
            uc_library.UC_X86_REG_DS,
            uc_library.UC_X86_REG_ES,
            uc_library.UC_X86_REG_SS,
            uc_library.UC_X86_REG_FS,
            uc_library.UC_X86_REG_GS,
        ):
            write(register, state.data_selector)
        write(uc_library.UC_X86_REG_RSI, state.rsi)
        write(uc_library.UC_X86_REG_RFLAGS, 2)
        write(uc_library.UC_X86_REG_RIP, state.rip)

    # --- running ---

    def run(self) -> None:
        """Runs the guest; see Engine."""
        internals = self._internals
        self._thread = get_ident()
        start, uc = self._library.dll.uc_emu_start, internals.uc
        while True:
            error = start(uc, internals.rip.value, 0, 0, 0)
            if self._failure is not None:
                raise self._failure
            if error:
                raise GuestFault(f"{self._library.error_text(error)} at RIP {internals.rip.value:#x}")
            if not internals.halted.value:
                raise GuestFault(f"triple fault at RIP {internals.rip.value:#x}")
            if not internals.eflags.value & _IF:
                raise GuestHalted
            self._sleep_in_hlt()
            if self._failure is not None:
                raise self._failure

    def _sleep_in_hlt(self) -> None:
        try:
            self._sleep(self._platform.interrupt_pending, self._platform.idle)
        except BaseException as error:
            self._failure = error
        self._internals.interrupt_request.value = CPU_INTERRUPT_HARD
