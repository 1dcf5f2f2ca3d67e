"""A PCI bus: how the guest finds its devices, and where their registers are (PCI Local Bus Specification 3.0).

There is one bus, with a host bridge in slot 0 and single-function devices in the slots after it. Their
configuration spaces are reached by the type-1 mechanism: an address register and a data register among the ports
(3.2.2.3.2). Each device has at most one window of memory-mapped registers, always of :data:`WINDOW_SIZE` bytes and
aligned to that, so that one look into a dict by address says whose register is meant. The firmware part of this
machine gives every window an address before the guest starts; the guest may move and close them, and the dict
follows.

A configuration space is 256 bytes, each with a mask of the bits that software can change. A write goes through the
mask and is then shown to the device, which acts on what has changed. Sizes and alignment are as PCI has them: 1, 2
or 4 bytes within one doubleword; everything else reads as all ones and writes nothing.

Interrupt pins are wired-OR: the bus counts who asserts each of the four lines, INTA# of each slot going to the next
one round (the usual swizzle), and tells the machine only when a line as a whole changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from lguest_mp.record import Value

#: The size of a device's window of memory-mapped registers, as a shift and in bytes.
WINDOW_SHIFT = 15
WINDOW_SIZE = 1 << WINDOW_SHIFT
#: What a read gives where nothing answers, by size.
ALL_ONES = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF, 8: 0xFFFF_FFFF_FFFF_FFFF}

SLOTS = 32
CONFIG_SIZE = 256

# The header (6.1, 6.2).
_VENDOR_ID = 0x00
_DEVICE_ID = 0x02
COMMAND = 0x04
STATUS = 0x06
_REVISION = 0x08
_CLASS = 0x09
BAR0 = 0x10
_SUBSYSTEM_VENDOR_ID = 0x2C
_SUBSYSTEM_ID = 0x2E
_CAPABILITIES = 0x34
_INTERRUPT_LINE = 0x3C
_INTERRUPT_PIN = 0x3D
_FIRST_CAPABILITY = 0x40

COMMAND_MEMORY = 1 << 1
COMMAND_MASTER = 1 << 2
COMMAND_INTX_DISABLE = 1 << 10
STATUS_INTERRUPT = 1 << 3
_STATUS_CAPABILITIES = 1 << 4

_CONFIG_ENABLE = 1 << 31
_CONFIG_ADDRESS_WRITABLE = 0x80FF_FFFC


class PciIdentity(Value):
    """Who a device says it is. ``class_code`` is base class, subclass and programming interface, 24 bits."""

    vendor: int
    device: int
    class_code: int
    revision: int = 0
    subsystem_vendor: int = 0
    subsystem: int = 0


class Interrupts(Protocol):
    """Where a device's interrupts go. Both methods are called with the platform's lock held."""

    @property
    def message(self) -> Callable[[int, int], object]:
        """Takes the address and data of a message-signalled interrupt."""

    def set_intx(self, asserted: bool) -> None:
        """The device's INTA# pin."""


