"""A block of guest memory becomes a huge page when the embedded CPU first comes there, once, and not before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hugepages import mapped_huge, needs_huge_pages, whole_blocks
from tinymachine import RAM, Machine

from lguest_mp import memory as memory_module
from lguest_mp.memory import BLOCK_SIZE, HIGH_RAM_BASE, LOW_RAM_LIMIT, PAGE_SIZE, GuestMemory

Assemble = Callable[[str], bytes]


@contextmanager
def machine_with(ram: int = RAM, *, huge_pages: bool = True) -> Iterator[Machine]:
    machine = Machine(ram, huge_pages=huge_pages)
    try:
        yield machine
    finally:
        machine.engine.close()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What is asked of guest memory, which does none of it."""
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(GuestMemory, "make_huge", lambda _self, gpa, length: calls.append((gpa, length)))
    return calls


@needs_huge_pages
def test_what_the_guest_touches_becomes_huge_and_nothing_else(assemble: Assemble) -> None:
    # Its tables and its code are in block 0, of 8.
    source = "mov eax, [0x500000]; mov ebx, 0xa00ffc; mov dword ptr [rbx], 0x1234; add eax, [rbx]; exit"
    with machine_with() as machine:
        machine.load(assemble(source))
        machine.memory.write(0x500000, (7).to_bytes(4, "little"))
        machine.memory.write(0xC00000, b"a device's")
        assert machine.run() == 0x1234 + 7
        assert whole_blocks(machine.memory) == [0, 2, 5]
        assert mapped_huge(machine.memory.address) == 3 * BLOCK_SIZE
        assert machine.memory.read(0xC00000, 10) == b"a device's"
        assert machine.memory.read(0xA00FFC, 4) == b"\x34\x12\0\0"


@needs_huge_pages
def test_code_does_so_too(assemble: Assemble) -> None:
    with machine_with() as machine:
        machine.load(assemble("mov eax, 0x700000; jmp rax"))
        machine.load(assemble("mov eax, 5; exit"), at=0x700000)
        assert machine.run() == 5
        assert whole_blocks(machine.memory) == [0, 3]


@needs_huge_pages
def test_what_the_guest_finds_there_is_what_was_there(assemble: Assemble) -> None:
    """The sum of all bytes of a block of which the last page was written, and some of the others."""
    source = """
        mov esi, 0x400000
        xor eax, eax
    each:
        movzx edx, byte ptr [rsi]
        add eax, edx
        inc esi
        cmp esi, 0x600000
        jb each
        exit
    """
    content = bytes(range(256)) * (PAGE_SIZE // 256)
    with machine_with() as machine:
        machine.load(assemble(source))
        for page in (0, 3, 100, 511):
            machine.memory.write(0x400000 + page * PAGE_SIZE, content)
        assert machine.run() == 4 * sum(content)
        assert 2 in whole_blocks(machine.memory)


def test_each_block_is_asked_for_once_however_often_it_is_looked_up(
    assemble: Assemble, asked: list[tuple[int, int]]
) -> None:
    source = """
        mov ecx, 100
    again:
        mov eax, [0x400000]
        mov [0x5ff000], ecx
        mov rax, cr3
        mov cr3, rax
        loop again
        exit
    """
    with machine_with() as machine:
        machine.load(assemble(source))
        machine.run()
    assert asked == [(0, BLOCK_SIZE), (2 * BLOCK_SIZE, BLOCK_SIZE)]


def test_a_block_that_is_not_whole_is_not_asked_for(assemble: Assemble, asked: list[tuple[int, int]]) -> None:
    with machine_with(ram=5 << 20) as machine:
        machine.load(assemble("mov eax, [0x400000]; mov eax, [0x4ffffc]; mov eax, [0x200000]; exit"))
        machine.run()
    assert asked == [(0, BLOCK_SIZE), (BLOCK_SIZE, BLOCK_SIZE)]


def test_less_memory_than_a_block(assemble: Assemble, asked: list[tuple[int, int]]) -> None:
    with machine_with(ram=1 << 20) as machine:
        machine.load(assemble("mov eax, [0xf0000]; mov eax, 6; exit"))
        assert machine.run() == 6
    assert asked == []


def test_the_devices_registers_are_no_memory(assemble: Assemble, asked: list[tuple[int, int]]) -> None:
    """Nor is what lies behind the last of a guest's memory; above 4 GiB it goes on where it ends below."""
    ram = LOW_RAM_LIMIT + 2 * BLOCK_SIZE + PAGE_SIZE
    places = [LOW_RAM_LIMIT - 4, LOW_RAM_LIMIT, 0xFEE00020, *(HIGH_RAM_BASE + each * BLOCK_SIZE for each in range(4))]
    source = "".join(f"mov rbx, {place}; mov eax, [rbx];" for place in places)
    with machine_with(ram) as machine:
        machine.load(assemble(source + "exit"))
        machine.run()
    blocks = [0, LOW_RAM_LIMIT - BLOCK_SIZE, HIGH_RAM_BASE, HIGH_RAM_BASE + BLOCK_SIZE]
    assert asked == [(block, BLOCK_SIZE) for block in blocks]


def test_switched_off_nothing_is_asked_for(assemble: Assemble, asked: list[tuple[int, int]]) -> None:
    with machine_with(huge_pages=False) as machine:
        machine.load(assemble("mov eax, [0x400000]; exit"))
        machine.run()
    assert asked == []


def test_the_next_guest_of_a_process_may_have_them_switched_off(
    assemble: Assemble, asked: list[tuple[int, int]]
) -> None:
    """There is one table for the machine code, whoever uses it."""
    for huge_pages in (True, False):
        asked.clear()
        with machine_with(huge_pages=huge_pages) as machine:
            machine.load(assemble("mov eax, [0x400000]; exit"))
            machine.run()
    assert asked == []


def test_on_a_host_that_has_none_the_guest_runs_all_the_same(
    assemble: Assemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel itself says no here, to advice that no version of it knows; nobody asks again."""
    advice: list[int] = []
    advise = memory_module._advise

    def recorded(address: int, length: int, how: int) -> None:
        advice.append(how)
        advise(address, length, how)

    monkeypatch.setattr(memory_module, "_advise", recorded)
    monkeypatch.setattr(memory_module, "_MADV_POPULATE_WRITE", 0x7000)
    with machine_with() as machine:
        machine.load(assemble("mov eax, [0x400000]; mov eax, [0x600000]; mov eax, 9; exit"))
        assert machine.run() == 9
        assert not machine.memory.huge_pages
    assert advice == [0x7000]


def test_what_goes_wrong_there_ends_the_run(assemble: Assemble, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: int) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(GuestMemory, "make_huge", fail)
    with machine_with() as machine:
        machine.load(assemble("mov eax, 1; exit"))
        with pytest.raises(ZeroDivisionError):
            machine.run()
