"""Drivers that put anything at all into the rings, descriptors and tables (virtio 1.2, 2.7).

Whatever they do: the queue does what the standard says, as a second, slow and plain reading of it does (``walk``); a
device ends with DeviceProtocolError or goes on; and no byte of guest memory changes that the driver did not offer to
be written. That the compiled core does the same as the queue in Python is test_cores.py's.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import closing, suppress

import pytest
from fakewire import FakeWire
from hypothesis import given, settings
from hypothesis import strategies as st
from mockdriver import ALL, INDIRECT, NEXT, WRITE, Context, Idle, IdlingQueue, MockDriver, require_untouched
from ringstrategies import BUFFERS, MEMORY, SECTORS, SIZE, rings

from lguest_mp.errors import DeviceProtocolError
from lguest_mp.memory import GuestMemory
from lguest_mp.network.header import NetFeature
from lguest_mp.network.wire import LONGEST_FRAME
from lguest_mp.virtio.block import Block
from lguest_mp.virtio.console import RECEIVEQ, TRANSMITQ, Console
from lguest_mp.virtio.device import Device, Feature
from lguest_mp.virtio.net import OFFLOADS, Net
from lguest_mp.virtio.queue import Chain
from lguest_mp.virtio.rng import Rng
from lguest_mp.virtio.usual import Usual


class Broken(Exception):
    """What ``walk`` finds wrong."""


def walk(memory: bytes, driver: MockDriver, head: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The (address, length) of the readable and of the writable part of a chain, by the letter of 2.7.5."""

    def descriptor(table: int, index: int) -> tuple[int, int, int, int]:
        fields: tuple[int, int, int, int] = struct.unpack_from("<QIHH", memory, table + 16 * index)
        return fields

    def inside(address: int, length: int) -> None:
        if address + length > len(memory):
            raise Broken

    if head >= driver.size:
        raise Broken
    parts: list[tuple[int, int, bool]] = []
    table, entries, index, indirect = driver.layout.descriptor_table, driver.size, head, False
    while True:
        address, length, how, following = descriptor(table, index)
        if how & INDIRECT:
            if indirect or not driver.features & Feature.RING_INDIRECT_DESC or how & NEXT or length % 16 or not length:
                raise Broken
            inside(address, length)
            table, entries, index, indirect = address, length // 16, 0, True
            continue
        inside(address, length)
        parts.append((address, length, bool(how & WRITE)))
        if len(parts) > driver.size:
            raise Broken
        if not how & NEXT:
            break
        if following >= entries:
            raise Broken
        index = following
    order = [writable for _, _, writable in parts]
    if order != sorted(order) or sum(length for _, length, _ in parts) > 1 << 32:
        raise Broken
    return (
        [(address, length) for address, length, writable in parts if not writable],
        [(address, length) for address, length, writable in parts if writable],
    )


@pytest.fixture(scope="module")
def memory() -> GuestMemory:
    return GuestMemory(MEMORY)


class JudgedQueue(IdlingQueue):
    """Compares every chain with what ``walk`` finds at that moment, and notes what may be written."""

    def judge(self, driver: MockDriver) -> JudgedQueue:
        self.driver = driver
        self.allowed = [(driver.layout.used_ring, 6 + 8 * driver.size)]
        self.popped = self._next_available
        return self

    def pop(self) -> Chain | None:
        memory = bytes(self.driver.memory.view)
        entry = self.driver.layout.available_ring + 4 + 2 * (self.popped % self.size)
        (head,) = struct.unpack_from("<H", memory, entry)
        try:
            chain = super().pop()
        except DeviceProtocolError as error:
            if not error.section.startswith("2.7.6.1"):
                with pytest.raises(Broken):
                    walk(memory, self.driver, head)
            raise
        if chain is not None:
            parts = walk(memory, self.driver, head)
            assert (chain.head, chain.readable_ranges, chain.writable_ranges) == (head, *parts)
            self.allowed += chain.writable_ranges
            self.popped += 1
        return chain

    def waiter(self, requests: Usual) -> Callable[[], Chain]:
        return self.wait


def judged(driver: MockDriver) -> JudgedQueue:
    queue = driver.queue(kind=JudgedQueue)
    assert isinstance(queue, JudgedQueue)
    return queue.judge(driver)