class PciFunction:
    """A device's configuration space, and what is behind its window.

    Configuration and window are accessed on the CPU's thread only.
    """

    def __init__(self, identity: PciIdentity, *, window: bool = False) -> None:
        self.config = bytearray(CONFIG_SIZE)
        self._writable = bytearray(CONFIG_SIZE)
        self._last_link = _CAPABILITIES
        self._free = _FIRST_CAPABILITY
        self._has_window = window
        self._put(_VENDOR_ID, 2, identity.vendor)
        self._put(_DEVICE_ID, 2, identity.device)
        self._put(_REVISION, 1, identity.revision)
        self._put(_CLASS, 3, identity.class_code)
        self._put(_SUBSYSTEM_VENDOR_ID, 2, identity.subsystem_vendor)
        self._put(_SUBSYSTEM_ID, 2, identity.subsystem)
        if window:
            self._put(COMMAND, 2, 0, writable=COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_DISABLE)
            self._put(BAR0, 4, 0, writable=0xFFFF_FFFF & -WINDOW_SIZE)
            self._put(_INTERRUPT_LINE, 1, 0, writable=0xFF)
            self._put(_INTERRUPT_PIN, 1, 1)

    def _put(self, offset: int, size: int, value: int, writable: int = 0) -> None:
        self.config[offset : offset + size] = value.to_bytes(size, "little")
        self._writable[offset : offset + size] = writable.to_bytes(size, "little")

    def add_capability(self, capability: int, body: bytes, writable: bytes | None = None) -> int:
        """Appends a capability (6.7): its ID, the link, then ``body``; the offset in configuration space.

        ``writable`` is the mask of what software can change in ``body``.
        """
        offset = self._free
        end = offset + 2 + len(body)
        self.config[offset] = capability
        self.config[offset + 2 : end] = body
        self._writable[offset + 2 : end] = writable or bytes(len(body))
        self.config[self._last_link] = offset
        self.config[STATUS] |= _STATUS_CAPABILITIES
        self._last_link = offset + 1
        self._free = end + 3 & ~3
        return offset

    @property
    def command(self) -> int:
        """The command register."""
        return int.from_bytes(self.config[COMMAND : COMMAND + 2], "little")

    @property
    def window(self) -> int | None:
        """Where the window is, while it is open."""
        if not self._has_window or not self.config[COMMAND] & COMMAND_MEMORY:
            return None
        return int.from_bytes(self.config[BAR0 : BAR0 + 4], "little") & -WINDOW_SIZE

    def assign(self, address: int, interrupt_line: int) -> None:
        """What firmware does: gives the window an address and opens it, and notes where the interrupt goes."""
        self.config[BAR0 : BAR0 + 4] = address.to_bytes(4, "little")
        self.config[COMMAND] |= COMMAND_MEMORY
        self.config[_INTERRUPT_LINE] = interrupt_line

    def config_read(self, offset: int, size: int) -> int:
        """Reads ``size`` bytes of configuration space, within one doubleword."""
        return int.from_bytes(self.config[offset : offset + size], "little")

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Writes them, through the mask."""
        mask = int.from_bytes(self._writable[offset : offset + size], "little")
        old = int.from_bytes(self.config[offset : offset + size], "little")
        self.config[offset : offset + size] = (old & ~mask | value & mask).to_bytes(size, "little")

    def read(self, offset: int, size: int) -> int:
        """Reads a register in the window; ``size`` is 1, 2, 4 or 8 and the access may be unaligned."""
        return ALL_ONES[size]

    def write(self, offset: int, size: int, value: int) -> None:
        """Writes one."""


def host_bridge() -> PciFunction:
    """The function in slot 0: the processor's side of the bus, of which a guest needs no more than the class code.

    The ID is the one that other virtual machines use for a bridge without registers (Intel's "virtual PCIe host").
    """
    return PciFunction(PciIdentity(vendor=0x8086, device=0x0D57, class_code=0x06_0000))


class IntxLines:
    """The four interrupt lines of the bus, shared by the slots. The platform's lock is held for every change."""

    def __init__(self, set_line: Callable[[int, bool], None]) -> None:
        self._set_line = set_line
        #: For each line the slots that assert it, a bit each.
        self._asserted = [0, 0, 0, 0]

    @staticmethod
    def line(slot: int) -> int:
        """The line, 0 to 3, to which INTA# of that slot is wired."""
        return slot % 4

    def set(self, slot: int, asserted: bool) -> None:
        """INTA# of a slot."""
        line = self.line(slot)
        before = self._asserted[line]
        after = before | 1 << slot if asserted else before & ~(1 << slot)
        self._asserted[line] = after
        if bool(before) != bool(after):
            self._set_line(line, asserted)


class PciBus:
    """The bus, on the CPU's thread. ``functions`` are put into slots 1 and up, in their order."""

    def __init__(
        self, functions: Sequence[PciFunction], *, window_first: int, window_last: int, interrupt_pin: int
    ) -> None:
        """``window_first`` to ``window_last`` are for the devices' windows.

        ``interrupt_pin`` is the interrupt controller's input to which the first of the four lines goes.
        """
        self._slots = [host_bridge(), *functions]
        if len(self._slots) > SLOTS:
            raise ValueError(f"{len(functions)} devices do not fit {SLOTS - 1} PCI slots")
        #: What answers at an address, by address >> WINDOW_SHIFT. Replaced as a whole when a window moves.
        self.windows: dict[int, PciFunction] = {}
        self._address = 0
        for slot, function in enumerate(functions, start=1):
            address = window_first + (slot - 1) * WINDOW_SIZE
            assert address + WINDOW_SIZE - 1 <= window_last
            function.assign(address, interrupt_pin + IntxLines.line(slot))
        self._find_windows()

    def _find_windows(self) -> None:
        self.windows = {
            window >> WINDOW_SHIFT: function for function in self._slots if (window := function.window) is not None
        }

    def read_address(self, _port: int, size: int) -> int:
        """Port 0xcf8: only a doubleword is the address register."""
        return self._address if size == 4 else ALL_ONES[size]

    def write_address(self, _port: int, size: int, value: int) -> None:
        """Port 0xcf8."""
        if size == 4:
            self._address = value & _CONFIG_ADDRESS_WRITABLE

    def _selected(self) -> PciFunction | None:
        address = self._address
        # Bus 0, function 0 of an existing slot.
        if not address & _CONFIG_ENABLE or address & 0x00FF_0700:
            return None
        slot = address >> 11 & 0x1F
        return self._slots[slot] if slot < len(self._slots) else None

    def read_data(self, port: int, size: int) -> int:
        """Ports 0xcfc to 0xcff."""
        function = self._selected()
        lane = port & 3
        if function is None or lane + size > 4:
            return ALL_ONES[size]
        return function.config_read(self._address & 0xFC | lane, size)

    def write_data(self, port: int, size: int, value: int) -> None:
        """Ports 0xcfc to 0xcff."""
        function = self._selected()
        lane = port & 3
        if function is None or lane + size > 4:
            return
        offset = self._address & 0xFC | lane
        function.config_write(offset, size, value)
        if offset & 0xFC in {COMMAND, BAR0}:
            self._find_windows()
