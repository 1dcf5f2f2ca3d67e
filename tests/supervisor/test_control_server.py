"""How the supervisor answers lguestctl: whoever connects gets their answer, and nobody holds it up."""

from __future__ import annotations

import json
import os
import select
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lguest_mp import control, jail, runtime
from lguest_mp.control import (
    Answer,
    Attach,
    Attached,
    Describe,
    Done,
    Goodbye,
    GuestFacts,
    ListJail,
    LogLine,
    ProcessFacts,
    ProcessJail,
    ReadLog,
    Reboot,
    Refused,
    Request,
    Reset,
    Resize,
    Restart,
    Stop,
    Welcome,
)
from lguest_mp.errors import LguestError
from lguest_mp.line import Line
from lguest_mp.supervisor import control as server
from lguest_mp.supervisor import ending
from lguest_mp.supervisor.control import Attachment, Control
from lguest_mp.supervisor.loop import Loop, is_readable

GUEST = GuestFacts("one", 7, "running", 1.5, 0, "pc", "unicorn", 1 << 20, "vmlinuz")
PROCESSES = [ProcessFacts("supervisor", None, None, 7, "running"), ProcessFacts("cpu", None, None, 8, "running")]
ROW = ProcessJail("cpu", 7, {"on": True, "limits": {"files": 10}, "calls": None})


@dataclass(frozen=True)
class Said:
    """A line of the log."""

    text: str
    source: str = ""
    time: float = 1.0
    level: int = 5


@dataclass(frozen=True)
class Ends:
    """The console."""

    screen: int
    news: select.epoll
    keys: int


@dataclass
class FakeSubject:
    """A guest that does nothing but write down what it is told to do."""

    done: list[str] = field(default_factory=list)
    log: list[Said] = field(default_factory=list)
    listeners: list[Callable[[Said], None]] = field(default_factory=list)
    ends: Attachment | None = None

    def guest(self) -> GuestFacts:
        return GUEST

    def processes(self) -> list[ProcessFacts]:
        return PROCESSES

    def jail(self) -> list[ProcessJail]:
        return [ROW]

    def stop(self) -> None:
        self.done.append("stop")

    def reboot(self) -> None:
        self.done.append("reboot")

    def restart(self, device: str) -> None:
        if device != "block0":
            raise LguestError(f"it has no device {device}")
        self.done.append(f"restart {device}")

    def reset(self, device: str) -> None:
        self.done.append(f"reset {device}")

    def attach(self) -> Attachment:
        if self.ends is None:
            raise LguestError("no console")
        return self.ends

    def resize(self, columns: int, rows: int) -> None:
        self.done.append(f"resize {columns} {rows}")

    def entries(self, source: str | None, last: int) -> Sequence[Said]:
        return [entry for entry in self.log if source in {None, entry.source}][-last:]

    def subscribe(self, callback: Callable[[Said], None]) -> Callable[[], None]:
        self.listeners.append(callback)
        return lambda: self.listeners.remove(callback)

    def say(self, text: str, source: str = "") -> None:
        for each in list(self.listeners):
            each(Said(text, source))


class Peer:
    """Somebody connected."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.channel = host.opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        self.channel.connect(str(host.path))
        host.pump()

    def send(self, request: Request | bytes) -> None:
        self.channel.send(request if isinstance(request, bytes) else control.encode(request))
        self._host.pump()

    def hear(self) -> Answer | None:
        """The next message; None: cut off."""
        self._host.pump()
        assert is_readable(self.channel.fileno()), "there is no answer"
        try:
            datagram = self.channel.recv(control.MAX_ANSWER + 1)
        except ConnectionResetError:
            return None
        return control.decode_answer(datagram) if datagram else None

    def hear_all(self) -> list[Answer]:
        """All messages up to the last of an answer."""
        heard: list[Answer] = []
        while not heard or not isinstance(heard[-1], Done | Refused):
            answer = self.hear()
            assert answer is not None, heard
            heard.append(answer)
        return heard

    def ask(self, request: Request) -> list[Answer]:
        self.send(request)
        return self.hear_all()

    @property
    def is_cut_off(self) -> bool:
        """Whether there is nothing to come, whatever still lay there."""
        self._host.pump()
        while is_readable(self.channel.fileno()):
            if self.hear() is None:
                return True
        return False


class Host:
    """A supervisor's loop with nothing in it but the server."""

    def __init__(self, path: Path, loop: Loop) -> None:
        self.path = path
        self.subject = FakeSubject()
        self.opened = ExitStack()
        self.listener = self.opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        self.listener.bind(str(path))
        self.listener.listen(16)
        self.listener.setblocking(False)
        self._loop = loop
        self.server = Control(self.listener, os.geteuid(), loop, self.subject)

    def close(self) -> None:
        """Closes everything, whatever is closed already."""
        with suppress(ValueError):
            self.server.close(None)
        self.opened.close()

    def pump(self) -> None:
        """Has the supervisor do what there is to do now."""
        for _ in range(8):
            self._loop.wait(0)

    def connect(self) -> Peer:
        """Somebody who is welcome."""
        peer = Peer(self)
        assert peer.hear() == Welcome(control.PROTOCOL)
        return peer


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with Loop() as loop:
        host = Host(tmp_path / "control", loop)
        yield host
        host.close()


