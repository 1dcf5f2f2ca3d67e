"""How a worker comes to know the other guests on its link, without being able to find or to reach anybody itself."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import pytest

from lguest_mp import jail
from lguest_mp.jail.calls import COMMON
from lguest_mp.network import introductions
from lguest_mp.network.introductions import MOST, Directory, Introducer, Introductions, Newcomers
from lguest_mp.network.link import Link
from lguest_mp.supervisor import children
from lguest_mp.supervisor.loop import Loop

OWN = bytes.fromhex("525400000000")
BROADCAST = b"\xff" * 6


def address(number: int) -> bytes:
    return bytes([0x52, 0x54, 0, 0]) + number.to_bytes(2, "big")


class Wirehouse:
    """A link's directory with the sockets of others, and a supervisor that answers for it from a thread."""

    def __init__(self, place: Path, opened: ExitStack) -> None:
        self.place = place
        self._opened = opened
        self._fd = os.open(place, os.O_PATH)
        opened.callback(os.close, self._fd)
        self._loop = opened.enter_context(Loop())
        self.introducer = Introducer(Directory(self._fd, OWN), self._loop)
        opened.callback(self.introducer.close)
        self._ended = threading.Event()
        thread = threading.Thread(target=self._run)
        thread.start()
        opened.callback(thread.join)
        opened.callback(self._ended.set)

    def _run(self) -> None:
        while not self._ended.is_set():
            self._loop.wait(0.01)

    def join(self, mac: bytes) -> socket.socket:
        """Another guest."""
        joined = self._opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        joined.settimeout(5)
        joined.bind(str(self.place / mac.hex(":")))
        return joined

    def ask(self, *known: bytes) -> Newcomers:
        """What a worker hears that knows these."""
        found = self.introducer.introductions().newcomers(known)
        for line in found.lines.values():
            self._opened.callback(os.close, line)
        return found


@pytest.fixture
def house(tmp_path: Path) -> Iterator[Wirehouse]:
    with ExitStack() as opened:
        yield Wirehouse(tmp_path, opened)


def test_who_is_new_comes_with_a_socket_that_reaches_them(house: Wirehouse) -> None:
    others = {mac: house.join(mac) for mac in map(address, range(1, 4))}
    found = house.ask(address(2))
    assert (set(found.lines), found.more, found.error) == ({address(1), address(3)}, False, 0)
    for mac, line in found.lines.items():
        assert not os.get_blocking(line)
        assert not os.get_inheritable(line)
        os.write(line, mac)
        assert others[mac].recv(100) == mac


def test_one_is_not_introduced_to_oneself_nor_to_the_dead(house: Wirehouse) -> None:
    house.join(OWN)
    house.join(address(1)).close()
    (house.place / "readme").touch()
    assert house.ask() == Newcomers({}, more=False, error=0)


def test_more_than_come_at_a_time(house: Wirehouse) -> None:
    everybody = {address(number) for number in range(1, 2 * MOST + 8)}
    for mac in everybody:
        house.join(mac)
    known: set[bytes] = set()
    for expected in (True, True, False):
        found = house.ask(*known)
        assert found.more is expected
        known |= found.lines.keys()
    assert known == everybody


def test_what_a_predecessor_asked_for_is_not_taken_for_an_answer(house: Wirehouse) -> None:
    """It was killed between its question and the answers."""
    house.join(address(1))
    channel = house.introducer._workers
    channel.send(introductions._NUMBER.pack(7))
    time.sleep(0.1)
    before = len(os.listdir("/proc/self/fd"))
    assert house.ask(address(1)) == Newcomers({}, more=False, error=0)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_host_that_is_out_of_files_says_so(house: Wirehouse, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_name: str) -> NoReturn:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    house.join(address(1))
    monkeypatch.setattr(introductions, "_connect", refuse)
    assert house.ask() == Newcomers({}, more=False, error=errno.EMFILE)


def test_a_supervisor_that_does_not_answer_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(introductions, "PATIENCE", 0.05)
    ours, silent = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, silent:
        assert Introductions(ours).newcomers([]).error == errno.ETIMEDOUT
        silent.close()
        assert Introductions(ours).newcomers([]).error in {errno.ECONNRESET, errno.EPIPE}


@pytest.mark.parametrize("question", [b"", b"x", bytes(9), bytes(8 + 6 * 1024 + 6), bytes(100_000)])
def test_what_is_no_question_has_no_answer_and_does_no_harm(house: Wirehouse, question: bytes) -> None:
    house.join(address(1))
    house.introducer._workers.send(question)
    assert house.ask().lines.keys() == {address(1)}


def test_who_does_not_take_the_answers_holds_nobody_up(house: Wirehouse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(introductions, "PAUSE", 0)
    for number in range(1, MOST):
        house.join(address(number))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        house.introducer._workers.send(bytes(8))
    channel = house.introducer._workers
    channel.settimeout(0.5)
    with suppress(TimeoutError):
        while channel.recv(100):  # all answers that there was room for
            pass
    assert len(os.listdir("/proc/self/fd")) == before
    channel.setblocking(True)
    assert len(house.ask().lines) == MOST - 1


# ---- Workers ----


@contextmanager
def link(name: str, mac: bytes) -> Iterator[Link]:
    with closing(Link(name, mac)) as joined:
        yield joined


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[Link], int]], int]]:
    """Runs a body in the jail of a link's transmitq worker, with another guest on the link; its exit status."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with ExitStack() as opened:
        loop = opened.enter_context(Loop())
        ours = opened.enter_context(link("lab", OWN))
        other = opened.enter_context(link("lab", address(1)))
        ours.attend(loop)
        plan = jail.Jail().plan(ours.needs_of_writer())
        null = os.open(os.devnull, os.O_RDWR)
        opened.callback(os.close, null)

        def run(body: Callable[[Link], int]) -> int:
            def be_worker() -> int:
                children.keep_only(ours.files_of_writer, null)
                plan.enter()
                return body(ours)

            child = children.fork("net0/transmitq", be_worker)
            while not child.has_ended():
                loop.wait(0.01)
            status = child.reap()
            buffer = bytearray(1000)
            if status == 0:
                length = other.read([memoryview(buffer)])
                assert buffer[:length].endswith(b"in jail")
            return status

        yield run


def test_a_worker_in_its_jail_finds_the_others(worker: Callable[[Callable[[Link], int]], int]) -> None:
    def body(wire: Link) -> int:
        for destination in (BROADCAST, address(1)):
            wire.write([memoryview(bytes(12) + destination + OWN + b"\x88\xb5 in jail")])
        return 0

    assert worker(body) == 0


def test_a_worker_has_nothing_else_and_can_make_no_socket(worker: Callable[[Callable[[Link], int]], int]) -> None:
    def body(wire: Link) -> int:
        wire.write([memoryview(bytes(12) + BROADCAST + OWN + b"\x88\xb5 in jail")])
        return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).fileno()

    assert children.how_it_ended(worker(body)) == "was killed by SIGSYS"


def test_its_list_of_calls_names_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with link("lab", OWN) as wire:
        names = {call.name for call in (*COMMON, *wire.needs_of_writer().calls)}
    assert not names & {"socket", "connect", "bind", "sendmsg", "openat", "fchdir", "getdents64", "newfstatat"}
