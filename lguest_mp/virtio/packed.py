"""The device's side of a packed virtqueue (virtio 1.2, 2.8): the same queue, on the other ring.

What a device does with it, what is checked and in which order memory is written stand in ``queue.py``; here is what is
different.

**One ring for both.** The driver makes a buffer available in the next places of the descriptor ring, one for each of
its descriptors (or a single one, for a table of them). The device says that it is used in the place of the buffer's
first descriptor, in the same words: buffer ID, length, flags; and skips the rest. Two of the flags say which of the two
a descriptor is. Both change their meaning with each turn, which the standard calls a wrap counter. A *position* here
counts through two turns, 0 to ``2 * size - 1``, and says both, the place and the counter: it is 1 in the first turn.

**Half a descriptor is one access.** Length, ID and flags are 64 bits that are aligned, and so they are read, and
written, at once. A descriptor whose flags say that it is available was filled before (x86 shows the driver's stores in
their order), so the look at the flags has copied that half of it, and then the address is read; no byte twice. A used
descriptor is a single store. The driver never sees half of one.

**A batch is found at once.** The driver looks at one place only, that of the next descriptor to be used. So the used
descriptors of a batch are written first to last but for the very first, and that one then (2.8.9 wants no less for the
buffers of one frame).

**A worker may be killed at any instruction.** No index in guest memory says how much is used; the ring does, but only
to one who knows where to look, and a used descriptor destroys the available one. So the ledger says more than for a
split queue, by one store each and in this order:

1. ``completions[place]``: how the used descriptor of a buffer will look, and how many places the buffer takes.
2. ``PROGRESS``: up to which position all buffers are completed. The ring is untouched up to now: what is not in
   PROGRESS is served again, and can be.
3. The ring, in the order above, when they are published.
4. ``PUBLISHED``: up to which position that is done. PROGRESS does not move between 3 and 4.

A successor that finds PUBLISHED behind PROGRESS looks at the place of PUBLISHED. If that is still available in this
turn, the driver has seen nothing of the batch, and the successor writes all of it once more. If it is anything else,
the batch was published as a whole (and the place perhaps used anew by the driver, for the next turn). What was written
into the buffers of a batch that is not published has to be told to the watch (again); where the used descriptor
stands already it was told, since that comes first, and where not, the chain is there to be read again.

The driver can write the ring meanwhile and so mislead a successor; it harms nobody but itself, as everything that a
successor finds there is checked like everything else. The guest cannot write the ledger. One that makes no sense is
the work of a worker gone bad, and as nobody can tell then where in the ring the driver is, the successor gives up
(ValueError): after some more the device needs a reset, and that is a new beginning, with a blank ledger.

**Sizes** need not be powers of two (2.8.10.1).
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lguest_mp.errors import DeviceProtocolError, GuestAddressError
from lguest_mp.virtio import ledger
from lguest_mp.virtio.device import Feature
from lguest_mp.virtio.ledger import PROGRESS, PUBLISHED
from lguest_mp.virtio.queue import (
    CACHED,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    MAX_CHAIN_BYTES,
    MAX_QUEUE_SIZE,
    Chain,
    Queue,
    place,
)

if TYPE_CHECKING:
    from lguest_mp.memory import GuestMemory
    from lguest_mp.virtio.device import QueueLayout

#: As a plain number: an operation on flags makes a new flag of them.
_RING_PACKED = int(Feature.RING_PACKED)
_SECTIONS = ("2.8", "2.8.10.1")
#: Descriptor flags (2.8.1): available where AVAIL is the wrap counter and USED is not, used where both are.
DESC_F_AVAIL = 1 << 7
DESC_F_USED = 1 << 15
_MARKS = DESC_F_AVAIL | DESC_F_USED
#: Flags of an event suppression structure (2.8.10).
EVENT_FLAGS_ENABLE = 0
EVENT_FLAGS_DISABLE = 1
EVENT_FLAGS_DESC = 2
#: Where they are in the 32 bits of one; below are 15 bits of offset, then the wrap counter.
_EVENT_FLAGS_SHIFT = 16
_EVENT_WRAP = 1 << 15

#: Of a descriptor's second half: below the flags are 32 bits of length, then 16 of buffer ID. A completion is the same,
#: with the number of descriptors in place of the flags.
_FLAGS_SHIFT = 48
_ID_SHIFT = 32
_LENGTH_MASK = 0xFFFF_FFFF
_ID_AND_LENGTH_MASK = (1 << _FLAGS_SHIFT) - 1


class PackedQueue(Queue):
    """One packed virtqueue. ``layout`` says where descriptor ring, driver area and device area are, in this order.

    ValueError: the ledger makes no sense.
    """

    def _place_rings(self, memory: GuestMemory, layout: QueueLayout) -> int:
        size = layout.size
        if not 0 < size <= MAX_QUEUE_SIZE:
            raise DeviceProtocolError("2.8", f"a queue size of {size}")
        ring = place(memory, "descriptor ring", layout.descriptor_table, 16 * size, 16, _SECTIONS)
        driver_area = place(memory, "driver area", layout.available_ring, 4, 4, _SECTIONS)
        device_area = place(memory, "device area", layout.used_ring, 4, 4, _SECTIONS)
        # 64 bits each, two for a descriptor: address; length, ID and flags.
        self._ring = memory.view[ring : ring + 16 * size].cast("Q")
        self._driver_event = memory.view[driver_area : driver_area + 4].cast("I")
        self._device_event = memory.view[device_area : device_area + 4].cast("I")
        #: How many positions there are: two turns.
        self._turn = 2 * size
        #: How many buffers are completed and not published.
        self._unpublished = 0
        fields = self._fields
        if ledger.done(fields[PROGRESS]) is None:
            # 2.8.1: the wrap counter begins with 1.
            fields[PUBLISHED] = 0
        published = fields[PUBLISHED]
        if published >= self._turn:
            raise ValueError(f"the ledger has position {published} of a ring of {size}")
        return published

    # ---- Taking over ----

    def _take_over(self) -> None:
        """Goes on where a predecessor was killed: publishes what it had completed, and interrupts in its place."""
        said = self._fields[PROGRESS]
        done = ledger.done(said)
        if done is None:
            return
        if done >= self._turn or (done - self._used_index) % self._turn > self.size:
            raise ValueError(f"the ledger has position {done} after {self._used_index} in a ring of {self.size}")
        if self._is_available():
            self._complete_up_to(done)
        else:
            # That it did publish, or else there is nothing.
            self._fields[PUBLISHED] = self._used_index = self._done = self._next_available = done
        self.taken = ledger.taken(said)
        self.publish()
        self._signalled = self._used_index
        os.eventfd_write(self._call, 1)

    def _complete_up_to(self, done: int) -> None:
        """Takes what the ledger has for completed, and notes what was written for it."""
        while self._done != done:
            completion = self._completions[self._done % self.size]
            descriptors = completion >> _FLAGS_SHIFT
            if not 0 < descriptors <= (done - self._done) % self._turn:
                raise ValueError(f"the ledger has {descriptors} descriptors at position {self._done}, up to {done}")
            self._next_available = self._done
            if self._watch is not None and (chain := self.pop()) is not None:
                self._note(chain.writable_ranges, completion & _LENGTH_MASK)
            self._done = self._next_available = (self._done + descriptors) % self._turn
            self._unpublished += 1

    # ---- Taking ----

    def pop(self) -> Chain | None:
        """The next buffer, if there is one now."""
        position = self._next_available
        size = self.size
        if position < size:
            index, available = position, DESC_F_AVAIL
        else:
            index, available = position - size, DESC_F_USED
        rest = self._ring[2 * index + 1]
        if rest >> _FLAGS_SHIFT & _MARKS != available:
            return None
        try:
            chain = self._list(index, rest)
        except GuestAddressError as error:
            raise DeviceProtocolError("2.8.4", f"a descriptor names memory that is none: {error}") from error
        if (position - self._used_index) % self._turn + chain.descriptors > size:
            raise DeviceProtocolError("2.8.17", "a list of descriptors of which some were not used yet")
        self._next_available = (position + chain.descriptors) % self._turn
        return chain

    def _list(self, index: int, rest: int) -> Chain:
        """The list of descriptors that begins at ``index``, of which ``rest`` is the second half.

        Every descriptor is copied once, and the copy checked.
        """
        ring = self._ring
        locate = self._memory.offset
        flags = rest >> _FLAGS_SHIFT
        address, length = ring[2 * index], rest & _LENGTH_MASK
        kind = flags & (DESC_F_NEXT | DESC_F_WRITE | DESC_F_INDIRECT)
        if kind == DESC_F_WRITE:  # nearly all that a receiving queue gets
            return Chain(self._view, rest >> _ID_SHIFT & 0xFFFF, [], [(locate(address, length), length)])
        if kind & DESC_F_INDIRECT and not kind & DESC_F_NEXT:
            return self._table(rest >> _ID_SHIFT & 0xFFFF, address, length)
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        descriptors = total = 0
        while True:
            if flags & DESC_F_INDIRECT:
                raise DeviceProtocolError("2.8.19", "an indirect descriptor in a list of several")
            if descriptors == self.size:
                raise DeviceProtocolError("2.8.17", f"a list of more descriptors than the queue's {self.size}")
            descriptors += 1
            total += length
            if flags & DESC_F_WRITE:
                writable.append((locate(address, length), length))
            elif writable:
                raise DeviceProtocolError("2.8.17", "a device-readable descriptor after a device-writable one")
            else:
                readable.append((locate(address, length), length))
            if not flags & DESC_F_NEXT:
                break
            index = (index + 1) % self.size
            rest = ring[2 * index + 1]
            flags = rest >> _FLAGS_SHIFT
            address, length = ring[2 * index], rest & _LENGTH_MASK
        if total > MAX_CHAIN_BYTES:
            raise DeviceProtocolError("2.8.4", f"a list of {total} bytes")
        # 2.8.6: the ID is in the last one.
        return Chain(self._view, rest >> _ID_SHIFT & 0xFFFF, readable, writable, descriptors)

    def _table(self, identifier: int, address: int, length: int) -> Chain:
        """The list in an indirect table: all of it, one descriptor after the other (2.8.7)."""
        entries = length // 16
        if not self._indirect:
            raise DeviceProtocolError("2.8.19", "an indirect descriptor without VIRTIO_F_INDIRECT_DESC")
        if not length or length % 16:
            raise DeviceProtocolError("2.8.7", f"an indirect table of {length} bytes")
        if entries > self.size:
            raise DeviceProtocolError("2.8.17", f"a table of {entries} descriptors, more than the queue's {self.size}")
        table = _table_reader(entries)(self._view, self._memory.offset(address, length))
        readable = _readable_in_table(table[2::3])
        if readable is None:
            raise DeviceProtocolError("2.8.17", "a device-readable descriptor after a device-writable one")
        addresses, lengths = table[0::3], table[1::3]
        if sum(lengths) > MAX_CHAIN_BYTES:
            raise DeviceProtocolError("2.8.4", f"a list of {sum(lengths)} bytes")
        ranges = list(zip(self._memory.offsets(addresses, lengths), lengths))  # noqa: B905 -- as long as each other
        return Chain(self._view, identifier, ranges[:readable], ranges[readable:])

    def _is_available(self) -> bool:
        """Whether there is another buffer than those that were taken."""
        position = self._next_available
        available = DESC_F_AVAIL if position < self.size else DESC_F_USED
        return self._ring[2 * (position % self.size) + 1] >> _FLAGS_SHIFT & _MARKS == available

    # ---- Completing ----

    def _complete(self, chain: Chain, written: int) -> None:
        done = self._done
        self._completions[done % self.size] = (
            min(written, _LENGTH_MASK) | chain.head << _ID_SHIFT | chain.descriptors << _FLAGS_SHIFT
        )
        self._done = (done + chain.descriptors) % self._turn
        self._unpublished += 1
        if self._watch is not None:
            self._note(chain.writable_ranges, written)

    @property
    def unpublished(self) -> int:
        """How many completions the driver cannot see yet."""
        return self._unpublished

    def _show(self) -> None:
        """Has the driver find all that is completed, at once."""
        ring, completions, size = self._ring, self._completions, self.size
        first = position = self._used_index
        while True:
            completion = completions[position % size]
            if position != first:
                ring[2 * (position % size) + 1] = self._used_half(position, completion)
            position = (position + (completion >> _FLAGS_SHIFT)) % self._turn
            if position == self._done:
                break
        ring[2 * (first % size) + 1] = self._used_half(first, completions[first % size])
        # Now it has.
        self._used_index = self._fields[PUBLISHED] = position
        self._unpublished = 0

    def _used_half(self, position: int, completion: int) -> int:
        """The second half of a used descriptor. WRITE says that something was written, and how much (2.8.3)."""
        flags = _MARKS if position < self.size else 0
        if completion & _LENGTH_MASK:
            flags |= DESC_F_WRITE
        return completion & _ID_AND_LENGTH_MASK | flags << _FLAGS_SHIFT

    # ---- Notifications, of both kinds ----

    def _wants_interrupt(self, index: int, news: int) -> bool:
        """Whether the driver wants to be told of the ``news`` positions before ``index``, all published (2.8.10).

        Flags that are reserved are taken for a yes, which is harmless.
        """
        event = self._driver_event[0]
        flags = event >> _EVENT_FLAGS_SHIFT & 3
        if flags == EVENT_FLAGS_DESC and self._event_idx:
            wanted = event & _EVENT_WRAP - 1
            if not event & _EVENT_WRAP:
                wanted += self.size
            return (index - wanted - 1) % self._turn < news
        return flags != EVENT_FLAGS_DISABLE

    def _suppress_notifications(self) -> None:
        """We look for available buffers of our own accord."""
        self._device_event[0] = EVENT_FLAGS_DISABLE << _EVENT_FLAGS_SHIFT

    def _ask_for_notifications(self) -> None:
        """The driver is to notify us of the next buffer; with EVENT_IDX, of no other."""
        if not self._event_idx:
            self._device_event[0] = EVENT_FLAGS_ENABLE << _EVENT_FLAGS_SHIFT
            return
        position = self._next_available
        wanted = position | _EVENT_WRAP if position < self.size else position - self.size
        self._device_event[0] = wanted | EVENT_FLAGS_DESC << _EVENT_FLAGS_SHIFT


def queue_maker(split: type[Queue]) -> Callable[..., Queue]:
    """Makes queues of the format that the driver accepted; ``split`` are the others."""

    def make(memory: GuestMemory, layout: QueueLayout, features: int, *others: Any) -> Queue:
        return (PackedQueue if features & _RING_PACKED else split)(memory, layout, features, *others)

    return make


@functools.lru_cache(CACHED)
def _table_reader(entries: int) -> Callable[[memoryview, int], tuple[int, ...]]:
    """Copies ``entries`` descriptors at once: address, length, flags; each in turn. Their IDs mean nothing (2.8.7)."""
    return struct.Struct("<" + "QI2xH" * entries).unpack_from


@functools.lru_cache(CACHED)
def _readable_in_table(flags: tuple[int, ...]) -> int | None:
    """How many descriptors of a table are device-readable, from their flags; None: others come before one of them.

    Only WRITE means something there (2.8.7).
    """
    writable = [bool(each & DESC_F_WRITE) for each in flags]
    return writable.count(False) if writable == sorted(writable) else None
