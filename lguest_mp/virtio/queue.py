"""The device's side of a split virtqueue (virtio 1.2, 2.7). It knows nothing of devices, buses or CPUs.

What is different in a packed one is told, and done, in ``packed.py``.

A worker that serves a queue does this and no more::

    queue = Queue(memory, layout, features, kick, call)
    while True:
        chain = queue.wait()            # sleeps until the driver has made a buffer available
        ...                             # read chain.readable, fill chain.writable
        queue.push(chain, written)      # done with it: the first `written` bytes of its writable part are filled

A device that can say in data what is usual of its requests (``usual.py``) asks for :meth:`Queue.waiter` and calls that
in place of ``wait``: a compiled core then serves what is usual by itself, and returns the rest.

Completions are *published* (the driver sees them) and the driver is interrupted, if it wants to be, when ``wait()``
finds nothing more to do, when ``BATCH`` of them have come together, and at :meth:`Queue.flush`. A device calls
``flush()`` before anything that may take long, so that finished work does not wait behind it. A device whose work comes
from elsewhere and in bursts takes that into its own hands: ``push_together``, ``publish`` and ``flush``.

**What the driver may not do** is checked here, all of it, and each check names the section of the standard whose rule
it holds; DeviceProtocolError then means that the device needs a reset. The driver shares its memory with the guest's
other programs and can change it at any time, so a value is copied once and the copy is checked: nothing is read twice,
and nothing that the driver can write is trusted to be what we wrote there. What comes out, a :class:`Chain`, lies in
guest memory with every byte, has no more descriptors than the queue and at most 2**32 bytes. A buffer of no bytes is
allowed (nothing in the standard forbids one), and so is a chain of nothing else.

**Memory order.** On x86 stores are seen in program order and loads are done in program order, so "ring entry before
index" costs nothing on either side, provided that one Python operation is one machine access: ring fields are read and
written through ``memoryview.cast`` and nothing else. (``struct.pack_into`` would clear the bytes first, and the driver
would see that; ``int.from_bytes`` of a slice may tear.) What x86 does reorder is a load with an *earlier store*, and
two places depend on it not doing so, on both sides: ``fence.py`` has the story. They are

- going to sleep: ask for notifications; fence; look whether something became available meanwhile;
- publishing: move the used index; fence; look whether the driver wants an interrupt. A look *before* the fence that
  says yes is good enough, since an interrupt too many is harmless; only a no has to be confirmed behind it.

An engine that keeps translations of guest code adds a third thing: what a worker has written may be code, and the guest
may find the used index by polling. So data comes first, then the ``watch`` is told which bytes were written and sees to
it that no stale translation is left (``codemap.py``), and only then the used ring moves.

**A worker may be killed at any instruction and replaced.** Another Queue on the same rings and the same ledger goes on
where it stopped (:meth:`Queue._take_over`). Buffers are completed in the order in which they were made available
(``push`` in the order of ``pop``, always). So the used index says how many are published, the ledger how many more
are completed (their entries in the used ring are written by ``push``; the driver does not look beyond the index), and
the next one is the one that the old worker was at: it is served again, all others once. What the old worker had taken
of the host's for it, and could not be had again, stands in the ledger too (:meth:`Queue.take`, :attr:`Queue.taken`).
A notification that was lost is made up for by looking at the available ring before sleeping, and an interrupt by one
more, which is harmless. After a reset the driver has cleared the rings, the ledger is blank, and this is an ordinary
start.

**Assumptions**: a little-endian host with x86's memory order; guest memory is mapped and outlives the queue; ``kick``
and ``call`` are blocking eventfds that are no semaphores, and ``call`` is read by somebody (or not written 2**64
times); one process with one thread serves a queue at a time; the rings do not move while it does.
"""

from __future__ import annotations

import functools
import os
import select
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from typing import TYPE_CHECKING

from lguest_mp.errors import DeviceProtocolError, GuestAddressError
from lguest_mp.memory import GuestMemory
from lguest_mp.virtio import fence, ledger
from lguest_mp.virtio.device import Feature, QueueLayout
from lguest_mp.virtio.ledger import (
    BYTES,
    MARK_SHIFT,
    MOMENT,
    PHASE,
    PROGRESS,
    REQUESTS,
    TAKEN_SHIFT,
    VALID,
    Ledger,
    Phase,
)

