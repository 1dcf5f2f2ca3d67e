"""The I/O APIC: 24 wires in, interrupt messages out (Intel 82093AA datasheet; register at 0x40: version 0x20).

Each pin has a redirection entry that says which message its interrupt becomes. An edge is a message, if the pin is not
masked at that moment. A level is a message when it is found asserted with the pin unmasked and no earlier one under
way (*remote IRR*); the CPU's end-of-interrupt comes back as a broadcast of the vector, and if the wire is still
asserted the message is sent again. So a level cannot be lost, whoever masks what in between.

Several sources can share a wire, as PCI's do: whoever drives it combines them (``bus/pci.py``).
"""

from __future__ import annotations

from typing import Protocol

from lguest_mp.machine.layout import IO_APIC_PINS
from lguest_mp.machine.lock import BoardLock

#: Redirection entry (82093AA, 3.2.4).
_LOGICAL = 1 << 11
_DELIVERY_STATUS = 1 << 12
_ACTIVE_LOW = 1 << 13
_REMOTE_IRR = 1 << 14
_LEVEL = 1 << 15
_MASKED = 1 << 16
_WRITABLE = 0xFF00_0000_0001_AFFF

_SELECT = 0x00
_WINDOW = 0x10
_EOI = 0x40

_INDEX_ID = 0
_INDEX_VERSION = 1
_INDEX_ARBITRATION = 2
_INDEX_TABLE = 0x10
#: Version 0x20 (has the EOI register), and the number of the last redirection entry.
_VERSION = 0x20 | (IO_APIC_PINS - 1) << 16


class InterruptBus(Protocol):
    """Where messages go; see :class:`lguest_mp.cpu.engine.LocalApics`."""

    def deliver(self, *, pin: int, destination: int, logical: bool, mode: int, vector: int, level: bool) -> bool: ...


class IoApic:
    """The I/O APIC of the machine, its registers in one page."""

    def __init__(self, lock: BoardLock, bus: InterruptBus) -> None:
        self._lock = lock
        self._bus = bus
        self._select = 0
        self._id = 0
        self._table = [_MASKED] * IO_APIC_PINS
        self._asserted = [False] * IO_APIC_PINS

    def set_line(self, pin: int, asserted: bool) -> None:
        """Drives a wire. The lock is held.

        Asserted is what the pin's polarity bit calls active; the board's wires are what the firmware says they are.
        """
        was, self._asserted[pin] = self._asserted[pin], asserted
        if asserted and not was:
            entry = self._table[pin]
            if entry & _LEVEL:
                self._service(pin)
            elif not entry & _MASKED:
                self._send(pin)

    def _service(self, pin: int) -> None:
        """Sends what an asserted level-triggered pin has to send now."""
        entry = self._table[pin]
        if self._asserted[pin] and entry & (_LEVEL | _MASKED | _REMOTE_IRR) == _LEVEL and self._send(pin):
            self._table[pin] = entry | _REMOTE_IRR

    def _send(self, pin: int) -> bool:
        entry = self._table[pin]
        return self._bus.deliver(
            pin=pin,
            destination=entry >> 56,
            logical=bool(entry & _LOGICAL),
            mode=entry >> 8 & 7,
            vector=entry & 0xFF,
            level=bool(entry & _LEVEL),
        )

    def end_of_interrupt(self, vector: int) -> None:
        """The CPU is done with a level-triggered vector. The lock is held."""
        for pin, entry in enumerate(self._table):
            if entry & (_REMOTE_IRR | 0xFF) == _REMOTE_IRR | vector:
                self._table[pin] = entry & ~_REMOTE_IRR
                self._service(pin)

    def read(self, offset: int, size: int) -> int:
        """A read of the registers' page; the two registers are 32 bits wide."""
        if size != 4:
            return 0
        with self._lock:
            if offset == _SELECT:
                return self._select
            if offset == _WINDOW:
                return self._read_register(self._select)
            return 0

    def _read_register(self, index: int) -> int:
        if index in {_INDEX_ID, _INDEX_ARBITRATION}:
            return self._id
        if index == _INDEX_VERSION:
            return _VERSION
        pin, high = divmod(index - _INDEX_TABLE, 2)
        if 0 <= pin < IO_APIC_PINS:
            return self._table[pin] >> 32 * high & 0xFFFF_FFFF
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """A write to the registers' page."""
        if size != 4:
            return
        with self._lock:
            if offset == _SELECT:
                self._select = value & 0xFF
            elif offset == _WINDOW:
                self._write_register(self._select, value)
            elif offset == _EOI:
                self.end_of_interrupt(value & 0xFF)

    def _write_register(self, index: int, value: int) -> None:
        if index == _INDEX_ID:
            self._id = value & 0x0F00_0000
            return
        pin, high = divmod(index - _INDEX_TABLE, 2)
        if not 0 <= pin < IO_APIC_PINS:
            return
        old = self._table[pin]
        half = 0xFFFF_FFFF << 32 * high
        entry = (old & ~half | value << 32 * high) & _WRITABLE | old & _REMOTE_IRR
        if not entry & _LEVEL:
            # An edge is never under way; kernels switch the mode to and fro to clear a remote IRR that got stuck.
            entry &= ~_REMOTE_IRR
        self._table[pin] = entry
        self._service(pin)
