"""What CPUID says of the machine around the CPU: a KVM guest with a local APIC, told its clocks.

The engine says what its CPU can execute; only what belongs to the platform is changed here. KVM's signature is the one
by which every Linux finds a paravirtual clock and skips the calibration of timers that this machine does not have.
"""

from __future__ import annotations

from typing import Protocol

from lguest_mp.cpu.engine import CpuidResult
from lguest_mp.machine.lapic import BUS_HZ

#: Leaf 1: ECX and EDX (SDM 2A, CPUID).
_X2APIC = 1 << 21
_TSC_DEADLINE = 1 << 24
_HYPERVISOR = 1 << 31
_APIC = 1 << 9
_HTT = 1 << 28
#: Leaf 6, EAX: the APIC's timer runs in every sleep state.
_ARAT = 1 << 2
#: Leaf 0x80000001, ECX: AMD's extended APIC registers.
_EXTAPIC = 1 << 3
#: Leaf 0x80000007, EDX. Without it Linux prefers the paravirtual clock, which follows the host's, to the bare counter.
_INVARIANT_TSC = 1 << 8

_HYPERVISOR_LEAF = 0x4000_0000
_TIMING_LEAF = 0x4000_0010
_SIGNATURE = b"KVMKVMKVM\0\0\0"
#: KVM_FEATURE_NOP_IO_DELAY, KVM_FEATURE_CLOCKSOURCE2, KVM_FEATURE_CLOCKSOURCE_STABLE_BIT.
_FEATURES = 1 << 1 | 1 << 3 | 1 << 24


class TscFrequency(Protocol):
    """Who knows the frequency of the time stamp counter."""

    @property
    def tsc_khz(self) -> int: ...


def cpuid(leaf: int, subleaf: int, native: CpuidResult, clock: TscFrequency) -> CpuidResult:  # noqa: PLR0911 -- a table
    """The answer to CPUID, given the engine's own."""
    eax, ebx, ecx, edx = native
    match leaf:
        case 0:
            return max(eax, 0xB), ebx, ecx, edx
        case 1:
            # One logical processor, whose APIC ID is 0.
            ecx = (ecx | _HYPERVISOR | _TSC_DEADLINE) & ~_X2APIC
            return eax, ebx & 0xFFFF | 1 << 16, ecx, (edx | _APIC) & ~_HTT
        case 6:
            return eax | _ARAT, ebx, ecx, edx
        case 0xB:
            # Level 0 is threads, level 1 cores; there is one of each (ECX: level type and number).
            level_type = {0: 1, 1: 2}.get(subleaf, 0)
            return 0, int(level_type > 0), level_type << 8 | subleaf & 0xFF, 0
        case 0x8000_0001:
            return eax, ebx, ecx & ~_EXTAPIC, edx
        case 0x8000_0007:
            return eax, ebx, ecx, edx & ~_INVARIANT_TSC
        case 0x4000_0000:
            return _TIMING_LEAF, _word(0), _word(4), _word(8)
        case 0x4000_0001:
            return _FEATURES, 0, 0, 0
        case 0x4000_0010:
            return clock.tsc_khz, BUS_HZ // 1000, 0, 0
        case _ if _HYPERVISOR_LEAF <= leaf <= _TIMING_LEAF:
            return 0, 0, 0, 0
    return native


def _word(offset: int) -> int:
    return int.from_bytes(_SIGNATURE[offset : offset + 4], "little")
