"""The embedded CPU as an Engine: one thread inside Unicorn, which calls the platform and sleeps in HLT.

The library executes translated blocks without looking up. Whoever wants its attention (an interrupt, a job) sets
CPU_INTERRUPT_HARD and then ends the chain of blocks; between two blocks the library calls ``exec_interrupt``
(native.S), which runs jobs, asks the platform for a vector, and delivers it. There is no polling, and ``uc_emu_stop``
is used only to leave for good.

The library clears the end-of-chain flag and then reads the request, with no fence between: its read may overtake its
own store, and a kick that falls in between is lost. So :meth:`settle`, a moment later, looks whether the request was
taken. If not, it drains the CPU's stores by ``membarrier`` and raises the flag once more: now it cannot be lost.

A callback into Python must not be left by an exception (there is C below it): the exception is kept, the library told
to stop, and :meth:`run` raises it.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable
from threading import get_ident
from typing import Any

from lguest_mp.codemap import CodeMap
from lguest_mp.cpu.engine import Engine, EntryState, GuestFault, GuestHalted, Platform
from lguest_mp.cpu.unicorn import library as uc_library
from lguest_mp.cpu.unicorn.internals import Internals
from lguest_mp.cpu.unicorn.library import MmioRead, MmioWrite
from lguest_mp.memory import HIGH_RAM_BASE, GuestMemory

#: Bytes of translated code that are kept; when they are full, all is dropped and translated anew.
TRANSLATION_BYTES = 256 << 20
#: The CPU model has 40 bits of physical address; what is not RAM below that goes to the platform.
PHYSICAL_LIMIT = 1 << 40

_CPU_INTERRUPT_HARD = 2
_IF = 1 << 9
_RAX, _RCX, _RDX, _RBX = 0, 1, 2, 3

_SYS_MEMBARRIER = 324
_MEMBARRIER_CMD_PRIVATE_EXPEDITED = 1 << 3
_MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED = 1 << 4

_Take = ctypes.CFUNCTYPE(ctypes.c_int)
_Jobs = ctypes.CFUNCTYPE(None)
_In = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32)
_Out = ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32)
_Cpuid = ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32)
_Rdmsr = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint32)
_Wrmsr = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint32, ctypes.c_uint64)


class UnicornEngine(Engine):
    """One virtual CPU (an AMD EPYC without what Unicorn lacks: AVX, nested paging's host side, a second core)."""

    def __init__(self, memory: GuestMemory, platform: Platform, code_map: CodeMap) -> None:
        self._platform = platform
        self._internals = Internals(uc_library.UC_CPU_X86_EPYC, TRANSLATION_BYTES)
        self._library = self._internals.library
        self._failure: BaseException | None = None
        self._jobs: deque[Callable[[], None]] = deque()
        self._sleeping = False
        self._is_settled = True
        self._thread = 0
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall
        self._fence(_MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED)
        self._callbacks: list[Any] = []  # ctypes must be kept from collecting them
        self._connect_code_map(memory, code_map)
        self._connect_callbacks()
        self._map(memory)

    # --- making ---

    def _connect_code_map(self, memory: GuestMemory, code_map: CodeMap) -> None:
        # The library numbers RAM in the order of mapping, without holes: its "ram address" is our offset.
        slot = self._internals.native.slot
        slot("ram").value = memory.address
        slot("code_map").value = ctypes.addressof(ctypes.c_char.from_buffer(code_map.marks))
        slot("code_pages").value = code_map.pages

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
                    request.value = _CPU_INTERRUPT_HARD
            except BaseException as error:
                fail(error)
                return -1
            return vector

        def jobs() -> None:
            try:
                self._run_jobs()
            except BaseException as error:
                fail(error)

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
                result = platform.cpuid(leaf, subleaf, native)
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
            ("python_jobs", _Jobs, jobs),
            ("python_in", _In, port_in),
            ("python_out", _Out, port_out),
            ("python_cpuid", _Cpuid, cpuid),
            ("python_rdmsr", _Rdmsr, rdmsr),
            ("python_wrmsr", _Wrmsr, wrmsr),
        ):
            callback = prototype(function)
            self._callbacks.append(callback)
            address = ctypes.cast(callback, ctypes.c_void_p).value
            assert address is not None
            internals.native.slot(name).value = address

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
            error = dll.uc_mmio_map(uc, start, end - start, read, None, write, None)
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

    def close(self) -> None:
        """Gives everything back that the CPU holds."""
        self._internals.close()
        os.close(self._wake)

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
            self._sleep()
            if self._failure is not None:
                raise self._failure

    def _sleep(self) -> None:
        # kick() and call() look at _sleeping after they have left their mark, so a mark that is not seen here
        # makes them write the eventfd.
        self._sleeping = True
        pending, idle = self._platform.interrupt_pending, self._platform.idle
        try:
            while True:
                if self._jobs:
                    self._run_jobs()
                if pending():
                    break
                idle(self._wake)
        except BaseException as error:
            self._failure = error
        finally:
            self._sleeping = False
        self._internals.interrupt_request.value = _CPU_INTERRUPT_HARD

    def kick(self) -> None:
        """Has the CPU look for interrupts; see Engine."""
        if self._sleeping:
            if get_ident() != self._thread:  # which looks of its own accord when it is done
                os.eventfd_write(self._wake, 1)
            return
        internals = self._internals
        internals.interrupt_request.value = _CPU_INTERRUPT_HARD
        internals.exit_chain.value = 0xFFFF
        self._is_settled = False

    def settle(self) -> None:
        """Kicks once more if the CPU may have missed it; see Engine.

        Nearly always it has looked by now, and the fence, which interrupts its processor, is spared.
        """
        if self._is_settled:
            return
        self._is_settled = True
        internals = self._internals
        if internals.interrupt_request.value:
            self._fence(_MEMBARRIER_CMD_PRIVATE_EXPEDITED)
            internals.exit_chain.value = 0xFFFF

    def call(self, job: Callable[[], None]) -> None:
        """Runs a job on the CPU's thread; see Engine."""
        self._jobs.append(job)
        self._internals.jobs_wanted.value = 1
        self.kick()

    def _run_jobs(self) -> None:
        self._internals.jobs_wanted.value = 0
        while self._jobs:
            self._jobs.popleft()()

    def forget_code(self, first_page: int, last_page: int) -> None:
        """Drops the translations of pages of RAM; see Engine."""
        self._internals.forget_code(first_page, last_page)

    def _fail(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
        self._library.dll.uc_emu_stop(self._internals.uc)

    def _fence(self, command: int) -> None:
        self._syscall(_SYS_MEMBARRIER, command, 0, 0)
