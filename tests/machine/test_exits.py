"""The table of exits: everything is counted, nothing is changed, and no guest makes it grow for ever."""

from __future__ import annotations

from typing import Any

from lguest_mp.machine.exits import MOST_CAUSES, MOST_LINES, Cause, CountedPlatform, ExitCount


class Machine:
    """Answers each access with what it was."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: (name, *arguments)


def in_words(cause: Cause) -> str:
    return f"{cause.kind} {cause.where:#x}"


def test_each_kind_of_exit_is_counted_and_answered_by_the_machine() -> None:
    exits = ExitCount()
    platform: Any = CountedPlatform(Machine(), exits)
    native = (1, 2, 3, 4)
    assert platform.port_read(0x3F8, 1) == ("port_read", 0x3F8, 1)
    assert platform.mmio_read(0xFEE0_0020, 4) == ("mmio_read", 0xFEE0_0020, 4)
    assert platform.cpuid(0x4000_0000, 5, native) == ("cpuid", 0x4000_0000, 5, native)
    assert platform.msr_read(0x6E0) == ("msr_read", 0x6E0)
    assert platform.msr_write(0x6E0, 7) == ("msr_write", 0x6E0, 7)
    assert platform.interrupt_pending() == ("interrupt_pending",)
    platform.port_write(0x80, 1, 5)
    platform.mmio_write(0xFEE0_00B0, 4, 0)
    platform.idle(3)
    counted = [
        *("port read 0x3f8", "load 0xfee00", "CPUID 0x40000000", "RDMSR 0x6e0", "WRMSR 0x6e0"),
        *("port write 0x80", "store 0xfee00", "HLT 0x0"),
    ]
    assert exits.table(in_words) == ["8 exits of the guest:", *(f"{1:>9}  {each}" for each in counted)]


def test_only_interrupts_that_are_taken_count() -> None:
    class Interrupting(Machine):
        vectors: tuple[int | None, ...] = (None, 0x31, None, 0x31)

        def take_interrupt(self) -> int | None:
            vector, *rest = self.vectors
            self.vectors = tuple(rest)
            return vector

    exits = ExitCount()
    platform = CountedPlatform(Interrupting(), exits)
    assert [platform.take_interrupt() for _ in range(4)] == [None, 0x31, None, 0x31]
    assert exits.table(in_words) == ["2 exits of the guest:", "        2  interrupt 0x31"]


def test_the_most_frequent_come_first_and_those_of_one_name_are_one() -> None:
    exits = ExitCount()
    for kind, where, times in (("load", 1, 2), ("store", 2, 3), ("load", 3, 2)):
        for _ in range(times):
            exits.add(kind, where)
    assert exits.table(lambda cause: cause.kind) == ["7 exits of the guest:", "        4  load", "        3  store"]


def test_a_guest_that_touches_everything_does_not_fill_the_memory() -> None:
    exits = ExitCount()
    for page in range(MOST_CAUSES + 500):
        exits.add("load", page)
    head, *lines, rest = exits.table(in_words)
    assert head == f"{MOST_CAUSES + 500} exits of the guest:"
    assert lines[0] == "      500  others"
    assert len(lines) == MOST_LINES
    assert rest == f"{MOST_CAUSES - MOST_LINES + 1:>9}  of {MOST_CAUSES - MOST_LINES + 1} other kinds"
