"""The serial port against the PC16550D datasheet, and as Linux's 8250 driver probes and uses it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lguest_mp.machine.lock import BoardLock
from lguest_mp.machine.serial import SerialPort

PORT = 0x3F8
DATA, IER, IIR, LCR, MCR, LSR, MSR, SCRATCH = range(8)
FCR = IIR
RECEIVED, TRANSMITTER, LINE, MODEM = 1, 2, 4, 8
OUT2 = 8


@dataclass
class FakeOutput:
    """A line that takes bytes, or is stopped."""

    busy: bool = False
    stopped: bool = False
    sent: bytearray = field(default_factory=bytearray)

    def put(self, byte: int) -> None:
        self.sent.append(byte)
        self.busy = self.stopped


class Port:
    """The port as the guest's driver sees it, with its wire to the I/O APIC."""

    def __init__(self) -> None:
        self.output = FakeOutput()
        self.line = False
        self.edges = 0
        self.rooms = 0
        self.serial = SerialPort(BoardLock(), self.output, self._set_line)
        self.serial.on_room = self._room

    def _set_line(self, line: bool) -> None:
        self.edges += line and not self.line
        self.line = line

    def _room(self) -> None:
        self.rooms += 1

    def read(self, register: int) -> int:
        if register == LSR:
            return self.serial.read_lsr(PORT + LSR, 1)
        return self.serial.read(PORT + register, 1)

    def write(self, register: int, value: int) -> None:
        if register == DATA:
            self.serial.write_data(PORT, 1, value)
        else:
            self.serial.write(PORT + register, 1, value)

    def open(self, interrupts: int) -> None:
        """What a driver does to use it: FIFOs on, trigger level 8, OUT2, interrupts."""
        self.write(FCR, 0x87)
        self.write(MCR, OUT2 | 3)
        self.write(IER, interrupts)


@pytest.fixture
def port() -> Port:
    return Port()


# Probing, as drivers/tty/serial/8250/8250_port.c does (autoconfig)


def test_the_interrupt_register_has_four_bits(port: Port) -> None:
    port.write(IER, 0)
    assert port.read(IER) & 0xF == 0
    port.write(IER, 0xFF)
    assert port.read(IER) == 0xF


def test_the_modem_control_lines_loop_back(port: Port) -> None:
    port.write(MCR, 0x10 | 0x0A)
    assert port.read(MSR) & 0xF0 == 0x90


def test_fifos_that_are_on_show_in_the_identification(port: Port) -> None:
    port.write(FCR, 1)
    assert port.read(IIR) >> 6 == 3
    port.write(FCR, 0)
    assert port.read(IIR) >> 6 == 0


def test_the_scratch_register_and_the_divisor_keep_what_is_written(port: Port) -> None:
    port.write(SCRATCH, 0xA5)
    assert port.read(SCRATCH) == 0xA5
    port.write(LCR, 0x83)
    port.write(DATA, 0x01)
    port.write(IER, 0x02)
    assert (port.read(DATA), port.read(IER)) == (1, 2)
    port.write(LCR, 0x03)
    assert port.read(LCR) == 3
    assert port.read(IER) == 0
    assert port.output.sent == b""


def test_the_transmitter_interrupt_comes_back_when_it_is_enabled_again(port: Port) -> None:
    """Linux calls a UART that does not do so buggy, and polls it by a timer (serial8250_do_startup)."""
    port.open(TRANSMITTER)
    assert port.read(IIR) & 0xF == 2
    assert port.read(IIR) & 0xF == 1
    port.write(IER, 0)
    port.write(IER, TRANSMITTER)
    assert port.read(IIR) & 0xF == 2


# Sending


def test_a_byte_goes_out_at_once(port: Port) -> None:
    for byte in b"hello":
        assert port.read(LSR) == 0x60
        port.write(DATA, byte)
    assert port.output.sent == b"hello"


def test_each_burst_of_bytes_ends_with_an_interrupt(port: Port) -> None:
    port.open(TRANSMITTER)
    for burst in (b"0123456789abcdef", b"x"):
        assert port.read(IIR) & 0xF == 2
        assert not port.line
        for byte in burst:
            port.write(DATA, byte)
        assert port.line
    assert port.edges == 3


def test_while_the_output_is_stuck_the_transmitter_is_not_empty(port: Port) -> None:
    port.open(TRANSMITTER)
    port.read(IIR)
    port.output.stopped = True
    port.write(DATA, 0x41)
    assert port.read(LSR) & 0x60 == 0
    assert not port.line
    port.output.busy = port.output.stopped = False
    port.serial.idle()
    assert port.line
    assert port.read(LSR) & 0x60 == 0x60
    assert port.read(IIR) & 0xF == 2