# ---- Answers ----


def test_a_description(host: Host) -> None:
    assert host.connect().ask(Describe()) == [GUEST, *PROCESSES, Done()]


def test_one_question_after_the_other(host: Host) -> None:
    peer = host.connect()
    peer.send(ListJail())
    peer.send(Describe())
    assert peer.hear_all() == [ROW, Done()]
    assert peer.hear_all() == [GUEST, *PROCESSES, Done()]


@pytest.mark.parametrize(
    ("request_", "done"),
    [
        (Stop(), "stop"),
        (Reboot(), "reboot"),
        (Restart("block0"), "restart block0"),
        (Reset("net0"), "reset net0"),
    ],
)
def test_orders(host: Host, request_: Request, done: str) -> None:
    assert host.connect().ask(request_) == [Done()]
    assert host.subject.done == [done]


def test_what_cannot_be_done_is_refused_and_harms_nobody(host: Host) -> None:
    peer = host.connect()
    assert peer.ask(Restart("tape0")) == [Refused("it has no device tape0")]
    assert peer.ask(Resize(80, 25)) == [Refused("nobody is attached here")]
    assert peer.ask(Attach(80, 25)) == [Refused("no console")]
    assert peer.ask(Restart("block0")) == [Done()]


def test_a_bug_of_ours_is_not_the_guests_end(
    host: Host, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host.subject, "jail", lambda: [1 // 0])
    peer = host.connect()
    assert peer.ask(ListJail()) == [Refused("its launcher has a bug, of which it says more itself")]
    assert "ZeroDivisionError" in capfd.readouterr().err
    assert peer.ask(Restart("block0")) == [Done()]


def test_a_stop_counts_from_somebody_who_has_gone(host: Host) -> None:
    peer = host.connect()
    peer.channel.send(control.encode(Stop()))
    peer.channel.close()
    host.pump()
    assert host.subject.done == ["stop"]


def test_the_console_comes_as_file_descriptors(host: Host, tmp_path: Path) -> None:
    names = [tmp_path / name for name in ("screen", "keys")]
    opened = [os.open(name, os.O_CREAT | os.O_RDWR) for name in names]
    news = select.epoll()
    host.subject.ends = Ends(opened[0], news, opened[1])
    peer = host.connect()
    peer.send(Attach(100, 70000))
    datagram, files, _, _ = socket.recv_fds(peer.channel, 1000, control.ATTACHED_FILES)
    assert control.decode_answer(datagram) == Attached()
    targets = [os.readlink(f"/proc/self/fd/{fd}") for fd in files]
    assert targets == [str(names[0]), "anon_inode:[eventpoll]", str(names[1])]
    assert news.closed, "it is theirs"
    assert peer.hear() == Done()
    assert peer.ask(Resize(81, 26)) == [Done()]
    peer.channel.close()
    host.pump()
    assert host.subject.done == ["resize 100 65535", "resize 81 26", "resize 0 0"]
    for fd in (*files, *opened):
        os.close(fd)


# ---- The log ----


def test_a_terminal_keeps_its_say_when_a_script_attaches(host: Host) -> None:
    with closing(Line()) as line:
        host.subject.ends = line.attach()
        person, script = host.connect(), host.connect()
        person.send(Attach(100, 30))
        script.send(Attach(0, 0))
        assert host.subject.done == ["resize 100 30"]
        for peer in (script, person):
            peer.channel.close()
            host.pump()
    assert host.subject.done == ["resize 100 30", "resize 0 0"]


def test_the_last_lines_of_the_log(host: Host) -> None:
    host.subject.log = [Said("a"), Said("b", "cpu"), Said("c")]
    peer = host.connect()
    assert peer.ask(ReadLog(None, 2, follow=False)) == [LogLine(1, 5, "cpu", "b"), LogLine(1, 5, "", "c"), Done()]
    assert peer.ask(ReadLog("", 9, follow=False)) == [LogLine(1, 5, "", "a"), LogLine(1, 5, "", "c"), Done()]


def test_following_the_log(host: Host) -> None:
    host.subject.log = [Said("before")]
    peer = host.connect()
    peer.send(ReadLog("cpu", 0, follow=True))
    host.subject.say("not this", "block0/requestq")
    host.subject.say("this", "cpu")
    assert peer.hear() == LogLine(1, 5, "cpu", "this")
    peer.channel.close()
    host.pump()
    assert host.subject.listeners == []


def test_who_follows_the_log_and_does_not_read_is_cut_off(host: Host) -> None:
    slow, quick = host.connect(), host.connect()
    for peer in (slow, quick):
        peer.send(ReadLog(None, 1, follow=True))
    count = 0
    while len(host.subject.listeners) == 2:
        host.subject.say(f"{count} {'x' * 900}")
        assert isinstance(quick.hear(), LogLine)
        count += 1
        assert count < 10 * server.MAX_NEWS, "the slow one is kept for ever"
    assert slow.is_cut_off
    host.subject.say("more")
    assert quick.hear() == LogLine(1, 5, "", "more")


# ---- The enemy ----


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b"null",
        b"[" * 1000,
        b'["Stop",{}',
        b'["Stop",[]]',
        b'["Stop",{"now":true}]',
        b'["Done",{}]',
        b'["Restart",{"device":1}]',
        b'["Restart",{}]',
        b'["ReadLog",{"source":null,"last":-1,"follow":false}]',
        b'["ReadLog",{"source":null,"last":1e3,"follow":false}]',
        b'["ReadLog",{"source":null,"last":true,"follow":false}]',
        b'["Resize",{"columns":18446744073709551616,"rows":1}]',
        json.dumps(["Restart", {"device": "x" * control.MAX_REQUEST}]).encode(),
        b"x" * 100_000,
    ],
)
def test_whoever_talks_nonsense_is_cut_off_and_nobody_else(host: Host, garbage: bytes) -> None:
    bystander = host.connect()
    peer = host.connect()
    peer.send(garbage)
    assert peer.is_cut_off
    assert host.subject.done == []
    assert bystander.ask(Describe())[-1] == Done()


