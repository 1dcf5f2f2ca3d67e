"""What is done inside Unicorn, and why it cannot be done from outside.

Unicorn runs code, not machines. Used through its documented interface alone, a Linux guest boots at a fraction of the
speed and then corrupts itself. Each defect and its repair:

1. *A stop from outside repeats instructions.* An exit check stands after every load and store and rewinds RIP to the
   start of the instruction, so a read-modify-write runs twice. ``uc_struct.no_exit_request`` suppresses that check;
   the one at the start of every translated block stays. Preemption then falls between instructions only.
2. *Exceptions do not go through the guest's IDT*, #UD not even to the same hook, SYSCALL does nothing, and an external
   interrupt is always vector 0. The library's own code for delivery is all there; ``native.S`` calls it.
3. *Translated code goes stale.* After a store to a page with translations only the bytes stored are invalidated, and
   then the page is no longer watched as long as the storing address itself has no code, though translations remain;
   Linux writes programs through its non-executable direct map. And what another process writes invalidates nothing.
   Five functions are replaced so that one byte per page says exactly whether it holds translations (``codemap.py``)
   and a watched page stays watched while it does.
4. *IN and OUT have no privilege check*, CPUID and the MSRs have no way to ask the platform. Their helpers are replaced.
5. *The guest's fences vanish in translation*, since there is one CPU; but its devices are other processes. Those who
   translate fences and locked instructions are replaced by ones that fence.
6. *Anybody may return to virtual-8086 mode*, with an I/O privilege level of his choice. IRET is replaced by one that
   looks first.
7. *Each block begins with the call of a function* that looks whether anybody wants the CPU's attention. Now translated
   code looks itself, and calls it only then: a kernel boots in 0.85 of the time, a shell's loop takes 0.72.

Some guests have a host above them who sees their exceptions before they do (``cpu/softhost``). For these the CPU is
made with ``traps``: exceptions come to Python, but for the vectors that may go straight through the IDT; what a guest's
page tables lead to outside of its memory becomes a page fault; and interrupts can be held back by a word of its memory.

How a function is replaced: the library is position-independent and calls its own exported functions through slots of
pointers (GOT, and tables of helpers), bound when it is loaded. Every slot in its writable or relocated data that holds
the function's address is overwritten, before the CPU is made, since making it copies some. No byte of its text changes.

All of this belongs to one version. The offsets below were read from its sources (``qemu/include/hw/core/cpu.h``,
``qemu/target/i386/cpu.h``); :meth:`Internals.verify` checks them against what the documented interface says, each time,
and the launcher refuses to run on anything else.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Iterator
from typing import Any

from lguest_mp.cpu.unicorn import library as uc_library
from lguest_mp.cpu.unicorn.library import UnicornLibrary
from lguest_mp.cpu.unicorn.native_code import CODE, ENTRIES, SLOTS
from lguest_mp.errors import LguestError
from lguest_mp.record import Value

_PAGE = 4096

# struct uc_struct
_UC_CPU = 0x1B8
_UC_TCG_CTX = 0x300
_UC_NO_EXIT_REQUEST_CHECK = "check_exit_request_x86_64"
# struct TCGContext
_TCG_CODE_GEN_EPILOGUE = 0x98
_TCG_ENV = 0x98F0
_TCG_UC = 0x9970
# struct CPUState
_CS_INTERRUPT_REQUEST = 0x1C
_CS_ENV_PTR = 0x128
_CS_ICOUNT_DECR_PTR = 0x130
_CS_HALTED = 0x8198
_CS_UC = 0x81A8
# struct CPUX86State
_ENV_REGS = 0
_ENV_EIP = 0x80
_ENV_EFLAGS = 0x88
_ENV_EFER = 0x250
_ENV_STAR = 0x12D8
_ENV_LSTAR = 0x12E8
_ENV_CSTAR = 0x12F0
_ENV_FMASK = 0x12F8
_ENV_UC = 0x1B58
_ENV_ICOUNT_DECR = -0x10

#: UC_X86_REG_RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15: the order of env->regs.
_GENERAL_REGISTERS = (35, 38, 40, 37, 44, 36, 43, 39, *range(106, 114))

#: Function of the library -> entry of native.S that takes its place.
_REPLACED = {
    "x86_cpu_exec_interrupt_x86_64": "exec_interrupt",
    "helper_lookup_tb_ptr_x86_64": "lookup",
    "helper_syscall_x86_64": "syscall",
    "helper_inb_x86_64": "inb",
    "helper_inw_x86_64": "inw",
    "helper_inl_x86_64": "inl",
    "helper_outb_x86_64": "outb",
    "helper_outw_x86_64": "outw",
    "helper_outl_x86_64": "outl",
    "helper_cpuid_x86_64": "cpuid",
    "helper_rdmsr_x86_64": "rdmsr",
    "helper_wrmsr_x86_64": "wrmsr",
    "tlb_protect_code_x86_64": "protect_code",
    "tlb_unprotect_code_x86_64": "unprotect_code",
    "tb_invalidate_phys_page_fast_x86_64": "page_written",
    "tlb_set_dirty_x86_64": "set_dirty",
    "tlb_reset_dirty_by_vaddr_x86_64": "nothing",
    "helper_iret_protected_x86_64": "iret",
    "x86_cpu_tlb_fill_x86_64": "fill",
    "tlb_set_page_with_attrs_x86_64": "set_page",
    "tcg_gen_mb_x86_64": "mb",
    "tcg_gen_callN_x86_64": "gen_call",
    "tcg_gen_atomic_xchg_i64_x86_64": "xchg",
    "tcg_gen_atomic_cmpxchg_i64_x86_64": "cmpxchg",
    "tcg_gen_atomic_fetch_add_i64_x86_64": "fetch_add",
    "tcg_gen_atomic_fetch_and_i64_x86_64": "fetch_and",
    "tcg_gen_atomic_fetch_or_i64_x86_64": "fetch_or",
    "tcg_gen_atomic_fetch_xor_i64_x86_64": "fetch_xor",
    "tcg_gen_atomic_add_fetch_i64_x86_64": "add_fetch",
    "tcg_gen_atomic_and_fetch_i64_x86_64": "and_fetch",
    "tcg_gen_atomic_or_fetch_i64_x86_64": "or_fetch",
    "tcg_gen_atomic_xor_fetch_i64_x86_64": "xor_fetch",
}
#: Slot of native.S's table -> function of the library that it calls.
_CALLED = {
    "do_interrupt": "x86_cpu_do_interrupt_x86_64",
    "do_hardirq": "do_interrupt_x86_hardirq_x86_64",
    "read_eflags": "helper_read_eflags_x86_64",
    "raise_exception": "helper_raise_exception_x86_64",
    "restore_state": "cpu_restore_state_x86_64",
    "check_iob": "helper_check_iob_x86_64",
    "check_iow": "helper_check_iow_x86_64",
    "check_iol": "helper_check_iol_x86_64",
    "original_cpuid": "helper_cpuid_x86_64",
    "original_rdmsr": "helper_rdmsr_x86_64",
    "original_wrmsr": "helper_wrmsr_x86_64",
    "tlb_reset_dirty": "tlb_reset_dirty_x86_64",
    "invalidate_fast": "tb_invalidate_phys_page_fast_x86_64",
    "original_set_dirty": "tlb_set_dirty_x86_64",
    "original_fill": "x86_cpu_tlb_fill_x86_64",
    "original_lookup": "helper_lookup_tb_ptr_x86_64",
    "original_set_page": "tlb_set_page_with_attrs_x86_64",
    "gen_op1": "tcg_gen_op1_x86_64",
    "original_xchg": "tcg_gen_atomic_xchg_i64_x86_64",
    "original_cmpxchg": "tcg_gen_atomic_cmpxchg_i64_x86_64",
    "original_fetch_add": "tcg_gen_atomic_fetch_add_i64_x86_64",
    "original_fetch_and": "tcg_gen_atomic_fetch_and_i64_x86_64",
    "original_fetch_or": "tcg_gen_atomic_fetch_or_i64_x86_64",
    "original_fetch_xor": "tcg_gen_atomic_fetch_xor_i64_x86_64",
    "original_add_fetch": "tcg_gen_atomic_add_fetch_i64_x86_64",
    "original_and_fetch": "tcg_gen_atomic_and_fetch_i64_x86_64",
    "original_or_fetch": "tcg_gen_atomic_or_fetch_i64_x86_64",
    "original_xor_fetch": "tcg_gen_atomic_xor_fetch_i64_x86_64",
    "raise_error": "raise_exception_err_ra_x86_64",
    "load_data": "cpu_ldl_data_ra_x86_64",
    "original_iret": "helper_iret_protected_x86_64",
    "original_call": "tcg_gen_callN_x86_64",
    "check_exit": "helper_check_exit_request_x86_64",
    "new_label": "gen_new_label_x86_64",
    "new_temp": "tcg_temp_new_internal_x86_64",
    "free_temp": "tcg_temp_free_internal_x86_64",
    "gen_op3": "tcg_gen_op3_x86_64",
    "gen_branch": "tcg_gen_brcondi_i32_x86_64",
    "const_i64": "tcg_const_i64_x86_64",
    "const_i32": "tcg_const_i32_x86_64",
}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.wmemchr.argtypes = (ctypes.c_void_p, ctypes.c_uint32, ctypes.c_size_t)
_libc.wmemchr.restype = ctypes.c_void_p


def _protect(address: int, length: int, protection: int) -> None:
    if _libc.mprotect(address, length, protection) != 0:
        raise LguestError(
            f"the embedded CPU cannot make memory executable or patch its library (mprotect: errno"
            f" {ctypes.get_errno()}); a security policy of this host forbids it"
        )


class NativeCode:
    """native.S in an executable page, with its table in the page behind."""

    def __init__(self) -> None:
        self._mapping = mmap.mmap(-1, 2 * _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._mapping[: len(CODE)] = CODE
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        _protect(self.address, _PAGE, mmap.PROT_READ | mmap.PROT_EXEC)

    def entry(self, name: str) -> int:
        """The address of a function."""
        return self.address + ENTRIES[name]

    def slot(self, name: str) -> ctypes.c_uint64:
        """An entry of the table, to read and write."""
        return ctypes.c_uint64.from_address(self.address + _PAGE + SLOTS[name])

    def slots(self, name: str, count: int) -> ctypes.Array[ctypes.c_uint64]:
        """Several entries of the table that belong together."""
        return (ctypes.c_uint64 * count).from_address(self.address + _PAGE + SLOTS[name])


class _Segment(Value):
    start: int
    end: int
    protection: int


def _data_segments(path: str) -> list[_Segment]:
    """Where a library's data is mapped in this process: what is writable, and what was until it was relocated.

    The two lie side by side (RELRO is the start of the writable segment).
    """
    segments: list[_Segment] = []
    relocated: _Segment | None = None
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            fields = line.rstrip("\n").split(None, 5)
            if len(fields) < 6 or fields[5] != path:
                continue
            start, end = (int(number, 16) for number in fields[0].split("-"))
            if fields[1].startswith("rw"):
                if relocated is not None and relocated.end == start:
                    segments.append(relocated)
                segments.append(_Segment(start, end, mmap.PROT_READ | mmap.PROT_WRITE))
            elif fields[1].startswith("r--"):
                relocated = _Segment(start, end, mmap.PROT_READ)
    return segments


def _places(segment: _Segment, address: int) -> Iterator[int]:
    """Where in the segment this address is held: at a multiple of 8.

    The launch waits for it, and the C library looks at 400,000 halves of words faster than Python at a tenth of them.
    """
    at = segment.start
    while (found := _libc.wmemchr(at, address & 0xFFFF_FFFF, (segment.end - at) // 4)) is not None:
        if found % 8 == 0 and ctypes.c_uint64.from_address(found).value == address:
            yield found
        at = found + 4


def _replace_functions(library: UnicornLibrary, native: NativeCode) -> None:
    replacements = {library.address(name): native.entry(entry) for name, entry in _REPLACED.items()}
    found: set[int] = set()
    for segment in _data_segments(str(library.path.resolve())):
        places = [(place, address) for address in replacements for place in _places(segment, address)]
        if not places:
            continue
        if not segment.protection & mmap.PROT_WRITE:
            _protect(segment.start, segment.end - segment.start, mmap.PROT_READ | mmap.PROT_WRITE)
        for place, address in places:
            ctypes.c_uint64.from_address(place).value = replacements[address]
            found.add(address)
        if not segment.protection & mmap.PROT_WRITE:
            _protect(segment.start, segment.end - segment.start, segment.protection)
    for name in _REPLACED:
        if library.address(name) not in found:
            raise _unknown(library, f"nothing refers to {name}")


def _unknown(library: UnicornLibrary, what: str) -> LguestError:
    return LguestError(
        f"{library.path} is not the library that the embedded CPU knows ({what});"
        f" pip install --force-reinstall --only-binary :all: unicorn==2.1.4"
    )


@functools.cache
def repaired_library() -> tuple[UnicornLibrary, NativeCode]:
    """The library with its functions replaced: there is one of it in a process, whatever one does.

    Called before anything is confined, it leaves nothing to be opened later.
    """
    library, native = UnicornLibrary(), NativeCode()
    for slot, function in _CALLED.items():
        native.slot(slot).value = library.address(function)
    _replace_functions(library, native)
    return library, native


class Internals:
    """One CPU of the library, opened and repaired; one at a time in a process."""

    def __init__(self, model: int, translation_bytes: int, *, traps: bool = False) -> None:
        """With ``traps`` the exceptions go to ``python_trap`` (native.S), and not through the guest's IDT."""
        self._library, self.native = repaired_library()
        library = self._library
        if self.native.slot("cpu_state").value:
            raise RuntimeError("this process has an embedded CPU already")
        self.uc = library.open(model, translation_bytes)
        # The library makes the CPU with the first register that is touched.
        self._write_register(uc_library.UC_X86_REG_RSP, 0)
        assert self.uc.value is not None
        self._uc_address = self.uc.value
        self._cs = ctypes.c_uint64.from_address(self._uc_address + _UC_CPU).value
        if not self._cs or self._cs % 8:
            raise _unknown(library, "no CPU where it should be")
        self._env = ctypes.c_uint64.from_address(self._cs + _CS_ENV_PTR).value
        self.verify()
        self.native.slot("cpu_state").value = self._cs
        self.native.slot("cpu_env").value = self._env
        self.native.slot("epilogue").value = self._epilogue()
        #: The general registers by number (rax, rcx, rdx, rbx, …).
        self.registers = (ctypes.c_uint64 * 16).from_address(self._env + _ENV_REGS)
        self.rip = ctypes.c_uint64.from_address(self._env + _ENV_EIP)
        self.eflags = ctypes.c_uint64.from_address(self._env + _ENV_EFLAGS)
        self.halted = ctypes.c_uint32.from_address(self._cs + _CS_HALTED)
        #: CPU_INTERRUPT_HARD (2) here has the CPU look for an interrupt between two blocks …
        self.interrupt_request = ctypes.c_uint32.from_address(self._cs + _CS_INTERRUPT_REQUEST)
        icount_decr = ctypes.c_uint64.from_address(self._cs + _CS_ICOUNT_DECR_PTR).value
        #: … and 0xffff here ends the chain of blocks that it is in.
        self.exit_chain = ctypes.c_uint16.from_address(icount_decr + 2)
        self.jobs_wanted = ctypes.c_uint32.from_address(self.native.address + _PAGE + SLOTS["jobs_wanted"])
        self.msr_value = self.native.slot("value")
        self._suppress_exit_checks()
        self._add_hook(uc_library.UC_HOOK_INTR, "on_trap" if traps else "on_interrupt")
        self._add_hook(uc_library.UC_HOOK_INSN_INVALID, "on_invalid_trap" if traps else "on_invalid")
        self._reset_table()
        invalidate = library.dll.tb_invalidate_phys_range_x86_64
        invalidate.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64)
        invalidate.restype = None
        self._invalidate = invalidate

    @property
    def library(self) -> UnicornLibrary:
        """The library that this CPU is of."""
        return self._library

    @property
    def state_address(self) -> int:
        """Where struct CPUState lies."""
        return self._cs

    @property
    def env_address(self) -> int:
        """Where struct CPUX86State lies."""
        return self._env

    def close(self) -> None:
        """Gives the CPU back; nothing of this object may be used afterwards."""
        self._library.dll.uc_close(self.uc)
        self.native.slot("cpu_state").value = 0

    def verify(self) -> None:
        """Checks every offset used here and in native.S against the documented interface, or LguestError."""
        u64 = ctypes.c_uint64.from_address
        if u64(self._cs + _CS_UC).value != self._uc_address or u64(self._env + _ENV_UC).value != self._uc_address:
            raise _unknown(self._library, "the CPU's structures are laid out differently")
        if u64(self._cs + _CS_ICOUNT_DECR_PTR).value != self._env + _ENV_ICOUNT_DECR:
            raise _unknown(self._library, "what asks for the CPU's attention is elsewhere")
        context = u64(self._uc_address + _UC_TCG_CTX).value
        # cpu_env is not where it lies but how far from the context, as all that is translated about is.
        if u64(context + _TCG_UC).value != self._uc_address or not 0 < u64(context + _TCG_ENV).value < _TCG_ENV:
            raise _unknown(self._library, "the translator's structures are laid out differently")
        magic = 0x5A17_0000_1000_0000
        checks: list[tuple[int, int, int]] = []
        for number, register in enumerate(_GENERAL_REGISTERS):
            self._write_register(register, magic + number)
            checks.append((self._env + _ENV_REGS + 8 * number, magic + number, 0))
        for index, offset in ((0xC000_0081, _ENV_STAR), (0xC000_0082, _ENV_LSTAR), (0xC000_0083, _ENV_CSTAR)):
            self.write_msr(index, magic + offset)
            checks.append((self._env + offset, magic + offset, index))
        self.write_msr(0xC000_0084, 0x47700)
        checks.append((self._env + _ENV_FMASK, 0x47700, 0xC000_0084))
        self._write_register(uc_library.UC_X86_REG_RFLAGS, 0x3202)
        checks.append((self._env + _ENV_EFLAGS, 0x3202, 0))
        for address, value, _ in checks:
            if u64(address).value != value:
                raise _unknown(self._library, f"a register is not at {address - self._env:#x}")
        if u64(self._env + _ENV_EFER).value & 0x500 != 0x500:
            raise _unknown(self._library, "EFER is elsewhere")
        for register in _GENERAL_REGISTERS:
            self._write_register(register, 0)
        for _, _, index in checks:
            if index:
                self.write_msr(index, 0)
        self._write_register(uc_library.UC_X86_REG_RFLAGS, 2)

    def _reset_table(self) -> None:
        """What a CPU before this one may have left in the table."""
        slot = self.native.slot
        #: Is never 0, so what lies there says that interrupts are wanted.
        self.open_gate = self.native.address + _PAGE + SLOTS["gate"]
        slot("gate").value = self.open_gate
        slot("physical_limit").value = (1 << 64) - 1
        for name in ("delivering", "beyond", "jobs_wanted", "blocks"):
            slot(name).value = 0

    def _epilogue(self) -> int:
        # helper_lookup_tb_ptr ends with it: mov 0x300(%r12), %rax … mov 0x98(%rax), %rax.
        code = ctypes.string_at(self._library.address("helper_lookup_tb_ptr_x86_64"), 0xE0)
        context = b"\x49\x8b\x84\x24" + _UC_TCG_CTX.to_bytes(4, "little")
        epilogue = b"\x48\x8b\x80" + _TCG_CODE_GEN_EPILOGUE.to_bytes(4, "little")
        if not 0 <= code.find(context) < code.find(epilogue):
            raise _unknown(self._library, "code_gen_epilogue is not where it was")
        tcg_context = ctypes.c_uint64.from_address(self._uc_address + _UC_TCG_CTX).value
        return ctypes.c_uint64.from_address(tcg_context + _TCG_CODE_GEN_EPILOGUE).value

    def _suppress_exit_checks(self) -> None:
        # check_exit_request(tcg_ctx) begins by looking at uc->no_exit_request: cmpb $0, disp32(%rsi).
        code = ctypes.string_at(self._library.address(_UC_NO_EXIT_REQUEST_CHECK), 14)
        if code[7:9] != b"\x80\xbe" or code[13] != 0:
            raise _unknown(self._library, "no_exit_request is not where it was")
        offset = int.from_bytes(code[9:13], "little")
        flag = ctypes.c_uint8.from_address(self._uc_address + offset)
        if flag.value != 0:
            raise _unknown(self._library, "no_exit_request has another value than expected")
        flag.value = 1

    def _add_hook(self, kind: int, entry: str) -> None:
        handle = ctypes.c_size_t()
        error = self._library.dll.uc_hook_add(
            self.uc, ctypes.byref(handle), kind, self.native.entry(entry), self._cs, 1, 0
        )
        self._library.check(error, f"uc_hook_add {kind}")

    def _write_register(self, register: int, value: int) -> None:
        error = self._library.dll.uc_reg_write(self.uc, register, ctypes.byref(ctypes.c_uint64(value)))
        self._library.check(error, f"uc_reg_write {register}")

    def function(self, name: str, result: Any, *arguments: Any) -> Any:
        """A function of the library's CPU that is short and calls nobody back: the interpreter's lock is kept."""
        return ctypes.PYFUNCTYPE(result, *arguments)(self._library.address(f"{name}_x86_64"))

    def write_register(self, register: int, value: int) -> None:
        """Sets a register by its UC_X86_REG number, with all that follows from it."""
        self._write_register(register, value)

    def write_msr(self, index: int, value: int) -> None:
        """Sets a model-specific register, as WRMSR would."""
        msr = uc_library.MsrValue(index, value)
        error = self._library.dll.uc_reg_write(self.uc, uc_library.UC_X86_REG_MSR, ctypes.byref(msr))
        self._library.check(error, f"MSR {index:#x}")

    def write_gdtr(self, base: int, limit: int) -> None:
        """LGDT."""
        gdtr = uc_library.TableRegister(0, base, limit, 0)
        error = self._library.dll.uc_reg_write(self.uc, uc_library.UC_X86_REG_GDTR, ctypes.byref(gdtr))
        self._library.check(error, "GDTR")

    def forget_code(self, first_page: int, last_page: int) -> None:
        """Drops the translations of whole pages of RAM. Whole pages: an invalidated part would clear the page's
        mark while translations of its other parts live on.
        """
        self._invalidate(self._uc_address, first_page * _PAGE, (last_page + 1) * _PAGE)
