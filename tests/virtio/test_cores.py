"""The compiled core does what the one in Python does, byte for byte: whatever the driver does, whichever the device.

Each example is run twice, on the same rings, with the same files and at the same moments. Equal afterwards are all of
guest memory, the ledger, the interrupts, what the write watch was told and what it could see, what went to the host,
what the device said, how it ended, and where the queue is.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from filewire import FileWire
from hypothesis import given, settings
from hypothesis import strategies as st
from mockdriver import ALL, WRITE, Context, Descriptor, Idle, IdlingQueue, MockDriver
from ringstrategies import BUFFERS, MEMORY, SECTORS, SIZE, rings

from lguest_mp import core
from lguest_mp.errors import DeviceProtocolError, GuestAddressError
from lguest_mp.line import Line
from lguest_mp.memory import GuestMemory
from lguest_mp.network.header import NetFeature
from lguest_mp.prctl import die_with_parent
from lguest_mp.screen import RING, Track
from lguest_mp.virtio import ledger
from lguest_mp.virtio.block import Block
from lguest_mp.virtio.console import RECEIVEQ, TRANSMITQ, Console
from lguest_mp.virtio.device import Device, Feature
from lguest_mp.virtio.ledger import Ledger
from lguest_mp.virtio.net import OFFLOADS, Net
from lguest_mp.virtio.queue import Chain
from lguest_mp.virtio.rng import Rng

pytestmark = pytest.mark.skipif(core.missing() is not None, reason=f"the compiled core {core.missing()}")

#: As a tap with a driver that accepts all of it; and a disk's.
NET = ALL | Feature.VERSION_1 | NetFeature.MRG_RXBUF | OFFLOADS
BLOCK = ALL | 1 << 9 | 1 << 13 | 1 << 14
IMAGE = b"".join(struct.pack("<Q", sector) * 64 for sector in range(1, SECTORS + 1))
Act = Callable[[MockDriver], object]


@dataclass
class Recorder:
    """A write watch that notes what it is told, and what the driver can see then; the driver acts at that moment.

    With ``marks`` it tells which pages matter, and notes those only.
    """

    driver: MockDriver
    acts: list[Act]
    marks: bytearray | None = None
    told: list[tuple[object, int, int | None]] = field(default_factory=list)

    def written(self, ranges: Sequence[tuple[int, int]]) -> None:
        if self.marks is None:
            self.told.append((list(ranges), self.driver.used_index, self.driver.interrupts()))
        else:
            self.told.append(({part for part in ranges if self._matters(*part)}, self.driver.used_index, None))
        if self.acts and self.marks is None:
            self.acts.pop(0)(self.driver)

    def _matters(self, offset: int, length: int) -> bool:
        assert self.marks is not None
        return bool(length) and any(self.marks[offset >> 12 : (offset + length - 1 >> 12) + 1])


class Host:
    """What the devices' other ends are: an image, and sockets and files for the rest."""

    def __init__(self, directory: Path) -> None:
        self.image = directory / "disk.img"
        self.output = directory / "output"

    @contextmanager
    def device(self, kind: str, frames: Sequence[bytes]) -> Iterator[tuple[Device, int, Callable[[], object]]]:
        """A device with one of its queues, all as ever; and what has gone to the host."""
        self.image.write_bytes(IMAGE)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs, self.output.open("w+b") as output, open("/dev/zero", "rb") as zero:
            ours.setblocking(False)
            theirs.setblocking(False)
            match kind:
                case "block":
                    with closing(Block("block0", self.image)) as disk:
                        yield disk, 0, self.image.read_bytes
                case "rng":
                    yield Rng("rng0"), 0, lambda: None
                case "net/receiveq":
                    for each in frames[::2]:
                        theirs.send(each)
                    later: list[Callable[[], object]] = [partial(theirs.send, each) for each in frames[1::2]]
                    yield Net("net0", FileWire(file=ours.fileno(), later=later), bytes(6)), RECEIVEQ, lambda: None
                case "net/transmitq":
                    wire = FileWire(file=ours.fileno())
                    yield Net("net0", wire, bytes(6)), TRANSMITQ, lambda: list(packets(theirs))
                case "console/receiveq":
                    yield Console(input_fd=zero.fileno()), RECEIVEQ, lambda: None
                case "console/transmitq":
                    with closing(Line()) as line:
                        screen = line.attach().screen
                        # Soon at the end of its ring, and behind what the serial port has shown meanwhile.
                        line.writer(Track.CONSOLE).append(bytes(RING - 10))
                        line.writer(Track.SERIAL).append(b"serial")
                        device = Console(output_fd=output.fileno(), line=line)
                        yield device, TRANSMITQ, lambda: (self.output.read_bytes(), os.pread(screen, 1 << 20, 0))


