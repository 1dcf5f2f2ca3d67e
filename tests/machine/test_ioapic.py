"""The I/O APIC against the 82093AA datasheet, together with the local APIC."""

from __future__ import annotations

import pytest
from fakemachine import EOI, IRR, TMR, Board
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lguest_mp import core
from lguest_mp.machine.layout import IO_APIC_PINS

LEVEL = 1 << 15
REMOTE_IRR = 1 << 14
MASKED = 1 << 16
PIN = 5


@pytest.fixture
def board(core_kind: str) -> Board:
    return Board(core_kind)


def test_it_has_24_pins_all_masked(board: Board) -> None:
    board.io_apic.write(0x00, 4, 1)
    assert board.io_apic.read(0x10, 4) == 0x0017_0020
    assert [board.redirection(pin) for pin in range(IO_APIC_PINS)] == [MASKED] * IO_APIC_PINS


def test_the_id_register_keeps_its_four_bits(board: Board) -> None:
    board.io_apic.write(0x00, 4, 0)
    board.io_apic.write(0x10, 4, 0xFFFF_FFFF)
    assert board.io_apic.read(0x10, 4) == 0x0F00_0000


def test_the_status_bits_of_an_entry_are_not_the_guests(board: Board) -> None:
    board.redirect(PIN, 0xFFFF_FFFF_FFFF_FFFF)
    assert board.redirection(PIN) == 0xFF00_0000_0001_AFFF


def test_an_edge_is_one_message(board: Board) -> None:
    board.redirect(PIN, 0x45)
    board.line(PIN, True)
    assert board.serve() == [0x45]
    board.line(PIN, True)
    board.line(PIN, False)
    assert board.serve() == []
    board.line(PIN, True)
    assert board.serve() == [0x45]


def test_an_edge_while_masked_is_ignored(board: Board) -> None:
    board.line(PIN, True)
    board.redirect(PIN, 0x45)
    assert board.serve() == []


def test_a_level_is_sent_again_as_long_as_it_is_asserted(board: Board) -> None:
    board.redirect(PIN, LEVEL | 0x45)
    board.line(PIN, True)
    assert board.in_register(TMR) == {0x45}
    assert board.redirection(PIN) & REMOTE_IRR
    for _ in range(3):
        assert board.apic.take() == 0x45
        assert not board.apic.pending
        board.write(EOI, 0)
    board.apic.take()
    board.line(PIN, False)
    board.write(EOI, 0)
    assert not board.redirection(PIN) & REMOTE_IRR
    assert board.serve() == []


def test_a_level_asserted_while_masked_is_sent_when_unmasked(board: Board) -> None:
    board.redirect(PIN, MASKED | LEVEL | 0x45)
    board.line(PIN, True)
    assert not board.apic.pending
    board.redirect(PIN, LEVEL | 0x45)
    assert board.apic.take() == 0x45


def test_a_level_that_nobody_accepted_is_not_under_way(board: Board) -> None:
    board.redirect(PIN, 7 << 56 | LEVEL | 0x45)
    board.line(PIN, True)
    assert not board.redirection(PIN) & REMOTE_IRR
    board.redirect(PIN, LEVEL | 0x45)
    assert board.apic.take() == 0x45


def test_switching_a_pin_to_edge_ends_what_is_under_way(board: Board) -> None:
    board.redirect(PIN, LEVEL | 0x45)
    board.line(PIN, True)
    board.redirect(PIN, 0x45)
    assert not board.redirection(PIN) & REMOTE_IRR


def test_the_end_of_an_edge_is_not_told_to_anybody(board: Board) -> None:
    board.redirect(PIN, LEVEL | 0x45)
    board.line(PIN, True)
    board.apic.take()
    board.message(0x55)
    board.apic.take()
    board.write(EOI, 0)
    assert board.redirection(PIN) & REMOTE_IRR


def test_the_eoi_register_does_what_the_broadcast_does(board: Board) -> None:
    board.redirect(PIN, LEVEL | 0x45)
    board.line(PIN, True)
    board.line(PIN, False)
    board.io_apic.write(0x40, 4, 0x45)
    assert not board.redirection(PIN) & REMOTE_IRR


def test_lowest_priority_goes_to_the_only_cpu(board: Board) -> None:
    board.write(0xD0, 1 << 24)
    board.redirect(PIN, 1 << 56 | 1 << 11 | 1 << 8 | 0x45)
    board.line(PIN, True)
    assert board.serve() == [0x45]


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 0xFFF), st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 64) - 1))
    )
)
def test_no_access_is_an_error_of_ours(core_kind: str, accesses: list[tuple[bool, int, int, int]]) -> None:
    board = Board(core_kind)
    for is_write, offset, size, value in accesses:
        if is_write:
            board.io_apic.write(offset & 0x50 if value & 1 else offset, size, value & (1 << 8 * size) - 1)
        else:
            assert 0 <= board.io_apic.read(offset, size) < 1 << 8 * size
        board.line(value % IO_APIC_PINS, bool(value & 2))
        board.serve()


class Levels(RuleBasedStateMachine):
    """A guest, and devices on level-triggered pins: as long as one asserts its wire, the guest hears of it."""

    core_kind = "python"
    pins = st.integers(0, 3)

    @initialize()
    def wire(self) -> None:
        self.board = Board(self.core_kind)
        self.masked = [False] * 4
        self.asserted = [False] * 4
        # Two of the pins share a vector.
        self.vectors = [0x40, 0x51, 0x51, 0x62]
        for pin in range(4):
            self.program(pin)

    def program(self, pin: int) -> None:
        self.board.redirect(pin, LEVEL | self.vectors[pin] | (MASKED if self.masked[pin] else 0))

    @rule(pin=pins, asserted=st.booleans())
    def drive(self, pin: int, asserted: bool) -> None:
        self.asserted[pin] = asserted
        self.board.line(pin, asserted)

    @rule(pin=pins, masked=st.booleans())
    def mask(self, pin: int, masked: bool) -> None:
        self.masked[pin] = masked
        self.program(pin)

    @rule()
    def take(self) -> None:
        self.board.apic.take()

    @rule()
    def end(self) -> None:
        self.board.write(EOI, 0)

    @invariant()
    def an_asserted_wire_is_requested_or_in_service(self) -> None:
        if not hasattr(self, "board"):
            return
        known = self.board.in_register(IRR) | self.board.in_register(0x100)
        for pin in range(4):
            if self.asserted[pin] and not self.masked[pin]:
                assert self.vectors[pin] in known

    def teardown(self) -> None:
        """Whatever has happened, a guest that serves its devices comes to rest."""
        if not hasattr(self, "board"):
            return
        for pin in range(4):
            self.mask(pin=pin, masked=False)
        for _ in range(8):
            self.board.write(EOI, 0)

        def handle(vector: int) -> None:
            for pin in range(4):
                if self.vectors[pin] == vector:
                    self.drive(pin=pin, asserted=False)

        wanted = {self.vectors[pin] for pin in range(4) if self.asserted[pin]}
        assert wanted <= set(self.board.serve(handle))
        assert not any(self.board.redirection(pin) & REMOTE_IRR for pin in range(4))


class CompiledLevels(Levels):
    """The same on the compiled board."""

    core_kind = "compiled"


TestLevels = Levels.TestCase
TestCompiledLevels = pytest.mark.skipif(core.missing() is not None, reason=f"the compiled core {core.missing()}")(
    CompiledLevels.TestCase
)
