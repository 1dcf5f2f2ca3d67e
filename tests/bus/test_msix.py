"""MSI-X tables against the PCI Local Bus Specification 3.0, 6.8.2."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lguest_mp.bus.msix import MsixTable


class Table:
    """A table of three vectors, and what it sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, int]] = []
        self.table = MsixTable(3, lambda address, data: self.sent.append((address, data)))

    def fill(self, vector: int, address: int, data: int) -> None:
        self.table.write(vector * 16, 8, address)
        self.table.write(vector * 16 + 8, 4, data)

    def mask(self, vector: int, masked: bool) -> None:
        self.table.write(vector * 16 + 12, 4, int(masked))


def test_all_vectors_are_masked_at_first() -> None:
    table = Table()
    assert [table.table.read(vector * 16 + 12, 4) for vector in range(3)] == [1, 1, 1]


def test_an_entry_reads_as_it_was_written_but_for_what_is_fixed() -> None:
    table = Table().table
    table.write(16, 8, 0x1122_3344_FEE0_0FFF)
    table.write(24, 8, 0xFFFF_FFFE_5566_7788)
    assert table.read(16, 4) == 0xFEE0_0FFC
    assert table.read(16, 8) == 0x1122_3344_FEE0_0FFC
    assert table.read(24, 8) == 0x5566_7788


def test_a_vector_sends_its_message() -> None:
    table = Table()
    table.fill(1, 0xFEE0_1000, 0x41)
    table.mask(1, False)
    table.table.set_open(True)
    table.table.raise_vector(1)
    assert table.sent == [(0xFEE0_1000, 0x41)]


def test_a_masked_vector_is_pending_until_it_is_unmasked() -> None:
    table = Table()
    table.fill(1, 0xFEE0_0000, 0x41)
    table.table.set_open(True)
    table.table.raise_vector(1)
    table.table.raise_vector(1)
    assert table.sent == []
    assert table.table.read_pending(0, 8) == 2
    table.mask(1, False)
    assert table.sent == [(0xFEE0_0000, 0x41)]
    assert table.table.read_pending(0, 4) == 0


def test_a_closed_function_keeps_its_vectors_pending() -> None:
    table = Table()
    for vector in range(3):
        table.fill(vector, 0xFEE0_0000, vector)
        table.mask(vector, False)
        table.table.raise_vector(vector)
    table.mask(1, True)
    table.table.set_open(True)
    assert [data for _, data in table.sent] == [0, 2]
    assert table.table.read_pending(0, 8) == 2


accesses = st.lists(
    st.one_of(
        st.tuples(st.just("raise"), st.integers(0, 2), st.just(0), st.just(0)),
        st.tuples(st.just("open"), st.integers(0, 1), st.just(0), st.just(0)),
        st.tuples(st.just("mask"), st.integers(0, 2), st.integers(0, 1), st.just(0)),
        st.tuples(
            st.just("write"), st.integers(0, 0xFFF), st.integers(0, (1 << 64) - 1), st.sampled_from([1, 2, 4, 8])
        ),
    )
)


@given(accesses)
def test_whatever_is_masked_when_no_interrupt_is_lost(accesses: list[tuple[str, int, int, int]]) -> None:
    table = Table()
    owed = 0
    for action, first, second, size in accesses:
        before = len(table.sent)
        match action:
            case "raise":
                table.table.raise_vector(first)
                owed |= 1 << first
            case "open":
                table.table.set_open(bool(first))
            case "mask":
                table.mask(first, bool(second))
            case "write":
                table.table.write(first, size, second & (1 << 8 * size) - 1)
        if len(table.sent) > before:
            owed = table.table.pending
        assert table.table.pending == owed
        assert 0 <= table.table.read(first, 8) < 1 << 64
    table.table.set_open(True)
    for vector in range(3):
        table.mask(vector, False)
    assert table.table.pending == 0
