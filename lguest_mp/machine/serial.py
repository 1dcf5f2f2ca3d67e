"""The first serial port: a 16550A, the guest's console until it has a better one (National Semiconductor PC16550D).

The line is infinitely fast: a byte written to the transmitter is out when the access ends, unless the host's end
cannot take it (``stdio.py``). What is typed arrives in the receiver's FIFO of 16 as the guest reads it, and only
while the guest has switched on the receiver's interrupt: a kernel that starts clears the FIFO when it first opens
the port, and nothing that was typed ahead is lost to that.

The transmitter's interrupt is as drivers expect it (datasheet, table 4): it becomes pending when the transmitter
becomes empty and when it is enabled while the transmitter is empty, and it ceases when the identification register
is read with it as the answer. The port's interrupt reaches the board through a gate that OUT2 opens, as on every
PC.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from lguest_mp.bus.pci import ALL_ONES
from lguest_mp.machine.lock import BoardLock

# Registers, by offset from the first port.
_DATA, _IER, _IIR, _LCR, _MCR, _LSR, _MSR, _SCRATCH = range(8)

_IER_RECEIVED = 1
_IER_TRANSMITTER = 2
_IER_LINE = 4
_IER_MODEM = 8

_IIR_NONE = 0x01
_IIR_MODEM = 0x00
_IIR_TRANSMITTER = 0x02
_IIR_RECEIVED = 0x04
_IIR_LINE = 0x06
_IIR_TIMEOUT = 0x0C
_IIR_FIFOS = 0xC0

_FCR_ENABLE = 1
_FCR_CLEAR_RECEIVER = 2

_LCR_DIVISOR = 0x80

_MCR_DTR = 1
_MCR_RTS = 2
_MCR_OUT1 = 4
_MCR_OUT2 = 8
_MCR_LOOP = 16

_LSR_READY = 1
_LSR_OVERRUN = 2
_LSR_TRANSMITTER_EMPTY = 0x60

_MSR_CTS = 0x10
_MSR_DSR = 0x20
_MSR_RI = 0x40
_MSR_DCD = 0x80
#: Outside of loopback a modem is there and willing.
_MSR_CONNECTED = _MSR_CTS | _MSR_DSR | _MSR_DCD

_FIFO_SIZE = 16
#: The receiver's trigger levels (FIFO control, bits 6 and 7).
_TRIGGERS = (1, 4, 8, 14)
#: What is kept of what is typed while the guest does not read; more is lost.
_TYPED_AHEAD = 4096


class Output(Protocol):
    """Where bytes go; see :class:`lguest_mp.machine.stdio.StandardOutput`."""

    busy: bool

    def put(self, byte: int) -> None: ...


class SerialPort:
    """The port. ``read`` and ``write`` are the CPU thread's, :meth:`receive` and :meth:`idle` the event loop's."""

    def __init__(self, lock: BoardLock, output: Output, set_line: Callable[[bool], None]) -> None:
        """``set_line`` drives the port's interrupt wire; it is called with the lock held."""
        self._lock = lock
        self._output = output
        self._set_line = set_line
        #: Called on the CPU's thread, without the lock, when there is room for input again.
        self.on_room: Callable[[], None] = _nothing
        self._fifo: deque[int] = deque()
        self._typed: deque[int] = deque(maxlen=_TYPED_AHEAD)
        self._ier = self._lcr = self._mcr = self._scratch = 0
        self._divisor = [0, 0]
        self._fifos_enabled = False
        self._trigger = 1
        self._overrun = 0
        self._modem_changes = 0
        self._transmitter_pending = False
        self._line = False

    @property
    def wants_input(self) -> bool:
        """Whether the guest waits for input and has taken all that there was."""
        return bool(self._ier & _IER_RECEIVED) and not self._fifo and not self._typed

    def receive(self, data: bytes) -> None:
        """Input, from the event loop."""
        with self._lock:
            self._typed.extend(data)
            self._fill()
            self._update()

    def idle(self) -> None:
        """The output has taken all bytes, after it had not."""
        with self._lock:
            self._transmitter_pending = True
            self._update()

    def _fill(self) -> None:
        if self._ier & _IER_RECEIVED and not self._mcr & _MCR_LOOP:
            size = _FIFO_SIZE if self._fifos_enabled else 1
            while self._typed and len(self._fifo) < size:
                self._fifo.append(self._typed.popleft())

    def _interrupt(self) -> int:
        """The interrupt of the highest priority, as the identification register shows it."""
        ier = self._ier
        if ier & _IER_LINE and self._overrun:
            return _IIR_LINE
        if ier & _IER_RECEIVED and self._fifo:
            # With fewer bytes than the trigger level the timeout has always just passed.
            return _IIR_RECEIVED if len(self._fifo) >= self._trigger else _IIR_TIMEOUT
        if ier & _IER_TRANSMITTER and self._transmitter_pending:
            return _IIR_TRANSMITTER
        if ier & _IER_MODEM and self._modem_changes:
            return _IIR_MODEM
        return _IIR_NONE

    def _update(self) -> None:
        line = self._interrupt() != _IIR_NONE and self._mcr & (_MCR_OUT2 | _MCR_LOOP) == _MCR_OUT2
        if line != self._line:
            self._line = line
            self._set_line(line)

    def read_lsr(self, _port: int, size: int) -> int:
        """The line status register: what a polling console reads before each byte."""
        if size != 1:
            return ALL_ONES[size]
        status = 0 if self._output.busy else _LSR_TRANSMITTER_EMPTY
        if self._fifo:
            status |= _LSR_READY
        if self._overrun:
            with self._lock:
                status |= self._overrun
                self._overrun = 0
                self._update()
        return status

    def read(self, port: int, size: int) -> int:  # noqa: PLR0911 -- a table of registers
        """Reads a register; they are one byte wide."""
        if size != 1:
            return ALL_ONES[size]
        register = port & 7
        if register == _DATA and not self._lcr & _LCR_DIVISOR:
            return self._read_data()
        with self._lock:
            match register:
                case 0 | 1 if self._lcr & _LCR_DIVISOR:
                    return self._divisor[register]
                case 1:
                    return self._ier
                case 2:
                    return self._read_iir()
                case 3:
                    return self._lcr
                case 4:
                    return self._mcr
                case 6:
                    changes, self._modem_changes = self._modem_changes, 0
                    self._update()
                    return self._modem_status(self._mcr) | changes
        return self._scratch

    def _read_data(self) -> int:
        with self._lock:
            byte = self._fifo.popleft() if self._fifo else 0
            self._fill()
            self._update()
            room = self.wants_input
        if room:
            self.on_room()
        return byte

    def _read_iir(self) -> int:
        interrupt = self._interrupt()
        if interrupt == _IIR_TRANSMITTER:
            self._transmitter_pending = False
            self._update()
        return interrupt | (_IIR_FIFOS if self._fifos_enabled else 0)

    def write_data(self, _port: int, size: int, value: int) -> None:
        """The transmitter (or the divisor's low byte): the path of each byte of console output."""
        if size != 1:
            return
        if self._lcr & _LCR_DIVISOR:
            self._divisor[0] = value
            return
        if self._mcr & _MCR_LOOP:
            self._loop_back(value)
        else:
            self._output.put(value)
            if not self._ier & _IER_TRANSMITTER:
                self._transmitter_pending = not self._output.busy
                return
        with self._lock:
            # The interrupt goes, and comes at once if the byte went.
            self._transmitter_pending = not self._output.busy
            self._update()

    def _loop_back(self, value: int) -> None:
        with self._lock:
            if len(self._fifo) < (_FIFO_SIZE if self._fifos_enabled else 1):
                self._fifo.append(value)
            else:
                self._overrun = _LSR_OVERRUN

    def write(self, port: int, size: int, value: int) -> None:
        """Writes any other register than the transmitter."""
        if size != 1:
            return
        with self._lock:
            match port & 7:
                case 1 if self._lcr & _LCR_DIVISOR:
                    self._divisor[1] = value
                case 1:
                    self._write_ier(value & 0xF)
                case 2:
                    self._write_fcr(value)
                case 3:
                    self._lcr = value
                case 4:
                    self._write_mcr(value & 0x1F)
                case 7:
                    self._scratch = value
            self._fill()
            self._update()
            room = self.wants_input
        if room:
            self.on_room()

    def _write_ier(self, value: int) -> None:
        if value & ~self._ier & _IER_TRANSMITTER and not self._output.busy:
            self._transmitter_pending = True
        self._ier = value

    def _write_fcr(self, value: int) -> None:
        enabled = bool(value & _FCR_ENABLE)
        if enabled != self._fifos_enabled or value & _FCR_CLEAR_RECEIVER:
            self._fifo.clear()
        self._fifos_enabled = enabled
        self._trigger = _TRIGGERS[value >> 6] if enabled else 1

    def _write_mcr(self, value: int) -> None:
        before, after = self._modem_status(self._mcr), self._modem_status(value)
        self._mcr = value
        changed = before ^ after
        # RI's change bit tells of its end only (trailing edge).
        self._modem_changes |= changed >> 4 & 0xB | (changed & before & _MSR_RI) >> 4

    @staticmethod
    def _modem_status(mcr: int) -> int:
        if not mcr & _MCR_LOOP:
            return _MSR_CONNECTED
        status = 0
        for output, status_bit in (
            (_MCR_RTS, _MSR_CTS),
            (_MCR_DTR, _MSR_DSR),
            (_MCR_OUT1, _MSR_RI),
            (_MCR_OUT2, _MSR_DCD),
        ):
            if mcr & output:
                status |= status_bit
        return status


def _nothing() -> None:
    """Nobody sends."""
