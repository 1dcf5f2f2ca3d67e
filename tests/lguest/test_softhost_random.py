"""Whatever a guest does, it dies of it or it does not: nothing else happens to its host."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Sequence

from hypothesis import example, given, settings
from hypothesis import strategies as st
from softguest import (
    CODE,
    DATA,
    DEVICE_LIMIT,
    DIRECTORY,
    HCALLS,
    KERNEL,
    KERNEL_ADDRESS,
    PAGES,
    STACK,
    STATUS,
    SYSCALL_VEC,
    TABLE,
)

from lguest_mp.codemap import CodeMap
from lguest_mp.cpu.lguest_host import GENERAL_PROTECTION, NOTIFY, PAGE_FAULT, GuestDied, GuestRestarts, Register
from lguest_mp.cpu.softhost import SoftHost
from lguest_mp.memory import PAGE_SIZE, GuestMemory

MEMORY = PAGES * PAGE_SIZE

#: Instructions, each to be followed by HLT, which comes to the launcher: hypercall, accesses to [ebp] of several kinds,
#: jumps there, exceptions, system call, stack switches, returns to another level, segment loads, the FPU, single step.
_CODE = """
    cd1f 8b4500 894500 f0ff4500 f3a4 0fae4500 ffe5 ffd5 0f0b f7f0 cc ce cd80 cd0e cd20 6a0089ec58 cf 9dcf cb
    8ed8 8ed0 8ee8 ea0000000061000000 9a00000000a3000000 0fb2 d9e8 6800410000 9d90 fa fb f4 ec ef 0f30 0f01d8
    0f0100 0f0110 0f22d8 0fa2 0f05 0f34 0f07 0f35 62 f1 0fc7 660f6f00 c8000000 c9 61 60 07 1f 17 cdff
"""
INSTRUCTIONS = tuple(map(bytes.fromhex, _CODE.split()))

addresses = st.one_of(
    st.sampled_from(
        [0, CODE, DATA, DIRECTORY, TABLE, STACK, MEMORY - 1, MEMORY - 4, MEMORY, MEMORY + 16, KERNEL_ADDRESS]
    ),
    st.sampled_from([0xFFC0_0000, 0xFFC0_0800, 0xFFC0_1000, 0xFFFF_F000, 0xFFFF_FFFC, 0xFFFF_FFFF, 0x7FFF_FFFF]),
    st.integers(0, MEMORY),
    st.integers(0, 0xFFFF_FFFF),
)
words = st.one_of(addresses, st.integers(0, 0x120), st.integers(0, 0xFFFF_FFFF))
numbers = st.one_of(st.integers(0, 20), words)
#: Entries of page tables and directories, of which some are good.
entries = st.builds(
    lambda page, flags: page << 12 | flags,
    st.one_of(
        st.integers(0, DEVICE_LIMIT),
        st.integers(0, 0xF_FFFF),
        st.sampled_from([TABLE >> 12, 0xFFC00]),
    ),
    st.one_of(st.sampled_from([0, 1, 3, 5, 7, 0x27, 0x67, 0x63, 0x87]), st.integers(0, 0xFFF)),
)
calls = st.tuples(numbers, words, words, words, words)


class NoEvents:
    """Nothing happens outside: who sleeps, sleeps for ever."""

    def __init__(self) -> None:
        self.before_sleep: Callable[[], None] = lambda: None

    def add_shared(self, fd: int, handler: Callable[[], None], /) -> None:
        pass

    def help(self, wake: int, /) -> None:
        raise GuestDied("asleep")


class Subject:
    """A guest that does one instruction at a time."""

    def __init__(self) -> None:
        self.memory = GuestMemory(DEVICE_LIMIT * PAGE_SIZE)
        self.code_map = CodeMap(self.memory, 0)
        self.host = SoftHost(self.memory, self.code_map, NoEvents())
        self.memory.write(DATA + KERNEL, struct.pack("<I", KERNEL_ADDRESS))
        self.memory.write(DATA + SYSCALL_VEC, struct.pack("<I", 0x80))
        self.memory.write(DATA + STATUS, b"\xff" * 64)
        self.memory.write(DIRECTORY, struct.pack("<I", TABLE | 0x67))
        self.memory.write(TABLE, b"".join(struct.pack("<I", page << 12 | 0x67) for page in range(PAGES)))
        self.host.initialize(PAGES, CODE, DEVICE_LIMIT)
        self.alive = True
        # A guest may well loop, and then it has done nothing wrong.
        self._watch = threading.Timer(3, self.host.call, (self._give_up,))
        self._watch.start()

    def close(self) -> None:
        self._watch.cancel()
        self._watch.join()
        self.host.close()
        self.code_map.close()

    def _give_up(self) -> None:
        raise GuestDied("loops")

    def do(self, code: bytes, registers: dict[Register, int]) -> None:
        """Has the guest, if it lives, execute something where it stands in its code."""
        if not self.alive:
            return
        self.memory.write(CODE, code + b"\xf4")
        self.host.call(lambda: self.host.forget_code(CODE // PAGE_SIZE, CODE // PAGE_SIZE))
        for register, value in {Register.EIP: CODE, **registers}.items():
            self.host.set_register(register, value)
        try:
            pending = self.host.run()
        except (GuestDied, GuestRestarts):
            self.alive = False
            return
        assert pending.trap in (NOTIFY, GENERAL_PROTECTION, PAGE_FAULT)
        assert len(pending.instruction) == 7
        if pending.trap == PAGE_FAULT:
            assert MEMORY <= pending.address < DEVICE_LIMIT * PAGE_SIZE

    def mapped_page(self) -> bytes:
        """What the guest may read of the host's: its GDT, IDT and TSS."""
        return self.host._pages.mapped()

    def hypercall(self, call: Sequence[int]) -> None:
        names = (Register.EAX, Register.EBX, Register.ECX, Register.EDX, Register.ESI)
        self.do(b"\xcd\x1f", dict(zip(names, call, strict=True)))


