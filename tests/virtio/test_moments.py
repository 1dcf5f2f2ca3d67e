"""The compiled core is killed at any machine instruction, and another worker goes on, of either core.

As in ``test_takeover.py``, but between the processor's instructions instead of the interpreter's. A worker is run step
by step while it serves what is usual; each state of what outlives it (guest memory, the ledger, the host's files) that
there is in between is put back, and a successor has to finish the work from there.
"""

from __future__ import annotations

import array
import fcntl
import mmap
import os
import struct
import termios
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from filewire import FileWire
from mockdriver import ALL, Buffer, Context, Idle, IdlingQueue, MockDriver
from singlestep import moments, watch_me

from lguest_mp import core
from lguest_mp.memory import GuestMemory
from lguest_mp.network.header import NetFeature
from lguest_mp.virtio import ledger
from lguest_mp.virtio.block import Block, BlockFeature
from lguest_mp.virtio.console import Console
from lguest_mp.virtio.device import Device, Feature
from lguest_mp.virtio.ledger import Ledger
from lguest_mp.virtio.net import OFFLOADS, RECEIVEQ, TRANSMITQ, Net
from lguest_mp.virtio.queue import Chain, Receive
from lguest_mp.virtio.rng import Rng
from lguest_mp.virtio.usual import Frames, Usual

pytestmark = pytest.mark.skipif(core.missing() is not None, reason=f"the compiled core {core.missing()}")

MEMORY = 1 << 16
NET = ALL | Feature.VERSION_1 | NetFeature.MRG_RXBUF | OFFLOADS
FRAME_HEADER = bytes(12)


class WatchedQueue(IdlingQueue):
    """Is watched from the moment at which the compiled code is called, and ends with it."""

    def waiter(self, requests: Usual) -> Callable[[], Chain]:
        wait = super().waiter(requests)

        def watched() -> Chain:
            watch_me()
            return wait()

        return watched

    def receiver(self, frames: Frames) -> Receive | None:
        receive = super().receiver(frames)
        assert receive is not None

        def watched() -> tuple[Chain, int | None]:
            watch_me()
            try:
                return receive()
            except BlockingIOError:
                os._exit(0)

        return watched

    def _sleep(self, seconds: float | None = None) -> None:
        os._exit(0)


@dataclass
class Scene:
    """A driver that wants something, and what its worker leaves."""

    driver: MockDriver
    account: Ledger

    def serve(self, device: Device, queue: int, of: str) -> None:
        """A successor's life."""
        self.driver.core = of
        with pytest.raises(Idle):
            device.serve(queue, self.driver.queue(account=self.account), Context())

    def deaths(
        self, device: Device, queue: int, outside: memoryview | None = None, host: Callable[[], int] = lambda: 0
    ) -> Iterator[tuple[str, int]]:
        """Of each moment at which a worker may have died, everything is put back: which core goes on, and ``host``."""
        driver, account = self.driver, self.account
        views = [driver.memory.view, account.fields.cast("B")] + ([] if outside is None else [outside])

        def work() -> None:
            device.serve(queue, driver.queue(account=account, kind=WatchedQueue), Context())

        with account.inherited():
            found = list(moments(work, views, host))
        assert len(found) > len(driver._chains), "something happens between one buffer and the next"
        for contents, said in found:
            for of in ("python", "compiled"):
                for view, content in zip(views, contents, strict=True):
                    view[:] = content
                driver._seen_used = 0
                yield of, said


@pytest.fixture
def scene() -> Iterator[Scene]:
    with closing(MockDriver(memory=GuestMemory(MEMORY), features=NET | BlockFeature.FLUSH, of="compiled")) as driver:
        yield Scene(driver, Ledger())


def waiting(fd: int) -> int:
    """How many bytes are in a pipe."""
    count = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return count[0]


@pytest.fixture
def pipes() -> Iterator[Callable[[], tuple[int, int]]]:
    """Makes pipes of packets, which do not block: what is written at once is read at once."""
    opened: list[int] = []

    def new() -> tuple[int, int]:
        ends = os.pipe2(os.O_DIRECT | os.O_NONBLOCK | os.O_CLOEXEC)
        opened.extend(ends)
        return ends

    yield new
    for end in opened:
        with suppress(OSError):
            os.close(end)


