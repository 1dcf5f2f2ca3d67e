"""A worker is killed, and another one goes on with the same rings and the same ledger (``Queue``'s essay).

"At any instruction" is taken at its word: :func:`killed_at` ends a device's ``serve`` between two instructions of the
interpreter, at each of them in turn, and a successor has to finish the work.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from fakewire import FakeWire
from hypothesis import given
from hypothesis import strategies as st
from mockdriver import ALL, Buffer, Context, Idle, MockDriver
from packeddriver import PACKED, PackedDriver, new_driver_of

from lguest_mp.errors import DeviceProtocolError
from lguest_mp.network.header import NetFeature
from lguest_mp.virtio import fence, ledger
from lguest_mp.virtio.block import Block, BlockFeature
from lguest_mp.virtio.console import RECEIVEQ, TRANSMITQ, Console
from lguest_mp.virtio.device import Device, Feature
from lguest_mp.virtio.ledger import Ledger, Phase
from lguest_mp.virtio.net import Net
from lguest_mp.virtio.queue import Chain, Queue

MODERN = ALL | Feature.VERSION_1 | NetFeature.MRG_RXBUF
FRAME_HEADER = bytes(12)


def popped(queue: Queue) -> Chain:
    chain = queue.pop()
    assert chain is not None
    return chain


@pytest.fixture
def account() -> Ledger:
    return Ledger()


class TestSuccession:
    """What a successor does with what it finds."""

    def test_what_was_completed_is_published_and_not_served_again(self, driver: MockDriver, account: Ledger) -> None:
        heads = [driver.add([], [8]).head for _ in range(3)]
        queue = driver.queue(account=account)
        queue.push(popped(queue), 8)
        queue.push(popped(queue), 5)
        popped(queue)

        successor = driver.queue(account=account)
        assert driver.used() == [(heads[0], 8), (heads[1], 5)]
        assert popped(successor).head == heads[2]

    def test_an_interrupt_is_made_up_for(self, driver: MockDriver, account: Ledger) -> None:
        driver.add([b"x"])
        queue = driver.queue(account=account)
        queue.push(popped(queue), 0)
        queue.publish()
        assert driver.interrupts() == 0
        driver.queue(account=account)
        assert driver.interrupts() == 1

    @pytest.mark.split
    def test_an_entry_that_is_not_accounted_for_is_served_again(self, driver: MockDriver, account: Ledger) -> None:
        buffers = [driver.add([], [8]) for _ in range(2)]
        queue = driver.queue(account=account)
        queue.push(popped(queue), 8)
        driver.memory.write(driver.layout.used_ring + 4 + 8, buffers[1].head.to_bytes(4, "little"))
        successor = driver.queue(account=account)
        assert driver.used() == [(buffers[0].head, 8)]
        assert popped(successor).head == buffers[1].head

    def test_the_first_worker_of_a_queue_interrupts_nobody(self, driver: MockDriver, account: Ledger) -> None:
        driver.queue(account=account)
        assert driver.interrupts() == 0

    def test_a_queue_that_was_reset_is_a_new_one(self, driver: MockDriver, account: Ledger) -> None:
        driver.add([], [8])
        queue = driver.queue(account=account)
        queue.push(popped(queue), 8)
        account.open()
        successor = driver.queue(account=account)
        assert driver.used() == []
        assert popped(successor).writable_ranges

    def test_stale_code_is_looked_for_again(self, driver: MockDriver, account: Ledger) -> None:
        """The predecessor may have been killed before it did, and what is not published is not looked at."""
        told: list[tuple[int, int]] = []

        class Watch:
            def written(self, ranges: Any) -> None:
                told.extend(ranges)

        buffer = driver.add([], [8, 8])
        queue = driver.queue(Watch(), account)
        queue.push(popped(queue), 11)
        driver.queue(Watch(), account)
        assert told == [(buffer.writable[0][0], 8), (buffer.writable[1][0], 3)]

    def test_what_was_taken_of_the_hosts_is_told(self, driver: MockDriver, account: Ledger) -> None:
        driver.add([], [8])
        queue = driver.queue(account=account)
        chain = popped(queue)
        assert queue.taken == (0, 0)
        assert queue.take(lambda views: views[0].nbytes, chain.writable, 7) == 8
        assert driver.queue(account=account).taken == (8, 7)

    @pytest.mark.parametrize("end", ["push", "forget_taken"])
    def test_it_is_told_until_it_is_done_with(self, driver: MockDriver, account: Ledger, end: str) -> None:
        driver.add([], [8])
        queue = driver.queue(account=account)
        chain = popped(queue)
        queue.take(len, chain.writable, 1)
        if end == "push":
            queue.push(chain, 8)
        else:
            queue.forget_taken()
        assert driver.queue(account=account).taken == (0, 0)

    def test_it_is_accounted_for_the_queues_whole_life(self, driver: MockDriver, account: Ledger) -> None:
        for _ in range(3):
            driver.add([b"abcd"], [8])
            queue = driver.queue(account=account)
            queue.push(popped(queue), 3, 5)
            queue.flush()
        said = account.account()
        assert (said.requests, said.bytes) == (3, 15)
        assert said.moment is not None

    def test_phases(self, driver: MockDriver, account: Ledger) -> None:
        seen: list[Phase] = []
        queue = driver.sleeping_queue(account, lambda: seen.append(account.account().phase))
        driver.add([], [1])
        os.eventfd_write(driver.kicked, 1)
        queue.push(queue.wait(), 1)
        driver.add([], [1])
        seen.append(account.account().phase)
        os.eventfd_write(driver.kicked, 1)
        queue.wait()
        assert queue.wait_for(0) is None
        queue.is_waiting(True)
        assert account.account().phase is Phase.WAITING
        queue.is_waiting(False)
        assert account.account().phase is Phase.SERVING
        assert set(seen) <= {Phase.IDLE, Phase.SERVING}


class TestLyingDrivers:
    """The driver writes what only the device may write; it harms nobody but itself."""

    @given(
        used_index=st.integers(0, 0xFFFF), entries=st.lists(st.integers(0, (1 << 64) - 1), max_size=16), data=st.data()
    )
    @pytest.mark.split
    def test_whatever_is_in_the_rings(self, of: str, used_index: int, entries: list[int], data: st.DataObject) -> None:
        driver, account = MockDriver(of=of), Ledger()
        try:
            for _ in range(4):
                driver.add([], [8])
            queue = driver.queue(account=account)
            for _ in range(data.draw(st.integers(0, 3))):
                queue.push(popped(queue), 8)
            queue.take(len, [memoryview(bytearray(1))], 3)
            driver.used_index = used_index
            for index, entry in enumerate(entries):
                driver.memory.write(driver.layout.used_ring + 4 + 8 * index, entry.to_bytes(8, "little"))
            try:
                successor = driver.queue(account=account)
                while chain := successor.pop():
                    successor.push(chain, 0)
            except DeviceProtocolError:
                return
            assert 0 <= successor.unpublished <= driver.size
        finally:
            driver.close()

    @given(fields=st.lists(st.integers(0, (1 << 64) - 1), min_size=5, max_size=5))
    @pytest.mark.split
    def test_whatever_is_in_the_ledger(self, of: str, fields: list[int]) -> None:
        """A worker that is not itself any more can write what it likes there; its successor and the watch live on."""
        driver, account = MockDriver(of=of), Ledger()
        try:
            for index, value in enumerate(fields):
                account.fields[index] = value
            account.account()
            driver.add([], [8])
            queue = driver.queue(account=account)
            if chain := queue.pop():
                queue.push(chain, 8)
                queue.flush()
        finally:
            driver.close()


class TestInheritance:
    """Which process has a ledger."""

    @staticmethod
    def _child_writes(account: Ledger) -> int:
        pid = os.fork()
        if not pid:
            signal.alarm(10)
            faulthandler.disable()
            account.fields[ledger.REQUESTS] = 42
            account.scratch[5] = 6
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def test_the_worker_of_its_queue(self, account: Ledger) -> None:
        with account.inherited():
            assert self._child_writes(account) == 0
        assert (account.account().requests, account.scratch[5]) == (42, 6)

    def test_no_other_child(self, account: Ledger) -> None:
        with Ledger().inherited():
            assert self._child_writes(account) == -signal.SIGSEGV
        assert account.account().requests == 0


# ---- Killed at any instruction ----


class Killed(BaseException):
    """What SIGKILL looks like from inside."""


_PACKAGE = str(Path(ledger.__file__).parent)


def killed_at(instruction: int, run: Callable[[], object]) -> tuple[str | None, int]:
    """Runs until so many instructions of the interpreter were executed in the package's virtio modules.

    Returns the function in which that was, or None if it ended (by Idle) before, and the number of instructions.
    """
    executed = 0
    place: str | None = None

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal executed, place
        if not frame.f_code.co_filename.startswith(_PACKAGE):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        if event == "opcode":
            if executed == instruction:
                sys.settrace(None)
                place = frame.f_code.co_name
                raise Killed
            executed += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except (Killed, Idle):
        pass
    finally:
        sys.settrace(before)
        with suppress(RuntimeError):  # what a process leaves locked ends with it
            fence._release()
    return place, executed


#: Runs a worker that is killed at some instruction; the function in which that was, None: it had ended before.
Kill = Callable[[Callable[[], object]], str | None]


def at_every_instruction(
    scenario: Callable[[MockDriver, Ledger, Kill], None], new_driver: Callable[[], MockDriver]
) -> None:
    """Runs a scenario again and again; the worker in it, run by a Kill, is killed a little later each time."""
    instruction = 0
    while True:
        ended = False

        def kill(run: Callable[[], object], at: int = instruction) -> str | None:
            nonlocal ended
            place, _ = killed_at(at, run)
            ended = place is None
            return place

        with closing(new_driver()) as driver:
            scenario(driver, Ledger(), kill)
        if ended:
            return
        instruction += 1


def serve(driver: MockDriver, device: Device, index: int, account: Ledger) -> None:
    """One worker's life, until it would sleep."""
    device.serve(index, driver.queue(account=account), Context())


