"""A driver for tests: the other side of a split virtqueue, in guest memory of its own and in this process.

It does what a good driver does (``add``, ``notify``, ``wait``, ``used``), and it lets a test do what a bad one does:
every field of the descriptor table and the rings can be written as one likes. A device is run on it with ``serve``,
which lets the worker's loop go on until it would sleep. Which core serves it (``lguest_mp/core.py``) is the driver's.
"""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from lguest_mp import core
from lguest_mp.codemap import WriteWatch
from lguest_mp.errors import DeviceProtocolError
from lguest_mp.memory import GuestMemory
from lguest_mp.virtio import fence
from lguest_mp.virtio.device import Device, Feature, QueueLayout
from lguest_mp.virtio.ledger import Ledger
from lguest_mp.virtio.queue import Chain, Queue
from lguest_mp.virtio.usual import Usual

NEXT, WRITE, INDIRECT = 1, 2, 4
#: A test that takes so many seconds hangs: a lost notification looks like that.
HANGS = 120
#: Both of the features that a queue has.
ALL = Feature.RING_EVENT_IDX | Feature.RING_INDIRECT_DESC


@dataclass(frozen=True)
class Descriptor:
    """One entry of a descriptor table."""

    address: int
    length: int
    flags: int = 0
    next: int = 0

    def pack(self) -> bytes:
        return struct.pack("<QIHH", self.address, self.length, self.flags, self.next)


@dataclass(frozen=True)
class Buffer:
    """What the driver made available: where its parts are."""

    head: int
    readable: tuple[tuple[int, int], ...]
    writable: tuple[tuple[int, int], ...]


class Idle(Exception):
    """The device has nothing to do and would sleep now."""


#: What a test may have replaced; the compiled core does not know of it.
_HOST_CALLS = ("preadv", "pwritev", "fdatasync", "readv", "writev", "getrandom")
_REAL = [getattr(os, name) for name in _HOST_CALLS]


class IdlingQueue(Queue):
    """A queue that says so instead of sleeping.

    Where a test plays the host (it has replaced a function of ``os``) each request is served by the device's own code.
    """

    def _sleep(self, seconds: float | None = None) -> None:
        raise Idle

    def waiter(self, requests: Usual) -> Callable[[], Chain]:
        is_host = [getattr(os, name) for name in _HOST_CALLS] == _REAL
        return super().waiter(requests) if is_host else self.wait


def of_core(of: str, kind: type[Queue]) -> type[Queue]:
    """The queues of one core, with what ``kind`` does otherwise than a Queue."""
    return core.queue(of) if kind is Queue else type(kind.__name__, (kind, core.queue(of)), {})


@dataclass
class Context:
    """A WorkerContext that remembers."""

    lines: list[str] = field(default_factory=list)
    interrupts: int = 0
    configuration: list[tuple[int, bytes]] = field(default_factory=list)

    def log(self, text: str) -> None:
        self.lines.append(text)

    def interrupt_guest(self) -> None:
        self.interrupts += 1

    def config_changed(self, offset: int, data: bytes) -> None:
        self.configuration.append((offset, data))


