"""What a virtio device is to each process that knows it.

A :class:`Device` is made once, by the supervisor, before anything is forked; every process inherits its own copy.

- The *machine* shows it to the guest: its ID, the features it offers, its configuration space, how many queues of
  what size.
- A *worker* serves one of its queues: :meth:`Device.serve` runs in that process, for ever.
- The *supervisor* opens and closes what it needs of the host (:attr:`Device.files`), and names it.

The copies do not talk to each other: what the guest decides travels as messages (``protocol.py``), and the data lies
in guest memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING

from lguest_mp.jail.needs import Needs
from lguest_mp.record import Value

if TYPE_CHECKING:
    from lguest_mp.supervisor.children import Child
    from lguest_mp.supervisor.loop import Loop
    from lguest_mp.virtio.queue import Queue
    from lguest_mp.worker import WorkerContext

#: The size of every queue (descriptors), as in the original lguest.
QUEUE_SIZE = 256


class DeviceId(IntEnum):
    """Virtio device IDs (virtio 1.2, 5)."""

    NET = 1
    BLOCK = 2
    CONSOLE = 3
    ENTROPY = 4


class Feature(IntFlag):
    """Feature bits that belong to no device type (virtio 1.2, 6)."""

    RING_INDIRECT_DESC = 1 << 28
    RING_EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36
    SR_IOV = 1 << 37
    NOTIFICATION_DATA = 1 << 38
    RING_RESET = 1 << 40


class DeviceStatus(IntFlag):
    """The device status field (virtio 1.2, 2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


class QueueLayout(Value):
    """Where the driver put a split virtqueue: ``size`` descriptors, and three guest-physical addresses.

    Of a packed one these are descriptor ring, driver event suppression and device event suppression.
    """

    size: int
    descriptor_table: int
    available_ring: int
    used_ring: int


class Device(ABC):
    """One virtio device of a guest."""

    #: Its ID (virtio 1.2, 5).
    device_id: DeviceId
    #: The names of its queues in the standard's words and order, for example ``("receiveq", "transmitq")``.
    queue_names: tuple[str, ...]

    def __init__(self, name: str, config: bytes = b"") -> None:
        #: What people call it: ``console``, ``block0``, ``rng0``.
        self.name = name
        self._config = bytearray(config)

    @property
    @abstractmethod
    def features(self) -> int:
        """The feature bits of this device type that are offered; the bus adds those of queues and transport."""

    def config_space(self) -> bytes:
        """The device-specific configuration as the guest reads it (little-endian), at this moment."""
        return bytes(self._config)

    def apply_config(self, offset: int, data: bytes) -> None:
        """Another process's copy changed its configuration space: ``data`` is now at ``offset``.

        ValueError for what does not lie in the configuration space.
        """
        end = offset + len(data)
        if not 0 <= offset <= end <= len(self._config):
            raise ValueError(f"{self.name} has no configuration bytes {offset} to {end}")
        self._config[offset:end] = data

    def write_config(self, offset: int, data: bytes) -> None:  # noqa: B027 -- most devices have nothing to write
        """The guest writes to the configuration space: ignored, unless the device says otherwise (virtio 1.2, 2.5).

        The guest chose ``offset`` and the length of ``data``: neither needs to lie in the configuration space.
        """

    @property
    def description(self) -> str:
        """Which device this is, for a person."""
        return self.name

    @property
    def files(self) -> tuple[int, ...]:
        """The host's file descriptors that its workers need; every other process may close them."""
        return ()

    def files_of(self, queue_index: int) -> tuple[int, ...]:
        """Those that the worker of one queue needs."""
        del queue_index
        return self.files

    def needs(self, queue_index: int) -> Needs:
        """What the worker of one queue needs of the host besides its files; nothing else is left to it."""
        del queue_index
        return Needs()

    @property
    def machine_files(self) -> tuple[int, ...]:
        """The host's file descriptors that the machine process needs for it."""
        return ()

    @property
    def helper(self) -> Child | None:
        """A process besides the workers without which it cannot work; the supervisor watches it."""
        return None

    @abstractmethod
    def serve(self, queue_index: int, queue: Queue, context: WorkerContext) -> None:
        """Serves one queue for ever, in a worker of its own.

        Returns never in normal life. DeviceProtocolError stops the device (the guest has to reset it); any other
        exception is a bug of ours and ends the worker.
        """

    def connect(self) -> None:  # noqa: B027 -- most devices are ready at once
        """Finishes what making the device began and a helper has to do, as late as it can be. LguestError."""

    def attend(self, loop: Loop) -> None:  # noqa: B027 -- most devices' workers need nobody
        """Serves, in the supervisor, the workers of one life of the guest, when ``loop`` comes to it. OSError."""

    def helper_ended(self) -> None:  # noqa: B027 -- most devices have none
        """The supervisor has reaped the helper."""

    def hand_on(self) -> None:  # noqa: B027 -- most devices begin anew
        """Leaves what outlives a reboot to the program that is executed next, before ``close``. OSError."""

    def close(self) -> None:  # noqa: B027 -- most devices hold nothing
        """Closes what the device holds of the host's, and ends its helper."""
