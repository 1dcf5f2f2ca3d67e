"""Leaving a guest's console in every way there is, with the terminal as it was; and consoles of scripts."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from fakelaunchers import FakeGuest, running

from guestkit.session import Session
from lguest_mp.ctl.console import parse_escape, shown_escape
from lguest_mp.line import Line
from lguest_mp.screen import ScreenWriter, Track

PATIENCE = 30.0
COMMAND = [sys.executable, "-m", "lguest_mp.ctl", "console", "demo"]
DETACH = "\x1d"


@pytest.fixture
def guest() -> Iterator[FakeGuest]:
    with running("demo") as started:
        yield started


@pytest.fixture
def screen(guest: FakeGuest) -> ScreenWriter:
    """The guest's side of its screen."""
    return guest.line.writer(Track.CONSOLE)


@pytest.fixture
def attach(guest: FakeGuest) -> Iterator[Callable[..., Session]]:
    """Starts ``lguestctl console`` on a terminal, and waits until it is attached."""
    with ExitStack() as sessions:

        def start(*options: str) -> Session:
            session = sessions.enter_context(Session([*COMMAND, *options], columns=91, rows=17))
            session.wait_for("^lguestctl: attached to demo", PATIENCE)
            wait_until(lambda: session.current_settings() != session.settings)
            return session

        yield start


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def typed(line: Line, count: int) -> bytes:
    """The next ``count`` bytes that the guest gets."""
    data = b""
    poller = select.poll()
    poller.register(line.keys, select.POLLIN)
    while len(data) < count:
        assert poller.poll(PATIENCE * 1000), data
        data += os.read(line.keys, count - len(data))
    return data


def finish(session: Session) -> int:
    """How it ends; the terminal is the user's again."""
    status = session.wait(PATIENCE)
    assert session.current_settings() == session.settings
    return status


class TestOnATerminal:
    def test_every_key_is_the_guests(self, guest: FakeGuest, attach: Callable[..., Session]) -> None:
        keys = "ls\r\x03\x1a\x11\x13\x04\x7f\0ä"
        attach().type(keys)
        assert typed(guest.line, len(keys.encode())) == keys.encode()

    def test_nothing_is_missing(self, screen: ScreenWriter, attach: Callable[..., Session]) -> None:
        """As long as the terminal keeps up."""
        session = attach()
        for number in range(2000):
            screen.append(b"%04d %s\r\n" % (number, b"x" * 40))
            if number % 100 == 99:
                session.wait_for(f"^{number:04} ", PATIENCE)
        assert re.findall(r"^(\d{4}) x{40}$", session.output, re.MULTILINE) == [f"{n:04}" for n in range(2000)]

    def test_several_look(self, screen: ScreenWriter, attach: Callable[..., Session]) -> None:
        sessions = [attach(), attach()]
        for number in range(20):
            screen.append(f"line {number}.".encode())
            for session in sessions:
                session.wait_for(rf"line {number}\.", PATIENCE)

    def test_its_size_is_told(self, guest: FakeGuest, attach: Callable[..., Session]) -> None:
        session = attach()
        assert guest.calls == ["resize 91 17"]
        session.resize(120, 40)
        wait_until(lambda: guest.calls[-1] == "resize 120 40")
        session.type(DETACH)
        assert finish(session) == 0
        wait_until(lambda: guest.calls[-1] == "resize 0 0")


