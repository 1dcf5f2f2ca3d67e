"""What a guest's kernel finds and asks for: hypercalls, traps, page tables, users, interrupts.

Each test is a scene of one of the guests in guests/, whose source says what happens in it.
"""

from __future__ import annotations

import time

import pytest
from ownguests import lines_of, play

# ---- hypercalls.s ----


def test_how_a_guest_begins() -> None:
    assert lines_of("hypercalls", "entry") == [
        "eflags 202",
        "registers 0 0 0 0 0 0 0",
        "cs 61",
        "ds 69",
        "es 69",
        "ss 69",
        "regions 1",
        f"memory {4 << 20}",
        "subarchitecture 1",
    ]


def test_what_init_tells() -> None:
    before = int(time.time())
    told = dict(line.split() for line in lines_of("hypercalls", "init"))
    assert told["reserve_mem"] == "400000"
    assert int(told["tsc_khz"]) > 0
    assert before <= int(told["seconds"]) <= time.time()
    assert int(told["nanoseconds"]) < 10**9
    assert (told["irq_enabled"], told["irq_pending"]) == ("0", "0")


def test_a_hypercall_keeps_everything_but_its_result() -> None:
    assert lines_of("hypercalls", "preserved") == [
        "registers 0 22222222 33333333 44444444 55555555 66666666",
        "flags 401",
        "same stack 1",
    ]


def test_calls_in_the_ring_are_made_in_order_up_to_the_first_gap() -> None:
    assert lines_of("hypercalls", "ring") == [
        "one two three ",
        "behind the gap 1",
        "segment 40b300",
        "four five six ",
        "left 0",
    ]


def test_a_full_ring() -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    assert lines_of("hypercalls", "full_ring") == [f"{letters}{letters.upper()}0123456789+-", "left 0"]


def test_the_floating_point_unit() -> None:
    assert lines_of("hypercalls", "floating_point") == ["without 3", "trap 7", "with 4", "trap 3 error 0", "kept 16 9"]


def test_segments() -> None:
    assert lines_of("hypercalls", "segments") == [
        "window bbbb1111",
        "access b300",
        "code in a9",
        "back in 61",
        "alive",
    ]


def test_a_threads_segments() -> None:
    assert lines_of("hypercalls", "thread_segments") == ["window aaaa0000", "window bbbb1111", "window cccc2222"]


def test_gates_that_change() -> None:
    assert lines_of("hypercalls", "gates") == ["trap 3 error 0", "another gate", "alive"]


# ---- traps.s ----


def test_traps_of_instructions() -> None:
    segment = 20 << 3
    assert lines_of("traps", "instructions") == [
        "trap 0 error 0",
        "trap 3 error 0",
        "trap 4 error 0",
        "trap 5 error 0",
        "trap 6 error 0",
        f"trap 11 error {segment:x}",
        f"trap 12 error {segment:x}",
        f"trap 13 error {40 << 3:x}",
        "trap 13 error 0",
    ]


def test_a_trap_of_the_floating_point_unit() -> None:
    assert lines_of("traps", "division") == ["trap 16 error 0"]


def test_single_steps() -> None:
    assert lines_of("traps", "steps") == ["steps 5"]


def test_what_a_kernel_must_not_do() -> None:
    assert lines_of("traps", "forbidden") == ["trap 13 error 0"] * 13


def test_ports() -> None:
    assert lines_of("traps", "ports") == [
        "in al,0x70: 123456ff",
        "in ax,0x70: 1234ffff",
        "in eax,0x70: ffffffff",
        "in al,KEYBOARD_STATUS: 12345601",
        "in ax,KEYBOARD_STATUS: 12340001",
        "in eax,KEYBOARD_STATUS: 1",
        "in al,dx: 123456ff",
        "in ax,dx: 1234ffff",
        "in eax,dx: ffffffff",
        *(f"out {operands}: 12345678" for operands in ("0x70,al", "0x70,ax", "0x70,eax", "dx,al", "dx,ax", "dx,eax")),
        "after cli: 200",
    ]


@pytest.mark.parametrize(
    ("guest", "touched", "faults"),
    [
        ("traps", ["0x4ff000", "0x4ff003"], ["trap 14 error 0 address 4ff000", "trap 14 error 2 address 4ff003"]),
        ("paging", ["0x4ff010"], ["trap 14 error 0 address 40000010"]),
    ],
)
def test_registers_of_no_device(guest: str, touched: list[str], faults: list[str]) -> None:
    ended = play(guest, "registers")
    assert ended.status == 0
    assert ended.lines[-1 - len(faults) :] == [*faults, "alive"]
    assert ended.said == [f"lguest: MMIO touching {address} (not a device)" for address in touched]


# ---- paging.s ----


