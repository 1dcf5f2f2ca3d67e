"""The wire between guests of one user: who gets which frame, whoever comes, goes, dies or does not read."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import select
import shutil
import signal
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lguest_mp import jail
from lguest_mp.errors import LguestError
from lguest_mp.network import link, peers
from lguest_mp.network.link import Link
from lguest_mp.network.wire import LONGEST_FRAME
from lguest_mp.supervisor import children
from lguest_mp.supervisor.loop import Loop, is_readable

#: Much longer than anything takes.
HANGS = 60

HEADER = bytes(range(12))
BROADCAST = b"\xff" * 6
MULTICAST = bytes.fromhex("333300000001")
A, B, C, UNKNOWN = (bytes([0x52, 0x54, 0, 0, 0, number]) for number in range(4))

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root may change its root directory and its user")

Joiner = Callable[..., Link]


@pytest.fixture(autouse=True)
def _a_look_for_every_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "INTERVAL", 0)


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    """Fails a test that would wait for ever."""

    def bark(_number: int, _frame: FrameType | None) -> NoReturn:
        pytest.fail(f"nothing happened for {HANGS} s")  # no OSError, which who is tested may expect

    previous = signal.signal(signal.SIGALRM, bark)
    signal.alarm(HANGS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture(autouse=True)
def links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of this test's links; there is none yet."""
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.chdir(tmp_path)  # for the tests that change it
    return tmp_path / "run" / "lguest" / "link"


@pytest.fixture
def join() -> Iterator[Joiner]:
    """Makes Links, and closes after the test those that the test did not."""
    joined: list[Link] = []

    def new(mac: bytes, name: str = "lab") -> Link:
        joined.append(Link(name, mac))
        return joined[-1]

    yield new
    for each in joined:
        if each._place.socket.fileno() >= 0:
            each.close()


def a_frame(destination: bytes, payload: bytes = b"hello") -> bytes:
    return HEADER + destination + A + b"\x88\xb5" + payload


def send(wire: Link, *pieces: bytes) -> None:
    wire.write([memoryview(piece) for piece in pieces])


def received(wire: Link) -> list[bytes]:
    """All frames that are there for it."""
    buffer = bytearray(2 * LONGEST_FRAME)
    frames = []
    with suppress(BlockingIOError):
        while True:
            length = wire.read([memoryview(buffer)[:100], memoryview(buffer)[100:]])
            frames.append(bytes(buffer[:length]))
    return frames


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def fill(sender: Link, destination: bytes) -> int:
    """Sends until the receiver's queue is full and it has been waited for in vain; how many frames it has."""
    for count in itertools.count():
        send(sender, a_frame(destination, count.to_bytes(4, "big")))
        if is_stuck(sender, destination):
            break
    return count


def is_stuck(sender: Link, destination: bytes) -> bool:
    return sender._peers._known[destination].is_stuck


def be_patient(sender: Link, destination: bytes, seconds: float) -> None:
    """Has the sender wait for ``destination`` for so long, whatever was before."""
    peer = sender._peers._known[destination]
    peer.patience, peer.is_stuck, peer._since = seconds, False, time.monotonic()


class Process:
    """A child that does ``body`` with its end of a socket pair; what it returns is sent, and then it ends."""

    def __init__(self, body: Callable[[socket.socket], bytes]) -> None:
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self.channel.close()
                said = body(theirs)
            except BaseException as error:  # for whoever started it
                said = repr(error).encode()
            with suppress(OSError):
                theirs.send(said)
            os._exit(0)
        theirs.close()

    def hear(self) -> bytes:
        return self.channel.recv(100000)

    def tell(self, text: bytes = b"go") -> None:
        self.channel.send(text)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.reap()

    def reap(self) -> None:
        """Waits for its end; nothing if that was done."""
        self.channel.close()
        if self.pid:
            os.waitpid(self.pid, 0)
            self.pid = 0


Starter = Callable[[Callable[[socket.socket], bytes]], Process]


@pytest.fixture
def start() -> Iterator[Starter]:
    """Starts processes that end with the test."""
    started: list[Process] = []

    def new(body: Callable[[socket.socket], bytes]) -> Process:
        started.append(Process(body))
        return started[-1]

    yield new
    for each in started:
        if each.pid:
            each.kill()


def a_guest(mac: bytes) -> Callable[[socket.socket], bytes]:
    """A process that is on the link until it is told otherwise."""

    def body(channel: socket.socket) -> bytes:
        with closing(Link("lab", mac)):
            channel.send(b"joined")
            channel.recv(10)
        return b"left"

    return body


