"""``/dev/kvm`` from Python: its requests, its structures, and a thin class for each kind of its file descriptors.

There is one file for the whole (:class:`Kvm`), one for each virtual machine (:class:`Vm`), one for each of its
processors (:class:`Vcpu`). Each request is an ioctl(2) whose number is made of its direction, its number and the size
of its argument, as the kernel's headers make it; nobody else in this package knows any. Constants have the names of
uapi/linux/kvm.h and uapi/asm/kvm.h, structures say which one they are, methods are what Documentation/virt/kvm/api.rst
tells of the request after which they are called.

A machine belongs to the process that makes it: Linux refuses it to any other, a fork too.

``fcntl.ioctl`` takes an int for an argument, which addresses do not fit, so the calls are libc's, by ctypes, which lets
other threads run meanwhile. Whatever fails is a :class:`KvmError`.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Sequence
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64
from enum import IntEnum

from lguest_mp.errors import LguestError

PATH = "/dev/kvm"
#: The one version of the interface there has been since Linux 2.6.22.
KVM_API_VERSION = 12


class KvmError(LguestError):
    """A request failed; ``errno`` is the host's."""

    def __init__(self, what: str, error: int) -> None:
        super().__init__(f"{PATH}: {what}: {os.strerror(error)}")
        self.errno = error


# ---- Structures ----


class UserspaceMemoryRegion(ctypes.Structure):
    """struct kvm_userspace_memory_region."""

    _fields_ = (
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    )


GENERAL_REGISTERS = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags"),
)


class Registers(ctypes.Structure):
    """struct kvm_regs."""

    _fields_ = tuple((name, c_uint64) for name in GENERAL_REGISTERS)


class Segment(ctypes.Structure):
    """struct kvm_segment."""

    _fields_ = (
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        *((name, c_uint8) for name in ("type", "present", "dpl", "db", "s", "l", "g", "avl", "unusable", "padding")),
    )