def packets(end: socket.socket) -> Iterator[bytes]:
    while True:
        try:
            yield end.recv(1 << 17)
        except BlockingIOError:
            return


class OfferedQueue(IdlingQueue):
    """Notes which memory the driver offered to be written, as a core in Python finds it."""

    offered: list[tuple[int, int]]

    def pop(self) -> Chain | None:
        chain = super().pop()
        if chain is not None:
            self.offered += chain.writable_ranges
        return chain


@dataclass
class Outcome:
    """All that can be told of a worker's life."""

    memory: bytes
    account: list[int]
    interrupts: int
    told: list[tuple[object, int, int | None]]
    host: object
    lines: list[str]
    end: str
    queue: list[Any]
    offered: list[tuple[int, int]]


#: What a queue knows of where it is.
STATE = (
    *("_used_index", "_signalled", "_next_available", "_seen_available", "_done", "_requests", "_bytes"),
    *("_written", "taken", "unpublished", "size"),
)


@dataclass(frozen=True)
class Example:
    """What the driver does, and when: at the beginning, then when the watch is told, and at fences."""

    write: Act
    at_watch: tuple[Act, ...] = ()
    at_fence: tuple[Act, ...] = ()
    marks: bytes | None = None
    frames: tuple[bytes, ...] = ()


class Stage:
    """Where workers live, one after the other."""

    def __init__(self, directory: Path) -> None:
        self.memory = GuestMemory(MEMORY)
        self.host = Host(directory)

    def live(self, of: str, kind: str, features: int, size: int, example: Example) -> Outcome:
        """A worker's whole life on one core."""
        self.memory.view[:] = bytes(MEMORY)
        account = Ledger()
        with (
            closing(MockDriver(size, features, self.memory, of=of)) as driver,
            self.host.device(kind, example.frames) as (device, index, seen),
        ):
            # What a device has to write is not there already.
            self.memory.view[driver._first_free :] = b"\xa5" * (MEMORY - driver._first_free)
            example.write(driver)
            marks = None if example.marks is None else bytearray(example.marks)
            watch = Recorder(driver, [*example.at_watch], marks)
            queue = driver.queue(watch, account, OfferedQueue if of == "python" else IdlingQueue)
            if of == "python":
                queue.offered = []  # type: ignore[attr-defined]
            at_fence = [*example.at_fence]
            context = Context()
            with driver.on_fence(queue, lambda: at_fence.pop(0)(driver) if at_fence else None):
                try:
                    device.serve(index, queue, context)
                except (Idle, DeviceProtocolError) as error:
                    end = f"{type(error).__name__} {error}"
            fields = list(account.fields)
            fields[ledger.MOMENT] = bool(fields[ledger.MOMENT])
            told = watch.told
            if marks is not None:  # a core may leave out what does not matter
                told = [each for each in told if each[0]]
            state = [getattr(queue, name) for name in STATE]
            if marks is not None:
                state[STATE.index("_written")] = None
            return Outcome(
                *(bytes(self.memory.view), fields, driver.interrupts(), told, seen(), context.lines, end, state),
                offered=getattr(queue, "offered", []),
            )

    def compare(self, kind: str, features: int, size: int, example: Example) -> Outcome:
        python, compiled = (self.live(of, kind, features, size, example) for of in ("python", "compiled"))
        if kind == "rng":
            # Nobody can foresee what it writes; where that is the driver's own rings, nor what it does then.
            if any(offset < BUFFERS and length for offset, length in python.offered):
                return python
            for each in (python, compiled):
                blotted = bytearray(each.memory)
                for offset, length in python.offered:
                    blotted[offset : offset + length] = bytes(length)
                each.memory = bytes(blotted)
        if kind == "net/receiveq":  # with no frame for it, a buffer need not have been taken
            for each in (python, compiled):
                each.queue[STATE.index("_next_available")] = each.queue[STATE.index("_seen_available")] = None
        compiled.offered = python.offered
        assert compiled == python
        return python


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("host"))