def test_no_interrupt_passes_without_out2_or_in_loopback(port: Port) -> None:
    port.open(TRANSMITTER)
    port.write(MCR, 0)
    assert not port.line
    port.write(MCR, OUT2)
    assert port.line
    port.write(MCR, OUT2 | 0x10)
    assert not port.line


# Receiving


def test_what_is_typed_arrives_with_an_interrupt(port: Port) -> None:
    port.open(RECEIVED)
    port.serial.receive(b"ls")
    assert port.line
    assert port.read(IIR) & 0xF == 0xC
    assert port.read(LSR) & 1
    assert [port.read(DATA), port.read(DATA)] == list(b"ls")
    assert not port.read(LSR) & 1
    assert not port.line


def test_at_the_trigger_level_it_is_received_data_and_not_a_timeout(port: Port) -> None:
    port.open(RECEIVED)
    port.serial.receive(b"12345678")
    assert port.read(IIR) & 0xF == 4
    port.read(DATA)
    assert port.read(IIR) & 0xF == 0xC


def test_what_was_typed_before_the_guest_listened_is_not_lost_to_its_start(port: Port) -> None:
    port.serial.receive(b"early")
    assert not port.read(LSR) & 1
    port.open(RECEIVED)
    assert bytes(port.read(DATA) for _ in range(5)) == b"early"


def test_more_than_a_fifo_arrives_piece_by_piece(port: Port) -> None:
    port.open(RECEIVED)
    text = bytes(range(100))
    port.serial.receive(text)
    received = bytearray()
    while port.read(LSR) & 1:
        received.append(port.read(DATA))
    assert received == text


def test_input_is_wanted_when_the_guest_listens_and_has_taken_all(port: Port) -> None:
    assert not port.serial.wants_input
    port.open(RECEIVED)
    assert port.serial.wants_input
    assert port.rooms > 0
    port.serial.receive(b"ab")
    assert not port.serial.wants_input
    rooms = port.rooms
    port.read(DATA)
    assert port.rooms == rooms
    port.read(DATA)
    assert port.rooms == rooms + 1


def test_clearing_the_receiver_drops_what_is_in_it(port: Port) -> None:
    port.open(RECEIVED)
    port.serial.receive(b"x")
    port.write(FCR, 0x83)
    assert not port.read(LSR) & 1


def test_an_empty_receiver_reads_zero(port: Port) -> None:
    assert port.read(DATA) == 0


# Loopback, modem status


def test_in_loopback_what_is_sent_is_received_and_goes_nowhere(port: Port) -> None:
    port.open(0)
    port.write(MCR, 0x10)
    port.serial.receive(b"typed")
    port.write(DATA, 0x55)
    assert port.read(DATA) == 0x55
    assert port.output.sent == b""
    port.write(MCR, 0)
    port.write(IER, RECEIVED)
    assert port.read(DATA) == ord("t")


def test_too_much_in_loopback_is_an_overrun(port: Port) -> None:
    port.write(FCR, 1)
    port.write(MCR, 0x10)
    for byte in range(17):
        port.write(DATA, byte)
    assert port.read(LSR) & 2
    assert not port.read(LSR) & 2
    assert port.read(DATA) == 0


def test_a_change_of_modem_status_is_told_once(port: Port) -> None:
    port.write(MCR, 0x10)
    assert port.read(MSR) & 0xF == 0xB
    assert port.read(MSR) & 0xF == 0
    port.write(MCR, 0x14)
    assert port.read(MSR) == 0x40
    port.write(MCR, 0x10)
    assert port.read(MSR) == 0x04


# Anything at all


@pytest.mark.parametrize("size", [2, 4])
def test_wider_accesses_do_nothing(port: Port, size: int) -> None:
    port.serial.write(PORT + SCRATCH, size, 0x55)
    port.serial.write_data(PORT, size, 0x55)
    assert port.serial.read(PORT + SCRATCH, size) == (1 << 8 * size) - 1
    assert port.serial.read_lsr(PORT + LSR, size) == (1 << 8 * size) - 1
    assert port.read(SCRATCH) == 0
    assert port.output.sent == b""


@given(st.lists(st.tuples(st.integers(0, 7), st.booleans(), st.integers(0, 255))))
def test_the_wire_is_what_the_identification_register_says(accesses: list[tuple[int, bool, int]]) -> None:
    port = Port()
    for register, is_write, value in accesses:
        if is_write:
            port.write(register, value)
        else:
            assert 0 <= port.read(register) <= 0xFF
        port.serial.receive(bytes([value]))
        gated = port.read(MCR) & 0x18 == OUT2
        if port.line:
            assert gated
            assert port.read(IIR) & 1 == 0
        elif gated:
            assert port.read(IIR) & 1 == 1
