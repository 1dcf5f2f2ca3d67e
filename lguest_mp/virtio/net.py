"""The network device (virtio 1.2, 5.1): frames between the guest and a wire of the host's (``network/``).

Two queues, two workers. A frame is one system call from or to the guest's memory, and the virtio_net_hdr in front of it
is the wire's own where that has one: a tap and we speak of checksums and segmentation in the same words.

**Losing frames.** A network loses frames, and who uses it knows. So a read or a write that fails loses that frame, the
user is told once for each reason, and nothing else happens. Only what the standard forbids the driver stops the device:
a buffer in the wrong direction, one that cannot even hold a header, or a frame without one.

**Receiving.** With MRG_RXBUF (which Linux accepts) a frame lies in as many buffers as it needs, usually one of
1.5 KiB, but 64 KiB when the sender left segmentation to us. How long it is shows only after it was read. So it is read
into as many buffers as the last ones needed, and what does not fit lands in memory of our own and is copied from there.
Buffers that were taken and not needed are kept for the next frame. All buffers of a frame are published at once,
since a driver that finds the first expects the others.

**One interrupt for many frames.** The driver is interrupted when the wire has nothing more for now, or when its buffers
are used up; frames are published before that, and a driver that is looking finds them.

**Who may lie.** The header of a frame from another guest is checked and, where this guest's driver did not accept what
it asks for, done in software (``network/offload.py``). A tap's comes from the kernel.

**No control queue.** It would be a third process for each device. Its filters spare nothing here (a wire has few
stations, and Linux drops what is not for it), the guest may change its MAC without telling, and offloads are switched
with ``offload=``.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from lguest_mp.errors import DeviceProtocolError
from lguest_mp.jail.needs import Needs
from lguest_mp.network import header, offload
from lguest_mp.network.header import NetFeature
from lguest_mp.network.wire import LONGEST_FRAME, WireGone
from lguest_mp.virtio import serving, vectors
from lguest_mp.virtio.device import Device, DeviceId, Feature
from lguest_mp.virtio.serving import Losses
from lguest_mp.virtio.usual import Frames

if TYPE_CHECKING:
    from lguest_mp.network.wire import Wire
    from lguest_mp.supervisor.children import Child
    from lguest_mp.supervisor.loop import Loop
    from lguest_mp.virtio.queue import Chain, Queue
    from lguest_mp.worker import WorkerContext

RECEIVEQ = 0
TRANSMITQ = 1

#: The configuration space (5.1.4): mac, le16 status, le16 max_virtqueue_pairs, le16 mtu.
_CONFIG = struct.Struct("<6sHHH")
STATUS_OFFSET = 6
#: Status: the cable is plugged in at both ends.
S_LINK_UP = 1

#: What a wire with a header can carry, in both directions; all that there is but UFO.
OFFLOADS = (
    NetFeature.CSUM
    | NetFeature.GUEST_CSUM
    | NetFeature.GUEST_TSO4
    | NetFeature.GUEST_TSO6
    | NetFeature.GUEST_ECN
    | NetFeature.HOST_TSO4
    | NetFeature.HOST_TSO6
    | NetFeature.HOST_ECN
)

#: A frame that lies in so many views is read; a longer list of buffers is not needed for any.
_MOST_VIEWS = vectors.IOV_MAX - 2
#: So many frames are published at the latest.
_BATCH = 16
#: After so many lost ones, frames that are not lost are shown to the driver at the latest.
_MOST_LOST = 64
#: How long (seconds) the driver may take to make more buffers available for a frame that needs them.
_SHORTAGE = 0.1
#: How long (seconds) to wait after a read that failed, in case the next one would, too.
_AFTER_FAILURE = 0.1

_ZEROES = bytes(header.LENGTH)

#: As plain numbers: an operation on flags makes a new flag of them, 180 KiB for a worker.
_MRG_RXBUF = NetFeature.MRG_RXBUF.value
#: 5.1.6.1: a legacy driver without MRG_RXBUF has no num_buffers.
_LONG_HEADER = Feature.VERSION_1.value | _MRG_RXBUF


class Net(Device):
    """A network device with ``mac`` (6 bytes), plugged into ``wire``.

    ``mtu`` is told to the guest. Without ``offload`` every frame on the wire is complete and no longer than the MTU.
    """

    device_id = DeviceId.NET
    queue_names = ("receiveq", "transmitq")

    def __init__(self, name: str, wire: Wire, mac: bytes, mtu: int | None = None, *, offload: bool = True) -> None:
        super().__init__(name, _CONFIG.pack(mac, S_LINK_UP, 1, mtu or 0))
        self.wire = wire
        self._features = NetFeature.MAC | NetFeature.STATUS | NetFeature.MRG_RXBUF
        if mtu is not None:
            self._features |= NetFeature.MTU
        if offload and wire.has_header:
            self._features |= OFFLOADS

    @property
    def features(self) -> int:
        """What the wire can carry, MAC, STATUS and MRG_RXBUF, and MTU if there is one."""
        return self._features

    @property
    def files(self) -> tuple[int, ...]:
        """The wire's."""
        return tuple({*self.wire.files, *self.wire.files_of_writer})

    def files_of(self, queue_index: int) -> tuple[int, ...]:
        """The wire's."""
        return self.wire.files if queue_index == RECEIVEQ else self.wire.files_of_writer

    def needs(self, queue_index: int) -> Needs:
        """The wire's."""
        return self.wire.needs_of_reader() if queue_index == RECEIVEQ else self.wire.needs_of_writer()

    @property
    def description(self) -> str:
        """With its wire and its MAC."""
        return f"{self.name}, {self.wire.description}, {self._config[:STATUS_OFFSET].hex(':')}"

    @property
    def helper(self) -> Child | None:
        """The wire's."""
        return self.wire.helper

    def connect(self) -> None:
        """Connects the wire."""
        self.wire.connect()

    def attend(self, loop: Loop) -> None:
        """The wire does."""
        self.wire.attend(loop)

    def helper_ended(self) -> None:
        """The wire is told."""
        self.wire.helper_ended()

    @property
    def is_up(self) -> bool:
        """Whether the guest is told, in this process's copy, that the link is up."""
        return bool(self._config[STATUS_OFFSET] & S_LINK_UP)

    def serve(self, queue_index: int, queue: Queue, context: WorkerContext) -> None:
        """Serves ``receiveq`` or ``transmitq``."""
        header_size = header.LENGTH if queue.features & _LONG_HEADER else header.NUM_BUFFERS
        self.wire.attach(queue.features, header_size)
        if queue_index == RECEIVEQ:
            _Receiver(self, queue, context, header_size).serve()
        else:
            _transmit(self, queue, context, header_size)

    def close(self) -> None:
        """Unplugs the wire."""
        self.wire.close()


