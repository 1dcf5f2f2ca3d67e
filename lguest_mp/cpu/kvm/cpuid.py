"""What CPUID says on KVM: what the host's processor and KVM can do, in a machine of one socket.

KVM says what it supports, but in the words of the host: whoever asks for the processor's number, its caches and its
neighbours gets the host's answer. So here is a machine with ``count`` cores of one thread each, in one package, with
the last level of cache in common, whose APIC IDs count from 0.

As on the embedded CPU, the time stamp counter is not called invariant, so that Linux prefers the clock that follows the
host's (it then reads it without leaving the guest, too), and the frequencies are told.

Source: Intel SDM 2A, CPUID; AMD APM 3, appendix E; the kernel's Documentation/virt/kvm/x86/cpuid.rst.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lguest_mp.cpu.kvm.api import KVM_CPUID_FLAG_SIGNIFCANT_INDEX, CpuidEntry

#: KVM's local APIC counts nanoseconds before it divides; kHz.
APIC_BUS_KHZ = 1_000_000

#: Leaf 1: ECX and EDX.
_TSC_DEADLINE = 1 << 24
_HYPERVISOR = 1 << 31
_APIC = 1 << 9
_HTT = 1 << 28
#: Leaf 0x80000007, EDX.
_INVARIANT_TSC = 1 << 8

#: Leaf 0: EBX of those whose leaf 0x80000008 tells of cores ("Auth", "Hygo").
_AMD = frozenset({0x6874_7541, 0x6F67_7948})

_TOPOLOGY_LEAF = 0xB
_TOPOLOGY_LEAVES = frozenset({_TOPOLOGY_LEAF, 0x1F})
_LAST_LEVEL = 3
_TIMING_LEAF = 0x4000_0010


def entries(supported: Sequence[CpuidEntry], number: int, count: int, tsc_khz: int) -> list[CpuidEntry]:
    """The table for processor ``number`` of ``count``."""
    is_amd = any(entry.function == 0 and entry.ebx in _AMD for entry in supported)
    table = []
    for original in supported:
        if original.function in _TOPOLOGY_LEAVES or original.function == _TIMING_LEAF:
            continue
        entry = CpuidEntry.from_buffer_copy(original)
        _adapt(entry, number, count, is_amd=is_amd)
        table.append(entry)
    table += _topology(number, count)
    table.append(CpuidEntry(_TIMING_LEAF, eax=tsc_khz, ebx=APIC_BUS_KHZ))
    return table


def _adapt(entry: CpuidEntry, number: int, count: int, *, is_amd: bool) -> None:
    match entry.function:
        case 0:
            entry.eax = max(entry.eax, _TOPOLOGY_LEAF)
        case 1:
            entry.ebx = entry.ebx & 0xFFFF | min(count, 0xFF) << 16 | (number & 0xFF) << 24
            entry.ecx |= _HYPERVISOR | _TSC_DEADLINE
            entry.edx = (entry.edx | _APIC) & ~_HTT | (_HTT if count > 1 else 0)
        case 4 if entry.eax & 0x1F:
            entry.eax = _cache(entry.eax, count) | min(count - 1, 0x3F) << 26
        case 0x4000_0000:
            entry.eax = _TIMING_LEAF
        case 0x8000_0007:
            entry.edx &= ~_INVARIANT_TSC
        case 0x8000_0008 if is_amd:
            entry.ecx = min(count - 1, 0xFF) | _id_bits(count) << 12
        case 0x8000_001D if entry.eax & 0x1F:
            entry.eax = _cache(entry.eax, count)
        case 0x8000_001E:
            entry.eax, entry.ebx, entry.ecx = number, number & 0xFF, 0


def _cache(eax: int, count: int) -> int:
    """What leaves 4 and 0x8000001d say of a cache: its kind as it was, and how many processors it is for."""
    level = eax >> 5 & 7
    sharing = count if level >= _LAST_LEVEL else 1
    return eax & 0x3FFF | min(sharing - 1, 0xFFF) << 14


def _topology(number: int, count: int) -> Iterator[CpuidEntry]:
    """Leaf 0xb: level 0 is threads, level 1 cores."""
    flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX
    yield CpuidEntry(_TOPOLOGY_LEAF, 0, flags, 0, 1, 1 << 8, number)
    yield CpuidEntry(_TOPOLOGY_LEAF, 1, flags, _id_bits(count), count, 2 << 8 | 1, number)


def _id_bits(count: int) -> int:
    """How many bits of the APIC ID tell the cores apart."""
    return (count - 1).bit_length()
