"""A driver of a packed virtqueue, for tests: the same as the MockDriver, on the other ring (virtio 1.2, 2.8)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from mockdriver import ALL, NEXT, Buffer, Descriptor, IdlingQueue, MockDriver

from lguest_mp.codemap import WriteWatch
from lguest_mp.memory import GuestMemory
from lguest_mp.virtio.device import QueueLayout
from lguest_mp.virtio.ledger import Ledger
from lguest_mp.virtio.packed import PackedQueue
from lguest_mp.virtio.queue import Queue

AVAIL, USED = 1 << 7, 1 << 15
ENABLE, DISABLE, DESC = 0, 1, 2
#: What it calls itself where a test asks for one core or the other.
PACKED = "packed"


class PackedDriver(MockDriver):
    """Positions count through two turns: the descriptor's place and, below the queue's size, a wrap counter of 1.

    Where one writes a Descriptor into the ring, its ``flags`` are the buffer ID and its ``next`` the flags.
    """

    def __init__(
        self, size: int = 16, features: int = ALL, memory: GuestMemory | None = None, base: int = 0x1000
    ) -> None:
        super().__init__(size, features, memory, base)
        #: What its workers leave each other, where a test does not keep that itself: the ring does not say all of it.
        self.account = Ledger()
        self._inheritance = ExitStack()
        self._inheritance.enter_context(self.account.inherited())
        #: By buffer ID: how many descriptors it has.
        self._lengths: dict[int, int] = {}
        #: By buffer ID, until they are made available: where the first is, and its flags.
        self._prepared: dict[int, tuple[int, int]] = {}
        self._found = 0

    def close(self) -> None:
        self._inheritance.close()
        super().close()

    def _place_rings(self, base: int) -> tuple[QueueLayout, int]:
        driver_area = base + 16 * self.size
        device_area = driver_area + 4
        self._ring = self.memory.slice(base, 16 * self.size)
        #: 16 bits each, eight for a descriptor: address (4), length (2), ID, flags.
        self.words = self._ring.cast("H")
        self._driver_event = self.memory.slice(driver_area, 4).cast("H")
        self._device_event = self.memory.slice(device_area, 4).cast("I")
        return QueueLayout(self.size, base, driver_area, device_area), device_area + 4

    def flags_at(self, position: int, flags: int = 0) -> int:
        """Flags that say that a descriptor is available there."""
        return flags | (AVAIL if position < self.size else USED)

    def moved(self, position: int, count: int) -> int:
        return (position + count) % (2 * self.size)

    def add(
        self,
        readable: Sequence[bytes] = (),
        writable: Sequence[int] = (),
        *,
        indirect: bool = False,
        direct: int = 0,
        backwards: bool = False,
    ) -> Buffer:
        """As ever; but a table has all descriptors of its list, in their order (2.8.5, 2.8.7)."""
        del direct, backwards
        return super().add(readable, writable, indirect=indirect)

    @staticmethod
    def table(parts: Sequence[Descriptor], *, backwards: bool = False) -> bytes:
        """An indirect table of ``parts``: one after the other (2.8.7). IDs mean nothing in it."""
        return b"".join(Descriptor(part.address, part.length, 0xDEAD, part.flags).pack() for part in parts)

    def chain(self, parts: Sequence[Descriptor]) -> int:
        """Writes a list of ``parts`` into the next places of the ring: its ID. The first is not available yet."""
        identifier = self._free.pop(0)
        position = self._available
        for number, part in enumerate(parts):
            flags = part.flags | (NEXT if number + 1 < len(parts) else 0)
            last = identifier if number + 1 == len(parts) else 0xBEEF
            here = self.flags_at(position, flags)
            if not number:
                self._prepared[identifier] = position, here
                here ^= AVAIL | USED
            self.set_descriptor(position % self.size, Descriptor(part.address, part.length, last, here))
            position = self.moved(position, 1)
        self._available = position
        self._lengths[identifier] = len(parts)
        return identifier

    def make_available(self, head: int) -> None:
        """Has the device find the list whose ID is ``head``."""
        position, flags = self._prepared.pop(head)
        self.words[position % self.size * 8 + 7] = flags

    def notify(self) -> None:
        """A notification if the device wants one for what was made available since the last (2.8.21.3)."""
        self.fence()
        new, old = self._available, self._notified
        self._notified = new
        event = self._device_event[0]
        if event >> 16 == DESC:
            wanted = (new - self._position(event) - 1) % (2 * self.size) < (new - old) % (2 * self.size)
        else:
            wanted = event >> 16 != DISABLE
        if wanted:
            self.kick()

    def _has_news(self) -> bool:
        return next(self._used_from(self._seen_used), None) is not None

    def _used_from(self, position: int) -> Iterator[tuple[int, int, int]]:
        """What is used from there on: buffer ID, length, next position."""
        for _ in range(self.size):
            words = self.words[position % self.size * 8 :]
            if words[7] & (AVAIL | USED) != (AVAIL | USED if position < self.size else 0):
                return
            identifier = words[6]
            if identifier not in self._lengths:
                return
            position = self.moved(position, self._lengths[identifier])
            yield identifier, words[4] | words[5] << 16, position

    def used(self) -> list[tuple[int, int]]:
        """The (ID, length) of what the device has completed since the last look; its descriptors are free again."""
        completed = []
        for identifier, length, following in self._used_from(self._seen_used):
            completed.append((identifier, length))
            del self._lengths[identifier]
            self._free.append(identifier)
            self._seen_used = following
        self._found += len(completed)
        return completed

    # What any driver may write.

    def set_available_flags(self, flags: int) -> None:
        """1: no interrupts, 0: they are wanted."""
        self._driver_event[1] = flags

    def set_used_event(self, index: int) -> None:
        """An interrupt when the descriptor at this position is used."""
        position = index % (2 * self.size)
        self._driver_event[0] = position | 1 << 15 if position < self.size else position - self.size
        self._driver_event[1] = DESC

    # What it finds.

    @property
    def used_index(self) -> int:
        """How many buffers were used, since the beginning."""
        return self._found + len(list(self._used_from(self._seen_used)))

    @used_index.setter
    def used_index(self, index: int) -> None:
        raise NotImplementedError("there is none in a packed ring")

    @property
    def used_flags(self) -> int:
        return self._device_event[0] >> 16

    @property
    def avail_event(self) -> int:
        """A position."""
        return self._position(self._device_event[0])

    def _position(self, event: int) -> int:
        return event & 0x7FFF if event & 1 << 15 else (event & 0x7FFF) + self.size

    # The device's side.

    def queue(
        self, watch: WriteWatch | None = None, account: Ledger | None = None, kind: type[Queue] = IdlingQueue
    ) -> Queue:
        return super().queue(watch, account or self.account, kind)

    def class_of(self, kind: type[Queue] = Queue) -> type[Queue]:
        return PackedQueue if kind is Queue else type(kind.__name__, (kind, PackedQueue), {})


def new_driver_of(of: str) -> Callable[..., MockDriver]:
    """Makes drivers for a core's split rings, or packed ones."""

    def new(*arguments: Any, **keywords: Any) -> MockDriver:
        if of == PACKED:
            return PackedDriver(*arguments, **keywords)
        return MockDriver(*arguments, **(keywords | {"of": of}))

    return new