# ---- Anything at all ----

frames = st.lists(st.binary(min_size=1, max_size=1500), max_size=6).map(tuple)
wild = st.builds(
    Example,
    write=rings(),
    at_watch=st.lists(rings(), max_size=2).map(tuple),
    at_fence=st.lists(rings(), max_size=2).map(tuple),
    marks=st.none()
    | st.binary(min_size=MEMORY >> 12, max_size=MEMORY >> 12).map(lambda marks: bytes(b & 1 for b in marks)),
    frames=frames,
)
KINDS = {
    "block": BLOCK,
    "rng": ALL,
    "net/receiveq": NET,
    "net/transmitq": NET,
    "console/receiveq": ALL,
    "console/transmitq": ALL,
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50)
@given(
    example=wild,
    without=st.sampled_from([0, 0, Feature.RING_EVENT_IDX, Feature.RING_INDIRECT_DESC, Feature.VERSION_1]),
    header=st.tuples(st.sampled_from([0, 0, 1, 1, 4, 8, 11, 13, 2, 99]), st.integers(0, SECTORS + 1)),
)
def test_whatever_is_in_the_rings(
    stage: Stage, kind: str, example: Example, without: int, header: tuple[int, int]
) -> None:
    def begin(driver: MockDriver) -> None:
        example.write(driver)
        driver.memory.write(BUFFERS, struct.pack("<IIQ", header[0], 0, header[1]))

    stage.compare(kind, KINDS[kind] & ~without, SIZE, replace(example, write=begin))


# ---- What is usual, and nearly so ----


@dataclass(frozen=True)
class Wish:
    """A buffer, as MockDriver.add makes it."""

    readable: tuple[bytes, ...]
    writable: tuple[int, ...]
    layout: dict[str, Any]


layouts = st.fixed_dictionaries({}, optional={"indirect": st.booleans(), "backwards": st.booleans()})
few_lengths = st.lists(st.sampled_from([0, 1, 2, 12, 511, 512, 512, 1024, 3000]), max_size=4)


@st.composite
def disk_wishes(draw: st.DrawFn) -> Wish:
    kind = draw(st.sampled_from([0, 0, 0, 1, 1, 1, 4, 4, 8, 11, 13, 7, 0xFFFF_FFFF]))
    sector = draw(st.one_of(st.integers(0, SECTORS + 1), st.sampled_from([1 << 55, (1 << 64) - 1, 1 << 63])))
    header = struct.pack("<IIQ", kind, draw(st.integers(0, 0xFFFF_FFFF)), sector)
    lengths = draw(few_lengths)
    data = tuple(bytes([len(lengths) + index]) * length for index, length in enumerate(lengths))
    if draw(st.integers(0, 9)) == 0:
        header = header[: draw(st.integers(0, 15))]
    room = tuple(draw(few_lengths))
    status = draw(st.sampled_from([1, 1, 1, 1, 0, 2]))
    if kind == 1:
        return Wish((header, *data), (*room[: draw(st.sampled_from([0, 0, 0, 1]))], status), draw(layouts))
    return Wish((header, *data[: draw(st.sampled_from([0, 0, 0, 1]))]), (*room, status), draw(layouts))


