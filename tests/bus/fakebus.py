"""What a device on the bus is connected to in tests, and the driver's side of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, NoReturn

from lguest_mp.bus.pci import PciBus
from lguest_mp.bus.virtio_pci import Common, VirtioPciFunction
from lguest_mp.virtio.device import Device, DeviceId, DeviceStatus, Feature, QueueLayout
from lguest_mp.virtio.queue import Queue
from lguest_mp.worker import WorkerContext

WINDOW = 0xC000_0000
NOTIFY, ISR, DEVICE, MSIX_TABLE, MSIX_PENDING = 0x3000, 0x1000, 0x2000, 0x4000, 0x5000
ALL_FEATURES = Feature.VERSION_1 | Feature.RING_INDIRECT_DESC | Feature.RING_EVENT_IDX | Feature.RING_RESET
OK = DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER | DeviceStatus.FEATURES_OK | DeviceStatus.DRIVER_OK


class FakeDevice(Device):
    """A device with two queues, one feature of its own, and ten bytes of configuration that the guest may write."""

    device_id = DeviceId.BLOCK
    queue_names = ("first", "second")

    def __init__(self, config: bytes = bytes(range(10))) -> None:
        super().__init__("fake0", config)

    @property
    def features(self) -> int:
        return 1 << 5

    def write_config(self, offset: int, data: bytes) -> None:
        self._config[offset : offset + len(data)] = data

    def serve(self, queue_index: int, queue: Queue, context: WorkerContext) -> NoReturn:
        raise NotImplementedError


@dataclass
class FakeControl:
    """Remembers what the device asked for; ``during`` runs while it is being done."""

    asked: list[Any] = field(default_factory=list)
    logged: list[str] = field(default_factory=list)
    during: Callable[[], object] = lambda: None

    def start(self, features: int, queues: tuple[QueueLayout | None, ...]) -> None:
        self.asked.append(("start", features, queues))
        self.during()

    def reset(self) -> None:
        self.asked.append(("reset",))
        self.during()

    def start_queue(self, queue: int, features: int, layout: QueueLayout) -> None:
        self.asked.append(("start_queue", queue, features, layout))

    def reset_queue(self, queue: int) -> None:
        self.asked.append(("reset_queue", queue))

    def log(self, text: str) -> None:
        self.logged.append(text)


@dataclass
class FakeInterrupts:
    """Remembers what was sent, and whether the pin is asserted."""

    lock: Lock
    messages: list[tuple[int, int]] = field(default_factory=list)
    asserted: bool = False

    def message(self, address: int, data: int) -> None:
        assert self.lock.locked()
        self.messages.append((address, data))

    def set_intx(self, asserted: bool) -> None:
        assert self.lock.locked()
        self.asserted = asserted


@dataclass
class FakeShortcuts:
    """Remembers which there are, by queue."""

    lock: Lock
    notifications: dict[int, int] = field(default_factory=dict)
    interrupts: dict[int, tuple[int, int]] = field(default_factory=dict)

    def notify_at(self, queue: int, address: int | None) -> None:
        assert self.lock.locked()
        self.notifications.pop(queue, None)
        if address is not None:
            self.notifications[queue] = address

    def interrupt_by(self, queue: int, message: tuple[int, int] | None) -> None:
        assert self.lock.locked()
        self.interrupts.pop(queue, None)
        if message is not None:
            self.interrupts[queue] = message


class Rig:
    """One device in slot 1, and everything around it."""

    def __init__(self, device: Device | None = None, *, packed: bool = False) -> None:
        self.lock = Lock()
        self.shortcuts = FakeShortcuts(self.lock)
        self.interrupts = FakeInterrupts(self.lock)
        self.control = FakeControl()
        self.device = device or FakeDevice()
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in self.device.queue_names]
        self.function = VirtioPciFunction(
            self.device,
            self.kicks,
            lock=self.lock,
            interrupts=self.interrupts,
            control=self.control,
            shortcuts=self.shortcuts,
            packed=packed,
        )
        self.bus = PciBus([self.function], window_first=WINDOW, window_last=0xFEBF_FFFF, interrupt_pin=16)

    def close(self) -> None:
        for kick in self.kicks:
            os.close(kick)

    def kicked(self) -> list[int]:
        """How often each queue was notified since the last time."""
        counts = []
        for kick in self.kicks:
            try:
                counts.append(os.eventfd_read(kick))
            except BlockingIOError:
                counts.append(0)
        return counts

    # Configuration space, by the ports

    def config_read(self, offset: int, size: int, slot: int = 1) -> int:
        self.bus.write_address(0xCF8, 4, 1 << 31 | slot << 11 | offset & 0xFC)
        return self.bus.read_data(0xCFC + (offset & 3), size)

    def config_write(self, offset: int, size: int, value: int, slot: int = 1) -> None:
        self.bus.write_address(0xCF8, 4, 1 << 31 | slot << 11 | offset & 0xFC)
        self.bus.write_data(0xCFC + (offset & 3), size, value)

    def capabilities(self) -> list[tuple[int, int]]:
        """(ID, offset) of each, in the order of the list."""
        found = []
        offset = self.config_read(0x34, 1)
        while offset:
            found.append((self.config_read(offset, 1), offset))
            offset = self.config_read(offset + 1, 1)
        return found

    @property
    def msix(self) -> int:
        """The offset of MSI-X's capability."""
        return next(offset for capability, offset in self.capabilities() if capability == 0x11)

    def structures(self) -> dict[int, tuple[int, int, int, int]]:
        """Virtio's structures by type: (capability's offset, BAR, offset, length)."""
        result = {}
        for capability, place in self.capabilities():
            if capability == 9:
                kind, bar = self.config_read(place + 3, 1), self.config_read(place + 4, 1)
                offset, length = self.config_read(place + 8, 4), self.config_read(place + 12, 4)
                result[kind] = (place, bar, offset, length)
        return result

    # The window

    def read(self, offset: int, size: int) -> int:
        return self.function.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self.function.write(offset, size, value)

    # What a driver does (virtio 1.2, 3.1.1)

    @property
    def status(self) -> int:
        return self.read(Common.DEVICE_STATUS, 1)

    def set_status(self, status: int) -> None:
        self.write(Common.DEVICE_STATUS, 1, status)

    def offered(self) -> int:
        value = 0
        for half in (0, 1):
            self.write(Common.DEVICE_FEATURE_SELECT, 4, half)
            value |= self.read(Common.DEVICE_FEATURE, 4) << 32 * half
        return value

    def accept(self, features: int) -> None:
        for half in (0, 1):
            self.write(Common.DRIVER_FEATURE_SELECT, 4, half)
            self.write(Common.DRIVER_FEATURE, 4, features >> 32 * half & 0xFFFF_FFFF)

    def negotiate(self, features: int = ALL_FEATURES) -> None:
        self.set_status(DeviceStatus.ACKNOWLEDGE)
        self.set_status(self.status | DeviceStatus.DRIVER)
        self.accept(features)
        self.set_status(self.status | DeviceStatus.FEATURES_OK)

    def set_up_queue(self, queue: int, vector: int = 0xFFFF, size: int = 256) -> QueueLayout:
        self.write(Common.QUEUE_SELECT, 2, queue)
        self.write(Common.QUEUE_SIZE, 2, size)
        self.write(Common.QUEUE_VECTOR, 2, vector)
        layout = QueueLayout(size, 0x1_0000 + queue * 0x4000, 0x1_2000 + queue * 0x4000, 0x1_3000 + queue * 0x4000)
        self.write64(Common.QUEUE_DESC, layout.descriptor_table)
        self.write64(Common.QUEUE_DRIVER, layout.available_ring)
        self.write64(Common.QUEUE_DEVICE, layout.used_ring)
        self.write(Common.QUEUE_ENABLE, 2, 1)
        return layout

    def write64(self, offset: int, value: int) -> None:
        self.write(offset, 4, value & 0xFFFF_FFFF)
        self.write(offset + 4, 4, value >> 32)

    def run(self, features: int = ALL_FEATURES, vectors: tuple[int, int] = (0xFFFF, 0xFFFF)) -> None:
        """All the way to DRIVER_OK, both queues enabled."""
        self.negotiate(features)
        for queue, vector in enumerate(vectors):
            self.set_up_queue(queue, vector)
        self.set_status(self.status | DeviceStatus.DRIVER_OK)

    # MSI-X

    def enable_msix(self, control: int = 0x8000) -> None:
        self.config_write(4, 2, 6)
        self.config_write(self.msix + 2, 2, control)

    def fill_table(self, masked: int = 0) -> None:
        """Entry n sends 0x40 + n to 0xfee00000."""
        for vector in range(3):
            entry = MSIX_TABLE + 16 * vector
            self.write(entry, 4, 0xFEE0_0000)
            self.write(entry + 4, 4, 0)
            self.write(entry + 8, 4, 0x40 + vector)
            self.write(entry + 12, 4, masked)

    def mask(self, vector: int, masked: bool) -> None:
        self.write(MSIX_TABLE + 16 * vector + 12, 4, int(masked))

    def sent(self) -> list[int]:
        """The data of the messages sent since the last time."""
        data = [data for address, data in self.interrupts.messages if address == 0xFEE0_0000]
        self.interrupts.messages.clear()
        return data

    def pending(self) -> int:
        return self.read(MSIX_PENDING, 8)