def test_the_first_page_tables() -> None:
    assert lines_of("paging", "first_tables") == ["low 1111", "high 1111", "low 2222", "ran at c0000000"]


def test_page_faults_and_their_repair() -> None:
    assert lines_of("paging", "faults_and_repairs") == [
        "fault at 40000018 error 0 interrupts 0",
        "loaded abcdef",
        "fault at 4000001c error 3 interrupts 0",
        "stored 123456",
        "fault at 40001008 error 2 interrupts 0",
        "fault at 40001008 error 3 interrupts 0",
        "stored 777",
    ]


def test_accessed_and_dirty_bits() -> None:
    assert lines_of("paging", "accessed_and_dirty") == ["bits 20", "bits 60"]


def test_two_page_directories() -> None:
    assert lines_of("paging", "two_directories") == [
        "here aaaa there bbbb",
        "here aaaa there bbbc",
        "here aaaa there bbbd",
        "there cccc",
    ]


def test_entries_of_the_page_directory() -> None:
    fault = "trap 14 error 0 address 40000000"
    assert lines_of("paging", "directory_entries") == [fault, "mapped aaaa", fault]


def test_flushes() -> None:
    assert lines_of("paging", "flushes") == [
        "mapped aaaa and aaaa",
        "users' part bbbb",
        "all bbbb",
        "one page aaaa",
        "trap 14 error 0 address 40000000",
    ]


def test_the_kernels_part_of_all_directories() -> None:
    assert lines_of("paging", "kernel_part") == ["here aaaa there aaaa"]


def test_code_that_changes() -> None:
    assert lines_of("paging", "changed_code") == ["code 1", "code 2", "code 3"]


# ---- users.s ----


def test_system_calls() -> None:
    sum_and_registers = ["6543210", "10", "200", "3000", "40000", "500000", "6000000"]
    assert lines_of("users", "system_calls") == [
        "user says 1234",
        *(f"user says {value}" for value in sum_and_registers),
        "back",
    ]


def test_what_the_kernel_sees_of_a_user() -> None:
    assert lines_of("users", "frames") == [
        "frame of 60",
        "ss 69",
        "cs 61",
        "user ss 7b",
        "user cs 73",
        "user stack 8",
        "eflags 202",
        "interrupts 512",
    ]


def test_what_a_user_must_not_do() -> None:
    lines = lines_of("users", "user_faults")
    address = lines[0].rpartition(" ")[2]
    assert lines == [
        f"trap 14 error 5 address {address}",
        f"trap 14 error 7 address {address}",
        "trap 14 error 4 address 40000000",
        "trap 14 error 6 address 40000000",
        *["trap 13 error 0"] * 4,
        "trap 6 error 0",
        "trap 3 error 0",
        f"trap 13 error {0x1F << 3 | 2:x}",
        f"trap 13 error {0x20 << 3 | 2:x}",
        "trap 0 error 0",
        "back",
    ]


def test_a_user_that_does_not_let_go() -> None:
    assert lines_of("users", "preempted") == ["ticks 3"]


def test_a_page_that_comes_when_it_is_touched() -> None:
    assert lines_of("users", "user_page_fault") == ["touched 20 error 4", "user says 5678"]


def test_a_users_segment() -> None:
    assert lines_of("users", "user_segment") == ["user says bbbb1111", "user says 33"]


# ---- interrupts.s ----


def test_a_timer_that_ends_a_halt() -> None:
    ticks, handler, nanoseconds = lines_of("interrupts", "halting")
    assert (ticks, handler) == ("ticks 3", "interrupts in the handler 0")
    assert int(nanoseconds.split()[1]) >= 3_000_000


@pytest.mark.parametrize(("scene", "ticks"), [("spinning", 3), ("cancelled", 0), ("set_twice", 1), ("unasked", 1)])
def test_the_timer(scene: str, ticks: int) -> None:
    assert lines_of("interrupts", scene) == [f"ticks {ticks}"]


def test_what_comes_while_interrupts_are_off_waits() -> None:
    assert lines_of("interrupts", "waiting") == ["waits 512", "ticks 0", "ticks 1", "waits 0"]


def test_what_is_blocked_waits_in_silence() -> None:
    assert lines_of("interrupts", "blocked") == ["ticks 0", "waits 0", "ticks 1"]


def test_code_that_is_not_interrupted() -> None:
    assert lines_of("interrupts", "uninterrupted") == ["ticks meanwhile 0", "ticks 1"]


def test_gates_and_the_interrupt_flag() -> None:
    assert lines_of("interrupts", "gates") == [
        "interrupts 512",
        "interrupts 0",
        "afterwards: interrupts 512",
        "interrupts 0",
        "afterwards: interrupts 0",
    ]


def test_the_lowest_interrupt_comes_first() -> None:
    assert lines_of("interrupts", "order") == ["..", "timer", "console"]