@pytest.fixture(params=["split", "packed"])
def rings(request: pytest.FixtureRequest) -> Callable[..., MockDriver]:
    """What makes drivers of one kind of queues, or of the other."""
    return new_driver_of("python" if request.param == "split" else PACKED)


@pytest.fixture
def files() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    yield reader, writer
    os.close(reader)
    os.close(writer)


class TestKilledAtAnyInstruction:
    """Each device, at each of some thousand moments."""

    def test_console_output(self, rings: Callable[..., MockDriver], files: tuple[int, int]) -> None:
        """At least once, in order, and at most one buffer twice."""
        reader, writer = files
        pieces = [b"one ", b"two ", b"three "]

        def scenario(driver: MockDriver, account: Ledger, kill: Kill) -> None:
            for piece in pieces:
                driver.add([piece])
            console = Console(output_fd=writer)
            kill(lambda: serve(driver, console, TRANSMITQ, account))
            with pytest.raises(Idle):
                serve(driver, console, TRANSMITQ, account)
            shown = os.read(reader, 4096).split(b" ")[:-1]
            assert sorted(set(shown), key=shown.index) == [piece[:-1] for piece in pieces]
            assert sum(Counter(shown).values()) <= len(pieces) + 1
            assert len(driver.used()) == len(pieces)

        at_every_instruction(scenario, rings)

    def test_console_input(self, rings: Callable[..., MockDriver]) -> None:
        """Exactly once, except for what was typed in the moment of the kill."""

        def scenario(driver: MockDriver, account: Ledger, kill: Kill) -> None:
            buffers = [driver.add([], [4]) for _ in range(3)]
            typed = string.ascii_letters.encode()
            reader, writer = os.pipe()
            os.write(writer, typed)
            console = Console(input_fd=reader)
            try:
                place = kill(lambda: serve(driver, console, RECEIVEQ, account))
                with pytest.raises(Idle):
                    serve(driver, console, RECEIVEQ, account)
            finally:
                os.close(reader)
                os.close(writer)
            got = b"".join(
                driver.memory.read(buffer.writable[0][0], written)
                for buffer, (_, written) in zip(buffers, driver.used(), strict=True)
            )
            if place not in {"take", "read"}:
                assert got == typed[:12]
            else:
                assert got in {typed[:12], typed[4:16], typed[:4] + typed[8:16], typed[:8] + typed[12:16]}

        at_every_instruction(scenario, rings)

    def test_received_frames(self, rings: Callable[..., MockDriver]) -> None:
        """Exactly once, also those that lie in several buffers, except for one in the moment of the kill."""
        frames = [FRAME_HEADER + bytes([number]) * length for number, length in enumerate((60, 250, 61), start=1)]

        def scenario(driver: MockDriver, account: Ledger, kill: Kill) -> None:
            buffers = {}
            for _ in range(8):
                buffer = driver.add([], [100])
                buffers[buffer.head] = buffer.writable[0][0]
            arriving: list[bytes | Exception] = [*frames]
            place = kill(lambda: serve(driver, _net(FakeWire(arriving=arriving)), 0, account))
            with pytest.raises(Idle):
                serve(driver, _net(FakeWire(arriving=arriving)), 0, account)
            got = []
            used = driver.used()
            while used:
                (number,) = driver.memory.read(buffers[used[0][0]] + 10, 2)[:1]
                parts, used = used[:number], used[number:]
                got.append(b"".join(driver.memory.read(buffers[head], written) for head, written in parts)[12:])
            whole = [frame[12:] for frame in frames]
            if place in ("take", "read"):
                assert [frame for frame in whole if frame in got] == got
                assert len(got) >= len(whole) - 1
            else:
                assert got == whole

        at_every_instruction(scenario, lambda: rings(features=MODERN))

    def test_sent_frames(self, rings: Callable[..., MockDriver]) -> None:
        frames = [FRAME_HEADER + bytes([number]) * 60 for number in range(3)]

        def scenario(driver: MockDriver, account: Ledger, kill: Kill) -> None:
            for frame in frames:
                driver.add([frame])
            wire = FakeWire()
            kill(lambda: serve(driver, _net(wire), 1, account))
            with pytest.raises(Idle):
                serve(driver, _net(wire), 1, account)
            assert sorted(set(wire.sent), key=wire.sent.index) == frames
            assert len(wire.sent) <= len(frames) + 1

        at_every_instruction(scenario, lambda: rings(features=MODERN))

    def test_disk_requests(
        self, rings: Callable[..., MockDriver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Writes are there, reads are right, and each request is answered once."""
        monkeypatch.setattr(os, "fdatasync", lambda _file: None)  # thousands of them take their time
        image = tmp_path / "disk.img"

        def scenario(driver: MockDriver, account: Ledger, kill: Kill) -> None:
            image.write_bytes(bytes(4096))
            disk = Block("block0", image)
            try:
                driver.add([_header(1, 1), b"w" * 512], [1])
                driver.add([_header(4, 0)], [1])
                read = driver.add([_header(0, 1)], [512, 1])
                kill(lambda: serve(driver, disk, 0, account))
                with pytest.raises(Idle):
                    serve(driver, disk, 0, account)
            finally:
                disk.close()
            assert image.read_bytes()[512:1024] == b"w" * 512
            assert driver.memory.read(read.writable[0][0], 512) == b"w" * 512
            assert [driver.memory.read(read.writable[1][0], 1), len(driver.used())] == [b"\0", 3]

        at_every_instruction(scenario, lambda: rings(features=ALL | Feature.VERSION_1 | BlockFeature.FLUSH))

    @pytest.mark.parametrize("is_busy", [False, True], ids=["the driver waits", "the driver goes on"])
    def test_lists_around_the_end_of_a_packed_ring(self, is_busy: bool) -> None:
        """Each is used once, also where the driver uses places anew before there is a successor.

        What was written was told to the watch before the driver could see it.
        """

        def scenario(driver: MockDriver, account: Ledger, kill: Kill) -> None:
            story = PackedStory(driver, account)
            for number in (0, 2, 4):
                story.add(number)
            with pytest.raises(Idle):
                story.serve()
            story.look()
            for number in (1, 6, 3):  # two places, around the end; one; two
                story.add(number)
            kill(story.serve)
            if is_busy:
                story.look()
                for number in range(8, 8 + 2 * story.room, 2):
                    story.add(number)
            with pytest.raises(Idle):
                story.serve()
            story.look()
            assert story.served_anew <= 1

        at_every_instruction(scenario, lambda: PackedDriver(5))


class PackedStory:
    """A driver that gives numbers, as lists of two descriptors or (even ones) as tables, and a device that echoes."""

    def __init__(self, driver: MockDriver, account: Ledger) -> None:
        self._driver = driver
        self._account = account
        self._asked: list[tuple[int, Buffer]] = []
        self._served: list[int] = []
        self._told: set[tuple[int, int]] = set()
        self._answered = 0

    def add(self, number: int) -> None:
        self._asked.append((number, self._driver.add([bytes([number])], [4], indirect=number % 2 == 0)))

    def serve(self) -> None:
        queue = self._driver.queue(self, self._account)
        while True:
            chain = queue.wait()
            (number,) = chain.readable[0]
            self._served.append(number)
            chain.writable[0][:] = bytes([number] * 4)
            queue.push(chain, number % 4)
            if number == 1:
                queue.publish()

    def written(self, ranges: Sequence[tuple[int, int]]) -> None:
        """What the watch is told."""
        self._told.update(ranges)

    def look(self) -> None:
        """What was used is what was asked, in order."""
        for head, length in self._driver.used():
            number, buffer = self._asked[self._answered]
            assert (head, length) == (buffer.head, number % 4)
            assert (buffer.writable[0][0], length) in self._told
            assert self._driver.content(buffer) == bytes([number] * 4)
            self._answered += 1

    @property
    def room(self) -> int:
        """How many places of the ring the driver has."""
        return self._driver.size - sum(number % 2 + 1 for number, _ in self._asked[self._answered :])

    @property
    def served_anew(self) -> int:
        """How many were served twice, when all were answered."""
        assert self._answered == len(self._asked)
        assert sorted(set(self._served)) == sorted(number for number, _ in self._asked)
        return len(self._served) - len(self._asked)


class TestPackedLedger:
    """What a successor on a packed ring does with what it finds."""

    @pytest.mark.parametrize("done", [0x1_0000 + 32, 0x1_0000 + 17, 0x1_FFFF])
    def test_a_ledger_that_makes_no_sense_is_given_up(self, done: int) -> None:
        with closing(PackedDriver()) as driver:
            driver.account.fields[ledger.PROGRESS] = done
            with pytest.raises(ValueError, match="the ledger has position"):
                driver.queue()

    @given(
        fields=st.lists(st.integers(0, (1 << 64) - 1), min_size=6, max_size=6),
        position=st.integers(0, 40),
        done=st.integers(0, 40),
        completions=st.lists(st.integers(0, (1 << 64) - 1) | st.integers(0, 3).map(lambda n: n << 48), max_size=16),
    )
    def test_whatever_is_in_it(self, fields: list[int], position: int, done: int, completions: list[int]) -> None:
        """It is given up, or the queue is served from somewhere; nothing is endless."""
        with closing(PackedDriver()) as driver:
            account = driver.account
            fields[ledger.PROGRESS] = fields[ledger.PROGRESS] & ~0xFFFF | done
            fields[ledger.PUBLISHED] = position
            for index, value in enumerate(fields):
                account.fields[index] = value
            for index, value in enumerate(completions):
                account.completions[index] = value
            account.account()
            for _ in range(3):
                driver.add([], [8])
            with suppress(ValueError, DeviceProtocolError):
                queue = driver.queue(account=account)
                while chain := queue.pop():
                    queue.push(chain, 8)
                queue.flush()

    @given(ring=st.binary(min_size=256, max_size=256), pushed=st.integers(0, 3), is_published=st.booleans())
    def test_whatever_is_in_the_ring(self, ring: bytes, pushed: int, is_published: bool) -> None:
        with closing(PackedDriver()) as driver:
            account = driver.account
            for _ in range(4):
                driver.add([], [8])
            queue = driver.queue(account=account)
            for _ in range(pushed):
                queue.push(popped(queue), 8)
            if is_published:
                queue.publish()
            queue.take(len, [memoryview(bytearray(1))], 3)
            driver.memory.write(driver.layout.descriptor_table, ring)
            try:
                successor = driver.queue(account=account)
                taken = 0
                while (chain := successor.pop()) and taken < 100:
                    successor.push(chain, 0)
                    taken += 1
            except DeviceProtocolError:
                return
            assert successor.taken == (1, 3)
            assert taken <= driver.size

    def test_a_new_queue_begins_in_the_first_turn(self) -> None:
        """2.8.1: after a reset, whatever the ledger said of the old one."""
        with closing(PackedDriver(3)) as driver:
            queue = driver.queue()
            for _ in range(4):
                driver.add([], [8])
                queue.push(popped(queue), 8)
                queue.flush()
                driver.used()
            driver.account.open()
        with closing(PackedDriver(3)) as again:
            again.add([], [8])
            queue = again.queue(account=driver.account)
            queue.push(popped(queue), 8)
            queue.flush()
            assert again.used() == [(0, 8)]
            another = again.add([], [1])
            assert popped(again.queue(account=driver.account)).head == another.head


def _net(wire: FakeWire) -> Net:
    return Net("net0", wire, bytes(6))


def _header(kind: int, sector: int) -> bytes:
    return kind.to_bytes(4, "little") + bytes(4) + sector.to_bytes(8, "little")