class TestLeaving:
    def test_what_was_typed_before_the_key_is_the_guests(
        self, guest: FakeGuest, attach: Callable[..., Session]
    ) -> None:
        session = attach()
        session.type(f"ls\r{DETACH}lost")
        assert finish(session) == 0
        assert typed(guest.line, 3) == b"ls\r"
        assert not select.select([guest.line.keys], [], [], 0)[0]

    def test_by_another_key(self, guest: FakeGuest, attach: Callable[..., Session]) -> None:
        session = attach("--escape=^A")
        session.type(DETACH)
        assert typed(guest.line, 1) == DETACH.encode()
        session.type("\x01")
        assert finish(session) == 0

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
    def test_by_a_signal(self, attach: Callable[..., Session], number: signal.Signals) -> None:
        session = attach()
        session.signal(number)
        assert finish(session) == -number

    def test_by_the_key_and_a_signal_at_once(self, attach: Callable[..., Session]) -> None:
        for _ in range(5):
            session = attach()
            session.type(DETACH)
            session.signal(signal.SIGTERM)
            assert finish(session) in {0, -signal.SIGTERM}

    def test_a_guest_that_takes_nothing_keeps_nobody(self, guest: FakeGuest, attach: Callable[..., Session]) -> None:
        session = attach()
        keys = guest.line.attach().keys
        while select.select([], [keys], [], 0)[1]:
            os.write(keys, b"x" * 4096)
        session.type("y")
        time.sleep(0.1)  # it may be read by itself, or with the key
        session.type(DETACH)
        assert finish(session) == 0

    def test_after_a_reboot_it_goes_on_where_it_was(
        self, guest: FakeGuest, screen: ScreenWriter, attach: Callable[..., Session]
    ) -> None:
        session = attach()
        screen.append(b"the first life\r\n")
        session.wait_for("the first life", PATIENCE)
        with Session([*COMMAND[:3], "reboot", "demo"]) as reboot:
            reboot.wait(PATIENCE)
        wait_until(lambda: guest.calls[-1].startswith("resize 91"))
        screen.append(b"the second life\r\n")
        session.wait_for("the second life", PATIENCE)
        assert session.output.count("the first life") == 1
        with Session(COMMAND) as newcomer:
            newcomer.wait_for("the first life", PATIENCE)
            newcomer.wait_for("the second life", PATIENCE)

    def test_the_last_that_was_shown_is_seen(
        self, guest: FakeGuest, screen: ScreenWriter, attach: Callable[..., Session]
    ) -> None:
        session = attach()
        screen.append(b"reboot: Power down\r\n")
        guest.stop()
        with Session([*COMMAND[:3], "stop", "demo", "--no-wait"]) as stop:
            stop.wait(PATIENCE)
        assert finish(session) == 0
        assert session.output.endswith("Power down\nlguestctl: guest demo has ended: it switched itself off\n")


class TestScripts:
    """Standard input is a pipe."""

    def test_every_byte_is_the_guests(self, guest: FakeGuest, screen: ScreenWriter) -> None:
        keys = b"echo \x1d\r" * 3000
        with subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as program:
            assert program.stdin
            assert program.stdout
            assert program.stderr
            program.stdin.write(keys)
            program.stdin.close()
            assert typed(guest.line, len(keys)) == keys
            screen.append(b"\0binary\xff")
            assert program.stdout.read(8) == b"\0binary\xff"
            subprocess.run([*COMMAND[:3], "stop", "demo", "--no-wait"], check=True)
            assert program.stdout.read() == b""
            assert program.stderr.read() == b"lguestctl: guest demo has ended: it switched itself off\n"
            assert program.wait() == 0
        assert "resize" not in " ".join(guest.calls[: guest.calls.index("stop")])

    def test_nobody_looks_any_more(self, guest: FakeGuest, screen: ScreenWriter) -> None:
        with subprocess.Popen(COMMAND, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as program:
            assert program.stdout
            screen.append(b"x")
            assert program.stdout.read(1) == b"x"
            program.stdout.close()
            screen.append(b"y")
            assert program.wait(PATIENCE) == -signal.SIGPIPE


@pytest.mark.parametrize(
    ("text", "key", "shown"),
    [
        ("^]", b"\x1d", "Ctrl-]"),
        ("^a", b"\1", "Ctrl-A"),
        ("^@", b"\0", "Ctrl-@"),
        ("~", b"~", "'~'"),
        ("^", b"^", "'^'"),
    ],
)
def test_keys(text: str, key: bytes, shown: str) -> None:
    assert parse_escape(text) == key
    assert shown_escape(key) == shown