sent = st.builds(
    lambda header, lengths, layout: Wish((bytes(header), *(b"f" * length for length in lengths)), (), layout),
    *(st.sampled_from([12, 12, 12, 10, 0]), few_lengths, layouts),
)
room_for_frames = st.builds(
    lambda first, lengths, layout: Wish((), (first, *lengths), layout),
    *(st.sampled_from([12, 12, 100, 1526, 1526, 11]), few_lengths, layouts),
)
room = st.builds(lambda lengths, layout: Wish((), (*lengths, 1), layout), few_lengths, layouts)
printed = st.builds(lambda text, layout: Wish((text, text), (), layout), st.binary(max_size=20), layouts)
WISHES = {
    "block": disk_wishes(),
    "rng": room,
    "net/receiveq": room_for_frames,
    "net/transmitq": sent,
    "console/receiveq": room,
    "console/transmitq": printed,
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50)
@given(data=st.data(), event=st.integers(0, 20), frames=frames, used_index=st.sampled_from([0, 0xFFF8]))
def test_whatever_is_asked_for(  # noqa: PLR0917 -- what hypothesis chooses
    stage: Stage,
    kind: str,
    data: st.DataObject,
    event: int,
    frames: tuple[bytes, ...],
    used_index: int,
) -> None:
    """Up to three batches, of which the last come while the others are served."""
    batches = [tuple(batch) for batch in data.draw(st.lists(st.lists(WISHES[kind], max_size=18), max_size=3))]

    def add(number: int) -> Act:
        def act(driver: MockDriver) -> None:
            for wish in batches[number] if number < len(batches) else ():
                try:
                    driver.add(wish.readable, wish.writable, **wish.layout)
                except (IndexError, GuestAddressError):  # no more descriptors, or memory
                    return

        return act

    def begin(driver: MockDriver) -> None:
        driver.used_index = used_index
        driver._available = driver._notified = driver._seen_used = used_index
        driver.set_available_index(used_index)
        driver.set_used_event(used_index + event)
        add(0)(driver)

    stage.compare(kind, KINDS[kind], 64, Example(begin, (add(1),), (add(2),), frames=frames))


# ---- What is too rare for chance ----


USUAL = {
    "block": Wish((struct.pack("<IIQ", 0, 0, 3),), (512, 1), {}),
    "rng": Wish((), (16,), {}),
    "net/receiveq": Wish((), (100,), {}),
    "net/transmitq": Wish((bytes(12), b"frame"), (), {}),
    "console/transmitq": Wish((b"text",), (), {}),
}


@pytest.mark.parametrize("kind", USUAL)
@pytest.mark.parametrize("event", [0, 15, 40, 1000])
def test_a_whole_ring_of_what_is_usual(stage: Stage, kind: str, event: int) -> None:
    """It is published, and the driver interrupted, batch by batch; or as soon as everything is used up."""
    wish = USUAL[kind]

    def begin(driver: MockDriver) -> None:
        driver.set_used_event(event)
        for _ in range(32):
            driver.add(wish.readable, wish.writable, indirect=True)

    def refill(driver: MockDriver) -> None:
        for _ in driver.used():
            driver.add(wish.readable, wish.writable, indirect=True)

    outcome = stage.compare(kind, KINDS[kind], 32, Example(begin, (lambda _: None, refill), frames=(bytes(72),) * 120))
    if wish.writable:
        assert [told[1] for told in outcome.told] == [0, 16, 32], "16 at a time"


@pytest.mark.parametrize(("marked", "told"), [(0, True), (1, True), (2, True), (3, False), (None, False)])
def test_a_mark_is_found_in_each_page_that_was_written(marked: int | None, told: bool) -> None:
    """And in no other: the buffer has room for four, and is filled up to the third."""
    told_of: list[tuple[int, int]] = []

    class Watch:
        marks = bytearray(64)

        def written(self, ranges: Sequence[tuple[int, int]]) -> None:
            told_of.extend(ranges)

    with closing(MockDriver(memory=GuestMemory(64 << 12), features=NET, of="compiled")) as driver:
        page = driver.allocate(4 << 12, alignment=4096) >> 12
        if marked is not None:
            Watch.marks[page + marked] = 1
        driver.make_available(driver.chain([Descriptor(page << 12, 4 << 12, WRITE)]))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            ours.setblocking(False)
            theirs.send(bytes((2 << 12) + 1))
            driver.serve(Net("net0", FileWire(file=ours.fileno()), bytes(6)), RECEIVEQ, driver.queue(Watch()))
        assert told_of == ([(page << 12, (2 << 12) + 1)] if told else [])
        assert len(driver.used()) == 1