def _transmit(net: Net, queue: Queue, context: WorkerContext, header_size: int) -> None:
    """Puts what the guest sends on the wire, frame by frame."""
    wire = net.wire
    wait = queue.wait
    if wire.file is not None:
        wait = queue.waiter(Frames(wire.file, header_size, LONGEST_FRAME))
    skipped = 0 if wire.has_header else header_size
    losses = Losses(net.name, context.log)
    while True:
        chain = queue.wait() if wire.is_stuck else wait()
        if chain.writable_ranges:
            raise DeviceProtocolError("5.1.6.2", "a device-writable buffer in transmitq")
        views = chain.readable
        length = vectors.total(views)
        if length < header_size:
            raise DeviceProtocolError("5.1.6.2", f"a packet of {length} bytes, with no room for its header")
        if skipped:
            views = vectors.advance(views, skipped)
        try:
            if length > LONGEST_FRAME:
                losses.note("long", f"a packet of {length} bytes is lost: no network has such")
            else:
                wire.write(views)
        except OSError as error:
            losses.note(error.errno, f"packets to the network are lost: {error.strerror}")
        except WireGone:
            pass  # the receiveq's worker says so, to the user and to the guest
        queue.push(chain, 0, length)


class _Receiver:
    """The receiveq's worker: what comes from the wire goes into the guest's buffers."""

    def __init__(self, net: Net, queue: Queue, context: WorkerContext, header_size: int) -> None:
        self._net = net
        self._wire = net.wire
        self._queue = queue
        self._context = context
        self._losses = Losses(net.name, context.log)
        self._header_size = header_size
        #: How much of a header the wire does not have.
        self._missing = 0 if net.wire.has_header else header_size
        self._features = int(queue.features)
        self._mergeable = bool(queue.features & _MRG_RXBUF)
        self._is_up = net.is_up
        #: Buffers that were taken and hold no frame yet, how much room there is in each, and where.
        self._held: list[tuple[Chain, int, list[memoryview]]] = []
        #: In how many of them the next frame is expected to lie.
        self._expected = 1
        #: Whether the driver was waited for in vain, and has made no buffer available since.
        self._is_short = False
        #: How many frames were lost here.
        self._lost = 0
        #: For what does not fit; a successor finds it there.
        self._spill = queue.scratch[:LONGEST_FRAME]
        #: Takes and delivers frames of the usual kind, where the core can and the header can be believed.
        self._receive = None
        if net.wire.file is not None and not net.wire.is_suspect:
            self._receive = queue.receiver(Frames(net.wire.file, header_size, LONGEST_FRAME))

    def serve(self) -> None:
        self._on_status(self._wire.is_up())
        self._deliver_inherited()
        try:
            while True:
                self._next_frame()
        except WireGone as reason:
            self._queue.flush()
            self._on_status(is_up=False)
            self._context.log(f"{self._net.name}: {reason}")
            serving.sleep_for_ever(self._queue)

    def _deliver_inherited(self) -> None:
        """The frame that a predecessor had read and not delivered when it ended."""
        length, buffers = self._queue.taken
        while len(self._held) < buffers:
            chain = self._queue.pop()
            if chain is None:  # the driver took back what it had made available
                return
            self._hold(chain)
        if length:
            self._expected = buffers
            self._on_frame(*self._where(), length)

    def _next_frame(self) -> None:
        """Takes a frame from the wire, or waits until there is one."""
        queue = self._queue
        try:
            views, buffers, length = self._take()
        except BlockingIOError:
            queue.flush()
            queue.is_waiting(True)
            self._wire.wait(self._on_status)
            queue.is_waiting(False)
        except OSError as error:
            queue.flush()
            self._losses.note(error.errno, f"packets from the network are lost: {error.strerror}")
            time.sleep(_AFTER_FAILURE)
        else:
            self._on_frame(views, buffers, length)

    def _take(self) -> tuple[list[memoryview], int, int]:
        """Reads a frame: where it lies, in how many buffers, and its length. OSError as of ``Wire.read``."""
        length = None
        if self._receive is not None and not self._held and self._expected == 1:
            chain, length = self._wire.read_by(self._receive)
            self._hold(chain)
        views, buffers = self._where()
        if length is None:
            length = self._queue.take(self._wire.read, views, buffers)
        return views, buffers, length

    def _on_frame(self, views: list[memoryview], buffers: int, length: int) -> None:
        """A frame of ``length`` bytes lies in ``views``, which are those of ``buffers`` buffers and the spill."""
        if self._wire.is_suspect:
            self._on_suspect_frame(views, length, buffers)
        else:
            self._deliver(length + self._missing, buffers)
        if self._queue.unpublished >= _BATCH:
            self._queue.publish()

    # ---- Buffers ----

    def _where(self) -> tuple[list[memoryview], int]:
        """Where the next frame goes: into so many of the guest's buffers, and what is left into memory of our own."""
        held = self._held
        if not held:
            self._hold(self._queue.wait())
        while len(held) < self._expected and (chain := self._queue.pop()) is not None:
            self._hold(chain)
        views: list[memoryview] = []
        buffers = 0
        for _, _, parts in islice(held, self._expected):
            if len(views) + len(parts) > _MOST_VIEWS:
                break
            views += parts
            buffers += 1
        if self._missing:
            views = vectors.advance(views, self._missing)
        views.append(self._spill)
        return views, buffers

    def _hold(self, chain: Chain) -> None:
        """Takes a buffer that the driver made available."""
        if chain.readable_ranges:
            raise DeviceProtocolError("5.1.6.3", "a device-readable buffer in receiveq")
        views = chain.writable
        room = len(views[0]) if len(views) == 1 else vectors.total(views)
        if room < self._header_size:
            raise DeviceProtocolError("5.1.6.3.1", f"a receive buffer of {room} bytes, with no room for a header")
        self._held.append((chain, room, views))
        self._is_short = False

    def _further_buffers(self, index: int) -> Iterator[tuple[Chain, int]]:
        """Buffers for the rest of a frame: what is held from ``index`` on, then others as the driver offers them.

        No more than a queue has: the driver cannot do its work before it got one back.
        """
        held = self._held
        while index < (self._queue.size if self._mergeable else 1):
            if index == len(held):
                chain = self._queue.pop() or (None if self._is_short else self._queue.wait_for(_SHORTAGE))
                if chain is None:
                    self._is_short = True
                    return
                self._hold(chain)
            yield held[index][:2]
            index += 1

    # ---- Frames ----

    def _deliver(self, length: int, filled: int) -> bool:
        """Gives the guest a frame of ``length`` bytes (with its header), or loses it: then False.

        Its beginning lies in the first ``filled`` of the buffers that are held, as much of it as they take. The rest is
        in the spill.
        """
        parts: list[tuple[Chain, int]] = []
        left = length
        for chain, room, _ in islice(self._held, filled):
            if left <= room:
                parts.append((chain, left))
                left = 0
                break
            parts.append((chain, room))
            left -= room
        if left and not self._unspill(left, parts):
            self._lose("room", f"a packet of {length} bytes is lost: the guest's receive buffers do not hold it")
            return False
        self._finish_header(parts[0][0], len(parts))
        self._queue.push_together(parts)
        del self._held[: len(parts)]
        self._expected = max(len(parts), self._expected - 1)
        return True

    def _unspill(self, left: int, parts: list[tuple[Chain, int]]) -> bool:
        """Copies ``left`` bytes of the spill into further buffers, and adds these; False: there are not enough."""
        spill = self._spill
        for chain, room in self._further_buffers(len(parts)):
            part = min(room, left)
            _fill(chain, spill[:part])
            spill = spill[part:]
            parts.append((chain, part))
            left -= part
            if not left:
                return True
        return False

    def _lose(self, kind: str, reason: str) -> None:
        """A frame is lost. Those before it must not wait until the wire, perhaps full of such, has nothing more."""
        self._queue.forget_taken()
        self._losses.note(kind, reason)
        self._lost += 1
        if self._lost % _MOST_LOST == 0:
            self._queue.flush()

    def _finish_header(self, chain: Chain, buffers: int) -> None:
        """Sets num_buffers (5.1.6.4: 1 without MRG_RXBUF), and all the rest of the header if the wire has none."""
        if self._missing:
            _fill(chain, _ZEROES[: self._header_size])
        if self._header_size == header.LENGTH:
            _fill(chain, buffers.to_bytes(2, "little"), header.NUM_BUFFERS)

    def _on_suspect_frame(self, views: list[memoryview], length: int, filled: int) -> None:
        """A frame from somebody who may lie, just read into ``views``."""
        size = self._header_size
        said = _copy(views, size)
        verdict = offload.check(said, length - size, self._features)
        if verdict == offload.CLEAN:
            _fill(self._held[0][0], offload.cleaned(said, length - size))
        if verdict in (offload.PASS, offload.CLEAN):
            self._deliver(length, filled)
            return
        try:
            frames = offload.mend(said, _copy(views, length)[size:])
        except offload.Nonsense as reason:
            self._lose("nonsense", f"a packet is lost: {reason}")
            return
        # From here on it lies nowhere as a whole. If this worker is killed now, what is not delivered of it is lost.
        self._queue.forget_taken()
        for frame in frames:
            self._spill[:size] = _ZEROES[:size]
            self._spill[size : size + len(frame)] = frame
            if not self._deliver(size + len(frame), 0):
                break

    # ---- The link ----

    def _on_status(self, is_up: bool) -> None:
        """Has the guest told, if that is news to it, whether the link is up."""
        if is_up != self._is_up:
            self._is_up = is_up
            status = S_LINK_UP if is_up else 0
            self._context.config_changed(STATUS_OFFSET, status.to_bytes(2, "little"))


def _fill(chain: Chain, data: bytes | memoryview, position: int = 0) -> None:
    """Copies ``data`` into the device-writable part of ``chain``, from ``position`` on; it has room for it."""
    offset, length = chain.writable_ranges[0]
    if position + len(data) <= length:
        chain.memory[offset + position : offset + position + len(data)] = data
        return
    for view in vectors.advance(chain.writable, position):
        part = data[: len(view)]
        view[: len(part)] = part
        data = data[len(part) :]
        if not data:
            break


def _copy(views: Iterable[memoryview], length: int) -> bytes:
    """The first ``length`` bytes that are in ``views``."""
    parts = []
    for view in views:
        part = bytes(view[:length])
        parts.append(part)
        length -= len(part)
        if not length:
            break
    return b"".join(parts)