def test_disk_requests(scene: Scene, tmp_path: Path) -> None:
    """Writes are there, reads are right, and each request is answered once."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    driver = scene.driver
    driver.add([_header(4, 0)], [1])
    driver.add([_header(1, 1), b"w" * 512], [1])
    read = driver.add([_header(0, 1)], [512, 1])
    with (
        path.open("r+b") as file,
        mmap.mmap(file.fileno(), 4096) as image,
        memoryview(image) as content,
        closing(Block("block0", path)) as disk,
    ):
        for of, _ in scene.deaths(disk, 0, content):
            scene.serve(disk, 0, of)
            assert content[512:1024] == b"w" * 512
            assert driver.content(read) == b"w" * 512 + b"\0"
            assert driver.used() == [(0, 1), (2, 1), (5, 513)]


def test_random_numbers(scene: Scene) -> None:
    driver = scene.driver
    buffers = [driver.add([], [16, 16]) for _ in range(3)]
    for of, _ in scene.deaths(Rng("rng0"), 0):
        scene.serve(Rng("rng0"), 0, of)
        assert driver.used() == [(buffer.head, 32) for buffer in buffers]
        assert all(driver.content(buffer).count(0) < 32 for buffer in buffers)


def test_output(scene: Scene, tmp_path: Path) -> None:
    """At least once, in order, and at most one buffer twice."""
    pieces = [b"one ", b"two ", b"three "]
    for piece in pieces:
        scene.driver.add([piece[:1], piece[1:]])
    with (tmp_path / "output").open("w+b", buffering=0) as output:
        console = Console(output_fd=output.fileno())
        for of, length in scene.deaths(console, TRANSMITQ, host=lambda: os.fstat(output.fileno()).st_size):
            os.ftruncate(output.fileno(), 0)
            os.pwrite(output.fileno(), b"".join(pieces)[:length], 0)
            os.lseek(output.fileno(), length, os.SEEK_SET)
            scene.serve(console, TRANSMITQ, of)
            shown = os.pread(output.fileno(), 4096, 0).split(b" ")[:-1]
            assert sorted(set(shown), key=shown.index) == [piece[:-1] for piece in pieces]
            assert sum(Counter(shown).values()) <= len(pieces) + 1
            assert len(scene.driver.used()) == len(pieces)


def test_sent_frames(scene: Scene, pipes: Callable[[], tuple[int, int]]) -> None:
    """At least once, in order, and at most one of them twice."""
    frames = [FRAME_HEADER + bytes([number]) * (60 + number) for number in range(3)]
    for frame in frames:
        scene.driver.add([frame])
    reader, writer = pipes()
    for of, length in scene.deaths(_net(writer), TRANSMITQ, host=lambda: waiting(reader)):
        sent = [frame for index, frame in enumerate(frames) if sum(map(len, frames[: index + 1])) <= length]
        rest, end = pipes()
        scene.serve(_net(end), TRANSMITQ, of)
        sent += _packets(rest)
        assert sorted(set(sent), key=sent.index) == frames
        assert sum(Counter(sent).values()) <= len(frames) + 1
        assert len(scene.driver.used()) == len(frames)


def test_received_frames(scene: Scene, pipes: Callable[[], tuple[int, int]]) -> None:
    """Exactly once, except for one that was read in the very moment before that is noted."""
    frames = [FRAME_HEADER + bytes([number]) * (60 + number) for number in range(1, 4)]
    buffers = {buffer.head: buffer for buffer in [scene.driver.add([], [100, 26]) for _ in range(8)]}
    reader, writer = pipes()
    for frame in frames:
        os.write(writer, frame)
    losses = 0
    for of, length in scene.deaths(_net(reader), RECEIVEQ, host=lambda: waiting(reader)):
        left = [frame for index, frame in enumerate(frames) if sum(map(len, frames[index:])) <= length]
        progress = scene.account.fields[ledger.PROGRESS]
        known = (ledger.done(progress) or 0) + bool(ledger.taken(progress)[0])
        start, end = pipes()
        for frame in left:
            os.write(end, frame)
        scene.serve(_net(start), RECEIVEQ, of)
        got = [_content(scene.driver, buffers[head], written) for head, written in scene.driver.used()]
        lost = len(frames) - len(left) - known
        assert lost in (0, 1)
        losses += lost
        assert got == [frame for index, frame in enumerate(frames) if not lost or index != known]
    assert losses <= 2 * 2 * len(frames), "no more than the moment between reading and noting, of each frame"


def _content(driver: MockDriver, buffer: Buffer, written: int) -> bytes:
    """A frame as the wire had it: num_buffers, which has to be 1, is ours."""
    content = driver.content(buffer)[:written]
    assert content[10:12] == b"\1\0"
    return content[:10] + bytes(2) + content[12:]


def _net(fd: int) -> Net:
    return Net("net0", FileWire(file=fd), bytes(6))


def _header(kind: int, sector: int) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


def _packets(reader: int) -> list[bytes]:
    packets = []
    with suppress(BlockingIOError):
        while True:
            packets.append(os.read(reader, 4096))
    return packets