@settings(max_examples=300)
@given(write=rings(), features=st.sampled_from([ALL, ALL, Feature.RING_EVENT_IDX]))
@pytest.mark.split
def test_the_queue_reads_chains_as_the_standard_does(
    memory: GuestMemory, of: str, write: Callable[[MockDriver], None], features: int
) -> None:
    """2.7.5, 2.7.6: and taking them changes nothing."""
    memory.view[:] = bytes(MEMORY)
    with closing(MockDriver(SIZE, features, memory, of=of)) as driver:
        write(driver)
        queue = judged(driver)
        before = bytes(memory.view)
        with suppress(DeviceProtocolError):
            while queue.pop() is not None:
                pass
        assert queue.popped <= SIZE
        assert bytes(memory.view) == before


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[Device, int]]]:
    """One queue of each, on files: the console's input never ends, as a terminal's does not."""
    image = tmp_path_factory.mktemp("images") / "disk.img"
    image.write_bytes(os.urandom(SECTORS * 512))
    with open("/dev/zero", "rb") as zero, open("/dev/null", "wb") as null, closing(Block("block0", image)) as block:
        console = Console(input_fd=zero.fileno(), output_fd=null.fileno())
        yield [(block, 0), (Rng("rng0"), 0), (console, RECEIVEQ), (console, TRANSMITQ)]
        assert image.stat().st_size == SECTORS * 512


@settings(max_examples=300)
@given(
    write=rings(),
    which=st.integers(0, 3),
    header=st.tuples(st.sampled_from([0, 0, 1, 1, 4, 8, 11, 13, 2, 99]), st.integers(0, SECTORS + 1)),
)
def test_a_device_writes_only_what_it_was_offered(
    memory: GuestMemory,
    devices: list[tuple[Device, int]],
    write: Callable[[MockDriver], None],
    which: int,
    header: tuple[int, int],
) -> None:
    """2.7.5.1: and it ends with DeviceProtocolError, or not at all."""
    memory.view[:] = bytes(MEMORY)
    with closing(MockDriver(SIZE, ALL | 1 << 9 | 1 << 13 | 1 << 14, memory)) as driver:
        write(driver)
        memory.write(BUFFERS, struct.pack("<IIQ", header[0], 0, header[1]))
        queue = judged(driver)
        before = bytes(memory.view)
        device, queue_index = devices[which]
        with suppress(DeviceProtocolError, Idle):
            device.serve(queue_index, queue, Context())
    require_untouched(memory, before, queue.allowed)


@settings(max_examples=300)
@given(
    write=rings(),
    queue_index=st.sampled_from([RECEIVEQ, TRANSMITQ]),
    features=st.sampled_from([0, NetFeature.MRG_RXBUF, NetFeature.MRG_RXBUF | OFFLOADS]),
    legacy=st.booleans(),
    has_header=st.booleans(),
    is_suspect=st.booleans(),
    frames=st.lists(st.binary(max_size=1500), max_size=6),
    header=st.builds(
        struct.Struct("<BBHHHHH").pack,
        *(st.integers(0, 3), st.sampled_from([0, 1, 4, 0x81, 3, 5])),
        *(st.integers(0, 0xFFFF), st.sampled_from([0, 1, 100, 1448]), st.sampled_from([0, 14, 34, 54, 0xFFFF])),
        *(st.sampled_from([0, 6, 16, 0xFFFF]), st.integers(0, 0xFFFF)),
    ),
)
def test_a_network_device_writes_only_what_it_was_offered(  # noqa: PLR0917 -- what hypothesis chooses
    memory: GuestMemory,
    write: Callable[[MockDriver], None],
    queue_index: int,
    features: int,
    legacy: bool,
    has_header: bool,
    is_suspect: bool,
    frames: list[bytes],
    header: bytes,
) -> None:
    """2.7.5.1: whatever the driver does, and whatever another guest sends it."""
    memory.view[:] = bytes(MEMORY)
    features |= ALL if legacy else ALL | Feature.VERSION_1
    arriving: list[bytes | Exception] = [header + each if has_header else each for each in frames]
    wire = FakeWire(has_header, has_header and is_suspect, arriving)
    with closing(MockDriver(SIZE, features, memory)) as driver:
        write(driver)
        queue = judged(driver)
        before = bytes(memory.view)
        with suppress(DeviceProtocolError, Idle):
            Net("net0", wire, bytes(6)).serve(queue_index, queue, Context())
    require_untouched(memory, before, queue.allowed)
    assert all(len(each) <= LONGEST_FRAME for each in wire.sent)
