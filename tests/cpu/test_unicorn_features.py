"""What the embedded CPU says of itself."""

from __future__ import annotations

from collections.abc import Callable

from tinymachine import Machine

from lguest_mp.cpu.unicorn.features import native

Assemble = Callable[[str], bytes]


def test_the_leaves_that_the_model_does_not_have_are_announced() -> None:
    assert native(0x8000_0000, 0, (0x8000_001E, 1, 2, 3)) == (0x8000_0021, 1, 2, 3)
    assert native(0x8000_001F, 0, (9, 9, 9, 9)) == (0, 0, 0, 0)


def test_what_is_not_changed_is_the_models() -> None:
    assert native(1, 0, (1, 2, 3, 4)) == (1, 2, 3, 4)
    assert native(7, 1, (1, 1 << 20, 3, 4)) == (1, 1 << 20, 3, 4)


def test_a_guest_finds_no_smap_but_smep(machine: Machine, assemble: Assemble) -> None:
    """CPUID leaf 7, EBX bits 20 and 7."""
    machine.load(assemble("mov eax, 7; xor ecx, ecx; cpuid; mov eax, ebx; and eax, (1 << 20) | (1 << 7); exit"))
    assert machine.run() == 1 << 7


def test_a_guest_finds_that_it_needs_no_detours(machine: Machine, assemble: Assemble) -> None:
    """BTC_NO, and AutomaticIBRS and SRSO_NO, behind a highest leaf that has them."""
    source = """
        mov eax, 0x80000000; cpuid
        cmp eax, 0x80000021
        jb fail
        mov eax, 0x80000008; cpuid
        bt ebx, 29
        jnc fail
        mov eax, 0x80000021; cpuid
        exit
    fail:
        xor eax, eax
        exit
    """
    machine.load(assemble(source))
    assert machine.run() == 1 << 8 | 1 << 29
