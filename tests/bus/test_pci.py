"""The PCI bus against the PCI Local Bus Specification 3.0."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fakebus import WINDOW, Rig
from hypothesis import given
from hypothesis import strategies as st

from lguest_mp.bus.pci import SLOTS, WINDOW_SIZE, IntxLines, PciBus, PciFunction, PciIdentity

IDENTITY = PciIdentity(0x1234, 0x5678, 0x12_3456, revision=7, subsystem_vendor=0x9ABC, subsystem=0xDEF0)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def make_bus(count: int) -> tuple[PciBus, list[PciFunction]]:
    functions = [PciFunction(IDENTITY, window=True) for _ in range(count)]
    return PciBus(functions, window_first=WINDOW, window_last=0xFEBF_FFFF, interrupt_pin=16), functions


# The configuration mechanism (3.2.2.3.2)


def test_the_address_register_is_a_doubleword(rig: Rig) -> None:
    rig.bus.write_address(0xCF8, 4, 0xFFFF_FFFF)
    assert rig.bus.read_address(0xCF8, 4) == 0x80FF_FFFC
    rig.bus.write_address(0xCF8, 1, 0)
    assert rig.bus.read_address(0xCF8, 4) == 0x80FF_FFFC
    assert rig.bus.read_address(0xCF8, 2) == 0xFFFF


def test_linux_finds_the_mechanism_and_a_host_bridge(rig: Rig) -> None:
    """arch/x86/pci/direct.c: pci_check_type1, pci_sanity_check."""
    rig.bus.write_address(0xCF8, 4, 0x8000_0000)
    assert rig.bus.read_address(0xCF8, 4) == 0x8000_0000
    assert rig.config_read(0x0A, 2, slot=0) == 0x0600
    assert rig.config_read(0x00, 2, slot=0) == 0x8086


@pytest.mark.parametrize(
    "address",
    [0x0000_0800, 0x8001_0800, 0x8000_0900, 0x8000_1000, 0x8000_F800],
    ids=["off", "bus", "function", "slot", "last"],
)
def test_where_nobody_is_everything_reads_as_ones(rig: Rig, address: int) -> None:
    rig.bus.write_address(0xCF8, 4, address)
    assert [rig.bus.read_data(0xCFC, size) for size in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFF_FFFF]
    rig.bus.write_data(0xCFC, 4, 0)


def test_accesses_stay_within_a_doubleword(rig: Rig) -> None:
    rig.bus.write_address(0xCF8, 4, 0x8000_0800)
    assert rig.bus.read_data(0xCFE, 2) == rig.config_read(2, 2)
    rig.bus.write_address(0xCF8, 4, 0x8000_0800)
    assert rig.bus.read_data(0xCFE, 4) == 0xFFFF_FFFF
    assert rig.bus.read_data(0xCFF, 2) == 0xFFFF


# The header (6.1, 6.2)


def test_the_header_says_who_it_is() -> None:
    function = PciFunction(IDENTITY, window=True)
    assert [function.config_read(0, 2), function.config_read(2, 2)] == [0x1234, 0x5678]
    assert function.config_read(8, 4) == 0x12_3456_07
    assert [function.config_read(0x2C, 2), function.config_read(0x2E, 2)] == [0x9ABC, 0xDEF0]
    assert function.config_read(0x0E, 1) == 0
    assert function.config_read(0x3D, 1) == 1


@given(st.integers(0, 63), st.integers(0, 0xFFFF_FFFF))
def test_only_what_is_writable_can_be_written(register: int, value: int) -> None:
    function = PciFunction(IDENTITY, window=True)
    before = bytes(function.config)
    function.config_write(register * 4, 4, value)
    changed = {index for index in range(256) if function.config[index] != before[index]}
    assert changed <= {0x04, 0x05, 0x11, 0x12, 0x13, 0x3C}
    assert function.config_read(0x10, 4) & 0x7FFF == 0


def test_the_size_of_the_window_is_found_by_writing_ones() -> None:
    bus, [function] = make_bus(1)
    bus.write_address(0xCF8, 4, 0x8000_0810)
    bus.write_data(0xCFC, 4, 0xFFFF_FFFF)
    assert -bus.read_data(0xCFC, 4) & 0xFFFF_FFFF == WINDOW_SIZE
    assert function.config_read(0x14, 4) == 0


def test_capabilities_are_a_list() -> None:
    function = PciFunction(IDENTITY)
    assert function.config_read(6, 2) & 0x10 == 0
    first = function.add_capability(0x09, bytes(5))
    second = function.add_capability(0x11, bytes(10))
    assert function.config_read(6, 2) & 0x10
    assert function.config_read(0x34, 1) == first == 0x40
    assert function.config_read(first, 2) == second << 8 | 0x09
    assert function.config_read(second, 2) == 0x11
    assert second % 4 == 0


# Windows (6.2.5)


def test_firmware_gives_each_window_a_place_and_opens_it() -> None:
    bus, functions = make_bus(3)
    assert [function.window for function in functions] == [WINDOW, WINDOW + WINDOW_SIZE, WINDOW + 2 * WINDOW_SIZE]
    assert bus.windows == {WINDOW + index * WINDOW_SIZE >> 15: function for index, function in enumerate(functions)}
    assert [function.config_read(0x3C, 1) for function in functions] == [17, 18, 19]


def test_a_window_is_where_the_guest_moves_it() -> None:
    bus, [function] = make_bus(1)
    bus.write_address(0xCF8, 4, 0x8000_0810)
    bus.write_data(0xCFC, 4, 0xD000_0000)
    assert bus.windows == {0xD000_0000 >> 15: function}


@pytest.mark.parametrize(("port", "size", "value"), [(0xCFC, 2, 0), (0xCFC, 1, 0), (0xCFC, 4, 0)])
def test_a_window_is_closed_with_memory_decoding(port: int, size: int, value: int) -> None:
    bus, [function] = make_bus(1)
    bus.write_address(0xCF8, 4, 0x8000_0804)
    bus.write_data(port, size, value)
    assert bus.windows == {}
    bus.write_data(port, size, 2)
    assert bus.windows == {WINDOW >> 15: function}


def test_the_host_bridge_has_no_window_and_no_pin(rig: Rig) -> None:
    rig.config_write(0x04, 2, 0xFFFF, slot=0)
    rig.config_write(0x10, 4, 0xFFFF_FFFF, slot=0)
    assert (rig.config_read(0x04, 2, slot=0), rig.config_read(0x10, 4, slot=0)) == (0, 0)
    assert rig.config_read(0x3D, 1, slot=0) == 0


def test_there_are_so_many_slots_and_no_more() -> None:
    assert len(make_bus(SLOTS - 1)[0].windows) == SLOTS - 1
    with pytest.raises(ValueError, match="slots"):
        make_bus(SLOTS)


# Interrupt pins (2.2.6)


def test_a_line_is_asserted_as_long_as_anybody_asserts_it() -> None:
    changes: list[tuple[int, bool]] = []
    lines = IntxLines(lambda line, asserted: changes.append((line, asserted)))
    lines.set(1, True)
    lines.set(5, True)
    lines.set(1, True)
    lines.set(1, False)
    assert changes == [(1, True)]
    lines.set(5, False)
    lines.set(5, False)
    assert changes == [(1, True), (1, False)]
    lines.set(2, True)
    assert changes[2:] == [(2, True)]


# Anything at all


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0xCF8, 0xCFC, 0xCFD, 0xCFE, 0xCFF]),
            st.booleans(),
            st.sampled_from([1, 2, 4]),
            st.one_of(st.integers(0, 0xFFFF_FFFF), st.integers(0, 0x3FF).map(lambda value: 0x8000_0000 | value << 2)),
        )
    )
)
def test_no_access_is_an_error_of_ours(accesses: list[tuple[int, bool, int, int]]) -> None:
    rig = Rig()
    for port, is_write, size, value in accesses:
        write, read = (
            (rig.bus.write_address, rig.bus.read_address) if port == 0xCF8 else (rig.bus.write_data, rig.bus.read_data)
        )
        if is_write:
            write(port, size, value & (1 << 8 * size) - 1)
        else:
            assert 0 <= read(port, size) < 1 << 8 * size
        assert len(rig.bus.windows) <= 1
    rig.close()
