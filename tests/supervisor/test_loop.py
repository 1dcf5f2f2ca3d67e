"""The supervisor's loop where it is more than a list of reactions."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from lguest_mp.supervisor.loop import Loop


@pytest.fixture
def loop() -> Iterator[Loop]:
    with Loop() as loop:
        yield loop


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(1)
    yield fd
    os.close(fd)


class TestWatchingLater:
    def test_a_host_without_memory_is_asked_again(
        self, loop: Loop, eventfd: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        watch, refusals, calls = loop.watch, [errno.ENOMEM, errno.ENOSPC], []

        def refuse(fd: int, react: object) -> None:
            if refusals:
                raise OSError(refusals.pop(), "not now")
            watch(fd, lambda: calls.append(fd))

        monkeypatch.setattr(loop, "watch", refuse)
        loop.watch_later(0, eventfd, lambda: None)
        for _ in range(4):
            loop.wait(0)
        assert (refusals, calls) == ([], [eventfd])

    def test_it_can_be_cancelled_at_any_time(self, loop: Loop, eventfd: int, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(fd: int, react: object) -> None:
            raise OSError(errno.ENOMEM, "never")

        monkeypatch.setattr(loop, "watch", refuse)
        timer = loop.watch_later(0, eventfd, lambda: None)
        loop.wait(0)
        timer.cancel()
        monkeypatch.undo()
        loop.wait(0)
        loop.watch(eventfd, lambda: None)  # nobody else does