class MockDriver:
    """A driver of one queue of ``size``; its rings begin at ``base``, its buffers behind them."""

    def __init__(
        self,
        size: int = 16,
        features: int = ALL,
        memory: GuestMemory | None = None,
        base: int = 0x1000,
        of: str = "python",
    ) -> None:
        self.memory = memory or GuestMemory(1 << 20)
        self.size = size
        self.features = features
        #: Which core serves it.
        self.core = of
        self.layout, end = self._place_rings(base)
        self._free_memory = self._first_free = align(end, 16)
        self.kicked = os.eventfd(0, os.EFD_CLOEXEC)
        self.called = os.eventfd(0, os.EFD_CLOEXEC)
        self._free = list(range(size))
        self._chains: dict[int, list[int]] = {}
        self._available = self._notified = 0
        self._seen_used = 0
        #: Its memory barrier (2.7.13.4.1).
        self.fence = fence.full

    def _place_rings(self, base: int) -> tuple[QueueLayout, int]:
        """Where the rings are, and where they end."""
        size = self.size
        available = base + 16 * size
        used = align(available + 6 + 2 * size, 4)
        self._available_ring = self.memory.slice(available, 6 + 2 * size).cast("H")
        self._used = self.memory.slice(used, 4).cast("H")
        self._used_ring = self.memory.slice(used + 4, 8 * size).cast("I")
        self._avail_event = self.memory.slice(used + 4 + 8 * size, 2).cast("H")
        return QueueLayout(size, base, available, used), used + 6 + 8 * size

    def close(self) -> None:
        os.close(self.kicked)
        os.close(self.called)

    # What a good driver does.

    def allocate(self, length: int, content: bytes | None = None, alignment: int = 1) -> int:
        """A piece of guest memory of its own: its address."""
        address = align(self._free_memory, alignment)
        self._free_memory = address + length
        if content is not None:
            self.memory.write(address, content)
        return address

    def add(
        self,
        readable: Sequence[bytes] = (),
        writable: Sequence[int] = (),
        *,
        indirect: bool = False,
        direct: int = 0,
        backwards: bool = False,
    ) -> Buffer:
        """Makes a buffer available: pieces to be read, and lengths of pieces to be written. No kick.

        ``indirect`` puts all descriptors but the first ``direct`` into a table of their own, in which they may be
        chained ``backwards``.
        """
        read = tuple((self.allocate(len(piece), piece), len(piece)) for piece in readable)
        write = tuple((self.allocate(length), length) for length in writable)
        parts = [Descriptor(*part) for part in read] + [Descriptor(*part, flags=WRITE) for part in write]
        if indirect:
            table = self.table(parts[direct:], backwards=backwards)
            address = self.allocate(len(table), table, alignment=16)
            parts[direct:] = [Descriptor(address, len(table), INDIRECT)]
        head = self.chain(parts)
        self.make_available(head)
        return Buffer(head, read, write)

    @staticmethod
    def table(parts: Sequence[Descriptor], *, backwards: bool = False) -> bytes:
        """An indirect table of ``parts``, which begins at index 0 and goes on up from there, or down from the end."""
        indices = [0, *reversed(range(1, len(parts)))] if backwards else list(range(len(parts)))
        entries = dict(zip(indices, _linked(parts, indices), strict=True))
        return b"".join(entries[index].pack() for index in range(len(parts)))

    def chain(self, parts: Sequence[Descriptor]) -> int:
        """Chains ``parts`` in the descriptor table, wherever it has room: the head."""
        indices = [self._free.pop(0) for _ in parts]
        for index, part in zip(indices, _linked(parts, indices), strict=True):
            self.set_descriptor(index, part)
        self._chains[indices[0]] = indices
        return indices[0]

    def make_available(self, head: int) -> None:
        """Puts a head into the available ring and moves the index."""
        self.set_ring(self._available, head)
        self._available = (self._available + 1) & 0xFFFF
        self.set_available_index(self._available)

    def kick(self) -> None:
        """A notification, wanted or not."""
        os.eventfd_write(self.kicked, 1)

    def notify(self) -> None:
        """A notification if the device wants one for what was made available since the last (2.7.10.1)."""
        self.fence()
        new, old = self._available, self._notified
        self._notified = new
        if self.features & Feature.RING_EVENT_IDX:
            wanted = (new - self.avail_event - 1) & 0xFFFF < (new - old) & 0xFFFF
        else:
            wanted = not self.used_flags & 1
        if wanted:
            self.kick()

    def wait(self, seconds: float) -> bool:
        """Sleeps until the device has completed something (2.7.14): False if no interrupt comes for so long."""
        poll = select.poll()
        poll.register(self.called, select.POLLIN)
        while True:
            if self.features & Feature.RING_EVENT_IDX:
                self.set_used_event(self._seen_used)
            else:
                self.set_available_flags(0)
            self.fence()
            if self._has_news():
                self.set_available_flags(1)
                return True
            if not poll.poll(seconds * 1000):
                return False
            os.read(self.called, 8)

    def _has_news(self) -> bool:
        return bool(self._seen_used != self._used[1])

    def used(self) -> list[tuple[int, int]]:
        """The (head, length) of what the device has completed since the last look; its descriptors are free again."""
        completed = []
        while self._seen_used != self._used[1]:
            slot = self._seen_used % self.size
            head, length = self._used_ring[2 * slot], self._used_ring[2 * slot + 1]
            self._free += self._chains.pop(head, [])
            completed.append((head, length))
            self._seen_used = (self._seen_used + 1) & 0xFFFF
        return completed

    def interrupts(self) -> int:
        """How often the device has interrupted since the last look."""
        os.set_blocking(self.called, False)
        try:
            return os.eventfd_read(self.called)
        except BlockingIOError:
            return 0
        finally:
            os.set_blocking(self.called, True)

    def forget_buffers(self) -> None:
        """The memory of all buffers may be used again."""
        self._free_memory = self._first_free

    def content(self, buffer: Buffer) -> bytes:
        """The writable part of a buffer."""
        return b"".join(self.memory.read(address, length) for address, length in buffer.writable)

    # What any driver may write.

    def set_descriptor(self, index: int, descriptor: Descriptor) -> None:
        self.memory.write(self.layout.descriptor_table + 16 * index, descriptor.pack())

    def set_ring(self, position: int, head: int) -> None:
        self._available_ring[2 + position % self.size] = head

    def set_available_index(self, index: int) -> None:
        self._available_ring[1] = index & 0xFFFF

    def set_available_flags(self, flags: int) -> None:
        self._available_ring[0] = flags

    def set_used_event(self, index: int) -> None:
        self._available_ring[2 + self.size] = index & 0xFFFF

    # What it does at a moment that it cannot choose.

    @staticmethod
    @contextmanager
    def on_fence(queue: Queue, action: Callable[[], object]) -> Iterator[None]:
        """While the device's next fences are executed, the driver does ``action``."""
        full = queue._fence

        def during() -> None:
            full()
            action()

        queue._fence = during
        try:
            yield
        finally:
            queue._fence = full

    # What it finds.

    @property
    def used_index(self) -> int:
        return self._used[1]

    @used_index.setter
    def used_index(self, index: int) -> None:
        self._used[1] = index

    @property
    def used_flags(self) -> int:
        return self._used[0]

    @property
    def avail_event(self) -> int:
        return self._avail_event[0]

    # The device's side.

    def class_of(self, kind: type[Queue] = Queue) -> type[Queue]:
        """The queues for these rings, with what ``kind`` does otherwise."""
        return of_core(self.core, kind)

    def queue(
        self, watch: WriteWatch | None = None, account: Ledger | None = None, kind: type[Queue] = IdlingQueue
    ) -> Queue:
        """A device's queue on these rings, which raises Idle instead of sleeping; or one of another ``kind``."""
        return self.class_of(kind)(self.memory, self.layout, self.features, self.kicked, self.called, watch, account)

    def sleeping_queue(self, account: Ledger | None = None, on_kick: Callable[[], object] | None = None) -> Queue:
        """The same as it is in a worker. When it takes a notification, the driver does ``on_kick``."""
        if on_kick is None:
            return self.queue(None, account, Queue)
        act = on_kick

        class Kicked(Queue):
            def _take_kick(self) -> None:
                act()
                super()._take_kick()

        return self.queue(None, account, Kicked)

    def serve(self, device: Device, queue_index: int = 0, queue: Queue | None = None) -> Context:
        """Lets a device's worker serve all that is available; what it said."""
        context = Context()
        try:
            device.serve(queue_index, queue or self.queue(), context)
        except Idle:
            return context
        raise AssertionError("serve() returned")


