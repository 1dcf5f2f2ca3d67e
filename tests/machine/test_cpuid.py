"""What CPUID says of the platform."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lguest_mp.machine.cpuid import cpuid

NOTHING = (0, 0, 0, 0)
ALL = (0xFFFF_FFFF,) * 4


@dataclass(frozen=True)
class Frequency:
    tsc_khz: int = 2_596_144


def ask(leaf: int, subleaf: int = 0, native: tuple[int, int, int, int] = NOTHING) -> tuple[int, int, int, int]:
    return cpuid(leaf, subleaf, native, Frequency())


@pytest.mark.parametrize("native", [NOTHING, ALL])
def test_there_is_a_local_apic_with_tsc_deadline_no_x2apic_and_a_hypervisor(
    native: tuple[int, int, int, int],
) -> None:
    _, ebx, ecx, edx = ask(1, 0, native)
    assert edx >> 9 & 1
    assert (ecx >> 24 & 1, ecx >> 21 & 1, ecx >> 31 & 1) == (1, 0, 1)
    # One logical processor, APIC ID 0.
    assert ebx >> 16 == 1
    assert edx >> 28 & 1 == 0


def test_the_hypervisor_is_kvm_with_its_clock() -> None:
    eax, ebx, ecx, edx = ask(0x4000_0000)
    assert struct.pack("<III", ebx, ecx, edx) == b"KVMKVMKVM\0\0\0"
    assert eax >= 0x4000_0010
    assert ask(0x4000_0001) == (1 << 1 | 1 << 3 | 1 << 24, 0, 0, 0)


def test_the_frequencies_are_told() -> None:
    assert ask(0x4000_0010) == (2_596_144, 1_000_000, 0, 0)


def test_the_bare_counter_is_not_called_invariant_and_the_timer_always_runs() -> None:
    assert ask(0x8000_0007, 0, ALL)[3] == 0xFFFF_FEFF
    assert ask(6)[0] & 4


@pytest.mark.parametrize(("subleaf", "expected"), [(0, (0, 1, 0x100, 0)), (1, (0, 1, 0x201, 0)), (2, (0, 0, 2, 0))])
def test_the_topology_is_one_thread_of_one_core(subleaf: int, expected: tuple[int, int, int, int]) -> None:
    assert ask(0xB, subleaf, ALL) == expected


@given(st.integers(0, 0xFFFF_FFFF), st.integers(0, 0xFFFF_FFFF))
def test_all_answers_are_four_registers(leaf: int, subleaf: int) -> None:
    assert all(0 <= register <= 0xFFFF_FFFF for register in ask(leaf, subleaf, ALL))


@given(st.integers(0x8000_0008, 0x8FFF_FFFF))
def test_what_is_not_the_platforms_is_the_engines(leaf: int) -> None:
    assert ask(leaf, 0, (1, 2, 3, 4)) == (1, 2, 3, 4)