def test_somebody_who_dies_amid_an_answer(host: Host) -> None:
    host.subject.log = [Said("x" * 900)] * 1000
    for how in ("at once", "after a while"):
        peer = host.connect()
        peer.send(ReadLog(None, 1000, follow=False))
        if how == "after a while":
            peer.hear()
        peer.channel.close()
        host.pump()
    assert host.connect().ask(Describe())[-1] == Done()


def test_somebody_who_asks_and_does_not_read_waits_alone(host: Host) -> None:
    host.subject.log = [Said("x" * 900)] * 1000
    slow = host.connect()
    slow.send(ReadLog(None, 1000, follow=False))
    slow.channel.settimeout(0)
    with suppress(BlockingIOError):  # its own requests pile up in the kernel, as far as that lets them
        while True:
            slow.channel.send(control.encode(Describe()))
    for _ in range(10):
        assert host.connect().ask(Describe())[-1] == Done()
    assert len(slow.hear_all()) == 1001, "late is not lost"


def test_too_many_are_sent_away(host: Host) -> None:
    peers = [host.connect() for _ in range(server.MAX_CLIENTS)]
    for _ in range(3):
        peer = Peer(host)
        assert peer.hear() == Refused("too many are connected to this guest; try again later")
        assert peer.is_cut_off
    peers[3].channel.close()
    host.pump()
    assert host.connect().ask(Describe())[-1] == Done()