def _linked(parts: Sequence[Descriptor], indices: Sequence[int]) -> list[Descriptor]:
    """``parts`` with NEXT and next, for when each is at its index."""
    following = [*indices[1:], None]
    return [
        part if index is None else Descriptor(part.address, part.length, part.flags | NEXT, index)
        for part, index in zip(parts, following, strict=True)
    ]


def align(address: int, alignment: int) -> int:
    return -(-address // alignment) * alignment


#: Makes drivers that are closed after the test (the fixture ``new_driver``); its arguments are MockDriver's.
DriverFactory = Callable[..., MockDriver]


def layout_error(queue: type[Queue], layout: QueueLayout) -> str | None:
    """The section of the standard by which such a layout in a MiB of memory is refused; None: it is not."""
    kick, call = os.eventfd(0), os.eventfd(0)
    try:
        queue(GuestMemory(1 << 20), layout, ALL, kick, call)
    except DeviceProtocolError as error:
        return error.section
    finally:
        os.close(kick)
        os.close(call)
    return None


def require_untouched(memory: GuestMemory, before: bytes, allowed: Sequence[tuple[int, int]]) -> None:
    """Memory is what it was ``before``, except in the ``allowed`` ranges (offset, length)."""
    after = bytearray(memory.view)
    for offset, length in allowed:
        after[offset : offset + length] = before[offset : offset + length]
    assert after == before
