"""What children write to their standard error: all of it in the log, and no more than is good for the supervisor."""

from __future__ import annotations

import errno
import faulthandler
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import PATIENCE

from lguest_mp.errors import LguestError
from lguest_mp.supervisor import children, complaints
from lguest_mp.supervisor.children import Child, Ear
from lguest_mp.supervisor.complaints import AT_A_TIME, LONGEST, Complaints
from lguest_mp.supervisor.log import BURST, Log
from lguest_mp.supervisor.loop import Loop


class Silent:
    """An output that shows nothing."""

    fd = -1

    def show(self, level: int, text: str) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def ear() -> Iterator[Ear]:
    with Loop() as loop:
        yield Ear(loop, Log(Silent()))


def words(ear: Ear) -> list[str]:
    return [entry.text for entry in ear.log.entries("child")]


def fork(ear: Ear, body: Callable[[], object]) -> Child:
    def run() -> int:
        body()
        return 0

    return children.fork("child", run, ear)


def wait_until(ear: Ear, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        ear.loop.wait(0.1)


def test_lines_are_heard_while_the_child_lives(ear: Ear) -> None:
    def body() -> None:
        os.write(2, b"one\ntwo\nth")
        os.write(2, b"ree\n")
        time.sleep(PATIENCE)

    child = fork(ear, body)
    wait_until(ear, lambda: words(ear) == ["one", "two", "three"])
    child.signal(signal.SIGKILL)
    child.reap()


def test_last_words_are_heard_when_it_is_reaped(ear: Ear) -> None:
    """Nobody has looked meanwhile, and the last line has no end."""
    child = fork(ear, lambda: os.write(2, b"one\ntwo"))
    child.reap()
    assert words(ear) == ["one", "two"]


def test_the_traceback_of_a_bug(ear: Ear) -> None:
    def body() -> None:
        raise RuntimeError("a bug")

    child = fork(ear, body)
    assert os.waitstatus_to_exitcode(child.reap()) == 70
    assert words(ear)[0] == "Traceback (most recent call last):"
    assert words(ear)[-1] == "RuntimeError: a bug"


@pytest.mark.parametrize("signum", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL])
def test_the_stack_of_a_crash(ear: Ear, signum: signal.Signals) -> None:
    def body() -> None:
        faulthandler.enable(2)  # in a supervisor it is, for all that are forked
        os.kill(os.getpid(), signum)

    child = fork(ear, body)
    assert os.waitstatus_to_exitcode(child.reap()) == -signum
    assert words(ear)[0].startswith("Fatal Python error: ")
    assert any("test_complaints.py" in word for word in words(ear))


def test_a_child_that_closes_standard_error_is_not_listened_to(ear: Ear) -> None:
    def body() -> None:
        os.write(2, b"bye\n")
        os.close(2)
        time.sleep(PATIENCE)

    child = fork(ear, body)
    wait_until(ear, lambda: words(ear) == ["bye"])
    turns = 0
    deadline = time.monotonic() + 0.2
    while time.monotonic() < deadline:
        ear.loop.wait(0.1)
        turns += 1
    assert turns < 10, "the end of the pipe does not wake the supervisor again and again"
    child.signal(signal.SIGKILL)
    child.reap()


def test_a_flood_takes_little_of_the_supervisor_s_time_and_is_counted(
    ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    real = os.read

    def read(fd: int, size: int) -> bytes:
        data = real(fd, size)
        reads.append(len(data))
        return data

    def flood() -> None:
        while True:
            os.write(2, b"flood\n" * 1000)

    monkeypatch.setattr(os, "read", read)
    child = fork(ear, flood)
    deadline = time.monotonic() + 10 * complaints.PAUSE
    while time.monotonic() < deadline:
        ear.loop.wait(deadline - time.monotonic())
    assert 2 <= len(reads) <= 12
    child.signal(signal.SIGKILL)
    child.reap()
    assert "too many lines" in words(ear)
    assert any(word.endswith("lines were dropped") for word in words(ear))
    assert words(ear)[-1].startswith("fl") or words(ear)[-1] == "too many lines"


def test_words_without_a_line_s_end_take_no_memory(ear: Ear) -> None:
    child = fork(ear, lambda: os.write(2, b"x" * 10 * LONGEST))
    child.reap()
    assert words(ear) == ["x" * LONGEST] * 10


def test_somebody_else_who_has_the_pipe_does_not_hold_up_the_end(ear: Ear) -> None:
    """A process that the child left behind."""
    reading, writing = os.pipe()
    listened = Complaints("child", reading, ear.loop, ear.log)
    os.write(writing, b"left\n")
    listened.finish()
    os.close(writing)
    assert words(ear) == ["left"]


@settings(max_examples=50)
@given(st.lists(st.text(alphabet="ab c", max_size=3 * LONGEST), max_size=10), st.lists(st.integers(1, 5000)))
def test_whatever_the_pieces_the_lines_are_the_same(lines: list[str], sizes: list[int]) -> None:
    with Loop() as loop:
        log = Log(Silent())
        reading, writing = os.pipe()
        listened = Complaints("child", reading, loop, log)
        data = "".join(f"{line}\n" for line in lines).encode()
        for size in [*sizes, *[AT_A_TIME] * len(data)]:
            if not data:
                break
            os.write(writing, data[:size])
            loop.wait(0)
            data = data[size:]
        os.close(writing)
        listened.finish()
        said = [entry.text for entry in log.entries("child")]
    assert len(said) <= BURST
    assert "".join(said) == "".join(lines)
    assert all(len(each) <= LONGEST for each in said)


def test_a_fork_that_fails_leaves_no_pipe(ear: Ear, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(os, "fork", fail)
    with pytest.raises(LguestError, match="cannot fork child"):
        children.fork("child", lambda: 0, ear)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("what", ["watch", "pidfd_open"])
def test_a_host_that_cannot_watch_a_child_has_none(ear: Ear, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    def fail(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    forked = []
    fork_ = os.fork

    def fork() -> int:
        forked.append(fork_())
        return forked[-1]

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(os, "fork", fork)
    monkeypatch.setattr(Loop if what == "watch" else os, what, fail)
    with pytest.raises(LguestError, match="cannot fork child"):
        children.fork("child", lambda: 0, ear)
    assert os.listdir("/proc/self/fd") == before
    for pid in forked:
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
