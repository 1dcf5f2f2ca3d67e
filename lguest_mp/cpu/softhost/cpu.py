"""The embedded CPU as an lguest guest finds it: 32 bits, paging on, its kernel at privilege level 1.

Everything that the host has to see comes out of the CPU as a call: a trap (:class:`Traps`), or the question whether an
interrupt is to be delivered now. What is delivered, and how, is the host's business (``host.py``); here is the state
that it reads and changes meanwhile. That goes straight to the library's own structures: the documented interface takes
3 µs for a register, and does not let anybody change the privilege level.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from threading import get_ident
from typing import Protocol

from lguest_mp.codemap import CodeMap
from lguest_mp.cpu.lguest_host import GuestDied, Register
from lguest_mp.cpu.softhost.abi import (
    FLAG_IF,
    FLAG_NT,
    FLAG_RF,
    FLAG_TF,
    FLAG_VM,
    KERNEL_LEVEL,
    PAGE_SIZE,
    RESERVED_BASE,
)
from lguest_mp.cpu.softhost.tables import (
    CACHE,
    DIRECTORY_PHYSICAL,
    GDT_OFFSET,
    IDT_OFFSET,
    PAGES,
    PHYSICAL_BASE,
    TSS_LIMIT,
    TSS_OFFSET,
    HostPages,
    Segment,
)
from lguest_mp.cpu.unicorn import library as uc_library
from lguest_mp.cpu.unicorn.core import CPU_INTERRUPT_HARD, TRANSLATION_BYTES, UnicornCore
from lguest_mp.cpu.unicorn.internals import Internals
from lguest_mp.errors import LguestError
from lguest_mp.memory import GuestMemory

# struct CPUX86State (target/i386/cpu.h), in words of 32 bits; registers have 64, of which the guest has the lower.
_ENV_BYTES = 0x1580
EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI = (2 * number for number in range(8))
EIP = 0x80 // 4
_EFLAGS = 0x88 // 4
_HFLAGS = 0xB0 // 4
_ES, _CS, _SS, _DS, _FS, _GS = (0xB8 + 24 * number for number in range(6))
_LDT, _TR, _GDT, _IDT = (0x148 + 24 * number for number in range(4))
_CACHE_BYTES = CACHE.size
_CS_BASE, _SS_BASE, _DS_BASE, _ES_BASE = ((place + 8) // 4 for place in (_CS, _SS, _DS, _ES))
_CR0 = 0x1A8 // 4
_CR2 = 0x1B8 // 4
_EFER = 0x250
_ERROR_CODE = 0x1508 // 4
_IS_INT = 0x150C // 4

_CR0_VALUE = 0x8001_0033  # PG, WP, NE, ET, MP, PE
_CR0_TS = 1 << 3
_CR4_VALUE = 0x610  # OSXMMEXCPT, OSFXSR, PSE
_HF_CPL = 3
_HF_CS32, _HF_SS32, _HF_ADDSEG, _HF_TS = 1 << 4, 1 << 5, 1 << 6, 1 << 11
_HF_LMA, _HF_CS64 = 1 << 14, 1 << 15
#: An available 32-bit TSS, present.
_TSS_FLAGS = 0x8900

_REGISTERS = {
    Register.EAX: EAX,
    Register.EBX: EBX,
    Register.ECX: ECX,
    Register.EDX: EDX,
    Register.ESI: ESI,
    Register.EDI: EDI,
    Register.EBP: EBP,
    Register.ESP: ESP,
    Register.EIP: EIP,
}
_SELECTORS = {
    Register.DS: _DS // 4,
    Register.ES: _ES // 4,
    Register.FS: _FS // 4,
    Register.GS: _GS // 4,
    Register.CS: _CS // 4,
    Register.SS: _SS // 4,
}

#: What take() gives to native.S.
_NOTHING, _DELIVERED = -1, -2


class Traps(Protocol):
    """Whom the CPU calls, on its own thread, between two instructions of the guest. What they raise ends the run."""

    def trap(self, vector: int) -> None:
        """An exception or INT n; the instruction pointer is at the faulting instruction, or behind INT n."""

    def attend(self) -> bool:
        """Somebody called :meth:`GuestCpu.kick`. Whether the guest goes on elsewhere."""


class GuestCpu(UnicornCore):
    """One CPU."""

    def __init__(self, memory: GuestMemory, pages: HostPages, code_map: CodeMap, traps: Traps) -> None:
        if len(memory.regions) != 1 or memory.size > PHYSICAL_BASE:
            raise LguestError(f"an lguest guest cannot have {memory.size >> 20} MiB of memory; ask for less than 3 GiB")
        super().__init__(Internals(uc_library.UC_CPU_X86_EPYC, TRANSLATION_BYTES, traps=True), memory, code_map)
        self._pages = pages
        internals = self._internals
        slot = internals.native.slot
        env = (ctypes.c_uint8 * _ENV_BYTES).from_address(internals.env_address)
        self._bytes = memoryview(env).cast("B")
        #: The CPU's state, to be indexed by EAX, EIP and so on.
        self.words = self._bytes.cast("I")
        self._trap_flags = slot("trap_flags")
        self._beyond = slot("beyond")
        self._delivering = slot("delivering")
        self._gate = slot("gate")
        self._request = internals.interrupt_request
        self._open_gate = internals.open_gate
        self._direct = internals.native.slots("direct", 4)
        self._direct[:] = [0] * 4
        self._stopped = False
        slot("reserved").value = RESERVED_BASE
        self._connect_callbacks(traps)
        self._map(memory)
        self._read_eflags = internals.function("helper_read_eflags", ctypes.c_uint32, ctypes.c_void_p)
        self._tlb_flush = internals.function("tlb_flush", None, ctypes.c_void_p)
        self._tlb_flush_page = internals.function("tlb_flush_page", None, ctypes.c_void_p, ctypes.c_uint64)
        self._env_address, self._state_address = internals.env_address, internals.state_address

    def _connect_callbacks(self, traps: Traps) -> None:
        trap, attend, fail = traps.trap, traps.attend, self._fail

        def python_trap(vector: int) -> None:
            try:
                trap(vector)
            except BaseException as error:
                fail(error)

        def take() -> int:
            try:
                return _DELIVERED if attend() else _NOTHING
            except BaseException as error:
                fail(error)
                return _NOTHING

        self._connect("python_trap", ctypes.CFUNCTYPE(None, ctypes.c_int), python_trap)
        self._connect("python_take", ctypes.CFUNCTYPE(ctypes.c_int), take)
        # Ports and MSRs are out of the guest's reach (no I/O privilege, no level 0); CPUID is the library's.
        nothing = self._internals.native.entry("nothing")
        for name in ("python_in", "python_out", "python_cpuid", "python_rdmsr", "python_wrmsr"):
            self._internals.native.slot(name).value = nothing

    def _map(self, memory: GuestMemory) -> None:
        dll, uc = self._library.dll, self._internals.uc
        for base, size, address in (
            (0, memory.size, memory.address),
            (PHYSICAL_BASE, PAGES * PAGE_SIZE, self._pages.address),
        ):
            error = dll.uc_mem_map_ptr(uc, base, size, uc_library.UC_PROT_ALL, address)
            self._library.check(error, "mapping memory")

    def set_memory_size(self, size: int) -> None:
        """Where the guest's memory ends: what its page tables lead to beyond that becomes a page fault."""
        self._internals.native.slot("physical_limit").value = size

    def enter(self, start: int, code: Segment, data: Segment) -> None:
        """The state at the guest's first instruction, at ``start``: its kernel's, all general registers 0."""
        words, write = self.words, self._internals.write_register
        words[_EFER // 4] = words[_EFER // 4 + 1] = 0
        words[_HFLAGS] = words[_HFLAGS] & ~(_HF_LMA | _HF_CS64 | _HF_CPL) | KERNEL_LEVEL
        write(uc_library.UC_X86_REG_CR4, _CR4_VALUE)
        write(uc_library.UC_X86_REG_CR3, DIRECTORY_PHYSICAL)
        write(uc_library.UC_X86_REG_CR0, _CR0_VALUE)
        self._internals.write_gdtr(RESERVED_BASE + GDT_OFFSET, 0xFF)
        self._set_table(_IDT, RESERVED_BASE + IDT_OFFSET, 0x7FF, 0)
        self._set_table(_TR, RESERVED_BASE + TSS_OFFSET, TSS_LIMIT, _TSS_FLAGS)
        self._set_table(_LDT, 0, 0, 0)
        for place, segment in ((_CS, code), (_SS, data), (_DS, data), (_ES, data)):
            self._bytes[place : place + _CACHE_BYTES] = segment.cache
        for place in (_FS, _GS):
            self._bytes[place : place + _CACHE_BYTES] = bytes(_CACHE_BYTES)
        self._hidden_flags(KERNEL_LEVEL, code_big=code.big, stack_big=data.big)
        write(uc_library.UC_X86_REG_RFLAGS, FLAG_IF | 2)
        for register in (EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI):
            words[register] = words[register + 1] = 0
        words[EIP], words[EIP + 1] = start, 0

    def _set_table(self, place: int, base: int, limit: int, flags: int) -> None:
        self._bytes[place : place + _CACHE_BYTES] = CACHE.pack(0, base, limit, flags)

    def _hidden_flags(self, level: int, *, code_big: bool, stack_big: bool) -> None:
        """What the library keeps of the privilege level and the segments a second time."""
        words = self.words
        flags = words[_HFLAGS] & ~(_HF_CPL | _HF_CS32 | _HF_SS32 | _HF_ADDSEG) | level
        based = words[_DS_BASE] or words[_ES_BASE] or words[_SS_BASE]
        if code_big:
            flags |= _HF_CS32
        if stack_big:
            flags |= _HF_SS32
        if based or not code_big:
            flags |= _HF_ADDSEG
        words[_HFLAGS] = flags

    # --- running ---

    def run(self) -> None:
        """Runs the guest until :meth:`stop`. Raises what a callback raised; GuestDied: the CPU cannot go on."""
        internals = self._internals
        self._thread = get_ident()
        self._stopped = False
        error = self._library.dll.uc_emu_start(internals.uc, self.words[EIP], 0, 0, 0)
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if error or not self._stopped:
            what = self._library.error_text(error) if error else "stopped"
            raise GuestDied(f"{what} at {self.words[EIP]:#x}")

    def stop(self) -> None:
        """Has run() return, from a callback."""
        self._stopped = True
        self._stop()

    def sleep(self, awake: Callable[[], bool], idle: Callable[[int], None]) -> None:
        """Sleeps until ``awake()``, in ``idle(wake)``; see Platform.idle."""
        self._thread = get_ident()
        self._sleep(awake, idle)

    @property
    def sleeping(self) -> bool:
        """Whether the CPU's thread is in :meth:`sleep`."""
        return self._sleeping

    def ask_again(self, address: int | None) -> None:
        """An interrupt could not be delivered: attend() is called again after the next indirect jump.

        With ``address``, the host address of a u32, not before that is something else than 0.
        """
        self._gate.value = self._open_gate if address is None else address
        self._request.value = CPU_INTERRUPT_HARD

    def ask_no_more(self) -> None:
        """There is nothing to ask attend() for until the next kick."""
        self._gate.value = self._open_gate
        self._request.value = 0
        if self._jobs:  # one that came just now, and whose mark this was, too
            self._request.value = CPU_INTERRUPT_HARD

    # --- the guest's state, while it stands still ---

    @property
    def level(self) -> int:
        """The current privilege level."""
        return self.words[_HFLAGS] & _HF_CPL

    @property
    def error_code(self) -> int:
        """The error code of the exception that trap() is called for."""
        return self.words[_ERROR_CODE]

    @property
    def is_int(self) -> bool:
        """Whether trap() is called for INT n."""
        return bool(self.words[_IS_INT])

    @property
    def fault_address(self) -> int:
        """CR2."""
        return self.words[_CR2]

    @property
    def trap_flags(self) -> int:
        """EFLAGS, in trap()."""
        return self._trap_flags.value

    def read_flags(self) -> int:
        """EFLAGS, at any time."""
        flags: int = self._read_eflags(self._env_address)
        return flags

    def take_beyond(self) -> int:
        """The physical address beyond the guest's memory whose access became this page fault; 0: an ordinary one."""
        address = self._beyond.value
        self._beyond.value = 0
        return address

    def take_delivering(self) -> int | None:
        """The vector on whose way through the IDT this exception happened, if it did."""
        vector = self._delivering.value - 1
        self._delivering.value = 0
        return vector if vector >= 0 else None

    @property
    def code_base(self) -> int:
        """The base of CS."""
        return self.words[_CS_BASE]

    @property
    def stack_base(self) -> int:
        """The base of SS."""
        return self.words[_SS_BASE]

    @property
    def code_selector(self) -> int:
        """CS."""
        return self.words[_CS // 4]

    @property
    def stack_selector(self) -> int:
        """SS."""
        return self.words[_SS // 4]

    def enter_handler(self, offset: int, code: Segment, stack: Segment | None, pointer: int) -> None:
        """Goes on at ``offset`` of the guest's kernel, with ``pointer`` in ESP; ``stack``: SS, None: as it is."""
        words = self.words
        words[EIP] = offset
        words[ESP] = pointer
        words[_EFLAGS] &= ~(FLAG_TF | FLAG_NT | FLAG_RF | FLAG_VM)
        self._bytes[_CS : _CS + _CACHE_BYTES] = code.cache
        if stack is not None:
            self._bytes[_SS : _SS + _CACHE_BYTES] = stack.cache
            stack_big = stack.big
        else:
            stack_big = bool(words[_HFLAGS] & _HF_SS32)
        self._hidden_flags(KERNEL_LEVEL, code_big=code.big, stack_big=stack_big)

    def set_task_switched(self, wanted: bool) -> None:
        """CR0.TS: whether the next use of the FPU traps."""
        words = self.words
        if wanted:
            words[_CR0] |= _CR0_TS
            words[_HFLAGS] |= _HF_TS
        else:
            words[_CR0] &= ~_CR0_TS
            words[_HFLAGS] &= ~_HF_TS

    def set_direct(self, vector: int, direct: bool) -> None:
        """Whether a vector goes through the IDT, and trap() is not called for it."""
        if direct:
            self._direct[vector >> 6] |= 1 << (vector & 63)
        else:
            self._direct[vector >> 6] &= ~(1 << (vector & 63))

    def flush(self) -> None:
        """Forgets all translations of addresses."""
        self._tlb_flush(self._state_address)

    def flush_page(self, virtual: int) -> None:
        """Forgets the translation of a virtual address."""
        self._tlb_flush_page(self._state_address, virtual & ~(PAGE_SIZE - 1))

    def get_register(self, register: Register) -> int:
        """A register, 32 bits. There is no ORIG_EAX: all ones."""
        if register in _REGISTERS:
            return self.words[_REGISTERS[register]]
        if register in _SELECTORS:
            return self.words[_SELECTORS[register]]
        return self.read_flags() if register is Register.EFLAGS else 0xFFFF_FFFF

    def set_register(self, register: Register, value: int) -> None:
        """Changes a general register, ESP or EIP. ValueError: any other."""
        if register not in _REGISTERS:
            raise ValueError(f"{register.name} cannot be set")
        self.words[_REGISTERS[register]] = value & 0xFFFF_FFFF
