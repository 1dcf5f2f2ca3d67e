"""The network device (virtio 1.2, 5.1), its wire in the test's hands."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Sequence

import pytest
from fakewire import FakeWire
from mockdriver import ALL, Buffer, Context, DriverFactory, Idle, IdlingQueue, MockDriver

from lguest_mp.errors import DeviceProtocolError
from lguest_mp.memory import GuestMemory
from lguest_mp.network.header import HEADER, LENGTH, NetFeature
from lguest_mp.network.wire import LONGEST_FRAME, WireGone
from lguest_mp.virtio import net as net_module
from lguest_mp.virtio import serving
from lguest_mp.virtio.device import Feature
from lguest_mp.virtio.net import OFFLOADS, RECEIVEQ, S_LINK_UP, STATUS_OFFSET, TRANSMITQ, Net
from lguest_mp.virtio.queue import Queue

MAC = bytes.fromhex("525400c0ffee")
VERSION_1 = Feature.VERSION_1
MODERN = ALL | VERSION_1 | NetFeature.MRG_RXBUF
#: A Linux guest's receive buffer.
BUFFER = 1526


class Asleep(Exception):
    """The worker sleeps for ever."""


@pytest.fixture(autouse=True)
def _no_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    def asleep(_queue: Queue) -> None:
        raise Asleep

    monkeypatch.setattr(serving, "sleep_for_ever", asleep)
    monkeypatch.setattr(net_module, "_AFTER_FAILURE", 0)
    monkeypatch.setattr(net_module, "_SHORTAGE", 0)


def frame(length: int = 60, *, gso: int = 0, seed: int = 0) -> bytes:
    """A frame of ``length`` bytes with its virtio_net_hdr, whose num_buffers nobody has set."""
    body = bytes((seed + index) & 0xFF for index in range(length))
    return HEADER.pack(1 if gso else 0, gso, 0, 1448 if gso else 0, 34, 16) + b"\xaa\xaa" + body


def received(driver: MockDriver, buffers: dict[int, Buffer]) -> list[tuple[int, bytes]]:
    """The frames that the driver finds: (num_buffers, header and frame), as many buffers put together as that says."""
    found = []
    used = iter(driver.used())
    for head, length in used:
        content = driver.content(buffers[head])[:length]
        (count,) = struct.unpack_from("<H", content, 10)
        for _ in range(count - 1):
            head_, length_ = next(used)
            content += driver.content(buffers[head_])[:length_]
        found.append((count, content))
    return found


def receive(
    driver: MockDriver, wire: FakeWire, sizes: Sequence[int] = (BUFFER,) * 8, *, offload: bool = True
) -> tuple[list[tuple[int, bytes]], Context]:
    """Makes buffers of ``sizes`` available and has the wire's frames put into them."""
    buffers = {buffer.head: buffer for buffer in (driver.add(writable=[size]) for size in sizes)}
    context = driver.serve(Net("net0", wire, MAC, offload=offload), RECEIVEQ)
    return received(driver, buffers), context


@pytest.fixture
def modern(new_driver: DriverFactory) -> MockDriver:
    """A driver as Linux's."""
    return new_driver(features=MODERN | OFFLOADS, memory=GuestMemory(4 << 20))


# What it is.


def test_its_configuration_space() -> None:
    """5.1.4: mac, status, max_virtqueue_pairs, mtu."""
    net = Net("net0", FakeWire(), MAC, mtu=9000)
    assert net.config_space() == MAC + struct.pack("<HHH", S_LINK_UP, 1, 9000)
    assert net.queue_names == ("receiveq", "transmitq")
    assert net.files == (42,)


@pytest.mark.parametrize(
    ("wire", "mtu", "offload", "features"),
    [
        (FakeWire(), None, True, OFFLOADS),
        (FakeWire(), 1500, True, OFFLOADS | NetFeature.MTU),
        (FakeWire(), None, False, 0),
        (FakeWire(has_header=False), None, True, 0),
    ],
)
def test_what_it_offers(wire: FakeWire, mtu: int | None, offload: bool, features: int) -> None:
    """5.1.3: a wire without headers cannot carry half-made frames."""
    always = NetFeature.MAC | NetFeature.STATUS | NetFeature.MRG_RXBUF
    assert Net("net0", wire, MAC, mtu, offload=offload).features == always | features