if TYPE_CHECKING:
    from lguest_mp.codemap import WriteWatch
    from lguest_mp.virtio.usual import Frames, Usual

#: Descriptor flags (virtio 1.2, 2.7.5).
DESC_F_NEXT = 1
DESC_F_WRITE = 2
DESC_F_INDIRECT = 4
#: Flag of the available ring (2.7.6): the driver wants no interrupts. Without EVENT_IDX only.
AVAIL_F_NO_INTERRUPT = 1
#: Flag of the used ring (2.7.8): the device wants no notifications. Without EVENT_IDX only.
USED_F_NO_NOTIFY = 1

#: The largest queue there can be (2.7).
MAX_QUEUE_SIZE = 32768
#: The most bytes that a chain may have (2.7.5.2).
MAX_CHAIN_BYTES = 1 << 32
#: So many completions are published at the latest: enough to make the cost of publishing small, few enough that the
#: guest can work on some of them while we work on the next.
BATCH = 16
#: How many shapes of indirect tables are remembered; a driver has few. (The caches are made at import, before anything
#: is forked: making them touches 150 KiB of memory that workers otherwise share.)
CACHED = 64

#: As plain numbers: an operation on flags makes a new flag of them, 70 KiB for a worker.
_EVENT_IDX = int(Feature.RING_EVENT_IDX)
_INDIRECT_DESC = int(Feature.RING_INDIRECT_DESC)
_IDLE, _SERVING, _WAITING = int(Phase.IDLE), int(Phase.SERVING), int(Phase.WAITING)

#: One descriptor: address, length, flags, next.
_read_descriptor = struct.Struct("<QIHH").unpack_from
#: Of a range, (offset, length).
_length = itemgetter(1)


class Chain:
    """One buffer that the driver made available: a device-readable part, then a device-writable part.

    Both parts are lists of (offset into guest memory, length in bytes), each range checked to lie in RAM. How the
    driver cut the buffer into ranges means nothing (virtio 1.2, 2.7.4.1).
    """

    __slots__ = ("descriptors", "head", "memory", "readable_ranges", "writable_ranges")

    def __init__(
        self,
        memory: memoryview,
        head: int,
        readable_ranges: list[tuple[int, int]],
        writable_ranges: list[tuple[int, int]],
        descriptors: int = 1,
    ) -> None:
        #: All of guest memory, indexed by offset.
        self.memory = memory
        #: By what the driver knows it: the index of its first descriptor; in a packed ring, its buffer ID.
        self.head = head
        #: How many places of the ring it takes, which only a packed ring asks.
        self.descriptors = descriptors
        self.readable_ranges = readable_ranges
        self.writable_ranges = writable_ranges

    @property
    def readable(self) -> list[memoryview]:
        """Views of the device-readable part, in order."""
        view = self.memory
        return [view[offset : offset + length] for offset, length in self.readable_ranges]

    @property
    def writable(self) -> list[memoryview]:
        """Views of the device-writable part, in order."""
        view = self.memory
        return [view[offset : offset + length] for offset, length in self.writable_ranges]


#: What Queue.receiver gives.
Receive = Callable[[], tuple[Chain, int | None]]