class TestWhoGets:
    """Which frame goes to whom."""

    def test_one_that_is_named(self, join: Joiner) -> None:
        a, b, c = join(A), join(B), join(C)
        for _ in range(3):
            send(a, a_frame(B))
            assert [received(each) for each in (a, b, c)] == [[], [a_frame(B)], []]

    @pytest.mark.parametrize("destination", [BROADCAST, MULTICAST, UNKNOWN])
    def test_all_others(self, join: Joiner, destination: bytes) -> None:
        a, b, c = join(A), join(B), join(C)
        send(a, a_frame(destination))
        assert [received(each) for each in (a, b, c)] == [[], [a_frame(destination)], [a_frame(destination)]]

    def test_oneself_never(self, join: Joiner) -> None:
        a, b = join(A), join(B)
        send(a, a_frame(A))
        assert [received(a), received(b)] == [[], []]

    def test_nobody_is_there(self, join: Joiner) -> None:
        a = join(A)
        for destination in (BROADCAST, B):
            send(a, a_frame(destination))
        assert received(a) == []

    def test_another_link(self, join: Joiner) -> None:
        lab, office = ((join(A, name), join(B, name)) for name in ("lab", "office"))
        for a, b, other in ((*lab, office[1]), (*office, lab[1])):
            for destination in (BROADCAST, B):
                send(a, a_frame(destination))
            assert len(received(b)) == 2
            assert received(other) == []
        lab[1].close()
        rebooted = join(B, "lab")
        send(lab[0], a_frame(B))
        assert received(rebooted) == [a_frame(B)]

    @pytest.mark.parametrize(
        "name",
        [
            "ff:ff:ff:ff:ff:ff",
            "33:33:00:00:00:01",
            "52:54:00:00:00:0B",
            "52-54-00-00-00-0b",
            "52:54:00:00:00:0b:00",
            "52:54:00:00:00:0b\n",
            "५२:54:00:00:00:0b",
            "note",
        ],
    )
    def test_what_is_no_guests_name(self, join: Joiner, links: Path, name: str) -> None:
        """A group's address as a name would get what is for all, and only that one would."""
        a, b = join(A), join(B)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
            os.chdir(links / "lab")
            stranger.bind(name)
            send(a, a_frame(BROADCAST))
            send(a, a_frame(MULTICAST))
            assert len(received(b)) == 2
            with pytest.raises(BlockingIOError):
                stranger.recv(1, socket.MSG_DONTWAIT)
        (links / "lab" / name).unlink()


class TestFrames:
    """What is carried, and what is none."""

    def test_however_it_lies_in_memory(self, join: Joiner) -> None:
        """2.7.4.1: framing is the driver's own."""
        a, b = join(A), join(B)
        whole = a_frame(B, bytes(range(200)))
        for cuts in ([], [12], [10], [0, 12, 12, 15], [1, 2, 3, 13, 14, 17], range(len(whole))):
            edges = [0, *cuts, len(whole)]
            send(a, *(whole[begin:end] for begin, end in itertools.pairwise(edges)))
            assert received(b) == [whole]

    def test_the_longest(self, join: Joiner) -> None:
        a, b = join(A), join(B)
        longest = a_frame(B, bytes(LONGEST_FRAME - len(a_frame(B, b""))))
        assert len(longest) == LONGEST_FRAME
        send(a, longest)
        assert received(b) == [longest]

    def test_room_for_the_next_while_one_is_read(self, join: Joiner) -> None:
        """As much as the host gives; it doubles what is asked for (socket(7))."""
        a, b = join(A), join(B)
        send(a, a_frame(B))
        received(b)
        most = int(Path("/proc/sys/net/core/wmem_max").read_text())
        with socket.socket(fileno=os.dup(a._peers._known[B].fd)) as line:
            room = line.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        assert room == 2 * min(4 * LONGEST_FRAME, most)

    def test_one_without_an_ethernet_header(self, join: Joiner) -> None:
        with pytest.raises(OSError, match="shorter than an Ethernet header"):
            send(join(A), HEADER, B[:5])

    def test_more_pieces_than_a_system_call_takes(self, join: Joiner) -> None:
        """The frame's fault: the receiver is still known."""
        a, b = join(A), join(B)
        send(a, a_frame(B))
        with pytest.raises(OSError, match="Invalid argument"):
            send(a, a_frame(B), *[b"x"] * 1024)
        send(a, a_frame(B))
        assert received(b) == [a_frame(B)] * 2

    def test_what_the_host_cannot_send(self, join: Joiner) -> None:
        a, b = join(A), join(B)
        with pytest.raises(OSError, match="Message too long"):
            send(a, a_frame(BROADCAST, bytes(8 << 20)))
        send(a, a_frame(B))
        assert received(b) == [a_frame(B)]

    @pytest.mark.parametrize("size", [0, 1, 12, 25, LONGEST_FRAME + 1])
    def test_a_datagram_that_is_no_frame(self, join: Joiner, links: Path, size: int) -> None:
        """It is as if there was nothing, once, and what comes after it is read."""
        b = join(B)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
            os.chdir(links / "lab")
            for datagram in (bytes(size), a_frame(B)):
                stranger.sendto(datagram, "52:54:00:00:00:01")
        assert received(b) == []
        b.wait(lambda _: None)
        assert received(b) == [a_frame(B)]

    def test_files_that_are_sent_along_are_not_taken(self, join: Joiner, links: Path) -> None:
        b = join(B)
        reader, writer = os.pipe()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
            os.chdir(links / "lab")
            stranger.connect("52:54:00:00:00:01")
            socket.send_fds(stranger, [a_frame(B)], [writer])
        os.close(writer)
        assert received(b) == [a_frame(B)]
        assert os.read(reader, 1) == b""
        os.close(reader)

    def test_a_worker_that_begins_loses_nothing(self, join: Joiner, start: Starter) -> None:
        """Neither what came for the other queue's worker, nor for the one before it."""
        a, b = join(A), join(B)
        sent = [a_frame(B, bytes([number])) for number in range(5)]

        def worker(_channel: socket.socket) -> bytes:
            b.attach(0, 12)
            buffer = bytearray(LONGEST_FRAME)
            return bytes(buffer[: b.read([memoryview(buffer)])])

        for each in sent:
            send(a, each)
        assert [start(worker).hear() for _ in sent] == sent

    def test_it_is_always_up(self, join: Joiner) -> None:
        a = join(A)
        assert (a.is_up(), a.has_header, a.is_suspect, a.description) == (True, True, True, "link lab")

    def test_a_legacy_drivers_header_is_shorter_than_that_on_the_link(self, join: Joiner) -> None:
        modern, legacy = join(A), join(B)
        legacy.attach(0, 10)
        send(modern, a_frame(B))
        assert received(legacy) == [HEADER[:10] + a_frame(B)[12:]]
        for cut in (1, 9, 10, 11, 20):
            answer = HEADER[:10] + a_frame(A)[12:]
            send(legacy, answer[:cut], answer[cut:])
            assert received(modern) == [HEADER[:10] + bytes(2) + a_frame(A)[12:]]

    @pytest.mark.parametrize("first", [0, 1, 9, 10, 11, 30])
    def test_a_legacy_drivers_buffer_may_be_cut_anywhere(self, join: Joiner, first: int) -> None:
        modern, legacy = join(A), join(B)
        legacy.attach(0, 10)
        send(modern, a_frame(B))
        buffer = memoryview(bytearray(100))
        length = legacy.read([buffer[:first], buffer[first:]])
        assert bytes(buffer[:length]) == HEADER[:10] + a_frame(B)[12:]