def test_closing_it_unplugs_the_wire() -> None:
    wire = FakeWire()
    Net("net0", wire, MAC).close()
    assert wire.closed


@pytest.mark.parametrize(
    ("features", "size"), [(VERSION_1, 12), (VERSION_1 | NetFeature.MRG_RXBUF, 12), (NetFeature.MRG_RXBUF, 12), (0, 10)]
)
@pytest.mark.parametrize("queue", [RECEIVEQ, TRANSMITQ])
def test_the_wire_is_told_what_the_driver_accepted(
    new_driver: DriverFactory, features: int, size: int, queue: int
) -> None:
    """5.1.6.1: the header has no num_buffers with a legacy driver that did not accept MRG_RXBUF."""
    wire = FakeWire()
    new_driver(features=features).serve(Net("net0", wire, MAC), queue)
    assert wire.attached == [(features, size)]


# Transmitting.


@pytest.mark.parametrize("pieces", [[12, 60], [72], [5, 7, 30, 30], [1] * 14, [12, 0, 60, 0]])
def test_a_packet_goes_out_however_it_is_cut(modern: MockDriver, pieces: list[int]) -> None:
    """2.7.4.1."""
    packet = os.urandom(sum(pieces))
    cut = [packet[sum(pieces[:index]) : sum(pieces[: index + 1])] for index in range(len(pieces))]
    wire = FakeWire()
    buffer = modern.add(readable=cut)
    modern.serve(Net("net0", wire, MAC), TRANSMITQ)
    assert wire.sent == [packet]
    assert list(modern.used()) == [(buffer.head, 0)]


def test_a_wire_without_headers_gets_the_frame_alone(modern: MockDriver) -> None:
    wire = FakeWire(has_header=False)
    modern.add(readable=[bytes(5), bytes(7) + b"frame", b"'s rest"])
    modern.serve(Net("net0", wire, MAC), TRANSMITQ)
    assert wire.sent == [b"frame's rest"]


def test_a_legacy_packet(new_driver: DriverFactory) -> None:
    driver = new_driver(features=0)
    wire = FakeWire(has_header=False)
    driver.add(readable=[bytes(10), b"frame"])
    driver.serve(Net("net0", wire, MAC), TRANSMITQ)
    assert wire.sent == [b"frame"]


def test_a_packet_that_the_host_refuses_is_lost_and_said_once(modern: MockDriver) -> None:
    failure = OSError(errno.EIO, os.strerror(errno.EIO))
    other = OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    wire = FakeWire(failures=[failure, failure, other, failure, None])
    for _ in range(5):
        modern.add(readable=[bytes(72)])
    context = modern.serve(Net("net0", wire, MAC), TRANSMITQ)
    assert len(wire.sent) == 1
    assert len(list(modern.used())) == 5
    assert context.lines == [
        "net0: packets to the network are lost: Input/output error",
        "net0: packets to the network are lost: Invalid argument",
    ]


def test_packets_to_a_wire_that_is_gone_vanish(modern: MockDriver) -> None:
    """The worker of receiveq says so."""
    wire = FakeWire(failures=[WireGone("tap0 was deleted")] * 2)
    for _ in range(2):
        modern.add(readable=[bytes(72)])
    context = modern.serve(Net("net0", wire, MAC), TRANSMITQ)
    assert len(list(modern.used())) == 2
    assert context.lines == []


def test_a_packet_that_no_network_has_is_lost(modern: MockDriver) -> None:
    wire = FakeWire()
    modern.add(readable=[bytes(12), bytes(LONGEST_FRAME - 11)])
    modern.add(readable=[bytes(12), bytes(LONGEST_FRAME - 10)])
    modern.add(readable=[bytes(12), bytes(LONGEST_FRAME - 12)])
    context = modern.serve(Net("net0", wire, MAC), TRANSMITQ)
    assert [len(packet) for packet in wire.sent] == [LONGEST_FRAME]
    assert context.lines == [f"net0: a packet of {LONGEST_FRAME + 1} bytes is lost: no network has such"]


