"""What a child finds out is told; a child that fails tells nothing; neither leaves anything."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import psutil
import pytest

from lguest_mp.aside import Aside


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    files, children = set(os.listdir("/proc/self/fd")), {child.pid for child in psutil.Process().children()}
    yield
    assert set(os.listdir("/proc/self/fd")) == files
    assert {child.pid for child in psutil.Process().children()} <= children


@pytest.mark.parametrize("answer", [b"", b"\0 an answer \xff"])
def test_the_answer_is_the_childs(answer: bytes) -> None:
    assert Aside(lambda: answer).answer() == answer


def test_it_is_another_process() -> None:
    assert int(Aside(lambda: str(os.getppid()).encode()).answer() or b"") == os.getpid()


def fail() -> bytes:
    raise ValueError


def die() -> bytes:
    os.kill(os.getpid(), signal.SIGKILL)
    return b"not dead"


@pytest.mark.parametrize("find_out", [fail, die])
def test_a_child_that_fails_tells_nothing(find_out: Callable[[], bytes], capfd: pytest.CaptureFixture[str]) -> None:
    assert Aside(find_out).answer() is None
    assert capfd.readouterr() == ("", "")


def test_without_a_process_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError(11, "no more processes")

    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(BlockingIOError):
        Aside(lambda: b"")
