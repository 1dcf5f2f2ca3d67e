"""Virtio over PCI: one device as a function on the bus, as its driver sees it (virtio 1.2, 4.1; modern only).

All registers are in one window:

====== ===========================================================
0x0000 common configuration (4.1.4.3)
0x1000 ISR status (4.1.4.5)
0x2000 the device's own configuration (4.1.4.6)
0x3000 notifications, four bytes for each queue (4.1.4.4)
0x4000 MSI-X table
0x5000 MSI-X pending bits
====== ===========================================================

One vector of MSI-X is meant for each queue and one for configuration changes; the driver may assign them otherwise,
or leave MSI-X off and share the INTA# pin.

**The life of the device** is a state machine, :class:`DeviceState`. The driver moves it by setting bits of the
device status, in the standard's order (3.1.1); the last step starts the workers, and only a reset leads back, once
they are gone. Starting and resetting are asked of :class:`DeviceControl` and waited for inside the register access,
as the driver expects: when the status reads zero, nobody uses its memory any more. A device whose driver broke the
rules, or whose workers crashed too often, is *broken*: it shows NEEDS_RESET, serves nothing, and waits for the reset
(or for somebody to mend it).

**Notifications** go from the notify register straight into the queue's eventfd. Before the device runs they are
ignored; a worker looks at its ring when it starts, whoever has kicked.

**Interrupts** come on another thread, so what they touch (vectors, MSI-X, ISR status, the pin) changes under the
platform's lock only. An interrupt that cannot be delivered is remembered: by the pending bits while masked, by ISR
status until it is read, and it moves from one to the other when the driver switches between them.

The driver is not trusted. An access that the standard does not define (another width, another offset, a queue that
does not exist, a register that may not be written now) reads as zero and writes nothing.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager
from enum import Enum, auto
from typing import Protocol

from lguest_mp.bus import msix
from lguest_mp.bus.msix import MsixTable
from lguest_mp.bus.pci import (
    BAR0,
    COMMAND,
    COMMAND_INTX_DISABLE,
    COMMAND_MASTER,
    STATUS,
    STATUS_INTERRUPT,
    WINDOW_SIZE,
    Interrupts,
    PciFunction,
    PciIdentity,
)
from lguest_mp.record import Record
from lguest_mp.virtio.device import QUEUE_SIZE, Device, DeviceId, DeviceStatus, Feature, QueueLayout

VENDOR = 0x1AF4
#: The PCI device ID is this plus the virtio device ID (4.1.2.1).
DEVICE_BASE = 0x1040
_SUBSYSTEM_BASE = 0x0040

#: PCI class codes, by what a guest expects of the device.
_CLASS_CODES = {
    DeviceId.NET: 0x02_0000,
    DeviceId.BLOCK: 0x01_8000,
    DeviceId.CONSOLE: 0x07_8000,
    DeviceId.ENTROPY: 0xFF_0000,
}

#: What the bus offers for every device, beside the device's own features.
BUS_FEATURES = Feature.VERSION_1 | Feature.RING_INDIRECT_DESC | Feature.RING_EVENT_IDX | Feature.RING_RESET

#: The driver asked for no vector, or for one that does not exist (4.1.5.1.2).
NO_VECTOR = 0xFFFF

COMMON = 0x0000
ISR = 0x1000
DEVICE = 0x2000
NOTIFY = 0x3000
NOTIFY_MULTIPLIER = 4
MSIX_TABLE = 0x4000
MSIX_PENDING = 0x5000
_PART_SHIFT = 12

_VENDOR_CAPABILITY = 0x09
#: struct virtio_pci_cap after ID and link: length, type, BAR, ID, padding, offset, length (4.1.4).
_CAPABILITY = struct.Struct("<BBBBHII")
_CAP_COMMON, _CAP_NOTIFY, _CAP_ISR, _CAP_DEVICE, _CAP_PCI = 1, 2, 3, 4, 5


class Common:
    """Offsets of struct virtio_pci_common_cfg (4.1.4.3)."""

    DEVICE_FEATURE_SELECT = 0
    DEVICE_FEATURE = 4
    DRIVER_FEATURE_SELECT = 8
    DRIVER_FEATURE = 12
    CONFIG_VECTOR = 16
    NUM_QUEUES = 18
    DEVICE_STATUS = 20
    CONFIG_GENERATION = 21
    QUEUE_SELECT = 22
    QUEUE_SIZE = 24
    QUEUE_VECTOR = 26
    QUEUE_ENABLE = 28
    QUEUE_NOTIFY_OFF = 30
    QUEUE_DESC = 32
    QUEUE_DRIVER = 40
    QUEUE_DEVICE = 48
    QUEUE_NOTIFY_DATA = 56
    QUEUE_RESET = 58
    LENGTH = 60


#: The width of each register; 64-bit ones are accessed as two of 32 (4.1.3.1).
_WIDTHS = {
    Common.DEVICE_FEATURE_SELECT: 4,
    Common.DEVICE_FEATURE: 4,
    Common.DRIVER_FEATURE_SELECT: 4,
    Common.DRIVER_FEATURE: 4,
    Common.CONFIG_VECTOR: 2,
    Common.NUM_QUEUES: 2,
    Common.DEVICE_STATUS: 1,
    Common.CONFIG_GENERATION: 1,
    Common.QUEUE_SELECT: 2,
    Common.QUEUE_SIZE: 2,
    Common.QUEUE_VECTOR: 2,
    Common.QUEUE_ENABLE: 2,
    Common.QUEUE_NOTIFY_OFF: 2,
    Common.QUEUE_DESC: 4,
    Common.QUEUE_DESC + 4: 4,
    Common.QUEUE_DRIVER: 4,
    Common.QUEUE_DRIVER + 4: 4,
    Common.QUEUE_DEVICE: 4,
    Common.QUEUE_DEVICE + 4: 4,
    Common.QUEUE_NOTIFY_DATA: 2,
    Common.QUEUE_RESET: 2,
}
_QUADWORDS = frozenset({Common.QUEUE_DESC, Common.QUEUE_DRIVER, Common.QUEUE_DEVICE})

#: ISR status (4.1.4.5).
_ISR_QUEUE = 1
_ISR_CONFIG = 2


class DeviceState(Enum):
    """Where a device is in its life (virtio 1.2, 2.1 and 3.1)."""

    #: Nothing was negotiated, nobody serves it.
    RESET = auto()
    #: The guest has noticed the device.
    ACKNOWLEDGED = auto()
    #: The guest has a driver for it.
    DRIVER = auto()
    #: The features are agreed on; queues are being set up.
    FEATURES_OK = auto()
    #: DRIVER_OK was set and the workers are being started; they may interrupt already.
    STARTING = auto()
    RUNNING = auto()
    #: The driver broke a rule: NEEDS_RESET is set, nothing is served.
    BROKEN = auto()
    #: The workers are being ended.
    RESETTING = auto()


_ALIVE = frozenset({DeviceState.STARTING, DeviceState.RUNNING})
#: Its queues are known to those who serve it; who mends a broken device has to know what became of them.
_SET_UP = frozenset({DeviceState.RUNNING, DeviceState.BROKEN})


class DeviceControl(Protocol):
    """Who makes a device's decisions true. Each method returns when they are."""

    def start(self, features: int, queues: tuple[QueueLayout | None, ...]) -> None:
        """The driver is ready: serve the queues (None: one that it did not enable)."""

    def reset(self) -> None:
        """Stop serving the device; afterwards nothing is left in its eventfds."""

    def start_queue(self, queue: int, features: int, layout: QueueLayout) -> None:
        """Serve this queue, which was not served."""

    def reset_queue(self, queue: int) -> None:
        """Stop serving this queue; afterwards nothing is left in its eventfd."""

    def log(self, text: str) -> None:
        """One line for the user."""