@pytest.mark.parametrize("pieces", [[11], [5, 6], [0]])
def test_a_packet_without_a_header_stops_the_device(modern: MockDriver, pieces: list[int]) -> None:
    """5.1.6.2."""
    modern.add(readable=[bytes(piece) for piece in pieces])
    with pytest.raises(DeviceProtocolError, match="no room for its header"):
        modern.serve(Net("net0", FakeWire(), MAC), TRANSMITQ)


def test_a_buffer_to_be_written_in_transmitq_stops_the_device(modern: MockDriver) -> None:
    modern.add(readable=[bytes(72)], writable=[10])
    with pytest.raises(DeviceProtocolError, match="device-writable"):
        modern.serve(Net("net0", FakeWire(), MAC), TRANSMITQ)


# Receiving.


def test_a_frame_lies_behind_its_header(modern: MockDriver) -> None:
    """5.1.6.4: and num_buffers says in how many buffers."""
    sent = frame()
    found, context = receive(modern, FakeWire(arriving=[sent]))
    assert found == [(1, sent[:10] + b"\1\0" + sent[12:])]
    assert context.lines == []


def test_a_wire_without_headers_gives_frames_an_empty_one(modern: MockDriver) -> None:
    found, _ = receive(modern, FakeWire(has_header=False, arriving=[b"x" * 60, b"y" * 3000]))
    assert found == [(1, bytes(10) + b"\1\0" + b"x" * 60), (2, bytes(10) + b"\2\0" + b"y" * 3000)]


@pytest.mark.parametrize("has_header", [True, False])
@pytest.mark.parametrize("cut", [[BUFFER], [10, 2, 500], [1] * 11 + [600], [0, 12, 0, 60], [11, 300, 300]])
def test_a_receive_buffer_may_be_cut_anywhere(new_driver: DriverFactory, cut: list[int], has_header: bool) -> None:
    """2.7.4.1."""
    driver = new_driver(features=MODERN)
    buffers = {buffer.head: buffer for buffer in [driver.add(writable=cut)]}
    sent = frame() if has_header else frame()[12:]
    driver.serve(Net("net0", FakeWire(has_header, arriving=[sent]), MAC), RECEIVEQ)
    ((count, content),) = received(driver, buffers)
    assert count == 1
    assert content[12:] == frame()[12:]
    assert content[:10] == (frame()[:10] if has_header else bytes(10))


def test_a_large_frame_lies_in_several_buffers(modern: MockDriver) -> None:
    """With MRG_RXBUF; whatever the frames before it needed."""
    sent = [frame(length, gso=1 if length > 1500 else 0) for length in (60, 9000, 60, 60, 1514, 1515, 4564, 60)]
    found, _ = receive(modern, FakeWire(arriving=list(sent)), [BUFFER] * 16)
    assert [count for count, _ in found] == [1, 6, 1, 1, 1, 2, 3, 1]
    assert [content[:10] + content[12:] for _, content in found] == [each[:10] + each[12:] for each in sent]


def test_the_longest_frame(new_driver: DriverFactory) -> None:
    driver = new_driver(64, features=MODERN, memory=GuestMemory(4 << 20))
    sent = frame(LONGEST_FRAME - LENGTH)
    found, _ = receive(driver, FakeWire(arriving=[sent, sent]), [BUFFER] * 43 + [LONGEST_FRAME])
    assert [(count, content[12:] == sent[12:]) for count, content in found] == [(43, True), (1, True)]


def test_all_buffers_of_a_frame_are_published_at_once(new_driver: DriverFactory) -> None:
    """A driver that finds the first one expects the others."""
    driver = new_driver(64, features=MODERN, memory=GuestMemory(4 << 20))
    steps = []

    class Watching(IdlingQueue):
        def publish(self) -> None:
            before = driver.used_index
            super().publish()
            steps.append((driver.used_index - before) & 0xFFFF)

    for _ in range(50):
        driver.add(writable=[BUFFER])
    queue = driver.queue(kind=Watching)
    wire = FakeWire(arriving=[frame(), frame(40000), frame(), frame(20000)])
    driver.serve(Net("net0", wire, MAC), RECEIVEQ, queue)
    assert [step for step in steps if step] == [1 + 27, 1 + 14]


