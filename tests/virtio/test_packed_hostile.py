"""Drivers that put anything at all into a packed ring: as ``test_hostile_drivers.py``, on the other ring (2.8)."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import closing, suppress

import pytest
from fakewire import FakeWire
from hypothesis import given, settings
from hypothesis import strategies as st
from mockdriver import ALL, INDIRECT, NEXT, WRITE, Context, Descriptor, Idle, IdlingQueue, require_untouched
from packeddriver import AVAIL, USED, PackedDriver
from ringstrategies import (
    BUFFERS,
    MEMORY,
    SECTORS,
    SIZE,
    TABLES,
    addresses,
    descriptors,
    flags,
    indirect_tables,
    lengths,
)

from lguest_mp.errors import DeviceProtocolError
from lguest_mp.memory import GuestMemory
from lguest_mp.network.header import NetFeature
from lguest_mp.virtio.block import Block
from lguest_mp.virtio.console import RECEIVEQ, TRANSMITQ, Console
from lguest_mp.virtio.device import Device, Feature
from lguest_mp.virtio.net import Net
from lguest_mp.virtio.queue import Chain
from lguest_mp.virtio.rng import Rng

marks = st.sampled_from([AVAIL, AVAIL, AVAIL, AVAIL, USED, 0, AVAIL | USED])


@st.composite
def ring_descriptors(draw: st.DrawFn) -> Descriptor:
    """One of those for split rings, with its flags where a packed one has them."""
    given = draw(descriptors | st.builds(Descriptor, addresses, lengths, flags))
    known = given.flags & (NEXT | WRITE | INDIRECT) | draw(marks)
    return Descriptor(given.address, given.length, draw(st.integers(0, 0xFFFF)), known)


Write = Callable[[PackedDriver], None]


@st.composite
def packed_rings(draw: st.DrawFn) -> Write:
    """Everything that a driver writes; the result writes it."""
    ring = draw(st.lists(ring_descriptors(), min_size=SIZE, max_size=SIZE))
    inner = [draw(indirect_tables) for _ in TABLES]
    data = draw(st.binary(max_size=64))
    event = draw(st.binary(min_size=4, max_size=4))

    def write(driver: PackedDriver) -> None:
        memory = driver.memory
        memory.write(BUFFERS, data * (4096 // len(data)) if data else bytes(4096))
        for number, descriptor in enumerate(ring):
            driver.set_descriptor(number, descriptor)
        for address, entries in zip(TABLES, inner, strict=True):
            # A split table's flags stand where a packed one has IDs, and the other way round.
            table = [Descriptor(entry.address, entry.length, entry.next, entry.flags) for entry in entries]
            memory.write(address, b"".join(entry.pack() for entry in table))
        memory.write(driver.layout.available_ring, event)

    return write


class Broken(Exception):
    """What ``walk`` finds wrong."""


Parts = list[tuple[int, int]]


def walk(memory: bytes, driver: PackedDriver, position: int) -> tuple[int, int, Parts, Parts] | None:
    """Buffer ID, places, and the readable and writable parts of what is available there, by the letter of 2.8."""

    def descriptor(at: int) -> tuple[int, int, int, int]:
        fields: tuple[int, int, int, int] = struct.unpack_from("<QIHH", memory, at)
        return fields

    def inside(address: int, length: int) -> None:
        if address + length > len(memory):
            raise Broken

    ring, size = driver.layout.descriptor_table, driver.size
    _, _, _, how = descriptor(ring + 16 * (position % size))
    if how & (AVAIL | USED) != (AVAIL if position < size else USED):
        return None
    parts: list[tuple[int, int, int]] = []
    places = 0
    while True:
        address, length, identifier, how = descriptor(ring + 16 * ((position + places) % size))
        places += 1
        if how & INDIRECT:
            if places > 1 or how & NEXT or not driver.features & Feature.RING_INDIRECT_DESC or length % 16:
                raise Broken
            inside(address, length)
            parts = [
                (each[0], each[1], each[3] & WRITE)
                for each in (descriptor(at) for at in range(address, address + length, 16))
            ]
            break
        parts.append((address, length, how & WRITE))
        if not how & NEXT:
            break
        if places == size:
            raise Broken
    if not 0 < len(parts) <= size:
        raise Broken
    for address, length, _ in parts:
        inside(address, length)
    order = [writable for _, _, writable in parts]
    if order != sorted(order) or sum(length for _, length, _ in parts) > 1 << 32:
        raise Broken
    readable, writable = (
        [(address, length) for address, length, how in parts if how == wanted] for wanted in (0, WRITE)
    )
    return identifier, places, readable, writable


class JudgedQueue(IdlingQueue):
    """Compares every chain with what ``walk`` finds at that moment, and notes what may be written."""

    driver: PackedDriver
    allowed: Parts

    def pop(self) -> Chain | None:
        memory = bytes(self.driver.memory.view)
        position = self._next_available
        try:
            chain = super().pop()
        except DeviceProtocolError as error:
            if "not used yet" not in str(error):
                with pytest.raises(Broken):
                    walk(memory, self.driver, position)
            raise
        expected = walk(memory, self.driver, position)
        if chain is None:
            assert expected is None
        else:
            assert (chain.head, chain.descriptors, chain.readable_ranges, chain.writable_ranges) == expected
            self.allowed += chain.writable_ranges
        return chain


def judged(driver: PackedDriver) -> JudgedQueue:
    queue = driver.queue(kind=JudgedQueue)
    assert isinstance(queue, JudgedQueue)
    queue.driver = driver
    queue.allowed = [(driver.layout.descriptor_table, 16 * driver.size), (driver.layout.used_ring, 4)]
    return queue


@pytest.fixture(scope="module")
def memory() -> GuestMemory:
    return GuestMemory(MEMORY)


@settings(max_examples=300)
@given(write=packed_rings(), features=st.sampled_from([ALL, ALL, Feature.RING_EVENT_IDX]), turns=st.integers(0, 1))
def test_the_queue_reads_lists_as_the_standard_does(
    memory: GuestMemory, write: Write, features: int, turns: int
) -> None:
    """And taking them changes nothing."""
    memory.view[:] = bytes(MEMORY)
    with closing(PackedDriver(SIZE, features, memory)) as driver:
        driver.account.fields[0] = 1 << 16 | SIZE * turns
        driver.account.fields[5] = SIZE * turns
        write(driver)
        queue = judged(driver)
        before = bytes(memory.view)
        with suppress(DeviceProtocolError):
            for _ in range(SIZE + 1):
                if queue.pop() is None:
                    break
            else:
                raise AssertionError("more buffers than places")
        assert bytes(memory.view) == before


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Block]:
    path = tmp_path_factory.mktemp("images") / "disk.img"
    path.write_bytes(os.urandom(SECTORS * 512))
    with closing(Block("block0", path)) as block:
        yield block


KINDS = ("block", "rng", "console/receiveq", "console/transmitq", "net/receiveq", "net/transmitq")


@settings(max_examples=300)
@given(
    write=packed_rings(),
    kind=st.sampled_from(KINDS),
    header=st.tuples(st.sampled_from([0, 0, 1, 1, 4, 8, 11, 13, 2, 99]), st.integers(0, SECTORS + 1)),
    frames=st.lists(st.binary(min_size=12, max_size=1500), max_size=6),
)
def test_a_device_writes_only_what_it_was_offered(  # noqa: PLR0917 -- what hypothesis chooses
    memory: GuestMemory, image: Block, write: Write, kind: str, header: tuple[int, int], frames: list[bytes]
) -> None:
    """2.8.15: and it ends with DeviceProtocolError, or not at all."""
    memory.view[:] = bytes(MEMORY)
    arriving: list[bytes | Exception] = [*frames]
    with (
        open("/dev/zero", "rb") as zero,
        open("/dev/null", "wb") as null,
        closing(PackedDriver(SIZE, ALL | Feature.VERSION_1, memory)) as driver,
    ):
        devices: dict[str, tuple[Device, int]] = {
            "block": (image, 0),
            "rng": (Rng("rng0"), 0),
            "console/receiveq": (Console(input_fd=zero.fileno()), RECEIVEQ),
            "console/transmitq": (Console(output_fd=null.fileno()), TRANSMITQ),
            "net/receiveq": (Net("net0", FakeWire(arriving=arriving), bytes(6)), RECEIVEQ),
            "net/transmitq": (Net("net0", FakeWire(), bytes(6)), TRANSMITQ),
        }
        device, index = devices[kind]
        features = {"block": 1 << 9 | 1 << 13 | 1 << 14, "net/receiveq": NetFeature.MRG_RXBUF.value}
        driver.features |= features.get(kind, 0)
        write(driver)
        memory.write(BUFFERS, struct.pack("<IIQ", header[0], 0, header[1]))
        queue = judged(driver)
        before = bytes(memory.view)
        with suppress(DeviceProtocolError, Idle):
            device.serve(index, queue, Context())
    require_untouched(memory, before, queue.allowed)