def test_who_is_there_for_nothing_makes_room(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "IDLE", 0.0)
    follower = host.connect()
    follower.send(ReadLog(None, 1, follow=True))
    idle = [host.connect() for _ in range(server.MAX_CLIENTS - 1)]
    assert host.connect().ask(Describe())[-1] == Done()
    assert idle[0].is_cut_off
    assert not any(each.is_cut_off for each in (follower, *idle[1:]))


def test_who_follows_the_log_and_reads_stays(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who do not read make room, before there is too much that they have not read."""
    peers = [host.connect() for _ in range(server.MAX_CLIENTS)]
    for peer in peers:
        peer.send(ReadLog(None, 1, follow=True))
    for number in range(300):
        host.subject.say(f"{number} {'x' * 1000}")
        assert peers[3].hear() is not None
    monkeypatch.setattr(server, "IDLE", 0.0)
    for _ in range(server.MAX_CLIENTS - 1):
        host.connect()
    assert len(host.subject.listeners) == 1
    host.subject.say("still heard")
    assert peers[3].hear() == LogLine(1.0, 5, "", "still heard")


def test_a_thousand_come_and_go_and_leave_nothing(host: Host) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(1000):
        peer = Peer(host)
        if number % 2:
            peer.channel.send(b"?")
        peer.channel.close()
        host.pump()
    assert len(os.listdir("/proc/self/fd")) == before


def test_files_that_somebody_sends_are_not_taken(host: Host) -> None:
    before = len(os.listdir("/proc/self/fd"))
    peer = host.connect()
    socket.send_fds(peer.channel, [control.encode(Describe())], [0] * 200)
    assert peer.hear_all()[-1] == Done()
    peer.channel.close()
    host.pump()
    assert len(os.listdir("/proc/self/fd")) == before


def test_another_user_is_not_heard(tmp_path: Path) -> None:
    with Loop() as loop:
        host = Host(tmp_path / "control", loop)
        host.server.close(None)
        host.server = Control(host.listener, os.geteuid() + 1, loop, host.subject)
        answer = Peer(host).hear()
        expected = Welcome(control.PROTOCOL) if os.geteuid() == 0 else Refused("this guest is another user's")
        assert answer == expected, "root may always"
        host.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_who_it_was_that_connected_is_asked_of_the_kernel(host: Host, tmp_path: Path) -> None:
    """In case that somebody else gets as far as the socket."""
    nobody = jail.prepare("nobody", None).user
    modes = {path: path.stat().st_mode for path in (*list(tmp_path.parents)[:-2], tmp_path, host.path)}
    try:
        for path in modes:
            path.chmod(0o777)
        with runtime.acting_as(nobody):
            peer = Peer(host)
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
    assert peer.hear() == Refused("this guest is another user's")
    assert peer.is_cut_off


# ---- The end ----


@pytest.mark.parametrize(
    ("how", "goodbye"),
    [
        (ending.powered_off(), Goodbye(reboots=False, reason="it switched itself off")),
        (ending.guest_died("triple fault"), Goodbye(reboots=False, reason="the guest died: triple fault")),
        (ending.interrupted(), Goodbye(reboots=False, reason="it was stopped by SIGINT")),
        (ending.Rebooting(), Goodbye(reboots=True, reason="it reboots")),
        (None, Goodbye(reboots=False, reason=None)),
    ],
)
def test_everybody_hears_goodbye_after_what_they_asked_for(
    host: Host, how: ending.Ending | None, goodbye: Goodbye
) -> None:
    follower, idle = host.connect(), host.connect()
    follower.send(ReadLog(None, 1, follow=True))
    host.subject.say("the last word")
    host.server.close(how)
    assert follower.hear() == LogLine(1, 5, "", "the last word")
    for peer in (follower, idle):
        assert peer.hear() == goodbye
        assert peer.hear() is None


def test_who_waits_to_be_accepted_waits_on_for_the_next_life(host: Host) -> None:
    waiting = host.opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    waiting.connect(str(host.path))
    host.server.close(ending.Rebooting())
    with Loop() as loop:
        again = Control(host.listener, os.geteuid(), loop, host.subject)
        loop.wait(0)
        assert control.decode_answer(waiting.recv(1000)) == Welcome(control.PROTOCOL)
        again.close(None)
