"""The local APIC against the Intel SDM, volume 3A, chapter 11."""

from __future__ import annotations

import pytest
from fakemachine import (
    CURRENT,
    DFR,
    DIVIDE,
    ENABLED,
    EOI,
    ESR,
    ICR_HIGH,
    ICR_LOW,
    ID,
    INITIAL,
    IRR,
    ISR,
    LDR,
    LVT_ERROR,
    LVT_TIMER,
    MASKED,
    PPR,
    SVR,
    TMR,
    TPR,
    VERSION,
    Board,
)
from hypothesis import given
from hypothesis import strategies as st

from lguest_mp.machine.lapic import MIN_PERIOD

ONE_SHOT, PERIODIC, TSC_DEADLINE = 0, 1 << 17, 2 << 17
BASE = 0xFEE0_0900


@pytest.fixture
def board(core_kind: str) -> Board:
    return Board(core_kind)


# What it says of itself


def test_it_is_the_integrated_apic_of_processor_0(board: Board) -> None:
    assert board.read(ID) == 0
    assert board.read(VERSION) == 0x0006_0014


def test_after_power_up_everything_is_masked_and_nothing_is_accepted(board: Board) -> None:
    board.write(SVR, 0xFF)
    assert [board.read(lvt) for lvt in (0x2F0, *range(0x320, 0x380, 0x10))] == [MASKED] * 7
    assert not board.message(0x40)
    assert board.apic.take() is None


def test_the_base_register_says_enabled_and_bootstrap_processor(board: Board) -> None:
    assert board.apic.read_base() == BASE


def test_the_guest_moves_the_registers(board: Board) -> None:
    board.apic.write_base(0xFEE1_0900)
    assert board.apic.page == 0xFEE10


def test_switching_it_off_forgets_everything(board: Board) -> None:
    board.message(0x40)
    board.apic.write_base(0xFEE0_0000)
    assert board.apic.page == -1
    assert not board.apic.pending
    board.apic.write_base(BASE)
    assert board.read(SVR) == 0xFF
    assert board.in_register(IRR) == set()


@pytest.mark.parametrize(("offset", "size"), [(TPR, 1), (TPR, 2), (TPR, 8), (TPR + 4, 4), (TPR + 1, 4)])
def test_other_widths_and_places_than_the_registers_do_nothing(board: Board, offset: int, size: int) -> None:
    board.apic.write(offset, size, 0x55)
    assert board.read(TPR) == 0
    assert board.apic.read(offset, size) == 0


# Priority (11.8.3)


def test_an_interrupt_is_requested_then_in_service_then_gone(board: Board) -> None:
    assert board.message(0x41)
    assert (board.in_register(IRR), board.in_register(ISR)) == ({0x41}, set())
    assert board.apic.pending
    assert board.kicks == 1
    assert board.apic.take() == 0x41
    assert (board.in_register(IRR), board.in_register(ISR)) == (set(), {0x41})
    assert board.read(PPR) == 0x40
    board.write(EOI, 0)
    assert (board.in_register(IRR), board.in_register(ISR)) == (set(), set())


def test_a_higher_class_interrupts_a_handler_and_the_same_class_does_not(board: Board) -> None:
    board.message(0x41)
    board.apic.take()
    board.message(0x4F)
    assert not board.apic.pending
    board.message(0x50)
    assert board.apic.take() == 0x50
    board.write(EOI, 0)
    assert board.apic.take() is None
    board.write(EOI, 0)
    assert board.apic.take() == 0x4F


def test_the_task_priority_holds_back_its_class_and_those_below(board: Board) -> None:
    board.write(TPR, 0x5F)
    board.message(0x5F)
    assert not board.apic.pending
    board.message(0x60)
    assert board.apic.take() == 0x60
    board.write(EOI, 0)
    kicks = board.kicks
    board.write(TPR, 0x4F)
    assert board.apic.pending
    assert board.kicks == kicks + 1


def test_the_processor_priority_is_the_task_priority_unless_a_higher_class_is_in_service(board: Board) -> None:
    board.write(TPR, 0x47)
    assert board.read(PPR) == 0x47
    board.message(0x52)
    board.apic.take()
    assert board.read(PPR) == 0x50
    board.write(TPR, 0x53)
    assert board.read(PPR) == 0x53


def test_an_end_of_interrupt_with_nothing_in_service_does_nothing(board: Board) -> None:
    board.message(0x40)
    board.write(EOI, 0)
    assert board.in_register(IRR) == {0x40}