class Queue:
    """One virtqueue, served by this process: a split one, and what is the same in others (``packed.py``).

    ``layout`` and ``features`` are the driver's choice; ``kick`` and ``call`` the two eventfds (the driver's
    notifications, and our interrupts). ``account`` is what a predecessor left, or a ledger of its own.
    DeviceProtocolError when the rings cannot be where the driver put them.
    """

    def __init__(  # noqa: PLR0917 -- what a queue consists of
        self,
        memory: GuestMemory,
        layout: QueueLayout,
        features: int,
        kick: int,
        call: int,
        watch: WriteWatch | None = None,
        account: Ledger | None = None,
    ) -> None:
        #: The feature bits that the driver accepted.
        self.features = features
        self.size = layout.size
        self._memory = memory
        self._view = memory.view
        self._kick = kick
        self._call = call
        self._watch = watch
        self._fence = fence.full
        self._event_idx = bool(features & _EVENT_IDX)
        self._indirect = bool(features & _INDIRECT_DESC)
        #: What was written for those that are not published yet (with a watch only).
        self._written: list[tuple[int, int]] = []

        account = account or Ledger()
        self._fields = account.fields
        self._completions = account.completions
        self._requests, self._bytes = account.counts()
        #: Memory of the device's that outlives this process.
        self.scratch = account.scratch
        #: What a predecessor had taken of the host's for the next buffers, and its number for it; see :meth:`take`.
        self.taken = (0, 0)

        start = self._place_rings(memory, layout)
        # Positions count up and wrap.
        #: Up to where buffers are published: private, because the driver can write what it finds in memory.
        self._used_index = start
        #: Where that was when it was last decided whether the driver wants an interrupt.
        self._signalled = start
        #: The next position at which something may be available, and (split) how far the ring is known to be filled.
        self._next_available = start
        self._seen_available = start
        #: Up to where buffers are completed: what the driver will find of them is written down somewhere already.
        self._done = start
        self._begin()

    def _place_rings(self, memory: GuestMemory, layout: QueueLayout) -> int:
        """Finds the queue's parts in guest memory; the position of the next buffer. DeviceProtocolError."""
        size = layout.size
        if not 0 < size <= MAX_QUEUE_SIZE or size & (size - 1):
            raise DeviceProtocolError("2.7", f"a queue size of {size}")
        self._descriptors = place(memory, "descriptor table", layout.descriptor_table, 16 * size, 16)
        available = place(memory, "available ring", layout.available_ring, 6 + 2 * size, 2)
        used = place(memory, "used ring", layout.used_ring, 6 + 8 * size, 4)
        view = memory.view
        # 16 bits each: flags, idx, ring[size], used_event.
        self._available = view[available : available + 6 + 2 * size].cast("H")
        self._used_event = 2 + size
        # 16 bits each: flags, idx; then 64 bits each: ring[size], id in the low half; then 16 bits: avail_event.
        self._used = view[used : used + 4].cast("H")
        self._used_ring = view[used + 4 : used + 4 + 8 * size].cast("Q")
        self._avail_event = view[used + 4 + 8 * size : used + 6 + 8 * size].cast("H")
        if self._event_idx:
            self._used[0] = 0  # 2.7.10.2
        #: How many positions there are: all indices are 16 bits.
        self._turn = 1 << 16
        return self._used[1]

    def _begin(self) -> None:
        """Makes a start, now that all of the queue's parts are in their places."""
        self._suppress_notifications()
        self._take_over()

    def _take_over(self) -> None:
        """Goes on where a predecessor was killed: publishes what it had completed, and interrupts in its place."""
        said = self._fields[PROGRESS]
        done = ledger.done(said)
        if done is None:
            return
        # A driver can write the used index and the used ring. It harms nobody but itself: whatever does not fit is
        # not taken for completed, and served (again).
        unpublished = (done - self._used_index) & 0xFFFF
        if unpublished <= self.size and all(self._complete_again() for _ in range(unpublished)):
            self.taken = ledger.taken(said)
        self.publish()
        self._signalled = self._used_index
        os.eventfd_write(self._call, 1)

    def _complete_again(self) -> bool:
        """Takes the next buffer for completed, as its entry in the used ring says; False if that is another's."""
        index = self._next_available
        head, written = _halves(self._used_ring[index & (self.size - 1)])
        chain = self.pop()
        if chain is None or chain.head != head:
            self._next_available = index
            return False
        self._complete(chain, written)
        return True

    def wait(self) -> Chain:
        """The next buffer; publishes and sleeps until there is one."""
        while True:
            chain = self.pop()
            if chain is not None:
                return chain
            self.flush()
            self._sleep()

    def wait_for(self, seconds: float) -> Chain | None:
        """The next buffer; publishes and sleeps until there is one, but no longer than that: None then."""
        deadline = time.monotonic() + seconds
        while True:
            chain = self.pop()
            if chain is not None:
                return chain
            self.flush()
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            self._sleep(left)

    def waiter(self, requests: Usual) -> Callable[[], Chain]:
        """A function that does what ``wait`` does, except that it may serve such ``requests`` itself.

        What it returns is to be served from its beginning.
        """
        del requests  # this core leaves them all to the device
        return self.wait

    def receiver(self, frames: Frames) -> Receive | None:
        """A function that may put such ``frames`` into one buffer each, for as long as they come and fit; None: cannot.

        It returns the next buffer, and the length of a frame that was taken (see :meth:`take`) into that and, since it
        is too short, the ``scratch``; None: no frame was taken, since the buffer is not usual. OSError, as of readv(2):
        there is no frame now (BlockingIOError), or that one is lost; no buffer was taken.
        """
        del frames
        return None

    def is_waiting(self, waiting: bool) -> None:
        """Tells those who watch that this worker waits for the host, perhaps for long, or that it goes on."""
        self._fields[PHASE] = _WAITING if waiting else _SERVING

    def pop(self) -> Chain | None:
        """The next buffer, if there is one now."""
        index = self._next_available
        if index == self._seen_available:
            seen = self._available[1]
            if seen == index:
                return None
            if (seen - index) & 0xFFFF > self.size:
                raise DeviceProtocolError("2.7.6.1", f"the available index moved from {index} to {seen}")
            self._seen_available = seen
        head = self._available[2 + (index & (self.size - 1))]
        self._next_available = (index + 1) & 0xFFFF
        try:
            return self._chain(head)
        except GuestAddressError as error:
            raise DeviceProtocolError("2.7.5", f"a descriptor names memory that is none: {error}") from error

    def take(self, read: Callable[[list[memoryview]], int], views: list[memoryview], mark: int = 0) -> int:
        """Has ``read`` take something of the host's that cannot be had again, into ``views``: its result, a length.

        They are (parts of) the next buffers to be pushed, and scratch. If this worker is killed before that, its
        successor finds in :attr:`taken` how much it was, and ``mark`` (a number below MARK_LIMIT) with it. What is lost
        is what the host gives in the very moment before it is noted here: some hundred nanoseconds.
        """
        so_far = self._done | VALID | mark << MARK_SHIFT
        length = read(views)
        self._fields[PROGRESS] = so_far | length << TAKEN_SHIFT
        return length

    def forget_taken(self) -> None:
        """What was taken is not in the buffers any more."""
        self._fields[PROGRESS] = self._done | VALID

    def push(self, chain: Chain, written: int, data: int | None = None) -> None:
        """The device is done with ``chain`` and has filled the first ``written`` bytes of its writable part.

        Chains are pushed in the order in which they were popped. The driver sees them after the next ``flush()``.
        ``data`` is how many bytes were moved for it, for those who watch; None: ``written``.
        """
        self._complete(chain, written)
        # From here on a successor does not serve it again.
        self._fields[PROGRESS] = self._done | VALID
        self._requests += 1
        self._bytes += written if data is None else data
        if (self._done - self._used_index) % self._turn >= BATCH:
            self.flush()

    def push_together(self, parts: Iterable[tuple[Chain, int]]) -> None:
        """The same for several chains (with how much is written in each) that the driver is to find all at once.

        They are the device's to publish: that does not happen by itself, however many they are.
        """
        data = 0
        for chain, written in parts:
            self._complete(chain, written)
            data += written
        self._fields[PROGRESS] = self._done | VALID
        self._requests += 1
        self._bytes += data

    def _complete(self, chain: Chain, written: int) -> None:
        done = self._done
        self._used_ring[done & (self.size - 1)] = chain.head | min(written, 0xFFFFFFFF) << 32
        self._done = (done + 1) & 0xFFFF
        if self._watch is not None:
            self._note(chain.writable_ranges, written)

    def _note(self, ranges: list[tuple[int, int]], written: int) -> None:
        """Notes which bytes the watch is to be told of."""
        if len(ranges) == 1:
            offset, length = ranges[0]
            self._written.append((offset, min(length, written)))
        elif written >= sum(map(_length, ranges)):
            self._written += ranges
        else:
            self._written += _first_bytes(ranges, written)

    @property
    def unpublished(self) -> int:
        """How many completions the driver cannot see yet."""
        return (self._done - self._used_index) & 0xFFFF

    def flush(self) -> None:
        """Publishes what was pushed, and interrupts the driver if it wants that."""
        self.publish()
        self._signal()

    def publish(self) -> None:
        """Has the driver find what was pushed, when it looks. It is not told before the next ``flush()``.

        Except when the driver has so much to find that there may be nothing left that it made available.
        """
        if self._done == self._used_index:
            return
        if self._written and self._watch is not None:
            self._watch.written(self._written)
            self._written.clear()
        self._show()
        fields = self._fields
        fields[REQUESTS] = self._requests
        fields[BYTES] = self._bytes
        fields[MOMENT] = time.monotonic_ns()
        if (self._used_index - self._signalled) % self._turn >= self.size:
            self._signal()

    def _show(self) -> None:
        """Has the driver find all that is completed, at once."""
        self._used_index = self._used[1] = self._done

    def _signal(self) -> None:
        """Interrupts the driver if it wants to be told of what was published since the last time."""
        index = self._used_index
        news = (index - self._signalled) % self._turn
        if not news:
            return
        self._signalled = index
        if not self._wants_interrupt(index, news):
            self._fence()
            if not self._wants_interrupt(index, news):
                return
        os.eventfd_write(self._call, 1)

    def _wants_interrupt(self, index: int, news: int) -> bool:
        """Whether the driver wants to be told of the ``news`` positions before ``index``, all published (2.7.7.2)."""
        if self._event_idx:
            return (index - self._available[self._used_event] - 1) & 0xFFFF < news
        return not self._available[0] & AVAIL_F_NO_INTERRUPT

    def _suppress_notifications(self) -> None:
        """We look for available buffers of our own accord (2.7.10.2)."""
        # With EVENT_IDX there is nothing to do: avail_event stays behind, and the driver does not reach it again
        # before it has made another 65536 buffers available.
        if not self._event_idx:
            self._used[0] = USED_F_NO_NOTIFY

    def _ask_for_notifications(self) -> None:
        """The driver is to notify us of the next buffer."""
        if self._event_idx:
            self._avail_event[0] = self._next_available
        else:
            self._used[0] = 0

    def _is_available(self) -> bool:
        """Whether there is another buffer than those that were taken."""
        return self._available[1] != self._next_available

    def _sleep(self, seconds: float | None = None) -> None:
        """Returns when another buffer is available, or when it may be, or after ``seconds``."""
        self._ask_for_notifications()
        self._fence()
        if not self._is_available():
            self._fields[PHASE] = _IDLE
            if seconds is None or self._is_kicked_within(seconds):
                self._take_kick()
            self._fields[PHASE] = _SERVING
        self._suppress_notifications()

    def _take_kick(self) -> None:
        """Waits for a notification, and takes all that have come."""
        os.read(self._kick, 8)

    def _is_kicked_within(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._kick, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def _chain(self, head: int) -> Chain:  # noqa: PLR0912 -- a branch for each rule
        """Walks a descriptor chain: every descriptor is copied once, and the copy checked."""
        size = self.size
        if head >= size:
            raise DeviceProtocolError("2.7.6", f"the available ring names descriptor {head} of {size}")
        view = self._view
        locate = self._memory.offset
        table, entries, indirect = self._descriptors, size, False
        address, length, flags, following = _read_descriptor(view, table + 16 * head)
        if flags == DESC_F_WRITE:  # nearly all that a receiving queue gets
            return Chain(view, head, [], [(locate(address, length), length)])
        if flags == DESC_F_INDIRECT and (chain := self._straight_chain(head, address, length)):
            return chain
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        left = size
        total = 0
        while True:
            if flags & DESC_F_INDIRECT:
                if indirect:
                    raise DeviceProtocolError("2.7.5.3.1", "an indirect descriptor in an indirect table")
                table, entries = self._indirect_table(address, length, flags)
                index, indirect = 0, True
            else:
                if not left:
                    raise DeviceProtocolError("2.7.5.3.1", f"a chain of more descriptors than the queue's {size}")
                left -= 1
                total += length
                if flags & DESC_F_WRITE:
                    writable.append((locate(address, length), length))
                elif writable:
                    raise DeviceProtocolError("2.7.4.2", "a device-readable descriptor after a device-writable one")
                else:
                    readable.append((locate(address, length), length))
                if not flags & DESC_F_NEXT:
                    break
                index = following
                if index >= entries:
                    raise DeviceProtocolError("2.7.5", f"a descriptor continues at {index} of {entries}")
            address, length, flags, following = _read_descriptor(view, table + 16 * index)
        if total > MAX_CHAIN_BYTES:
            raise DeviceProtocolError("2.7.5.2", f"a chain of {total} bytes")
        return Chain(view, head, readable, writable)

    def _straight_chain(self, head: int, address: int, length: int) -> Chain | None:
        """The chain in an indirect table as Linux lays it out, one descriptor after the other; None for any other.

        It is what the walk of :meth:`_chain` comes to: the whole table is copied at once, and its flags and nexts are
        only compared with those of tables before. Whoever gets None walks, and copies anew.
        """
        entries = length // 16
        if length % 16 or not 0 < entries <= self.size or not self._indirect:
            return None
        table = _table_reader(entries)(self._view, self._memory.offset(address, length))
        readable = _readable_in_straight_table(table[2::3])
        if readable is None:
            return None
        addresses, lengths = table[0::3], table[1::3]
        if sum(lengths) > MAX_CHAIN_BYTES:
            return None
        ranges = list(zip(self._memory.offsets(addresses, lengths), lengths))  # noqa: B905 -- as long as each other
        return Chain(self._view, head, ranges[:readable], ranges[readable:])

    def _indirect_table(self, address: int, length: int, flags: int) -> tuple[int, int]:
        """Where the table that an indirect descriptor names is, and how many descriptors it has.

        The descriptor's own WRITE flag means nothing (2.7.5.3.2).
        """
        if not self._indirect:
            raise DeviceProtocolError("2.7.5.3.1", "an indirect descriptor without VIRTIO_F_INDIRECT_DESC")
        if flags & DESC_F_NEXT:
            raise DeviceProtocolError("2.7.5.3.1", "an indirect descriptor that continues")
        if not length or length % 16:
            raise DeviceProtocolError("2.7.5.3", f"an indirect table of {length} bytes")
        return self._memory.offset(address, length), length // 16


def _halves(entry: int) -> tuple[int, int]:
    """Of an entry of the used ring: id and length."""
    return entry & 0xFFFF_FFFF, entry >> 32


def _first_bytes(ranges: list[tuple[int, int]], count: int) -> Iterator[tuple[int, int]]:
    """The first ``count`` bytes of ``ranges``."""
    for offset, length in ranges:
        part = min(length, count)
        count -= part
        yield offset, part


@functools.lru_cache(CACHED)
def _table_reader(entries: int) -> Callable[[memoryview, int], tuple[int, ...]]:
    """Copies ``entries`` descriptors at once: address, length, flags with next in the upper half; each in turn."""
    return struct.Struct("<" + "QII" * entries).unpack_from


@functools.lru_cache(CACHED)
def _readable_in_straight_table(shape: tuple[int, ...]) -> int | None:
    """How many descriptors of an indirect table are device-readable, from its flags and nexts.

    None if it is more than one descriptor after the other, first readable and then writable ones.
    """
    last = len(shape) - 1
    flags = [entry & (DESC_F_NEXT | DESC_F_WRITE | DESC_F_INDIRECT) for entry in shape]
    readable = sum(not flag & DESC_F_WRITE for flag in flags)
    expected = [DESC_F_NEXT if index < readable else DESC_F_NEXT | DESC_F_WRITE for index in range(last)]
    if flags[:last] != expected or flags[last] != (DESC_F_WRITE if readable <= last else 0):
        return None
    if any(entry >> 16 != index + 1 for index, entry in enumerate(shape[:last])):
        return None
    return readable


def place(  # noqa: PLR0917 -- what there is to say of it
    memory: GuestMemory,
    what: str,
    address: int,
    length: int,
    alignment: int,
    sections: tuple[str, str] = ("2.7", "2.7.1"),
) -> int:
    """The offset of a part of a virtqueue, or DeviceProtocolError (whose section is of its place, or its alignment)."""
    if address % alignment:
        raise DeviceProtocolError(sections[1], f"the {what} at {address:#x} is not {alignment}-byte aligned")
    try:
        return memory.offset(address, length)
    except GuestAddressError as error:
        raise DeviceProtocolError(sections[0], f"the {what}: {error}") from error