class Shortcuts(Protocol):
    """Ways between a device's driver and its workers past the machine. The platform's lock is held for both methods."""

    def notify_at(self, queue: int, address: int | None) -> None:
        """Stores to ``address`` notify the queue's worker from now on; None: no more, they are the device's again."""

    def interrupt_by(self, queue: int, message: tuple[int, int] | None) -> None:
        """The worker's interrupts are this message (address, data) from now on; None: they come here again."""


class _Queue(Record):
    """What the driver has configured for one queue (4.1.4.3)."""

    size: int = QUEUE_SIZE
    descriptor_table: int = 0
    available_ring: int = 0
    used_ring: int = 0
    enabled: bool = False

    def layout(self) -> QueueLayout:
        return QueueLayout(self.size, self.descriptor_table, self.available_ring, self.used_ring)


_ADDRESSES = {
    Common.QUEUE_DESC: "descriptor_table",
    Common.QUEUE_DRIVER: "available_ring",
    Common.QUEUE_DEVICE: "used_ring",
}


class VirtioPciFunction(PciFunction):
    """A virtio device on the PCI bus.

    ``kicks`` are its queues' eventfds towards the workers. ``packed``: packed virtqueues are offered, too.

    ``read``, ``write`` and the configuration space are the CPU thread's; :meth:`queue_interrupt`,
    :meth:`config_changed` and :meth:`broken` are any thread's.
    """

    def __init__(
        self,
        device: Device,
        kicks: Sequence[int],
        *,
        lock: AbstractContextManager[object],
        interrupts: Interrupts,
        control: DeviceControl,
        shortcuts: Shortcuts | None = None,
        packed: bool = False,
    ) -> None:
        super().__init__(
            PciIdentity(
                vendor=VENDOR,
                device=DEVICE_BASE + device.device_id,
                class_code=_CLASS_CODES[device.device_id],
                revision=1,
                subsystem_vendor=VENDOR,
                subsystem=_SUBSYSTEM_BASE + device.device_id,
            ),
            window=True,
        )
        self.device = device
        self._kicks = tuple(kicks)
        self._lock = lock
        self._interrupts = interrupts
        self._control = control
        self._shortcuts = shortcuts
        self._count = len(device.queue_names)
        if len(self._kicks) != self._count:
            raise ValueError(f"{device.name} has {self._count} queues and {len(self._kicks)} eventfds")
        self._offered = int(device.features | BUS_FEATURES | (Feature.RING_PACKED if packed else 0))

        #: Interrupt sources are the queues, and this one for configuration changes.
        self._config_source = self._count
        self._msix = MsixTable(self._count + 1, interrupts.message)
        self._msix_enabled = False
        self._raised = 0
        self.state = DeviceState.RESET
        self._served = False
        self._complained = False
        self._generation = 0
        #: For each queue which notifications and which interrupts take a shortcut now.
        self._short_notifications: list[int | None] = [None] * self._count
        self._short_interrupts: list[tuple[int, int] | None] = [None] * self._count
        self._set_defaults()
        self._add_capabilities()

    def _set_defaults(self) -> None:
        self._status = 0
        self._device_feature_select = self._driver_feature_select = 0
        self._driver_features = 0
        self._queue_select = 0
        self._queues = [_Queue() for _ in range(self._count)]
        self._vectors = [NO_VECTOR] * (self._count + 1)

    def _add_capabilities(self) -> None:
        body = struct.pack("<HII", self._msix.vectors - 1, MSIX_TABLE, MSIX_PENDING)
        self._msix_control = 2 + self.add_capability(
            msix.CAPABILITY, body, struct.pack("<HII", msix.ENABLE | msix.FUNCTION_MASK, 0, 0)
        )
        self._add_structure(_CAP_COMMON, COMMON, Common.LENGTH)
        self._add_structure(_CAP_NOTIFY, NOTIFY, NOTIFY_MULTIPLIER * self._count, struct.pack("<I", NOTIFY_MULTIPLIER))
        self._add_structure(_CAP_ISR, ISR, 1)
        if config := self.device.config_space():
            self._add_structure(_CAP_DEVICE, DEVICE, len(config))
        # The driver says BAR, offset and length itself and accesses the data field after them (4.1.4.9).
        writable = _CAPABILITY.pack(0, 0, 0xFF, 0, 0, 0xFFFF_FFFF, 0xFFFF_FFFF) + b"\xff" * 4
        self._pci_access = self._add_structure(_CAP_PCI, 0, 0, bytes(4), writable)
        self._pci_data = self._pci_access + 2 + _CAPABILITY.size

    def _add_structure(
        self, kind: int, offset: int, length: int, extra: bytes = b"", writable: bytes | None = None
    ) -> int:
        size = 2 + _CAPABILITY.size + len(extra)
        return self.add_capability(
            _VENDOR_CAPABILITY, _CAPABILITY.pack(size, kind, 0, 0, 0, offset, length) + extra, writable
        )

    # The window

    def read(self, offset: int, size: int) -> int:
        """Reads a register in the window."""
        match offset >> _PART_SHIFT:
            case 0:
                return self._read_common(offset, size)
            case 1:
                return self._read_isr() if offset == ISR and size == 1 else 0
            case 2:
                return self._read_device(offset - DEVICE, size)
            case 4:
                with self._lock:
                    return self._msix.read(offset - MSIX_TABLE, size)
            case 5:
                with self._lock:
                    return self._msix.read_pending(offset - MSIX_PENDING, size)
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Writes a register in the window."""
        if offset >> _PART_SHIFT == NOTIFY >> _PART_SHIFT:
            queue = (offset - NOTIFY) // NOTIFY_MULTIPLIER
            if queue < self._count and self.state is DeviceState.RUNNING and self._queues[queue].enabled:
                os.eventfd_write(self._kicks[queue], 1)
            return
        match offset >> _PART_SHIFT:
            case 0:
                self._write_common(offset, size, value)
            case 2:
                self._write_device(offset - DEVICE, size, value)
            case 4:
                with self._lock:
                    self._msix.write(offset - MSIX_TABLE, size, value)
                    self._update_shortcuts()

    # Common configuration

    def _read_common(self, offset: int, size: int) -> int:  # noqa: PLR0911 -- a table of registers
        if size == 8 and offset in _QUADWORDS:
            return self._read_common(offset, 4) | self._read_common(offset + 4, 4) << 32
        if _WIDTHS.get(offset) != size:
            return 0
        if offset >= Common.QUEUE_SIZE:
            return self._read_queue(offset)
        match offset:
            case Common.DEVICE_FEATURE_SELECT:
                return self._device_feature_select
            case Common.DEVICE_FEATURE:
                return _half(self._offered, self._device_feature_select)
            case Common.DRIVER_FEATURE_SELECT:
                return self._driver_feature_select
            case Common.DRIVER_FEATURE:
                return _half(self._driver_features, self._driver_feature_select)
            case Common.CONFIG_VECTOR:
                return self._vectors[self._config_source]
            case Common.NUM_QUEUES:
                return self._count
            case Common.DEVICE_STATUS:
                return self._status
            case Common.CONFIG_GENERATION:
                return self._generation
        return self._queue_select

    def _read_queue(self, offset: int) -> int:  # noqa: PLR0911 -- a table of registers
        if self._queue_select >= self._count:
            # No such queue: its size is zero (4.1.4.3.1).
            return 0
        queue = self._queues[self._queue_select]
        match offset:
            case Common.QUEUE_SIZE:
                return queue.size
            case Common.QUEUE_VECTOR:
                return self._vectors[self._queue_select]
            case Common.QUEUE_ENABLE:
                return int(queue.enabled)
            case Common.QUEUE_NOTIFY_OFF:
                return self._queue_select
            case Common.QUEUE_NOTIFY_DATA | Common.QUEUE_RESET:
                # A reset is done when the write that asked for it returns.
                return 0
        address: int = getattr(queue, _ADDRESSES[offset & ~7])
        return _half(address, offset >> 2 & 1)

    def _write_common(self, offset: int, size: int, value: int) -> None:
        if size == 8 and offset in _QUADWORDS:
            self._write_common(offset, 4, value & 0xFFFF_FFFF)
            self._write_common(offset + 4, 4, value >> 32)
            return
        if _WIDTHS.get(offset) != size:
            return
        if offset >= Common.QUEUE_SIZE:
            if self._queue_select < self._count:
                self._write_queue(self._queue_select, offset, value)
            return
        match offset:
            case Common.DEVICE_FEATURE_SELECT:
                self._device_feature_select = value
            case Common.DRIVER_FEATURE_SELECT:
                self._driver_feature_select = value
            case Common.DRIVER_FEATURE if not self._status & DeviceStatus.FEATURES_OK:
                self._driver_features = _with_half(self._driver_features, self._driver_feature_select, value)
            case Common.CONFIG_VECTOR:
                self._set_vector(self._config_source, value)
            case Common.DEVICE_STATUS:
                self._write_status(value)
            case Common.QUEUE_SELECT:
                self._queue_select = value

    def _write_queue(self, index: int, offset: int, value: int) -> None:
        queue = self._queues[index]
        match offset:
            case Common.QUEUE_VECTOR:
                self._set_vector(index, value)
            case Common.QUEUE_RESET:
                if value == 1 and queue.enabled and self._driver_features & Feature.RING_RESET:
                    self._reset_queue(index)
            case _ if queue.enabled:
                # The driver must not reconfigure a queue that is in use (4.1.4.3.2).
                pass
            case Common.QUEUE_ENABLE:
                if value == 1:
                    self._enable_queue(index)
            case Common.QUEUE_SIZE:
                # 4.1.4.3.2: a power of two, unless it is a packed virtqueue's.
                is_packed = self._driver_features & Feature.RING_PACKED
                if 0 < value <= QUEUE_SIZE and (is_packed or value & value - 1 == 0):
                    queue.size = value
            case _ if offset & ~7 in _ADDRESSES:
                name = _ADDRESSES[offset & ~7]
                setattr(queue, name, _with_half(getattr(queue, name), offset >> 2 & 1, value))

    def _set_vector(self, source: int, vector: int) -> None:
        with self._lock:
            self._vectors[source] = vector if vector < self._msix.vectors else NO_VECTOR
            self._update_shortcuts()

    # The device's own configuration

    def _read_device(self, offset: int, size: int) -> int:
        with self._lock:
            config = self.device.config_space()
        return int.from_bytes(config[offset : offset + size], "little")

    def _write_device(self, offset: int, size: int, value: int) -> None:
        with self._lock:
            if offset + size <= len(self.device.config_space()):
                self.device.write_config(offset, value.to_bytes(size, "little"))

    # The life of the device

    def _write_status(self, value: int) -> None:
        if value == 0:
            self._reset()
            return
        # The driver must not clear bits except by a reset, so what is new is what counts (2.1.1).
        if value & DeviceStatus.FAILED:
            self._set_status(DeviceStatus.FAILED)
        if value & DeviceStatus.ACKNOWLEDGE and self.state is DeviceState.RESET:
            self._advance(DeviceState.ACKNOWLEDGED, DeviceStatus.ACKNOWLEDGE)
        if value & DeviceStatus.DRIVER and self.state is DeviceState.ACKNOWLEDGED:
            self._advance(DeviceState.DRIVER, DeviceStatus.DRIVER)
        if value & DeviceStatus.FEATURES_OK and self.state is DeviceState.DRIVER:
            self._agree_on_features()
        if value & DeviceStatus.DRIVER_OK and self.state is DeviceState.FEATURES_OK:
            self._start()

    def _set_status(self, bit: DeviceStatus) -> None:
        with self._lock:
            self._status |= bit

    def _advance(self, state: DeviceState, bit: DeviceStatus) -> None:
        with self._lock:
            self.state = state
            self._status |= bit

    def _agree_on_features(self) -> None:
        """FEATURES_OK stays clear when the driver wants what cannot be (2.2.2, 6.1)."""
        if self._driver_features & ~self._offered:
            self._complain(f"the driver accepted features that were not offered: {self._driver_features:#x}")
        elif not self._driver_features & Feature.VERSION_1:
            self._complain("the driver is a legacy one, which this device does not support (no VERSION_1)")
        else:
            self._advance(DeviceState.FEATURES_OK, DeviceStatus.FEATURES_OK)

    def _complain(self, text: str) -> None:
        """Once: a driver that tries for ever is not worth a line each time."""
        if not self._complained:
            self._complained = True
            self._control.log(text)

    def _start(self) -> None:
        self._advance(DeviceState.STARTING, DeviceStatus.DRIVER_OK)
        self._served = True
        layouts = tuple(queue.layout() if queue.enabled else None for queue in self._queues)
        self._control.start(self._driver_features, layouts)
        with self._lock:
            # Unless a worker has found the driver breaking a rule already.
            if self.state is DeviceState.STARTING:
                self.state = DeviceState.RUNNING
            self._update_shortcuts()

    def _reset(self) -> None:
        with self._lock:
            self.state = DeviceState.RESETTING
            self._update_shortcuts()
        if self._served:
            self._control.reset()
            self._served = False
        with self._lock:
            self._set_defaults()
            self._raised = 0
            self._msix.forget()
            self._update_pin()
            self.state = DeviceState.RESET

    def _enable_queue(self, index: int) -> None:
        queue = self._queues[index]
        queue.enabled = True
        if self.state in _SET_UP:
            self._control.start_queue(index, self._driver_features, queue.layout())
            with self._lock:
                self._update_shortcuts()

    def _reset_queue(self, index: int) -> None:
        """The driver takes one queue back; its registers are as after a reset (2.6.1, 4.1.4.3.1)."""
        self._queues[index] = _Queue()
        self._set_vector(index, NO_VECTOR)
        if self.state in _SET_UP:
            self._control.reset_queue(index)

    # What happens outside

    def queue_interrupt(self, queue: int) -> None:
        """The worker of a queue has used buffers. From any thread."""
        with self._lock:
            if self.state in _ALIVE:
                self._raise(queue)

    def config_changed(self, offset: int, data: bytes) -> None:
        """The device's configuration has changed. From any thread."""
        with self._lock:
            self.device.apply_config(offset, data)
            self._generation = self._generation + 1 & 0xFF
            if self.state in _ALIVE:
                self._raise(self._config_source)

    def broken(self) -> bool:
        """The device was stopped: its driver broke a rule, or its workers crashed (2.1.2). From any thread.

        False: the driver has reset it already.
        """
        with self._lock:
            if self.state not in _ALIVE:
                return False
            self.state = DeviceState.BROKEN
            self._status |= DeviceStatus.NEEDS_RESET
            self._update_shortcuts()
            self._raise(self._config_source)
            return True

    def mended(self) -> bool:
        """The device is served again, from where it stopped. From any thread.

        Notifications and interrupts were lost meanwhile: both sides are made to look. False: it was reset since.
        """
        with self._lock:
            if self.state is not DeviceState.BROKEN:
                return False
            self.state = DeviceState.RUNNING
            self._status &= ~DeviceStatus.NEEDS_RESET
            self._update_shortcuts()
            for index, queue in enumerate(self._queues):
                if queue.enabled:
                    os.eventfd_write(self._kicks[index], 1)
                    self._raise(index)
            return True

    # Interrupts (4.1.5); the lock is held

    def _raise(self, source: int) -> None:
        if not self._msix_enabled:
            self._raised |= 1 << source
            self._update_pin()
        elif (vector := self._vectors[source]) != NO_VECTOR:
            self._msix.raise_vector(vector)

    def _update_pin(self) -> None:
        self._interrupts.set_intx(
            self._raised != 0 and not self._msix_enabled and not self.command & COMMAND_INTX_DISABLE
        )

    def _isr(self) -> int:
        queues = self._raised & (1 << self._count) - 1
        return (_ISR_QUEUE if queues else 0) | (_ISR_CONFIG if self._raised >> self._config_source else 0)

    def _read_isr(self) -> int:
        with self._lock:
            isr = self._isr()
            self._raised = 0
            self._update_pin()
            return isr

    def _switch_interrupts(self) -> None:
        """The driver has written the command register or MSI-X's control."""
        control = int.from_bytes(self.config[self._msix_control : self._msix_control + 2], "little")
        enabled = bool(control & msix.ENABLE)
        if enabled != self._msix_enabled:
            self._msix_enabled = enabled
            if enabled:
                self._raised_to_pending()
            else:
                self._pending_to_raised()
        self._msix.set_open(enabled and not control & msix.FUNCTION_MASK and bool(self.command & COMMAND_MASTER))
        self._update_pin()
        self._update_shortcuts()

    def _raised_to_pending(self) -> None:
        for source, vector in enumerate(self._vectors):
            if self._raised >> source & 1 and vector != NO_VECTOR:
                self._raised &= ~(1 << source)
                self._msix.raise_vector(vector)

    def _pending_to_raised(self) -> None:
        for source, vector in enumerate(self._vectors):
            if vector != NO_VECTOR and self._msix.pending >> vector & 1:
                self._raised |= 1 << source
        self._msix.forget()

    # Shortcuts; the lock is held

    def _update_shortcuts(self) -> None:
        """Something has changed that may open or close one."""
        if self._shortcuts is None:
            return
        for queue in range(self._count):
            address = self._notification_address(queue)
            if address != self._short_notifications[queue]:
                self._short_notifications[queue] = address
                self._shortcuts.notify_at(queue, address)
            message = self._interrupt_message(queue)
            if message != self._short_interrupts[queue]:
                self._short_interrupts[queue] = message
                self._shortcuts.interrupt_by(queue, message)

    def _notification_address(self, queue: int) -> int | None:
        """Where a store does nothing but notify the queue's worker."""
        window = self.window
        if window is None or self.state is not DeviceState.RUNNING or not self._queues[queue].enabled:
            return None
        return window + NOTIFY + queue * NOTIFY_MULTIPLIER

    def _interrupt_message(self, queue: int) -> tuple[int, int] | None:
        """The message that is all that an interrupt of the queue does."""
        vector = self._vectors[queue]
        if not self._msix_enabled or vector == NO_VECTOR or self.state not in _ALIVE:
            return None
        return self._msix.message(vector)

    # Configuration space

    def config_read(self, offset: int, size: int) -> int:
        """Reads configuration space; the data of the PCI access capability comes from the window (4.1.4.9.1)."""
        if offset & ~3 == self._pci_data and (access := self._pci_window_access()):
            value = self.read(*access)
            self.config[self._pci_data : self._pci_data + 4] = value.to_bytes(4, "little")
        value = super().config_read(offset, size)
        if offset <= STATUS < offset + size and self._raised:
            value |= STATUS_INTERRUPT << 8 * (STATUS - offset)
        return value

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Writes configuration space."""
        super().config_write(offset, size, value)
        doubleword = offset & ~3
        if doubleword in {COMMAND, self._msix_control & ~3}:
            with self._lock:
                self._switch_interrupts()
        elif doubleword == BAR0:
            with self._lock:
                self._update_shortcuts()
        elif doubleword == self._pci_data and (access := self._pci_window_access()):
            window_offset, length = access
            self.write(window_offset, length, int.from_bytes(self.config[self._pci_data :][:length], "little"))

    def _pci_window_access(self) -> tuple[int, int] | None:
        """Offset in the window and length of the access that the driver has set up, if it is a possible one."""
        _, _, bar, _, _, offset, length = _CAPABILITY.unpack_from(self.config, self._pci_access + 2)
        if bar == 0 and length in {1, 2, 4} and offset % length == 0 and offset < WINDOW_SIZE:
            return offset, length
        return None


def _half(value: int, select: int) -> int:
    """The low (0) or high (1) half of a 64-bit value; there are no others."""
    return value >> 32 * select & 0xFFFF_FFFF if select < 2 else 0


def _with_half(value: int, select: int, half: int) -> int:
    if select >= 2:
        return value
    return value & 0xFFFF_FFFF << 32 * (1 - select) | half << 32 * select
