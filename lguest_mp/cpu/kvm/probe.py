r"""Whether this host's KVM can run a stock kernel, found out in a few milliseconds.

A ``/dev/kvm`` that opens is not yet one to use. There are hosts, virtual machines themselves mostly, whose KVM has no
hardware under it: it runs the guest's user mode directly and interprets every instruction of its kernel in software.
A stock kernel there soon meets an instruction that this interpreter lacks; and if it did not, it would take minutes.

So a guest of a few bytes is run that does, at privilege level 0, what every kernel does early: it exchanges 16 bytes,
takes an exception and returns from it, and counts to 100,000, which is to take no longer than :data:`_PATIENCE` (a
processor takes 0.05 ms, an interpreter far longer). If its last word comes out of the right port, the answer is yes.

What the engine needs of KVM besides is asked for first.
"""

from __future__ import annotations

import mmap
import signal
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from ctypes import addressof, c_char
from types import FrameType

from lguest_mp.cpu.engine import EntryState
from lguest_mp.cpu.kvm import registers
from lguest_mp.cpu.kvm.api import Cap, Exit, Kvm, Run, Vcpu
from lguest_mp.errors import LguestError

#: What :class:`lguest_mp.cpu.kvm.engine.KvmEngine` cannot do without.
NEEDED = (
    Cap.IRQFD,
    Cap.IOEVENTFD,
    Cap.IOEVENTFD_ANY_LENGTH,
    Cap.SIGNAL_MSI,
    Cap.SPLIT_IRQCHIP,
    Cap.IMMEDIATE_EXIT,
    Cap.TSC_DEADLINE_TIMER,
)
#: How long the guest may take, seconds.
_PATIENCE = 0.1

_SIZE = 0x8000
_PAGE_TABLES, _GDT, _IDT, _CODE, _STACK = 0x1000, 0x4000, 0x5000, 0x6000, 0x8000
_HANDLER = _CODE + 0x40
_BREAKPOINT = 3
_LAST_WORD = 0x10

_GUEST = bytes.fromhex(
    "31 c0  31 d2  31 db"  #   xor eax, eax; xor edx, edx; xor ebx, ebx
    "f0 48 0f c7 0c 25 00700000"  # lock cmpxchg16b [0x7000]
    "cc"  #                    int3
    "b9 a0860100"  #           mov ecx, 100000
    "ff c9"  #              1: dec ecx
    "75 fc"  #                 jnz 1b
    "e6 10"  #                 out 0x10, al
    "f4"  #                    hlt
)
_IRETQ = bytes.fromhex("48 cf")


def judge(fd: int) -> str | None:
    """Why the KVM behind ``fd`` is not to be used for a stock kernel; None: it is."""
    try:
        kvm = Kvm(fd)
        missing = [capability.name for capability in NEEDED if not kvm.check(capability)]
        if missing:
            return f"it has no {', '.join(missing)}; Linux 4.12 has"
        return _try(kvm)
    except LguestError as error:
        return str(error)


def _try(kvm: Kvm) -> str | None:
    memory = mmap.mmap(-1, _SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _fill(memory)
    with closing(kvm.create_vm()) as vm:
        vm.set_tss_addr(0xFFFB_D000)
        vm.set_memory(0, 0, _SIZE, addressof(c_char.from_buffer(memory)))
        with closing(vm.create_vcpu(0)) as vcpu:
            vcpu.set_cpuid(kvm.supported_cpuid())
            registers.enter(vcpu, EntryState(_CODE, 0, _PAGE_TABLES, _GDT, 0x1F))
            system = vcpu.get_system_registers()
            system.idt.base, system.idt.limit = _IDT, 0xFFF
            vcpu.set_system_registers(system)
            general = vcpu.get_registers()
            general.rsp = _STACK
            vcpu.set_registers(general)
            with _alarm(_PATIENCE):
                finished = vcpu.run()
            return _verdict(vcpu, finished=finished)


def _verdict(vcpu: Vcpu, *, finished: bool) -> str | None:
    if not finished:
        return "it interprets guest kernels instead of running them, which takes too long"
    (reason,) = Run.EXIT_REASON.unpack_from(vcpu.state)
    if reason == Exit.IO and Run.PORT.unpack_from(vcpu.state, Run.UNION)[2] == _LAST_WORD:
        return None
    rip = vcpu.get_registers().rip
    return f"it interprets guest kernels, and lacks instructions of theirs (exit {reason} at {rip - _CODE:#x})"


def _fill(memory: mmap.mmap) -> None:
    """The first 2 MiB mapped to themselves, a GDT, a gate for the breakpoint, the code."""

    def put(address: int, data: bytes) -> None:
        memory[address : address + len(data)] = data

    put(_PAGE_TABLES, struct.pack("<Q", _PAGE_TABLES + 0x1003))
    put(_PAGE_TABLES + 0x1000, struct.pack("<Q", _PAGE_TABLES + 0x2003))
    put(_PAGE_TABLES + 0x2000, struct.pack("<Q", 0x83))
    put(_GDT, struct.pack("<4Q", 0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF))
    gate = _HANDLER & 0xFFFF | 0x10 << 16 | 0x8E << 40 | _HANDLER >> 16 << 48
    put(_IDT + 16 * _BREAKPOINT, struct.pack("<QQ", gate, 0))
    put(_CODE, _GUEST)
    put(_HANDLER, _IRETQ)


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Interrupts this thread's system call after a while, and again, lest it came too early for the first."""

    def ignore(_number: int, _frame: FrameType | None) -> None:
        pass

    before = signal.signal(signal.SIGALRM, ignore)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