def with_subject(test: Callable[[Subject], None]) -> None:
    subject = Subject()
    try:
        test(subject)
    finally:
        subject.close()


@settings(max_examples=150)
@given(st.booleans(), st.lists(calls, min_size=1, max_size=12))
@example(True, [(17, 0xFFFF_FFFF, 0, 0, 0)])
@example(False, [(1, 0xFFFF_FFFC, 0, 0, 0)])
@example(True, [(4, DIRECTORY, 0, 0, 0), (14, DIRECTORY, 0xFFBF_FFFF, 0xFFFF_FFFF, 0)])
def test_random_hypercalls(initialized: bool, wanted: list[tuple[int, ...]]) -> None:
    def test(subject: Subject) -> None:
        if initialized:
            subject.hypercall((1, DATA, 0, 0, 0))
        for call in wanted:
            subject.hypercall(call)

    with_subject(test)


@settings(max_examples=75)
@given(st.lists(st.tuples(st.integers(0, 63), calls), min_size=1, max_size=12))
def test_random_hypercalls_in_the_ring(wanted: list[tuple[int, tuple[int, ...]]]) -> None:
    def test(subject: Subject) -> None:
        subject.hypercall((1, DATA, 0, 0, 0))
        for index, call in wanted:
            subject.memory.write(DATA + HCALLS + 20 * index, struct.pack("<5I", *call))
            subject.memory.write(DATA + STATUS + index, b"\0")
        for _ in range(3):
            subject.hypercall((0, 0, 0, 0, 0))

    with_subject(test)


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.integers(0, 1023), entries), max_size=6),
    st.lists(st.tuples(st.integers(0, 1023), entries), max_size=6),
    st.lists(st.tuples(st.sampled_from(INSTRUCTIONS), addresses, addresses), min_size=1, max_size=8),
)
def test_random_page_tables(
    directory: list[tuple[int, int]], table: list[tuple[int, int]], done: list[tuple[bytes, int, int]]
) -> None:
    def test(subject: Subject) -> None:
        subject.hypercall((1, DATA, 0, 0, 0))
        for index, entry in directory:
            subject.memory.write(DIRECTORY + 4 * index, struct.pack("<I", entry))
        for index, entry in table:
            subject.memory.write(TABLE + 4 * index, struct.pack("<I", entry))
        subject.hypercall((4, DIRECTORY, 0, 0, 0))
        before = subject.mapped_page()
        for code, pointer, stack in done:
            if code != b"\xcd\x1f":
                subject.do(code, {Register.EBP: pointer, Register.ESP: stack})
        assert subject.mapped_page() == before
        assert not any(subject.memory.read(MEMORY, (DEVICE_LIMIT - PAGES) * PAGE_SIZE))

    with_subject(test)


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.sampled_from([6, 7, 16, 18]), words, words, words, words), max_size=8),
    st.lists(st.tuples(st.sampled_from(INSTRUCTIONS), words, words), min_size=1, max_size=8),
    st.binary(max_size=64),
)
def test_random_segments_gates_and_stacks(
    tables: list[tuple[int, ...]], done: list[tuple[bytes, int, int]], stack: bytes
) -> None:
    def test(subject: Subject) -> None:
        subject.hypercall((1, DATA, 0, 0, 0))
        for call in tables:
            subject.hypercall(call)
        subject.memory.write(STACK - 64, stack)
        for code, value, pointer in done:
            registers = {Register.EAX: value, Register.EBP: pointer, Register.ESP: STACK - 64, Register.EDX: value}
            subject.do(code, registers)

    with_subject(test)