class DescriptorTable(ctypes.Structure):
    """struct kvm_dtable."""

    _fields_ = (("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3))


class SystemRegisters(ctypes.Structure):
    """struct kvm_sregs."""

    _fields_ = (
        *((name, Segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        ("gdt", DescriptorTable),
        ("idt", DescriptorTable),
        *((name, c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", c_uint64 * 4),
    )


class CpuidEntry(ctypes.Structure):
    """struct kvm_cpuid_entry2."""

    _fields_ = (
        ("function", c_uint32),
        ("index", c_uint32),
        ("flags", c_uint32),
        ("eax", c_uint32),
        ("ebx", c_uint32),
        ("ecx", c_uint32),
        ("edx", c_uint32),
        ("padding", c_uint32 * 3),
    )


class _CpuidHeader(ctypes.Structure):
    """struct kvm_cpuid2, without its entries."""

    _fields_ = (("nent", c_uint32), ("padding", c_uint32))


class _MsrEntry(ctypes.Structure):
    """struct kvm_msr_entry."""

    _fields_ = (("index", c_uint32), ("reserved", c_uint32), ("data", c_uint64))


class _OneMsr(ctypes.Structure):
    """struct kvm_msrs with one entry."""

    _fields_ = (("nmsrs", c_uint32), ("pad", c_uint32), ("entry", _MsrEntry))


class _MpState(ctypes.Structure):
    """struct kvm_mp_state."""

    _fields_ = (("mp_state", c_uint32),)


class _EnableCap(ctypes.Structure):
    """struct kvm_enable_cap."""

    _fields_ = (("cap", c_uint32), ("flags", c_uint32), ("args", c_uint64 * 4), ("pad", c_uint8 * 64))


class _Msi(ctypes.Structure):
    """struct kvm_msi."""

    _fields_ = (
        ("address_lo", c_uint32),
        ("address_hi", c_uint32),
        ("data", c_uint32),
        ("flags", c_uint32),
        ("devid", c_uint32),
        ("pad", c_uint8 * 12),
    )


class _Irqfd(ctypes.Structure):
    """struct kvm_irqfd."""

    _fields_ = (
        ("fd", c_uint32),
        ("gsi", c_uint32),
        ("flags", c_uint32),
        ("resamplefd", c_uint32),
        ("pad", c_uint8 * 16),
    )


class _Ioeventfd(ctypes.Structure):
    """struct kvm_ioeventfd."""

    _fields_ = (
        ("datamatch", c_uint64),
        ("addr", c_uint64),
        ("len", c_uint32),
        ("fd", ctypes.c_int32),
        ("flags", c_uint32),
        ("pad", c_uint8 * 36),
    )


class _RoutingEntry(ctypes.Structure):
    """struct kvm_irq_routing_entry, of type KVM_IRQ_ROUTING_MSI (struct kvm_irq_routing_msi)."""

    _fields_ = (
        ("gsi", c_uint32),
        ("type", c_uint32),
        ("flags", c_uint32),
        ("pad", c_uint32),
        ("address_lo", c_uint32),
        ("address_hi", c_uint32),
        ("data", c_uint32),
        ("devid", c_uint32),
        ("rest", c_uint32 * 4),
    )


class _RoutingHeader(ctypes.Structure):
    """struct kvm_irq_routing, without its entries."""

    _fields_ = (("nr", c_uint32), ("flags", c_uint32))


# ---- Numbers ----

_KVMIO = 0xAE


def _io(number: int) -> int:
    return _KVMIO << 8 | number


def _iow(number: int, argument: type[ctypes.Structure | c_uint64]) -> int:
    return 1 << 30 | ctypes.sizeof(argument) << 16 | _io(number)


def _ior(number: int, argument: type[ctypes.Structure]) -> int:
    return 2 << 30 | ctypes.sizeof(argument) << 16 | _io(number)


def _iowr(number: int, argument: type[ctypes.Structure]) -> int:
    return 3 << 30 | ctypes.sizeof(argument) << 16 | _io(number)


# /dev/kvm itself
KVM_GET_API_VERSION = _io(0x00)
KVM_CREATE_VM = _io(0x01)
KVM_CHECK_EXTENSION = _io(0x03)
KVM_GET_VCPU_MMAP_SIZE = _io(0x04)
KVM_GET_SUPPORTED_CPUID = _iowr(0x05, _CpuidHeader)
# A virtual machine
KVM_CREATE_VCPU = _io(0x41)
KVM_SET_USER_MEMORY_REGION = _iow(0x46, UserspaceMemoryRegion)
KVM_SET_TSS_ADDR = _io(0x47)
KVM_SET_IDENTITY_MAP_ADDR = _iow(0x48, c_uint64)
KVM_SET_GSI_ROUTING = _iow(0x6A, _RoutingHeader)
KVM_IRQFD = _iow(0x76, _Irqfd)
KVM_IOEVENTFD = _iow(0x79, _Ioeventfd)
KVM_ENABLE_CAP = _iow(0xA3, _EnableCap)
KVM_SIGNAL_MSI = _iow(0xA5, _Msi)
# A virtual processor
KVM_RUN = _io(0x80)
KVM_GET_REGS = _ior(0x81, Registers)
KVM_SET_REGS = _iow(0x82, Registers)
KVM_GET_SREGS = _ior(0x83, SystemRegisters)
KVM_SET_SREGS = _iow(0x84, SystemRegisters)
KVM_GET_MSRS = _iowr(0x88, _CpuidHeader)  # struct kvm_msrs, without its entries, is as large
KVM_SET_MSRS = _iow(0x89, _CpuidHeader)
KVM_SET_CPUID2 = _iow(0x90, _CpuidHeader)
KVM_GET_MP_STATE = _ior(0x98, _MpState)
KVM_GET_TSC_KHZ = _io(0xA3)

KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1 << 0
KVM_IRQ_ROUTING_MSI = 2
KVM_IRQFD_FLAG_DEASSIGN = 1 << 0
KVM_IOEVENTFD_FLAG_DEASSIGN = 1 << 2
KVM_MP_STATE_UNINITIALIZED = 1
KVM_MP_STATE_HALTED = 3
KVM_EXIT_IO_OUT = 1
KVM_INTERNAL_ERROR_EMULATION = 1


class Cap(IntEnum):
    """What a host's KVM may be able to do (KVM_CAP_*)."""

    NR_VCPUS = 9
    IRQFD = 32
    IOEVENTFD = 36
    MAX_VCPUS = 66
    TSC_DEADLINE_TIMER = 72
    SIGNAL_MSI = 77
    SPLIT_IRQCHIP = 121
    IOEVENTFD_ANY_LENGTH = 122
    IMMEDIATE_EXIT = 136


class Exit(IntEnum):
    """Why KVM_RUN has returned (KVM_EXIT_*)."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    SET_TPR = 11
    TPR_ACCESS = 12
    NMI = 16
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24
    IOAPIC_EOI = 26


class Run:
    """struct kvm_run: where in it is what. ``PORT`` and the others are the exits' own parts, at ``UNION``."""

    IMMEDIATE_EXIT = 1
    EXIT_REASON = struct.Struct("<8xI")
    IF_FLAG = 13
    UNION = 32
    #: direction, size, port, count, data_offset.
    PORT = struct.Struct("<BBHIQ")
    #: phys_addr, data, len, is_write.
    MMIO = struct.Struct("<Q8sIB")
    MMIO_DATA = UNION + 8
    #: suberror, ndata (of the 16 words after them).
    INTERNAL = struct.Struct("<II")
    #: hardware_entry_failure_reason, or hardware_exit_reason.
    HARDWARE = struct.Struct("<Q")
    #: type.
    SYSTEM_EVENT = struct.Struct("<I")


# ---- The calls ----

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)


def _ioctl(fd: int, request: int, argument: int | ctypes.Structure | ctypes.Array[ctypes.c_char], what: str) -> int:
    """``argument``: a number, or what the host is to read and write."""
    place = argument if isinstance(argument, int) else ctypes.addressof(argument)
    result: int = _libc.ioctl(fd, request, place)
    if result < 0:
        raise KvmError(what, ctypes.get_errno())
    return result


def _split(address: int) -> tuple[int, int]:
    return address & 0xFFFF_FFFF, address >> 32


def open_device(path: str = PATH) -> int:
    """Opens the device: its file descriptor, not inherited across exec. OSError."""
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


class Kvm:
    """The host's KVM, behind ``fd``."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        version = _ioctl(fd, KVM_GET_API_VERSION, 0, "asking for its version")
        if version != KVM_API_VERSION:
            raise LguestError(f"{PATH} has interface version {version}, not {KVM_API_VERSION}")

    def check(self, capability: Cap) -> int:
        """How much of it there is; 0: it is not there."""
        return _ioctl(self.fd, KVM_CHECK_EXTENSION, capability, f"asking for {capability.name}")

    def supported_cpuid(self) -> list[CpuidEntry]:
        """What CPUID may say, on this host."""
        size = 128
        while True:
            table = _cpuid_table([CpuidEntry() for _ in range(size)])
            try:
                _ioctl(self.fd, KVM_GET_SUPPORTED_CPUID, table, "reading what CPUID may say")
            except KvmError as error:
                if error.errno != errno.E2BIG or size > 4096:
                    raise
                size *= 2
                continue
            header = _CpuidHeader.from_buffer(table)
            return list((CpuidEntry * header.nent).from_buffer(table, ctypes.sizeof(_CpuidHeader)))

    def create_vm(self) -> Vm:
        """A machine without anything in it."""
        return Vm(self, _ioctl(self.fd, KVM_CREATE_VM, 0, "making a virtual machine"))


def _cpuid_table(entries: Sequence[CpuidEntry]) -> ctypes.Array[ctypes.c_char]:
    """The entries as struct kvm_cpuid2."""
    header = _CpuidHeader(nent=len(entries))
    data = bytes(header) + b"".join(map(bytes, entries))
    return ctypes.create_string_buffer(data, len(data))


class Vm:
    """A virtual machine."""

    def __init__(self, kvm: Kvm, fd: int) -> None:
        self._kvm = kvm
        self.fd = fd

    def split_irqchip(self, pins: int) -> None:
        """Has KVM be the processors' local APICs. Routes 0 to ``pins`` - 1 are kept for an I/O APIC outside of it.

        Before any processor is made.
        """
        cap = _EnableCap(cap=Cap.SPLIT_IRQCHIP)
        cap.args[0] = pins
        _ioctl(self.fd, KVM_ENABLE_CAP, cap, "making local APICs")

    def set_tss_addr(self, address: int) -> None:
        """Three guest-physical pages of nobody's that Intel's processors need for real mode."""
        _ioctl(self.fd, KVM_SET_TSS_ADDR, address, "placing the TSS")

    def set_identity_map_addr(self, address: int) -> None:
        """One more of those."""
        place = ctypes.create_string_buffer(struct.pack("<Q", address), 8)
        _ioctl(self.fd, KVM_SET_IDENTITY_MAP_ADDR, place, "placing the identity map")

    def set_memory(self, slot: int, guest_address: int, size: int, address: int) -> None:
        """``size`` bytes at ``address`` of this process are the guest's RAM at ``guest_address``."""
        region = UserspaceMemoryRegion(slot, 0, guest_address, size, address)
        _ioctl(self.fd, KVM_SET_USER_MEMORY_REGION, region, f"giving it {size >> 20} MiB of memory")

    def create_vcpu(self, number: int) -> Vcpu:
        """A processor whose APIC ID is ``number``."""
        fd = _ioctl(self.fd, KVM_CREATE_VCPU, number, f"making processor {number}")
        return Vcpu(fd, _ioctl(self._kvm.fd, KVM_GET_VCPU_MMAP_SIZE, 0, "asking for a processor's size"))

    def set_gsi_routing(self, routes: Sequence[tuple[int, int, int]]) -> None:
        """Which messages interrupts are: all ``(gsi, address, data)`` there are from now on."""
        entries = []
        for gsi, address, data in routes:
            low, high = _split(address)
            entries.append(bytes(_RoutingEntry(gsi, KVM_IRQ_ROUTING_MSI, address_lo=low, address_hi=high, data=data)))
        table = bytes(_RoutingHeader(nr=len(entries))) + b"".join(entries)
        _ioctl(self.fd, KVM_SET_GSI_ROUTING, ctypes.create_string_buffer(table, len(table)), "routing interrupts")

    def irqfd(self, eventfd: int, gsi: int, *, assign: bool) -> None:
        """Whether a write to ``eventfd`` is interrupt ``gsi``. One that was written before is one at once."""
        request = _Irqfd(fd=eventfd, gsi=gsi, flags=0 if assign else KVM_IRQFD_FLAG_DEASSIGN)
        _ioctl(self.fd, KVM_IRQFD, request, "joining an eventfd to an interrupt")

    def ioeventfd(self, eventfd: int, address: int, *, assign: bool) -> None:
        """Whether the guest's stores to ``address``, of any length and value, do nothing but add 1 to ``eventfd``."""
        request = _Ioeventfd(addr=address, fd=eventfd, flags=0 if assign else KVM_IOEVENTFD_FLAG_DEASSIGN)
        _ioctl(self.fd, KVM_IOEVENTFD, request, f"joining address {address:#x} to an eventfd")

    def signal_msi(self, address: int, data: int) -> bool:
        """A message-signalled interrupt; False: no processor took it."""
        low, high = _split(address)
        return _ioctl(self.fd, KVM_SIGNAL_MSI, _Msi(low, high, data), "sending an interrupt") > 0

    def close(self) -> None:
        """Lets go of it; it ends when its processors are closed, too."""
        os.close(self.fd)


class Vcpu:
    """A virtual processor. Everything but :meth:`leave_soon` is for one thread at a time."""

    def __init__(self, fd: int, run_size: int) -> None:
        self.fd = fd
        #: struct kvm_run (see :class:`Run`).
        self.state = mmap.mmap(fd, run_size)

    def run(self) -> bool:
        """Executes the guest until there is something to do for it, which ``state`` says then; False: nothing is.

        That happens at signals, after :meth:`leave_soon`, and while the processor waits to be started.
        """
        if _libc.ioctl(self.fd, KVM_RUN, None) == 0:
            return True
        error = ctypes.get_errno()
        if error in {errno.EINTR, errno.EAGAIN}:
            return False
        raise KvmError("running the guest", error)

    def leave_soon(self, *, wanted: bool) -> None:
        """Whether run() is to return at once when it is called next. From any thread."""
        self.state[Run.IMMEDIATE_EXIT] = wanted

    def get_registers(self) -> Registers:
        """The general ones."""
        registers = Registers()
        _ioctl(self.fd, KVM_GET_REGS, registers, "reading registers")
        return registers

    def set_registers(self, registers: Registers) -> None:
        """All of them."""
        _ioctl(self.fd, KVM_SET_REGS, registers, "setting registers")

    def get_system_registers(self) -> SystemRegisters:
        """Segments, control registers and the like."""
        registers = SystemRegisters()
        _ioctl(self.fd, KVM_GET_SREGS, registers, "reading system registers")
        return registers

    def set_system_registers(self, registers: SystemRegisters) -> None:
        """All of them."""
        _ioctl(self.fd, KVM_SET_SREGS, registers, "setting system registers")

    def set_cpuid(self, entries: Sequence[CpuidEntry]) -> None:
        """What CPUID says."""
        _ioctl(self.fd, KVM_SET_CPUID2, _cpuid_table(entries), "setting CPUID")

    def get_msr(self, index: int) -> int | None:
        """A model-specific register; None: this processor does not have it."""
        one = _OneMsr(nmsrs=1, entry=_MsrEntry(index))
        done = _ioctl(self.fd, KVM_GET_MSRS, one, f"reading MSR {index:#x}")
        return int(one.entry.data) if done else None

    def set_msr(self, index: int, value: int) -> bool:
        """Writes one; False: this processor does not have it, or not with that value."""
        one = _OneMsr(nmsrs=1, entry=_MsrEntry(index, 0, value))
        return _ioctl(self.fd, KVM_SET_MSRS, one, f"writing MSR {index:#x}") == 1

    def mp_state(self) -> int:
        """Whether it runs, sleeps, or was not started yet (KVM_MP_STATE_*)."""
        state = _MpState()
        _ioctl(self.fd, KVM_GET_MP_STATE, state, "asking what a processor does")
        return int(state.mp_state)

    def tsc_khz(self) -> int:
        """The frequency of its time stamp counter."""
        return _ioctl(self.fd, KVM_GET_TSC_KHZ, 0, "asking for the TSC's frequency")

    def close(self) -> None:
        """Ends it."""
        self.state.close()
        os.close(self.fd)
