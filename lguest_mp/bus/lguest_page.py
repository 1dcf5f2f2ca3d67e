"""lguest's bus: a page that describes the devices, and one hypercall by which a driver speaks to them.

Behind the guest's RAM lie pages for devices, :data:`DEVICE_PAGES` of them. The first is the *descriptor page*, on which
the devices stand one after the other, unaligned, until a type of zero:

| bytes          | what                                                                              |
|----------------|-----------------------------------------------------------------------------------|
| 1              | type: the virtio device ID                                                        |
| 1              | number of virtqueues                                                              |
| 1              | length of each of the two sets of feature bits                                    |
| 1              | length of the configuration space                                                 |
| 1              | status, the driver's to write                                                     |
| 8 per queue    | size (16 bits), interrupt (16 bits), page number of its rings (32 bits)           |
| feature length | the features that are offered                                                     |
| feature length | the features that the driver accepted                                             |
| config length  | the configuration space                                                           |

The pages after it hold the virtqueues' rings, in the legacy layout: descriptor table and available ring, and from the
next page on the used ring. They are where we say and not where the driver likes. Interrupts count from 1, one for each
queue; 0 is the timer's. There is none for a changed configuration: who cares looks.

**Notifications** (:meth:`LguestBus.notify`) are addresses. A descriptor's: its status has changed. Zero is a reset;
with FAILED the driver gave up; anything else says that the features are final, and this is when the device starts, so
that a worker finds its rings empty and the driver not done yet. (DRIVER_OK comes without a word.) The rings' of a
queue: a kick, which the host hands to the worker by itself once the device has started; one that comes here is the
guest's mistake. Any other: the early console's, which prints the string there.

**Who may lie.** The page is the guest's to write. It is written by us and read back in two places only, the status and
the features that were accepted, each copied once; the rest we know.

Source: the original launcher, and Linux 3.18's drivers/lguest/lguest_device.c and include/linux/lguest_launcher.h for
what its driver does.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from enum import Enum, auto
from typing import Protocol

from lguest_mp.errors import GuestError, LguestError
from lguest_mp.memory import PAGE_SIZE, GuestMemory
from lguest_mp.record import Value
from lguest_mp.virtio.device import QUEUE_SIZE, Device, DeviceStatus, Feature, QueueLayout

#: How many pages behind the RAM are for devices.
DEVICE_PAGES = 256
#: The device's part of a legacy virtqueue begins at a multiple of this.
RING_ALIGNMENT = PAGE_SIZE
#: Interrupt 0 is the timer's; lguest_data has a bit for each of 32.
FIRST_INTERRUPT = 1
INTERRUPTS = 32

#: Legacy drivers know this bit: how they cut a buffer into descriptors means nothing (virtio 1.2, 6.3: a device with
#: VERSION_1 has it anyway).
ANY_LAYOUT = 1 << 27
#: What the bus offers for every device, beside the device's own features.
BUS_FEATURES = int(Feature.RING_INDIRECT_DESC | Feature.RING_EVENT_IDX) | ANY_LAYOUT

_DESCRIPTOR = struct.Struct("<BBBBB")
_QUEUE = struct.Struct("<HHI")
_STATUS = 4
_FEATURES_LENGTH = 4
_FEATURES_MASK = (1 << 8 * _FEATURES_LENGTH) - 1

#: At most so much of a string is printed. Linux sends 16 characters at a time.
_LONGEST_STRING = PAGE_SIZE

_TOO_MANY = "too many devices: {}; leave some out"


def _ring_offsets(size: int) -> tuple[int, int, int]:
    """Where the available ring and the used ring of a legacy virtqueue begin, and its length (virtio 1.2, 2.7.2)."""
    available = 16 * size
    used = _align(available + 6 + 2 * size)
    return available, used, used + 6 + 8 * size


def _align(length: int) -> int:
    return -(-length // RING_ALIGNMENT) * RING_ALIGNMENT


AVAILABLE_RING, USED_RING, RINGS_LENGTH = _ring_offsets(QUEUE_SIZE)
RING_PAGES = -(-RINGS_LENGTH // PAGE_SIZE)


class QueuePlace(Value):
    """A virtqueue: its interrupt, and the guest-physical address of its rings."""

    interrupt: int
    address: int

    def layout(self) -> QueueLayout:
        return QueueLayout(QUEUE_SIZE, self.address, self.address + AVAILABLE_RING, self.address + USED_RING)


class DevicePlace(Value):
    """A device: the guest-physical addresses of its descriptor and what follows that, and its queues."""

    descriptor: int
    offered: int
    accepted: int
    config: int
    end: int
    queues: tuple[QueuePlace, ...]


class Plan(Value):
    """Where every device is. ``end``: the guest-physical address where the device pages in use end."""

    devices: tuple[DevicePlace, ...]
    end: int


def plan(devices: Sequence[Device], page: int) -> Plan:
    """Gives devices their places, ``page`` being the guest-physical address of the descriptor page.

    LguestError if there are too many of them.
    """
    places = []
    interrupt = FIRST_INTERRUPT
    rings = page + PAGE_SIZE
    descriptor = page
    for device in devices:
        queues = []
        for _ in device.queue_names:
            queues.append(QueuePlace(interrupt, rings))
            interrupt += 1
            rings += RING_PAGES * PAGE_SIZE
        offered = descriptor + _DESCRIPTOR.size + _QUEUE.size * len(queues)
        accepted = offered + _FEATURES_LENGTH
        config = accepted + _FEATURES_LENGTH
        end = config + len(device.config_space())
        places.append(DevicePlace(descriptor, offered, accepted, config, end, tuple(queues)))
        descriptor = end
    if descriptor > page + PAGE_SIZE:
        raise LguestError(_TOO_MANY.format(f"their descriptors have {descriptor - page} bytes, and a page {PAGE_SIZE}"))
    if interrupt > INTERRUPTS:
        raise LguestError(
            _TOO_MANY.format(f"they have {interrupt - FIRST_INTERRUPT} queues, and a guest {INTERRUPTS - 1} interrupts")
        )
    if rings > page + DEVICE_PAGES * PAGE_SIZE:
        raise LguestError(_TOO_MANY.format(f"their queues have {(rings - page) // PAGE_SIZE} pages of {DEVICE_PAGES}"))
    return Plan(tuple(places), rings)


class DeviceControl(Protocol):
    """Who makes a device's decisions true. Each method returns when they are."""

    def start(self, features: int, queues: tuple[QueueLayout | None, ...]) -> None:
        """The features are final: serve the queues."""

    def reset(self) -> None:
        """Stop serving the device; afterwards nothing is left in its eventfds."""


