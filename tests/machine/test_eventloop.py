"""The machine's second thread."""

from __future__ import annotations

import os
import queue
import select
import tempfile
import threading
from collections.abc import Iterator

import pytest

from lguest_mp.machine.eventloop import EventLoop


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    loop = EventLoop()
    yield loop
    loop.stop()
    loop.close()


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0)
    yield fd
    os.close(fd)


def unexpected(error: Exception) -> None:
    raise AssertionError from error


def test_every_write_to_an_eventfd_is_an_edge_though_nobody_reads_it(loop: EventLoop, eventfd: int) -> None:
    calls: list[int] = []
    loop.add(eventfd, lambda: calls.append(1), select.EPOLLIN | select.EPOLLET)
    for number in range(1, 5):
        os.eventfd_write(eventfd, 1)
        loop.step()
        loop.step()
        assert len(calls) == number


def test_a_removed_descriptor_is_not_heard_of_any_more(loop: EventLoop, eventfd: int) -> None:
    calls: list[int] = []
    loop.add(eventfd, lambda: calls.append(1))
    loop.remove(eventfd)
    loop.remove(eventfd)
    os.eventfd_write(eventfd, 1)
    loop.step()
    assert calls == []


def test_a_file_that_is_always_ready_is_refused(loop: EventLoop) -> None:
    with tempfile.TemporaryFile() as file:
        with pytest.raises(PermissionError):
            loop.add(file.fileno(), lambda: None)
        loop.remove(file.fileno())


def test_handlers_run_on_the_loops_thread(loop: EventLoop, eventfd: int) -> None:
    threads: queue.Queue[str] = queue.Queue()
    loop.add(eventfd, lambda: threads.put(threading.current_thread().name), select.EPOLLIN | select.EPOLLET)
    loop.start(unexpected)
    os.eventfd_write(eventfd, 1)
    assert threads.get() == "events"


def test_later_is_later(loop: EventLoop) -> None:
    called: queue.Queue[str] = queue.Queue()
    loop.start(unexpected)
    loop.call_later(0.02, lambda: called.put("second"))
    loop.call_later(0, lambda: called.put("first"))
    assert [called.get(), called.get()] == ["first", "second"]


def test_an_exception_in_a_handler_ends_the_thread_and_is_told(loop: EventLoop, eventfd: int) -> None:
    failures: queue.Queue[Exception] = queue.Queue()

    def fail() -> None:
        raise ValueError("a bug")

    loop.add(eventfd, fail)
    loop.start(failures.put)
    os.eventfd_write(eventfd, 1)
    assert str(failures.get()) == "a bug"


def test_stopping_waits_for_the_thread_and_can_be_done_twice(loop: EventLoop) -> None:
    loop.start(unexpected)
    loop.stop()
    loop.stop()
    assert "events" not in [thread.name for thread in threading.enumerate()]