def test_the_same_vector_twice_is_one_interrupt_and_once_more_while_in_service(board: Board) -> None:
    board.message(0x40)
    board.message(0x40)
    assert board.apic.take() == 0x40
    board.message(0x40)
    board.message(0x40)
    board.write(EOI, 0)
    assert board.serve() == [0x40]


vectors = st.integers(16, 255)
actions = st.lists(
    st.one_of(
        vectors.map(lambda vector: ("message", vector)),
        st.integers(0, 255).map(lambda priority: ("tpr", priority)),
        st.just(("take", 0)),
        st.just(("eoi", 0)),
    ),
    max_size=60,
)


@given(actions)
def test_every_interrupt_is_taken_by_priority_and_none_is_lost(core_kind: str, actions: list[tuple[str, int]]) -> None:
    board = Board(core_kind)
    priority = 0
    requested: set[int] = set()
    in_service: list[int] = []
    for action, value in actions:
        match action:
            case "message":
                board.message(value)
                requested.add(value)
            case "tpr":
                board.write(TPR, value)
                priority = value
            case "eoi":
                board.write(EOI, 0)
                if in_service:
                    in_service.remove(max(in_service))
            case "take":
                threshold = max([priority >> 4, *(vector >> 4 for vector in in_service)])
                expected = max((vector for vector in requested if vector >> 4 > threshold), default=None)
                assert board.apic.pending == (expected is not None)
                assert board.apic.take() == expected
                if expected is not None:
                    requested.remove(expected)
                    in_service.append(expected)
        assert board.in_register(IRR) == requested
        assert board.in_register(ISR) == set(in_service)
    board.write(TPR, 0)
    for _ in in_service:
        board.write(EOI, 0)
    # Vectors of class 1 and above can all be taken now.
    assert board.serve() == sorted(requested, reverse=True)


@given(actions)
def test_the_cpu_is_kicked_whenever_an_interrupt_becomes_pending(
    core_kind: str, actions: list[tuple[str, int]]
) -> None:
    board = Board(core_kind)
    for action, value in actions:
        before, kicks = board.apic.pending, board.kicks
        match action:
            case "message":
                board.message(value)
            case "tpr":
                board.write(TPR, value)
            case "eoi":
                board.write(EOI, 0)
            case "take":
                board.apic.take()
        if board.apic.pending and not before:
            assert board.kicks > kicks


# Destinations (11.6.2)


@pytest.mark.parametrize(("destination", "accepted"), [(0, True), (1, False), (0xFE, False), (0xFF, True)])
def test_a_physical_destination_is_the_apic_id_or_everybody(board: Board, destination: int, accepted: bool) -> None:
    assert board.message(0x40, destination=destination) is accepted


@pytest.mark.parametrize(
    ("dfr", "ldr", "destination", "accepted"),
    [
        (0xFFFF_FFFF, 0x01, 0x01, True),
        (0xFFFF_FFFF, 0x01, 0xFE, False),
        (0xFFFF_FFFF, 0x00, 0xFF, False),
        (0x0FFF_FFFF, 0x21, 0x21, True),
        (0x0FFF_FFFF, 0x21, 0x11, False),
        (0x0FFF_FFFF, 0x21, 0x22, False),
        (0x0FFF_FFFF, 0x21, 0xF3, True),
    ],
)
def test_a_logical_destination_is_a_mask_flat_or_by_cluster(
    board: Board, dfr: int, ldr: int, destination: int, accepted: bool
) -> None:
    board.write(DFR, dfr)
    board.write(LDR, ldr << 24)
    with board.lock:
        assert board.apic.message(0xFEE0_0004 | destination << 12, 0x40) is accepted


@pytest.mark.parametrize(("mode", "accepted"), [(0, True), (1, True), (2, False), (4, False), (5, False), (7, False)])
def test_only_messages_that_carry_a_vector_are_accepted(board: Board, mode: int, accepted: bool) -> None:
    assert board.message(0x40, mode=mode) is accepted


@pytest.mark.parametrize("address", [0, 0x1000, 0xFED0_0000, 0xFEF0_0000, 0x1_FEE0_0000])
def test_a_message_to_another_address_is_dropped(board: Board, address: int) -> None:
    with board.lock:
        assert not board.apic.message(address, 0x40)


def test_the_message_that_a_level_has_ended_is_no_interrupt(board: Board) -> None:
    with board.lock:
        assert not board.apic.message(0xFEE0_0000, 0x8040)
        assert board.apic.message(0xFEE0_0000, 0xC040)