class DeviceState(Enum):
    """Where a device is in its life."""

    #: Nobody serves it.
    RESET = auto()
    #: Its features are final, its workers serve it (or are being started).
    RUNNING = auto()
    #: Its driver broke a rule: nothing is served until it is reset.
    BROKEN = auto()


class LguestDevice:
    """A device on the descriptor page.

    ``queue_interrupt``, ``config_changed`` and ``broken`` are any thread's, the rest is the guest's thread's.
    """

    def __init__(
        self,
        device: Device,
        place: DevicePlace,
        kicks: Sequence[int],
        memory: GuestMemory,
        *,
        lock: AbstractContextManager[object],
        interrupt: Callable[[int], None],
        attach: Callable[[int, int], None],
        control: DeviceControl,
        warn: Callable[[str], None],
    ) -> None:
        """``interrupt(irq)`` and ``attach(address, eventfd)`` are the host's; ``warn`` shows one line to the user."""
        self.device = device
        self.place = place
        self._kicks = tuple(kicks)
        self._memory = memory
        self._lock = lock
        self._interrupt = interrupt
        self._attach = attach
        self._control = control
        self._warn = warn
        self._offered = int(device.features) & _FEATURES_MASK | BUS_FEATURES
        self._attached = False
        self.state = DeviceState.RESET
        self._describe()

    def _describe(self) -> None:
        config = self.device.config_space()
        queues = self.place.queues
        self._memory.write(
            self.place.descriptor,
            _DESCRIPTOR.pack(self.device.device_id, len(queues), _FEATURES_LENGTH, len(config), 0)
            + b"".join(_QUEUE.pack(QUEUE_SIZE, queue.interrupt, queue.address // PAGE_SIZE) for queue in queues)
            + self._offered.to_bytes(_FEATURES_LENGTH, "little")
            + bytes(_FEATURES_LENGTH)
            + config,
        )

    # What the guest's driver does

    def status_changed(self) -> None:
        """The driver has notified the descriptor. GuestError: it did what ends the guest."""
        (status,) = self._memory.read(self.place.descriptor + _STATUS, 1)
        if not status:
            self._reset()
        elif status & DeviceStatus.FAILED:
            self._warn(f"Device {self.device.name} configuration FAILED")
            if self.state is not DeviceState.RESET:
                self._reset()
        elif self.state is not DeviceState.RESET:
            raise GuestError(f"Device {self.device.name} features finalized twice")
        else:
            self._start()

    def _start(self) -> None:
        features = int.from_bytes(self._memory.read(self.place.accepted, _FEATURES_LENGTH), "little") & self._offered
        if not self._attached:
            # For the guest's whole life: the host has no way to take it back, and a kick too many does no harm.
            self._attached = True
            for queue, kick in zip(self.place.queues, self._kicks, strict=True):
                self._attach(queue.address, kick)
        self._set_state(DeviceState.RUNNING)
        self._control.start(features, tuple(queue.layout() for queue in self.place.queues))

    def _reset(self) -> None:
        was_served = self.state is not DeviceState.RESET
        self._set_state(DeviceState.RESET)
        if was_served:
            self._control.reset()
        self._memory.write(self.place.accepted, bytes(_FEATURES_LENGTH))
        for queue in self.place.queues:
            self._memory.write(queue.address, bytes(RINGS_LENGTH))

    def _set_state(self, state: DeviceState) -> None:
        with self._lock:
            self.state = state

    # What happens outside

    def queue_interrupt(self, queue: int) -> None:
        """The worker of a queue has used buffers. From any thread."""
        with self._lock:
            running = self.state is DeviceState.RUNNING
        if running:
            self._interrupt(self.place.queues[queue].interrupt)

    def config_changed(self, offset: int, data: bytes) -> None:
        """The device's configuration has changed; the driver sees it when it looks. From any thread."""
        with self._lock:
            self.device.apply_config(offset, data)
            self._memory.write(self.place.config + offset, data)

    def broken(self) -> bool:
        """The device was stopped: its driver broke a rule, or its workers crashed; the status says so. From any thread.

        False: the driver has reset it already.
        """
        with self._lock:
            if self.state is not DeviceState.RUNNING:
                return False
            self.state = DeviceState.BROKEN
            status = self._memory.slice(self.place.descriptor + _STATUS, 1)
            status[0] |= DeviceStatus.NEEDS_RESET
            return True

    def mended(self) -> bool:
        """The device is served again, from where it stopped; its interrupts that were lost are made up for.

        From any thread. False: the driver has reset it since.
        """
        with self._lock:
            if self.state is not DeviceState.BROKEN:
                return False
            self.state = DeviceState.RUNNING
            status = self._memory.slice(self.place.descriptor + _STATUS, 1)
            status[0] &= ~DeviceStatus.NEEDS_RESET & 0xFF
        for queue in self.place.queues:
            self._interrupt(queue.interrupt)
        return True


class LguestBus:
    """All devices of a guest, and the hypercall by which it reaches them."""

    def __init__(
        self, devices: Sequence[LguestDevice], memory: GuestMemory, end: int, write: Callable[[bytes], None]
    ) -> None:
        """``end``: where the device pages in use end; ``write`` puts the early console's output out."""
        self._memory = memory
        self._end = end
        self._write = write
        self._descriptors = {device.place.descriptor: device for device in devices}
        self._rings = {queue.address: device for device in devices for queue in device.place.queues}

    def notify(self, address: int) -> None:
        """The guest's NOTIFY of a guest-physical address. GuestError: it ends the guest."""
        if (device := self._descriptors.get(address)) is not None:
            device.status_changed()
        elif (device := self._rings.get(address)) is not None:
            raise GuestError(f"Notification on {device.device.name} before setup!")
        elif address >= self._end:
            raise GuestError(f"Bad NOTIFY {address:#x}")
        else:
            text = self._memory.read(address, min(self._end - address, _LONGEST_STRING))
            self._write(text.partition(b"\0")[0])