# ---- What no example can show ----


@contextmanager
def scribbling(driver: MockDriver, seed: int) -> Iterator[None]:
    """Another process writes to the rings and tables all the while, on another processor if there is one."""
    pid = os.fork()
    if not pid:
        try:
            die_with_parent(os.getppid())
            scribble(driver, random.Random(seed))
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def scribble(driver: MockDriver, chance: random.Random) -> None:
    numbers = [0, 1, SIZE - 1, SIZE, 16, 512, BUFFERS, MEMORY - 16, MEMORY, 1 << 32, (1 << 64) - 16, (1 << 64) - 1]
    table = driver.memory.slice(driver.layout.descriptor_table, 16 * SIZE).cast("Q")
    inner = driver.memory.slice(0x2000, 0x300).cast("Q")
    while True:
        for view in (table, inner):
            index = 2 * chance.randrange(len(view) // 2)
            view[index] = chance.choice([BUFFERS, 0x2000, 0x2100, chance.choice(numbers)])
            flags, following = chance.choice([0, 1, 2, 3, 4]), chance.randrange(SIZE + 1)
            view[index + 1] = chance.choice([16, 32, 64, 512, 1 << 31]) | flags << 32 | following << 48
        driver.set_ring(chance.randrange(SIZE), chance.randrange(SIZE + 1))
        driver.set_available_index(driver.used_index + chance.randrange(SIZE + 2))


@pytest.mark.parametrize("kind", KINDS)
def test_rings_that_change_while_they_are_read(stage: Stage, kind: str) -> None:
    """A worker in the compiled core either says what the driver did wrong, or goes on: it ends by no signal."""
    with closing(MockDriver(SIZE, KINDS[kind], stage.memory, of="compiled")) as driver, scribbling(driver, 4711):
        account = Ledger()
        for _ in range(300):
            with stage.host.device(kind, [bytes(72)] * 4) as (device, index, _), suppress(Idle, DeviceProtocolError):
                device.serve(index, driver.queue(account=account), Context())


class Alarm(Exception):
    """The signal was heard."""


def bark(_number: int, _frame: object) -> None:
    raise Alarm


@pytest.fixture
def alarms() -> Iterator[None]:
    """SIGUSR1 and SIGPROF raise Alarm."""
    before = {number: signal.signal(number, bark) for number in (signal.SIGUSR1, signal.SIGPROF)}
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("of", ["python", "compiled"])
def test_a_worker_that_sleeps_hears_signals(of: str, alarms: None) -> None:
    with closing(MockDriver(of=of)) as driver:
        killer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
        killer.start()
        with pytest.raises(Alarm):
            Rng("rng0").serve(0, driver.sleeping_queue(), Context())
        killer.join()


@pytest.mark.parametrize("of", ["python", "compiled"])
def test_a_worker_that_has_a_lot_to_do_hears_signals(of: str, alarms: None) -> None:
    """Long before it is done with all that is available, which takes several times as long."""
    size = 32768
    with closing(MockDriver(size, memory=GuestMemory(4 << 20), of=of)) as driver:
        buffer = driver.allocate(256)
        for number in range(size):
            driver.set_descriptor(number, Descriptor(buffer, 256, WRITE))
            driver.set_ring(number, number)
        driver.set_available_index(size)
        signal.setitimer(signal.ITIMER_PROF, 0.001)
        with pytest.raises(Alarm):
            Rng("rng0").serve(0, driver.queue(), Context())
        assert driver.used_index < size