def test_one_interrupt_for_many_frames(new_driver: DriverFactory) -> None:
    """It comes when the wire has nothing more; the frames are there earlier, for a driver that looks."""
    driver = new_driver(64, features=MODERN, memory=GuestMemory(4 << 20))
    seen: list[tuple[int, int]] = []

    class Looking(FakeWire):
        def read(self, views: Sequence[memoryview]) -> int:
            seen.append((driver.used_index, driver.interrupts()))
            return super().read(views)

    receive(driver, Looking(arriving=[frame()] * 40), [BUFFER] * 64)
    assert seen[16] == (16, 0)
    assert seen[40] == (32, 0)
    assert driver.used_index == 40
    assert driver.interrupts() == 1


def test_an_interrupt_when_the_buffers_are_used_up(new_driver: DriverFactory) -> None:
    driver = new_driver(features=MODERN)
    found, _ = receive(driver, FakeWire(arriving=[frame()] * 20), [BUFFER] * 4)
    assert len(found) == 4
    assert driver.interrupts() == 1


def test_an_interrupt_after_a_whole_ring_though_the_wire_never_rests(new_driver: DriverFactory) -> None:
    """The driver makes buffers available again without having been told."""
    driver = new_driver(64, features=MODERN, memory=GuestMemory(4 << 20))
    interrupts: list[int] = []

    class Refilled(IdlingQueue):
        def publish(self) -> None:
            super().publish()
            for _ in driver.used():
                driver.add(writable=[BUFFER])
            interrupts.append(driver.interrupts())

    for _ in range(64):
        driver.add(writable=[BUFFER])
    queue = driver.queue(kind=Refilled)
    driver.set_used_event(63)
    driver.serve(Net("net0", FakeWire(arriving=[frame()] * 128), MAC), RECEIVEQ, queue)
    assert interrupts[:8] == [0, 0, 0, 1, 0, 0, 0, 0]


def test_a_frame_larger_than_the_buffer_is_lost_without_mrg_rxbuf(new_driver: DriverFactory) -> None:
    """5.1.6.4; the buffer is there for the next one."""
    driver = new_driver(features=ALL | VERSION_1)
    wire = FakeWire(arriving=[frame(BUFFER - 11), frame(BUFFER - 12), frame(9000), frame(60)])
    found, context = receive(driver, wire, [BUFFER, BUFFER])
    assert [(count, len(content) - 12) for count, content in found] == [(1, BUFFER - 12), (1, 60)]
    assert context.lines == [
        f"net0: a packet of {BUFFER + 1} bytes is lost: the guest's receive buffers do not hold it"
    ]


def test_a_frame_larger_than_all_buffers_is_lost(new_driver: DriverFactory) -> None:
    """They could not become more: the driver has none to give but these."""
    driver = new_driver(4, features=MODERN)
    found, context = receive(driver, FakeWire(arriving=[frame(1000), frame(60)]), [100] * 4)
    assert [len(content) - 12 for _, content in found] == [60]
    assert len(context.lines) == 1


def test_a_flood_of_lost_frames_hides_no_other(new_driver: DriverFactory) -> None:
    """It comes before the wire has nothing more for a moment, which may be never."""
    driver = new_driver(features=ALL | VERSION_1)
    seen: list[int] = []

    class Looking(FakeWire):
        def read(self, views: Sequence[memoryview]) -> int:
            seen.append(driver.interrupts())
            return super().read(views)

    receive(driver, Looking(arriving=[frame(), *[frame(9000)] * 200]), [BUFFER] * 4)
    assert seen.index(1) <= 66
    assert sum(seen) == 1