# Interprocessor interrupts (11.6.1)


@pytest.mark.parametrize(
    ("shorthand", "destination", "arrives"),
    [(0, 0, True), (0, 1, False), (0, 0xFF, True), (1, 1, True), (2, 1, True), (3, 0, False)],
)
def test_an_interprocessor_interrupt_reaches_this_cpu_if_it_is_meant(
    board: Board, shorthand: int, destination: int, arrives: bool
) -> None:
    board.write(ICR_HIGH, destination << 24)
    board.write(ICR_LOW, 0x4040 | shorthand << 18)
    assert board.apic.take() == (0x40 if arrives else None)
    assert board.read(ICR_LOW) == 0x4040 | shorthand << 18


def test_interprocessor_interrupts_are_edges_whatever_the_trigger_bit_says(board: Board) -> None:
    board.write(ICR_LOW, 0xC040 | 1 << 18)
    assert board.in_register(TMR) == set()


@pytest.mark.parametrize("mode", [2, 4, 5, 6])
def test_the_cpu_takes_no_smi_nmi_init_or_startup_from_itself(board: Board, mode: int) -> None:
    board.write(ICR_LOW, 0x40 | mode << 8 | 1 << 18)
    assert board.apic.take() is None


# Errors (11.5.3)


def test_an_illegal_vector_is_an_error_and_no_interrupt(board: Board) -> None:
    board.write(LVT_ERROR, 0x30)
    assert not board.message(0x0F)
    assert board.read(ESR) == 0
    board.write(ESR, 0)
    assert board.read(ESR) == 1 << 6
    board.write(ESR, 0)
    assert board.read(ESR) == 0
    assert board.serve() == [0x30]


def test_sending_an_illegal_vector_is_one_too(board: Board) -> None:
    board.write(ICR_LOW, 0x05 | 1 << 18)
    board.write(ESR, 0)
    assert board.read(ESR) == 1 << 5 | 1 << 6


def test_an_error_interrupt_with_an_illegal_vector_ends_somewhere(board: Board) -> None:
    board.write(LVT_ERROR, 0x03)
    board.write(ICR_LOW, 0x05 | 1 << 18)
    board.write(ESR, 0)
    assert board.read(ESR) == 1 << 5 | 1 << 6
    assert board.apic.take() is None


def test_a_register_that_does_not_exist_is_an_error(board: Board) -> None:
    board.write(0x3F0, 1)
    board.write(ESR, 0)
    assert board.read(ESR) == 1 << 7


# The timer (11.5.4)


def test_one_shot_counts_down_once(board: Board) -> None:
    board.write(LVT_TIMER, ONE_SHOT | 0x40)
    board.write(DIVIDE, 0b1011)
    board.write(INITIAL, 1000)
    board.pass_time(400)
    assert board.read(CURRENT) == 600
    assert board.apic.take() is None
    board.pass_time(600)
    assert board.serve() == [0x40]
    assert board.read(CURRENT) == 0
    board.pass_time(100_000)
    assert board.serve() == []


def test_periodic_starts_again_from_the_initial_count(board: Board) -> None:
    board.write(LVT_TIMER, PERIODIC | 0x40)
    board.write(DIVIDE, 0b1011)
    board.write(INITIAL, 1_000_000)
    for _ in range(3):
        board.pass_time(1_000_000)
        assert board.serve() == [0x40]
    board.pass_time(250_000)
    assert board.read(CURRENT) == 750_000


def test_missed_periods_are_one_interrupt(board: Board) -> None:
    board.write(LVT_TIMER, PERIODIC | 0x40)
    board.write(INITIAL, 1_000_000)
    board.pass_time(10_000_000)
    assert board.serve() == [0x40]


def test_a_period_too_short_for_the_host_is_made_longer(board: Board) -> None:
    board.write(LVT_TIMER, PERIODIC | 0x40)
    board.write(INITIAL, 1)
    assert board.timer.interval == MIN_PERIOD


@pytest.mark.parametrize(
    ("register", "divisor"),
    [(0b0000, 2), (0b0001, 4), (0b0010, 8), (0b0011, 16), (0b1000, 32), (0b1001, 64), (0b1010, 128), (0b1011, 1)],
)
def test_the_divide_configuration(board: Board, register: int, divisor: int) -> None:
    board.write(DIVIDE, register)
    board.write(INITIAL, 1000)
    assert board.timer.deadline == board.time.ns + 1000 * divisor


