"""What every engine does, whichever it is (docs/engines.md). Another engine is another line in ENGINES."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Protocol

import pytest
from kvmhost import open_or_skip
from tinymachine import CODE, DATA, GDT, PAGE_TABLES, RAM, Exit, TinyMachine

from lguest_mp.codemap import CodeMap
from lguest_mp.cpu.engine import Engine, EntryState, GuestFault, GuestHalted
from lguest_mp.memory import HIGH_RAM_BASE, LOW_RAM_LIMIT

Assemble = Callable[[str], bytes]


class EngineMaker(Protocol):
    """Makes an engine for a machine, to be closed with ``opened``."""

    def __call__(self, machine: TinyMachine, opened: ExitStack) -> Engine: ...


def make_unicorn(machine: TinyMachine, opened: ExitStack) -> Engine:
    from lguest_mp.cpu.unicorn.engine import UnicornEngine  # noqa: PLC0415

    code_map = CodeMap(machine.memory, 0)
    opened.callback(code_map.close)
    engine = UnicornEngine(machine.memory, machine.platform, code_map)
    opened.callback(engine.close)
    return engine


def make_kvm(machine: TinyMachine, opened: ExitStack) -> Engine:
    from lguest_mp.cpu.kvm.engine import KvmEngine  # noqa: PLC0415

    file = open_or_skip()
    opened.callback(os.close, file)
    engine = KvmEngine(file, machine.memory)
    opened.callback(engine.close)
    engine.connect(machine.platform)
    return engine


ENGINES = {"unicorn": make_unicorn, "kvm": make_kvm}


class Rig(TinyMachine):
    """A machine with one of the engines."""

    def __init__(self, make: EngineMaker, opened: ExitStack, ram: int = RAM) -> None:
        super().__init__(ram)
        self.engine = make(self, opened)

    def run(self) -> int:
        return self.run_on(self.engine)

    def run_to_its_end(self) -> None:
        self.engine.enter(EntryState(CODE, 0, PAGE_TABLES, GDT, 0x47))
        self.engine.run()

    def call_later(self, seconds: float, job: Callable[[], None]) -> threading.Timer:
        """Has a thread hand in a job, and then sleep."""

        def hand_in() -> None:
            self.engine.call(job)
            self.engine.settle()

        timer = threading.Timer(seconds, hand_in)
        timer.start()
        return timer


@pytest.fixture(params=ENGINES)
def make(request: pytest.FixtureRequest) -> EngineMaker:
    return ENGINES[request.param]


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def rig(make: EngineMaker, opened: ExitStack) -> Rig:
    return Rig(make, opened)


def leave() -> None:
    raise Exit


# The first instruction


def test_the_first_instruction_finds_what_the_boot_protocol_wants(rig: Rig, assemble: Assemble) -> None:
    source = """
        mov [DATA], rsi
        mov rsp, STACK
        pushfq
        pop rax
        mov [DATA + 8], rax
        mov rax, cr0; mov [DATA + 16], rax
        mov rax, cr3; mov [DATA + 24], rax
        mov rax, cr4; mov [DATA + 32], rax
        mov eax, cs; shl eax, 8; mov ebx, ds; or eax, ebx
        mov ebx, ss; shl ebx, 16; or eax, ebx
        exit
    """
    rig.load(assemble(source))
    rig.engine.enter(EntryState(CODE, 0x1234_5678_9ABC, PAGE_TABLES, GDT, 0x47))
    with pytest.raises(Exit):
        rig.engine.run()
    assert rig.platform.exit_value == 0x18 << 16 | 0x10 << 8 | 0x18
    rsi, flags, cr0, cr3, cr4 = struct.unpack("<5Q", rig.memory.read(DATA, 40))
    assert (rsi, cr3) == (0x1234_5678_9ABC, PAGE_TABLES)
    assert flags & 0x200 == 0  # interrupts are off
    assert cr0 & 0x8000_0001 == 0x8000_0001  # PG, PE
    assert cr4 & 1 << 5  # PAE


# Ports and memory


def test_ports_in_all_widths(rig: Rig, assemble: Assemble) -> None:
    rig.load(assemble("in al, 0x10; out 0x20, al; mov dx, 0x1234; in ax, dx; out dx, ax; in eax, dx; exit"))
    assert rig.run() == 0x1234 * 0x0101_0101 & 0xFFFF_FFFF
    assert rig.platform.outputs == [(0x20, 1, 0x10), (0x1234, 2, 0x1234 * 0x0101_0101 & 0xFFFF)]


def test_string_instructions_are_as_many_accesses(rig: Rig, assemble: Assemble) -> None:
    source = """
        mov dx, 0x30; mov rsi, DATA; mov ecx, 5; rep outsb
        mov dx, 0x40; mov rdi, DATA + 16; mov ecx, 3; rep insw
        mov eax, ecx
        exit
    """
    rig.load(assemble(source))
    rig.memory.write(DATA, b"hello")
    assert rig.run() == 0
    assert rig.platform.outputs == [(0x30, 1, byte) for byte in b"hello"]
    assert rig.memory.read(DATA + 16, 8) == b"\x40" * 6 + bytes(2)


def test_memory_that_is_no_ram_is_the_machines(rig: Rig, assemble: Assemble) -> None:
    source = """
        mov ebx, 0xd0000020
        mov eax, [rbx]
        mov [rbx + 0x10], al
        mov [rbx + 0x20], ax
        mov [rbx + 0x30], eax
        exit
    """
    rig.load(assemble(source))
    assert rig.run() == 0xD000_0020
    assert rig.platform.mmio_writes == [
        (0xD000_0030, 1, 0x20),
        (0xD000_0040, 2, 0x20),
        (0xD000_0050, 4, 0xD000_0020),
    ]


def test_eight_bytes_come_at_once_or_in_two_parts(rig: Rig, assemble: Assemble) -> None:
    rig.load(assemble("mov ebx, 0xd0000000; mov rax, 0x1122334455667788; mov [rbx], rax; exit"))
    rig.run()
    written = bytearray(8)
    for address, size, value in rig.platform.mmio_writes:
        start = address - 0xD000_0000
        written[start : start + size] = value.to_bytes(size, "little")
    assert int.from_bytes(written, "little") == 0x1122_3344_5566_7788


def test_ram_is_shared_with_everybody(rig: Rig, assemble: Assemble) -> None:
    rig.load(assemble("mov eax, [DATA]; out 0x20, al; mov eax, [DATA]; inc eax; mov [DATA + 4], eax; exit"))
    rig.memory.write(DATA, b"\1\0\0\0")
    rig.platform.on_output[0x20] = lambda _value: rig.memory.write(DATA, b"\x41\0\0\0")
    assert rig.run() == 0x42
    assert rig.memory.read(DATA + 4, 1) == b"\x42"


def test_what_does_not_fit_below_the_devices_continues_at_4_gib(
    make: EngineMaker, opened: ExitStack, assemble: Assemble
) -> None:
    rig = Rig(make, opened, LOW_RAM_LIMIT + RAM)
    rig.load(assemble("mov rbx, 0x100000000; mov eax, [rbx]; mov dword ptr [rbx + 4], 7; exit"))
    rig.memory.write(HIGH_RAM_BASE, b"\x55\0\0\0")
    assert rig.run() == 0x55
    assert rig.memory.read(HIGH_RAM_BASE + 4, 4) == b"\7\0\0\0"


# How it ends


def test_what_an_access_raises_comes_out(rig: Rig, assemble: Assemble) -> None:
    def fail(_value: int) -> None:
        raise ZeroDivisionError("in a port")

    rig.platform.on_output[0x20] = fail
    rig.load(assemble("out 0x20, al; 1: jmp 1b"))
    with pytest.raises(ZeroDivisionError, match="in a port"):
        rig.run_to_its_end()


def test_a_triple_fault_ends_the_guest(rig: Rig, assemble: Assemble) -> None:
    rig.load(assemble("lidt [rip + 1f]; mov rax, [0x100000000000]; 1: .word 0; .quad 0"))
    with pytest.raises(GuestFault, match=r"^triple fault at RIP 0x1[0-9a-f]{4}$"):
        rig.run_to_its_end()


def test_halt_with_interrupts_off_is_the_end(rig: Rig, assemble: Assemble) -> None:
    rig.load(assemble("cli; hlt"))
    if (look := getattr(rig.engine, "look_for_halt", None)) is None:
        with pytest.raises(GuestHalted):
            rig.run_to_its_end()
        return
    over = threading.Event()

    def look_again_and_again() -> None:
        while not over.wait(0.05):
            look()

    thread = threading.Thread(target=look_again_and_again)
    thread.start()
    try:
        with pytest.raises(GuestHalted):
            rig.run_to_its_end()
    finally:
        over.set()
        thread.join()


# Jobs and kicks


def test_a_job_reaches_a_guest_that_is_stuck_with_interrupts_off(rig: Rig, assemble: Assemble) -> None:
    rig.load(assemble("cli; 1: jmp 1b"))
    timer = rig.call_later(0.05, leave)
    with pytest.raises(Exit):
        rig.run_to_its_end()
    timer.join()


def test_a_job_reaches_a_guest_that_sleeps(rig: Rig, assemble: Assemble) -> None:
    rig.load(assemble("sti; 1: hlt; jmp 1b"))
    timer = rig.call_later(0.05, leave)
    with pytest.raises(Exit):
        rig.run_to_its_end()
    timer.join()


def test_jobs_run_on_the_cpus_thread_in_their_order(rig: Rig, assemble: Assemble) -> None:
    ran: list[tuple[int, int]] = []
    rig.load(assemble("1: out 0x20, al; jmp 1b"))

    def note(number: int) -> Callable[[], None]:
        return lambda: ran.append((number, threading.get_ident()))

    def hand_in() -> None:
        for number in range(100):
            rig.engine.call(note(number))
        rig.engine.call(leave)
        rig.engine.settle()

    thread = threading.Thread(target=hand_in)
    thread.start()
    with pytest.raises(Exit):
        rig.run_to_its_end()
    thread.join()
    assert ran == [(number, threading.get_ident()) for number in range(100)]


def test_kicks_change_nothing(rig: Rig, assemble: Assemble) -> None:
    """However often a thread asks for attention, each instruction is executed once."""
    source = """
        mov rbx, DATA
        mov ecx, 10000
    1:  add qword ptr [rbx], 1
        out 0x21, al
        dec ecx
        jnz 1b
        exit
    """
    rig.load(assemble(source))
    stop = threading.Event()

    def kick() -> None:
        while not stop.is_set():
            rig.engine.kick()
            rig.engine.settle()

    thread = threading.Thread(target=kick)
    thread.start()
    try:
        rig.run()
    finally:
        stop.set()
        thread.join()
    assert struct.unpack("<Q", rig.memory.read(DATA, 8)) == (10000,)
    assert len(rig.platform.outputs) == 10000
