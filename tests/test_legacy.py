"""What outlives an exec: it is checked by whoever takes it, and nobody after them gets it."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import closing, suppress

import pytest

from lguest_mp import legacy, screen
from lguest_mp.line import Line
from lguest_mp.screen import ScreenReader, Track
from lguest_mp.supervisor.log import Level, Log
from lguest_mp.supervisor.stderr import StandardError


@pytest.fixture
def log() -> Iterator[Callable[[], Log]]:
    with closing(StandardError()) as output:
        yield lambda: Log(output)


def test_files_are_left_in_their_order_and_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_LEGACY", "")
    reading, writing = os.pipe()
    legacy.leave("A_LEGACY", writing, reading)
    assert os.get_inheritable(reading)
    assert os.get_inheritable(writing)
    assert legacy.take("A_LEGACY") == (writing, reading)
    assert not os.get_inheritable(reading)
    assert legacy.take("A_LEGACY") == ()
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("said", ["", "x", "1,,2", "-1", "999999", "9" * 40, "1;2"])
def test_what_is_no_legacy(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setenv("A_LEGACY", said)
    assert legacy.take("A_LEGACY") == ()
    assert "A_LEGACY" not in os.environ


def test_a_screen_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LGUEST_SCREEN", "")
    with closing(Line()) as first:
        first.writer(Track.CONSOLE).append(b"one ")
        first.hand_on()
    with closing(Line()) as second:
        second.writer(Track.SERIAL).append(b"two ")
        second.writer(Track.CONSOLE).append(b"three")
        assert ScreenReader(second.attach().screen).read_new() == b"one two three"


def test_a_log_goes_on(log: Callable[[], Log], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LGUEST_LOG", "")
    first, second = log(), log()
    first.say("a debt", Level.INFO, "cpu")
    first.say("and a house \N{SNOWMAN}", Level.DEBUG)
    first.hand_on()
    second.take_over()
    second.say("mine", Level.DEBUG)
    assert second.entries()[:2] == first.entries()
    assert [entry.text for entry in second.entries(last=1)] == ["mine"]


def _file(content: bytes, seals: int) -> int:
    fd = os.memfd_create("another", os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


ALL_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"[[1,2]]", b"3", b'[["x",1,"",""]]', b"\xff\xfe"])
def test_a_log_that_is_none(log: Callable[[], Log], monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Another version's."""
    monkeypatch.setenv("LGUEST_LOG", str(_file(content, ALL_SEALS)))
    heir = log()
    heir.take_over()
    assert heir.entries() == []


def test_somebody_elses_files_are_left_alone(log: Callable[[], Log], monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    unsealed = _file(b"[]", 0)
    for fd in (reading, unsealed):
        monkeypatch.setenv("LGUEST_LOG", str(fd))
        log().take_over()
        monkeypatch.setenv("LGUEST_SCREEN", str(fd))
        created = screen.create()
        assert created != fd
        os.close(created)
        assert os.fstat(fd).st_mode & (stat.S_IFIFO | stat.S_IFREG)
    for fd in (reading, writing, unsealed):
        with suppress(OSError):
            os.close(fd)