def test_the_count_goes_on_when_the_divisor_changes(board: Board) -> None:
    board.write(DIVIDE, 0b1011)
    board.write(INITIAL, 1000)
    board.pass_time(400)
    board.write(DIVIDE, 0b0000)
    assert board.read(CURRENT) == 600
    assert board.timer.deadline == board.time.ns + 1200


def test_writing_zero_stops_the_count(board: Board) -> None:
    board.write(INITIAL, 1000)
    board.write(INITIAL, 0)
    assert board.timer.deadline is None
    assert board.read(CURRENT) == 0


def test_a_masked_timer_counts_and_does_not_interrupt(board: Board) -> None:
    board.write(LVT_TIMER, MASKED | 0x40)
    board.write(INITIAL, 1000)
    board.pass_time(2000)
    assert board.apic.take() is None


def test_a_deadline_of_the_time_stamp_counter(board: Board) -> None:
    board.write(LVT_TIMER, TSC_DEADLINE | 0x40)
    deadline = board.time.tsc + 2000
    board.apic.write_deadline(deadline)
    assert board.apic.read_deadline() == deadline
    assert board.timer.deadline == board.time.ns + 1000
    board.pass_time(1000)
    assert board.apic.read_deadline() == 0
    assert board.serve() == [0x40]


def test_a_deadline_in_the_past_interrupts_at_once(board: Board) -> None:
    board.write(LVT_TIMER, TSC_DEADLINE | 0x40)
    board.apic.write_deadline(1)
    assert board.serve() == [0x40]
    assert board.apic.read_deadline() == 0


def test_a_deadline_of_zero_disarms(board: Board) -> None:
    board.write(LVT_TIMER, TSC_DEADLINE | 0x40)
    board.apic.write_deadline(board.time.tsc + 2000)
    board.apic.write_deadline(0)
    board.pass_time(10_000)
    assert board.apic.take() is None


def test_a_deadline_in_another_mode_is_ignored_and_so_is_a_count_in_deadline_mode(board: Board) -> None:
    board.apic.write_deadline(board.time.tsc + 2000)
    assert board.apic.read_deadline() == 0
    board.write(LVT_TIMER, TSC_DEADLINE | 0x40)
    board.write(INITIAL, 1000)
    assert board.timer.deadline is None
    assert board.read(CURRENT) == 0


@pytest.mark.parametrize("mode", [ONE_SHOT, PERIODIC])
def test_changing_to_and_from_deadline_mode_disarms(board: Board, mode: int) -> None:
    board.write(LVT_TIMER, mode | 0x40)
    board.write(INITIAL, 1_000_000)
    board.write(LVT_TIMER, TSC_DEADLINE | 0x40)
    assert board.timer.deadline is None
    board.apic.write_deadline(board.time.tsc + 2000)
    board.write(LVT_TIMER, mode | 0x40)
    assert board.timer.deadline is None
    assert board.apic.read_deadline() == 0


def test_an_expiry_from_before_the_timer_was_set_again_is_no_interrupt(board: Board) -> None:
    board.write(LVT_TIMER, TSC_DEADLINE | 0x40)
    board.apic.write_deadline(board.time.tsc + 2000)
    # The events' thread has seen the timer expire and comes too late.
    board.timer.expired = True
    board.apic.write_deadline(board.time.tsc + 4000)
    board.apic.timer_expired()
    assert board.apic.take() is None


# Switched off by software (11.4.7.2)


def test_switching_it_off_by_software_masks_the_local_vectors_for_good(board: Board) -> None:
    board.write(LVT_TIMER, 0x40)
    board.write(SVR, 0xFF)
    assert board.read(LVT_TIMER) == MASKED | 0x40
    board.write(LVT_TIMER, 0x40)
    board.write(SVR, ENABLED)
    assert board.read(LVT_TIMER) == MASKED | 0x40


# Anything at all


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 0xFFF), st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 64) - 1)),
        max_size=50,
    )
)
def test_no_access_is_an_error_of_ours(core_kind: str, accesses: list[tuple[bool, int, int, int]]) -> None:
    board = Board(core_kind)
    for is_write, offset, size, value in accesses:
        if is_write:
            board.apic.write(offset & (~0xF if value & 1 else ~0), size, value & (1 << 8 * size) - 1)
        else:
            assert 0 <= board.apic.read(offset & (~0xF if value & 1 else ~0), size) < 1 << 8 * size
        board.pass_time(value & 0xFFFF)
        board.serve()