def test_a_driver_that_is_short_of_buffers_is_waited_for_once(new_driver: DriverFactory) -> None:
    """Frames that need more than there are would otherwise stop all others, each for a while."""
    driver = new_driver(features=MODERN)
    waits: list[float] = []

    class Counting(IdlingQueue):
        def wait_for(self, seconds: float) -> None:
            waits.append(seconds)

    buffers = {buffer.head: buffer for buffer in (driver.add(writable=[100]) for _ in range(3))}
    queue = driver.queue(kind=Counting)
    wire = FakeWire(arriving=[*[frame(1000)] * 5, frame(60)])
    driver.serve(Net("net0", wire, MAC), RECEIVEQ, queue)
    assert len(waits) == 1
    assert [len(content) - 12 for _, content in received(driver, buffers)] == [60]


def test_a_frame_waits_for_the_buffers_that_it_needs(
    new_driver: DriverFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver fills the queue up as it gets buffers back: the frames before this one are published, and it does."""
    monkeypatch.setattr(net_module, "_SHORTAGE", 60)
    driver = new_driver(features=MODERN)
    buffers: dict[int, Buffer] = {}

    def add() -> None:
        buffer = driver.add(writable=[BUFFER])
        buffers[buffer.head] = buffer

    class Late(IdlingQueue):
        def _sleep(self, seconds: float | None = None) -> None:
            if seconds is None:
                raise Idle
            assert driver.used_index == 1
            add()

    add()
    add()
    queue = driver.queue(kind=Late)
    driver.serve(Net("net0", FakeWire(arriving=[frame(), frame(6000)]), MAC), RECEIVEQ, queue)
    assert [(count, len(content)) for count, content in received(driver, buffers)] == [(1, 72), (4, 6012)]


def test_a_legacy_driver_gets_a_header_without_num_buffers(new_driver: DriverFactory) -> None:
    driver = new_driver(features=0)
    sent = frame()[:10] + b"frame"
    buffer = driver.add(writable=[100])
    driver.serve(Net("net0", FakeWire(arriving=[sent]), MAC), RECEIVEQ)
    assert list(driver.used()) == [(buffer.head, 15)]
    assert driver.content(buffer)[:15] == sent


@pytest.mark.parametrize("size", [0, 1, 11])
def test_a_receive_buffer_without_room_for_a_header_stops_the_device(modern: MockDriver, size: int) -> None:
    """5.1.6.3.1."""
    modern.add(writable=[size])
    with pytest.raises(DeviceProtocolError, match="no room for a header"):
        modern.serve(Net("net0", FakeWire(arriving=[frame()]), MAC), RECEIVEQ)


def test_a_buffer_to_be_read_in_receiveq_stops_the_device(modern: MockDriver) -> None:
    modern.add(readable=[b"what"], writable=[BUFFER])
    with pytest.raises(DeviceProtocolError, match="device-readable"):
        modern.serve(Net("net0", FakeWire(arriving=[frame()]), MAC), RECEIVEQ)


def test_a_read_that_fails_loses_a_packet_and_no_more(modern: MockDriver) -> None:
    failure = OSError(errno.EIO, os.strerror(errno.EIO))
    found, context = receive(modern, FakeWire(arriving=[frame(), failure, failure, frame()]))
    assert len(found) == 2
    assert context.lines == ["net0: packets from the network are lost: Input/output error"]


# The link.


def test_the_guest_hears_of_the_link(modern: MockDriver) -> None:
    """5.1.4.2: once for each change."""
    wire = FakeWire(states=[True, True, False, False, True])
    _, context = receive(modern, wire)
    assert context.configuration == [(STATUS_OFFSET, b"\0\0"), (STATUS_OFFSET, b"\1\0")]


def test_a_link_that_is_down_when_the_driver_comes(modern: MockDriver) -> None:
    _, context = receive(modern, FakeWire(states=[False]))
    assert context.configuration == [(STATUS_OFFSET, b"\0\0")]


def test_a_link_that_came_back_while_there_was_no_driver(modern: MockDriver) -> None:
    net = Net("net0", FakeWire(states=[True]), MAC)
    net.apply_config(STATUS_OFFSET, b"\0\0")
    modern.add(writable=[BUFFER])
    assert modern.serve(net, RECEIVEQ).configuration == [(STATUS_OFFSET, b"\1\0")]


@pytest.mark.parametrize("found_while", ["reading", "waiting"])
def test_a_wire_that_is_gone_is_a_link_that_is_down(modern: MockDriver, found_while: str) -> None:
    """The worker does not end, since a worker that ends is a failure."""
    buffers = {buffer.head: buffer for buffer in (modern.add(writable=[BUFFER]) for _ in range(3))}
    context = Context()
    gone = WireGone("tap0 was deleted")
    wire = FakeWire(arriving=[frame(), gone]) if found_while == "reading" else FakeWire(arriving=[frame()], gone=gone)
    with pytest.raises(Asleep):
        Net("net0", wire, MAC).serve(RECEIVEQ, modern.queue(), context)
    assert len(received(modern, buffers)) == 1
    assert modern.interrupts() == 1
    assert context.configuration == [(STATUS_OFFSET, b"\0\0")]
    assert context.lines == ["net0: tap0 was deleted"]


# What another guest sends.


def tcp_frame(payload: int) -> bytes:
    """An Ethernet frame with IPv4 and TCP, whose TCP checksum is yet to be computed."""
    ethernet = bytes.fromhex("525400000001 525400000002 0800")
    ip = struct.pack(
        ">BBHHHBBH4s4s", 0x45, 0, 40 + payload, 1, 0x4000, 64, 6, 0, bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])
    )
    tcp = struct.pack(">HHIIBBHHH", 1, 2, 1000, 0, 0x50, 0x18, 100, 0, 0)
    return ethernet + ip + tcp + bytes(index & 0xFF for index in range(payload))


PARTIAL = HEADER.pack(1, 0, 54, 0, 34, 16) + b"\0\0"
SEGMENTED = HEADER.pack(1, 1, 54, 1000, 34, 16) + b"\0\0"


def receive_suspect(driver: MockDriver, frames: Sequence[bytes]) -> tuple[list[tuple[int, bytes]], Context]:
    return receive(driver, FakeWire(is_suspect=True, arriving=list(frames)))


@pytest.mark.parametrize("header", [PARTIAL, SEGMENTED, bytes(12)])
def test_a_frame_that_the_driver_takes_as_it_is(modern: MockDriver, header: bytes) -> None:
    found, _ = receive_suspect(modern, [header + tcp_frame(3000)])
    assert found == [(3, header[:10] + b"\3\0" + tcp_frame(3000))]


def test_another_guest_cannot_vouch_for_a_checksum(modern: MockDriver) -> None:
    """5.1.6.4.1: DATA_VALID is the device's to say."""
    found, _ = receive_suspect(modern, [HEADER.pack(2, 0, 0, 0, 0, 0) + b"\0\0" + tcp_frame(10)])
    assert found == [(1, bytes(10) + b"\1\0" + tcp_frame(10))]


def test_what_the_driver_did_not_accept_is_done_for_it(new_driver: DriverFactory) -> None:
    driver = new_driver(features=MODERN)
    found, _ = receive_suspect(driver, [PARTIAL + tcp_frame(100), SEGMENTED + tcp_frame(2500)])
    assert [count for count, _ in found] == [1, 1, 1, 1]
    assert all(content[:12] == bytes(10) + b"\1\0" for _, content in found)
    assert [len(content) - 12 - 54 for _, content in found] == [100, 1000, 1000, 500]
    assert b"".join(content[12 + 54 :] for _, content in found[1:]) == tcp_frame(2500)[54:]
    # The sequence numbers go on; that the checksums are right is test_offload's.
    assert [struct.unpack_from(">I", content, 12 + 38)[0] for _, content in found] == [1000, 1000, 2000, 3000]


def test_nonsense_of_another_guest_is_lost(modern: MockDriver) -> None:
    absurd = HEADER.pack(1, 0, 0, 0, 34, 60000) + b"\0\0"
    found, context = receive_suspect(
        modern, [absurd + tcp_frame(10), absurd + tcp_frame(10), bytes(12) + tcp_frame(10)]
    )
    assert len(found) == 1
    assert len(context.lines) == 1
    assert context.lines[0].startswith("net0: a packet is lost: ")