class TestComingAndGoing:
    """In any order."""

    def test_who_comes_is_seen_at_once(self, join: Joiner) -> None:
        a = join(A)
        for number in range(1, 30):
            newcomer = join(bytes([0x52, 0, 0, 0, 0, number]))
            send(a, a_frame(BROADCAST))
            assert received(newcomer) == [a_frame(BROADCAST)]

    def test_looks_are_not_made_all_the_time(self, join: Joiner, monkeypatch: pytest.MonkeyPatch) -> None:
        """Not for a known address, for others every INTERVAL, and at once when somebody has gone."""
        now = 1000.0
        monkeypatch.setattr("time.monotonic", lambda: now)
        monkeypatch.setattr(peers, "INTERVAL", 0.05)
        a, b = join(A), join(B)
        send(a, a_frame(BROADCAST))
        c = join(C)
        send(a, a_frame(BROADCAST))
        now += 1
        send(a, a_frame(B))
        assert [len(received(b)), len(received(c))] == [3, 0]
        send(a, a_frame(BROADCAST))
        assert [len(received(b)), len(received(c))] == [1, 1]
        b.close()
        b = join(B)
        send(a, a_frame(B))
        assert received(b) == [a_frame(B)]

    def test_the_working_directory_stays_what_it_was(self, join: Joiner, tmp_path: Path) -> None:
        """A supervisor's command line may hold relative paths, and it executes that again."""
        a, b = join(A), join(B)
        send(a, a_frame(BROADCAST))
        assert received(b) == [a_frame(BROADCAST)]
        assert Path.cwd() == tmp_path

    @staticmethod
    def _be_short_of_files(patch: pytest.MonkeyPatch) -> None:
        """The host has no file for another socket."""

        def refuse(*_: object) -> NoReturn:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        patch.setattr("socket.socket", refuse)

    def test_more_come_than_there_are_files_for(self, join: Joiner, monkeypatch: pytest.MonkeyPatch) -> None:
        """Who is known gets everything; the others do as soon as there are files again. The user is told."""
        a, b = join(A), join(B)
        for _ in range(2):
            send(a, a_frame(BROADCAST))
        c = join(C)
        received(b)
        with monkeypatch.context() as patch:
            self._be_short_of_files(patch)
            for destination in (BROADCAST, UNKNOWN, C):
                with pytest.raises(OSError, match="Too many open files"):
                    send(a, a_frame(destination))
                assert received(b) == [a_frame(destination)]
            send(a, a_frame(B))
            assert received(b) == [a_frame(B)]
        send(a, a_frame(BROADCAST))
        assert [received(b), received(c)] == [[a_frame(BROADCAST)]] * 2

    def test_no_file_to_look_with(self, join: Joiner, monkeypatch: pytest.MonkeyPatch) -> None:
        """Listing a directory takes one, too."""
        a, b = join(A), join(B)
        send(a, a_frame(BROADCAST))
        received(b)
        with monkeypatch.context() as patch:
            patch.setattr("os.listdir", lambda _: os.open("/no such file", 0))
            with pytest.raises(OSError, match="No such file"):
                send(a, a_frame(BROADCAST))
        assert received(b) == [a_frame(BROADCAST)]

    def test_a_reboot_while_there_are_no_files(self, join: Joiner, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is found again afterwards."""
        a, b, c = join(A), join(B), join(C)
        for _ in range(2):
            send(a, a_frame(BROADCAST))
        received(c)
        b.close()
        b = join(B)
        with monkeypatch.context() as patch:
            self._be_short_of_files(patch)
            send(a, a_frame(B))
        send(a, a_frame(B))
        assert [received(b), received(c)] == [[a_frame(B)], []]

    def test_who_leaves(self, join: Joiner, links: Path) -> None:
        """Nobody is told, and nothing fails."""
        a, b, c = join(A), join(B), join(C)
        send(a, a_frame(B))
        b.close()
        assert names(links / "lab") == {"52:54:00:00:00:00", "52:54:00:00:00:02"}
        send(a, a_frame(BROADCAST))
        assert received(c) == [a_frame(BROADCAST)]
        assert set(a._peers._known) == {C}
        send(a, a_frame(B))
        assert received(c) == [a_frame(B)]

    def test_the_last_takes_the_directory_away(self, join: Joiner, links: Path) -> None:
        for _ in range(3):
            both = join(A), join(B)
            both[0].close()
            assert names(links) == {"lab"}
            both[1].close()
            assert names(links) == set()

    def test_everything_is_closed(self, join: Joiner) -> None:
        before = len(os.listdir("/proc/self/fd"))
        both = join(A), join(B)
        send(both[0], a_frame(BROADCAST))
        for each in both:
            each.close()
        assert len(os.listdir("/proc/self/fd")) == before

    @pytest.mark.parametrize("destination", [B, BROADCAST])
    def test_a_reboot(self, join: Joiner, destination: bytes) -> None:
        """The same name, another socket; the sender may have looked in between, and found the name as before."""
        a, b = join(A), join(B)
        for _ in range(5):
            send(a, a_frame(destination))
            assert received(b) == [a_frame(destination)]
            b.close()
            b = join(B)
            send(a, a_frame(UNKNOWN))
            assert received(b) == [a_frame(UNKNOWN)]

    def test_another_with_the_same_mac(self, join: Joiner, links: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(link, "TAKEOVER", 0)
        a, b = join(A), join(B)
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(LguestError) as failed:
            join(B)
        assert str(failed.value) == (
            "--net=link:lab: another guest on this link has the MAC address 52:54:00:00:00:01; "
            "give one of them another with mac="
        )
        assert len(os.listdir("/proc/self/fd")) == before
        send(a, a_frame(B))
        assert received(b) == [a_frame(B)]

    def test_one_of_many_with_the_same_mac(self, start: Starter, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(link, "TAKEOVER", 0)
        said = [each.hear() for each in [start(a_guest(B)) for _ in range(5)]]
        assert said.count(b"joined") == 1
        assert sum(b"another guest on this link has the MAC address" in each for each in said) == 4

    def test_the_last_life_is_still_ending(self, join: Joiner, monkeypatch: pytest.MonkeyPatch) -> None:
        """Workers of a launcher that was killed live a moment longer."""
        a, b = join(A), join(B)
        monkeypatch.setattr("time.sleep", lambda _: b.close())
        successor = join(B)
        send(a, a_frame(B))
        assert received(successor) == [a_frame(B)]

    def test_it_leaves_its_own_name_only(self, join: Joiner, links: Path) -> None:
        """However somebody else's came there."""
        b = join(B)
        (links / "lab" / "52:54:00:00:00:01").unlink()
        successor = join(B)
        b.close()
        a = join(A)
        send(a, a_frame(B))
        assert received(successor) == [a_frame(B)]


class TestDeath:
    """Guests that are killed leave their names."""

    def test_its_name_is_of_no_use_to_anybody(self, join: Joiner, start: Starter, links: Path) -> None:
        a, c = join(A), join(C)
        b = start(a_guest(B))
        assert b.hear() == b"joined"
        send(a, a_frame(B))
        b.kill()
        assert len(names(links / "lab")) == 3
        for _ in range(3):
            send(a, a_frame(B))
            send(a, a_frame(BROADCAST))
        assert received(c).count(a_frame(BROADCAST)) == 3

    def test_its_mac_is_used_again_at_once(self, join: Joiner, start: Starter) -> None:
        a = join(A)
        for _ in range(5):
            b = start(a_guest(B))
            assert b.hear() == b"joined"
            send(a, a_frame(B))
            b.kill()
        successor = join(B)
        send(a, a_frame(B))
        assert received(successor) == [a_frame(B)]

    @pytest.mark.parametrize("leaves", [False, True])
    def test_its_name_goes_with_the_next_who_comes_or_leaves(
        self, join: Joiner, start: Starter, links: Path, leaves: bool
    ) -> None:
        a = join(A)
        b = start(a_guest(B))
        assert b.hear() == b"joined"
        b.kill()
        if leaves:
            a.close()
            assert names(links) == set()
        else:
            join(C)
            assert names(links / "lab") == {"52:54:00:00:00:00", "52:54:00:00:00:02"}

    def test_in_the_midst_of_joining(self, join: Joiner, links: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Before its socket has its name. Nobody has seen it."""
        a = join(A)
        with monkeypatch.context() as patch:
            patch.setattr("os.rename", lambda *_, **__: os.open("/no such file", 0))
            with pytest.raises(LguestError, match="--net=link:lab: cannot join: No such file or directory"):
                join(B)
        assert names(links / "lab") == {"52:54:00:00:00:00", ".52:54:00:00:00:01"}
        send(a, a_frame(BROADCAST))
        b = join(B)
        assert names(links / "lab") == {"52:54:00:00:00:00", "52:54:00:00:00:01"}
        send(a, a_frame(BROADCAST))
        assert received(b) == [a_frame(BROADCAST)]


class NoPoll:
    """A poll(2) that nobody may wait in."""

    def register(self, fd: int, events: int) -> None:
        pass

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        raise AssertionError(f"waiting for {timeout} ms")


class TestFullQueues:
    """Guests that do not read, or not so fast."""

    @pytest.mark.parametrize("destination", [B, BROADCAST])
    def test_one_who_does_not_read_is_waited_for_once(
        self, join: Joiner, monkeypatch: pytest.MonkeyPatch, destination: bytes
    ) -> None:
        """And the others get everything all the time."""
        a, b, c = join(A), join(B), join(C)
        count = fill(a, B)
        assert count >= 1
        with monkeypatch.context() as patch:
            patch.setattr("select.poll", NoPoll)
            for _ in range(100):
                send(a, a_frame(destination))
                send(a, a_frame(C))
                assert received(c)[-1] == a_frame(C)
        assert [frame[-4:] for frame in received(b)] == [number.to_bytes(4, "big") for number in range(count)]

    def test_it_reads_again(self, join: Joiner) -> None:
        """Then it is waited for again, once there is patience."""
        a, b = join(A), join(B)
        for _ in range(3):
            fill(a, B)
            received(b)
            send(a, a_frame(B, b"again"))
            assert received(b) == [a_frame(B, b"again")]
            assert not is_stuck(a, B)

    def test_one_who_reads_a_frame_now_and_then(self, join: Joiner, monkeypatch: pytest.MonkeyPatch) -> None:
        """However it times that, what is for others waits for no more than a share of the time."""
        a, b = join(A), join(B)
        fill(a, B)
        begin = now = 1000.0
        slept = 0.0
        buffer = bytearray(1000)
        real = select.poll

        class Poll:
            """It reads a frame 4.5 ms after somebody began to wait, if they still do."""

            def __init__(self) -> None:
                self._poll = real()
                self.register, self.unregister = self._poll.register, self._poll.unregister

            def poll(self, timeout: float) -> list[tuple[int, int]]:
                nonlocal now, slept
                passed = min(0.0045, timeout / 1000)
                now += passed
                slept += passed
                if passed == 0.0045:
                    b.read([memoryview(buffer)])
                return self._poll.poll(0)

        monkeypatch.setattr("select.poll", Poll)
        monkeypatch.setattr("time.monotonic", lambda: now)
        be_patient(a, B, peers.PATIENCE)
        for _ in range(3000):
            send(a, a_frame(B))
            now += 0.001
            if is_stuck(a, B):
                b.read([memoryview(buffer)])
        assert slept <= peers.PATIENCE + (now - begin) * peers.EARNED + 0.0045

    def test_a_slow_reader_gets_everything(self, join: Joiner, start: Starter, monkeypatch: pytest.MonkeyPatch) -> None:
        """In order, from two senders at a time, of all sizes."""
        monkeypatch.setattr(peers, "PATIENCE", HANGS)
        count = 300
        receiver = join(C)

        def sender(mac: bytes) -> Callable[[socket.socket], bytes]:
            def body(_channel: socket.socket) -> bytes:
                with closing(Link("lab", mac)) as wire:
                    for number in range(count):
                        send(wire, a_frame(C, mac + number.to_bytes(4, "big") + bytes(number * 200)))
                return b"done"

            return body

        senders = [start(sender(mac)) for mac in (A, B)]
        got: dict[bytes, list[int]] = {A: [], B: []}
        while sum(map(len, got.values())) < 2 * count:
            receiver.wait(lambda _: None)
            for frame in received(receiver):
                got[frame[26:32]].append(int.from_bytes(frame[32:36], "big"))
        assert got == {A: list(range(count)), B: list(range(count))}
        assert [each.hear() for each in senders] == [b"done"] * 2

    def test_all_who_are_waited_for_get_it(self, join: Joiner, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each as soon as it reads, in whatever order."""
        a, b, c = join(A), join(B), join(C)
        fill(a, B)
        fill(a, C)
        readers = iter([c, b])
        for mac in (B, C):
            be_patient(a, mac, HANGS)
        monkeypatch.setattr(peers, "PATIENCE", HANGS)
        real = select.poll

        class Poll:
            """Before each sleep somebody reads."""

            def __init__(self) -> None:
                self._poll = real()
                self.register, self.unregister = self._poll.register, self._poll.unregister

            def poll(self, timeout: float) -> list[tuple[int, int]]:
                received(next(readers))
                return self._poll.poll(timeout)

        monkeypatch.setattr("select.poll", Poll)
        send(a, a_frame(BROADCAST))
        assert [received(b), received(c)] == [[a_frame(BROADCAST)]] * 2

    def test_waiting_uses_up_patience(self, join: Joiner, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also when it reads in the end."""
        a, b = join(A), join(B)
        fill(a, B)
        now = 1000.0
        real = select.poll

        class Poll:
            """It reads one frame just in time."""

            def __init__(self) -> None:
                self._poll = real()
                self.register, self.unregister = self._poll.register, self._poll.unregister

            def poll(self, timeout: float) -> list[tuple[int, int]]:
                nonlocal now
                now += 0.9 * timeout / 1000
                received(b)
                return self._poll.poll(timeout)

        monkeypatch.setattr("select.poll", Poll)
        monkeypatch.setattr("time.monotonic", lambda: now)
        be_patient(a, B, peers.PATIENCE)
        send(a, a_frame(B, b"in time"))
        assert received(b) == [a_frame(B, b"in time")]
        assert a._peers._known[B].patience == pytest.approx(0.1 * peers.PATIENCE)

    def test_it_dies_while_it_is_waited_for(self, join: Joiner, monkeypatch: pytest.MonkeyPatch) -> None:
        a, b = join(A), join(B)
        fill(a, B)
        monkeypatch.setattr(peers, "PATIENCE", HANGS)
        be_patient(a, B, HANGS)
        real = select.poll

        def poll() -> object:
            b.close()
            return real()

        monkeypatch.setattr("select.poll", poll)
        send(a, a_frame(B))
        assert a._peers._known == {}


class TestThePlace:
    """The directory, and what the host may have against it."""

    def test_it_is_the_users_alone(self, join: Joiner, links: Path) -> None:
        before = os.umask(0o777)
        try:
            a, b = join(A), join(B)
        finally:
            os.umask(before)
        assert {stat.S_IMODE(path.stat().st_mode) for path in (links, links / "lab")} == {0o700}
        assert stat.S_IMODE((links / "lab" / "52:54:00:00:00:00").stat().st_mode) == 0o600
        send(a, a_frame(BROADCAST))
        assert received(b) == [a_frame(BROADCAST)]

    def test_a_path_that_is_long(self, join: Joiner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A socket's address has 108 bytes."""
        deep = tmp_path / ("long" * 50) / ("path" * 50)
        deep.mkdir(parents=True, mode=0o700)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
        a, b = join(A, "x" * 255), join(B, "x" * 255)
        for destination in (BROADCAST, B):
            send(a, a_frame(destination))
        assert len(received(b)) == 2

    @pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "../lab", "a/b", "/tmp", "a\0b"])
    def test_a_name_that_leads_elsewhere(self, name: str) -> None:
        with pytest.raises(LguestError, match=r"a link's name has no '/' and does not begin with '\.'"):
            Link(name, A)

    def test_a_name_that_is_too_long(self) -> None:
        with pytest.raises(LguestError, match=r"--net=link:xxx.*: cannot join: File name too long"):
            Link("x" * 256, A)

    def test_something_is_in_the_way(self, links: Path) -> None:
        links.mkdir(parents=True, mode=0o700)
        links.parent.chmod(0o700)
        (links / "lab").symlink_to("/tmp")
        with pytest.raises(LguestError, match="link/lab is in the way: it is no directory; remove it"):
            Link("lab", A)

    def test_what_is_not_ours_stays(self, join: Joiner, links: Path) -> None:
        a = join(A)
        (links / "lab" / "note").touch()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as another_kind:
            os.chdir(links / "lab")
            another_kind.bind("52:54:00:00:00:09")
            another_kind.listen()
            send(a, a_frame(BROADCAST))
            a.close()
        assert names(links / "lab") == {"note", "52:54:00:00:00:09"}

    def test_somebody_has_removed_it(self, join: Joiner, links: Path) -> None:
        """A user's runtime directory goes with the last login. Those who know each other still do; who joins later
        meets those who join later.
        """
        a, b = join(A), join(B)
        send(a, a_frame(BROADCAST))
        shutil.rmtree(links.parent)
        send(a, a_frame(BROADCAST))
        assert len(received(b)) == 2
        late, later = join(A), join(B)
        a.close()
        b.close()
        send(late, a_frame(BROADCAST))
        assert received(later) == [a_frame(BROADCAST)]

    def test_it_is_removed_while_somebody_joins(
        self, join: Joiner, links: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """They join in the next one."""
        a = join(A)
        others = [a]
        flock = fcntl.flock

        def after_the_last_has_left(directory: int, operation: int) -> None:
            if others:
                others.pop().close()
            flock(directory, operation)

        monkeypatch.setattr("fcntl.flock", after_the_last_has_left)
        before = len(os.listdir("/proc/self/fd"))
        b = join(B)
        assert len(os.listdir("/proc/self/fd")) == before
        c = join(C)
        send(b, a_frame(BROADCAST))
        assert received(c) == [a_frame(BROADCAST)]

    def test_somebody_keeps_it_locked(self, join: Joiner, links: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """One may not join then, but one can always leave."""
        monkeypatch.setattr(link, "LOCKED", 0)
        a = join(A)
        stopped = os.open(links / "lab", os.O_RDONLY)
        fcntl.flock(stopped, fcntl.LOCK_EX)
        with pytest.raises(LguestError, match="--net=link:lab: cannot join: somebody is joining or leaving all the"):
            join(B)
        a.close()
        os.close(stopped)
        assert names(links / "lab") == {"52:54:00:00:00:00"}
        join(B).close()
        assert names(links) == set()


class TestManyProcesses:
    """As guests are: each a process, with workers that are others."""

    def test_twenty_start_at_once_and_leave_at_once(self, start: Starter, links: Path) -> None:
        """No name is lost or there twice, and each hears all others."""
        count = 20

        def guest(number: int) -> Callable[[socket.socket], bytes]:
            def body(channel: socket.socket) -> bytes:
                channel.recv(10)
                with closing(Link("lab", bytes([0x52, 0, 0, 0, 0, number]))) as wire:
                    channel.send(b"joined")
                    for sender in range(count):
                        if sender == number:
                            channel.recv(10)
                            send(wire, a_frame(BROADCAST, bytes([number])))
                        else:
                            wire.wait(lambda _: None)
                            assert received(wire) == [a_frame(BROADCAST, bytes([sender]))]
                            channel.send(b"heard")
                    channel.recv(10)
                return b"left"

            return body

        guests = [start(guest(number)) for number in range(count)]

        def all_do(expected: bytes) -> None:
            for each in guests:
                each.tell()
            assert [each.hear() for each in guests] == [expected] * count

        all_do(b"joined")
        assert names(links / "lab") == {f"52:00:00:00:00:{number:02x}" for number in range(count)}
        for sender in guests:
            sender.tell()
            assert [each.hear() for each in guests if each is not sender] == [b"heard"] * (count - 1)
        all_do(b"left")
        assert names(links) == set()

    def test_they_come_and_go_all_the_time(self, start: Starter, links: Path) -> None:
        """Some meet on the way; the directory is made and removed many times."""

        def guest(number: int) -> Callable[[socket.socket], bytes]:
            def body(_channel: socket.socket) -> bytes:
                for _ in range(50):
                    with closing(Link("lab", bytes([0x52, 0, 0, 0, 0, number]))) as wire:
                        send(wire, a_frame(BROADCAST))
                        received(wire)
                return b"done"

            return body

        guests = [start(guest(number)) for number in range(4)]
        assert [each.hear() for each in guests] == [b"done"] * 4
        assert names(links) == set()

    def test_two_talk_while_the_third_reboots(self, start: Starter, join: Joiner) -> None:
        """What two say to each other all arrives, whatever becomes of the third and of what is for all."""
        count = 2000

        def echo(channel: socket.socket) -> bytes:
            with closing(Link("lab", B)) as wire:
                channel.send(b"joined")
                left = count
                while left:
                    wire.wait(lambda _: None)
                    for frame in received(wire):
                        if frame[12:18] == B:
                            send(wire, a_frame(A, frame[26:]))
                            left -= 1
            return b"done"

        def reboots(channel: socket.socket) -> bytes:
            lives = 0
            while not select.select([channel], [], [], 0)[0]:
                with closing(Link("lab", C)) as wire:
                    send(wire, a_frame(BROADCAST))
                    received(wire)
                lives += 1
            channel.recv(10)  # what is left unread resets the connection
            return str(lives).encode()

        other = start(echo)
        assert other.hear() == b"joined"
        a = join(A)
        third = start(reboots)
        for number in range(count):
            payload = number.to_bytes(4, "big")
            send(a, a_frame(BROADCAST))
            send(a, a_frame(C))
            send(a, a_frame(B, payload))
            got: list[bytes] = []
            while not got:
                a.wait(lambda _: None)
                got = [frame[26:] for frame in received(a) if frame[12:18] == A]
            assert got == [payload]
        third.tell()
        assert int(third.hear()) > 1
        assert other.hear() == b"done"


class TestConfinement:
    """Workers in another root directory, as another user."""

    @pytest.fixture
    def nobody(self) -> Iterator[tuple[jail.User, Path]]:
        """Another user, and an empty root directory."""
        user = jail.prepare("nobody", None).user
        assert user is not None
        root = Path(tempfile.mkdtemp())  # where they may go, unlike to pytest's
        root.chmod(0o755)
        yield user, root
        root.rmdir()

    @root_only
    @pytest.mark.parametrize("is_elsewhere", [False, True])
    def test_guests_of_another_user(
        self,
        nobody: tuple[jail.User, Path],
        start: Starter,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        is_elsewhere: bool,
    ) -> None:
        """Joined by root, served by workers who are no longer root, left by a launcher that is no longer root."""
        user, root = nobody
        place = Path(tempfile.mkdtemp())
        place.chmod(0o1777)
        monkeypatch.setattr("lguest_mp.runtime._RUN", place / "none")
        monkeypatch.setattr("lguest_mp.runtime._TMP", place)

        def serve(wire: Link, keep: int, null: int, role: Callable[[], bytes]) -> int:
            channel = socket.socket(fileno=keep)
            children.keep_only([*wire.files, *wire.files_of_writer, keep], null)
            wire.attach(0, 12)
            channel.send(b"ready")
            channel.recv(10)
            channel.send(role())
            channel.recv(10)
            return 0

        def guest(mac: bytes) -> Callable[[socket.socket], bytes]:
            def body(channel: socket.socket) -> bytes:
                null = os.open(os.devnull, os.O_RDWR)
                confinement = jail.prepare("nobody", root if is_elsewhere else None)
                with closing(Link("lab", mac, user)) as wire, Loop() as loop:
                    assert os.geteuid() == 0
                    confinement.enter()
                    wire.attend(loop)

                    def transmit() -> bytes:
                        send(wire, a_frame(BROADCAST, mac))
                        return b"sent"

                    def receive() -> bytes:
                        wire.wait(lambda _: None)
                        return received(wire)[0][26:]

                    workers = []
                    for role in (transmit, receive):
                        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                        workers.append(ours)
                        with theirs:
                            children.fork("worker", partial(serve, wire, theirs.fileno(), null, role))
                        assert ours.recv(10) == b"ready"
                    channel.send(b"joined")
                    channel.recv(10)
                    for worker in workers:
                        worker.send(b"go")
                    for worker in workers:
                        while not is_readable(worker.fileno()):
                            loop.wait(0.01)
                    channel.send(b" ".join(worker.recv(100) for worker in workers))
                    channel.recv(10)
                    for worker in workers:
                        worker.send(b"end")
                        os.wait()
                return b"left"

            return body

        guests = [start(guest(mac)) for mac in (A, B)]
        assert [each.hear() for each in guests] == [b"joined"] * 2
        directory = place / f"lguest-{user.uid}" / "link"
        assert {(path.lstat().st_uid, path.lstat().st_gid) for path in (directory / "lab").iterdir()} == {
            (user.uid, user.gid)
        }
        for each in guests:
            each.tell()
        assert [each.hear() for each in guests] == [b"sent " + B, b"sent " + A]
        for each in guests:
            each.tell()
        assert [each.hear() for each in guests] == [b"left"] * 2
        assert names(directory) == set()
        shutil.rmtree(place)


class AnyOrder(RuleBasedStateMachine):
    """Guests that join, leave, are killed and send in any order, against who is to get which frame."""

    MACS = (A, B, C, UNKNOWN)

    def __init__(self) -> None:
        super().__init__()
        self._home = os.getcwd()
        self._run = tempfile.mkdtemp()
        self._before = os.environ.get("XDG_RUNTIME_DIR")
        os.environ["XDG_RUNTIME_DIR"] = self._run
        self._interval, peers.INTERVAL = peers.INTERVAL, 0
        self._takeover, link.TAKEOVER = link.TAKEOVER, 0
        self._directory = Path(self._run) / "lguest" / "link" / "lab"
        self._alive: dict[bytes, Link] = {}
        self._number = 0

    def teardown(self) -> None:
        for each in self._alive.values():
            each.close()
        if self._alive:
            assert not self._directory.exists()
        if self._before is None:
            del os.environ["XDG_RUNTIME_DIR"]
        else:
            os.environ["XDG_RUNTIME_DIR"] = self._before
        peers.INTERVAL, link.TAKEOVER = self._interval, self._takeover
        os.chdir(self._home)
        shutil.rmtree(self._run)

    @rule(mac=st.sampled_from(MACS))
    def join(self, mac: bytes) -> None:
        if mac in self._alive:
            with pytest.raises(LguestError, match="another guest on this link"):
                Link("lab", mac)
        else:
            self._alive[mac] = Link("lab", mac)

    @precondition(lambda self: self._alive)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self._alive.pop(data.draw(st.sampled_from(sorted(self._alive)))).close()

    @precondition(lambda self: self._alive)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        """All its files are closed, and no more."""
        dead = self._alive.pop(data.draw(st.sampled_from(sorted(self._alive))))
        dead._peers.close()
        dead._place.socket.close()
        os.close(dead._place.directory)
        os.close(dead._place._links)

    @precondition(lambda self: self._alive)
    @rule(data=st.data(), destination=st.sampled_from([*MACS, BROADCAST]))
    def send(self, data: st.DataObject, destination: bytes) -> None:
        sender = data.draw(st.sampled_from(sorted(self._alive)))
        self._number += 1
        frame = a_frame(destination, self._number.to_bytes(4, "big"))
        send(self._alive[sender], frame)
        got = {mac: received(wire) for mac, wire in self._alive.items()}
        others = {mac: [frame] if mac != sender else [] for mac in self._alive}
        nobody: dict[bytes, list[bytes]] = {mac: [] for mac in self._alive}
        if destination == sender:
            assert got == nobody
        elif destination in self._alive:
            assert got == {**nobody, destination: [frame]}
        elif destination == BROADCAST:
            assert got == others
        else:  # a sender that knew it loses one frame
            assert got in (others, nobody)

    @invariant()
    def all_who_live_have_their_names(self) -> None:
        present = names(self._directory) if self._directory.exists() else set()
        assert {mac.hex(":") for mac in self._alive} <= present


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=50, stateful_step_count=30)
