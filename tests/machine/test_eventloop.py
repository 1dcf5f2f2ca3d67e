"""The machine's second thread."""

from __future__ import annotations

import os
import queue
import select
import tempfile
import threading
from collections.abc import Iterator

import pytest
from fakemachine import make_loop

from lguest_mp.machine.eventloop import EventLoop, Patience


@pytest.fixture
def loop(core_kind: str) -> Iterator[EventLoop]:
    loop = make_loop(core_kind)
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


# What wakes the CPU is waited for by the CPU's own thread while that sleeps.


@pytest.fixture
def wake() -> Iterator[int]:
    fd = os.eventfd(0)
    yield fd
    os.close(fd)


def test_shared_events_are_the_loops_while_nobody_helps(loop: EventLoop, eventfd: int) -> None:
    threads: queue.Queue[str] = queue.Queue()
    loop.add_shared(eventfd, lambda: threads.put(threading.current_thread().name), select.EPOLLIN | select.EPOLLET)
    loop.start(unexpected)
    for _ in range(3):
        os.eventfd_write(eventfd, 1)
        assert threads.get() == "events"


def test_shared_events_are_handled_by_who_helps(loop: EventLoop, eventfd: int, wake: int) -> None:
    threads: list[str] = []
    loop.add_shared(eventfd, lambda: threads.append(threading.current_thread().name), select.EPOLLIN | select.EPOLLET)
    loop.start(unexpected)
    for number in range(1, 4):
        later = threading.Timer(0.01, os.eventfd_write, (eventfd, 1))
        later.start()
        loop.help(wake)
        later.join()
        assert len(threads) == number
    assert set(threads) == {"MainThread"}


def test_who_helps_is_woken(loop: EventLoop, wake: int) -> None:
    os.eventfd_write(wake, 3)
    loop.help(wake)
    os.set_blocking(wake, False)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(wake)


def test_events_that_are_not_shared_stay_the_loops(loop: EventLoop, eventfd: int, wake: int) -> None:
    threads: queue.Queue[str] = queue.Queue()

    def handler() -> None:
        threads.put(threading.current_thread().name)
        os.eventfd_write(wake, 1)

    loop.add(eventfd, handler, select.EPOLLIN | select.EPOLLET)
    loop.start(unexpected)
    threading.Timer(0.01, os.eventfd_write, (eventfd, 1)).start()
    loop.help(wake)
    assert threads.get() == "events"


def test_an_event_that_comes_as_the_help_ends_is_the_loops(loop: EventLoop, eventfd: int, wake: int) -> None:
    threads: queue.Queue[str] = queue.Queue()
    loop.add_shared(eventfd, lambda: threads.put(threading.current_thread().name), select.EPOLLIN | select.EPOLLET)
    os.eventfd_write(wake, 1)
    loop.help(wake)
    os.eventfd_write(eventfd, 1)
    loop.start(unexpected)
    assert threads.get() == "events"


def test_patience_grows_while_it_would_pay_and_ends_when_it_does_not() -> None:
    patience = Patience(processors=2)
    looked = []
    for _ in range(6):
        looked.append(patience.now)
        patience.slept(waited=150_000)
    assert looked == [0, 20_000, 40_000, 80_000, 160_000, 200_000]
    patience.slept(waited=250_000)
    assert patience.now == 0, "a guest that sleeps long is not looked after all the time"


def test_nobody_is_patient_on_the_only_processor() -> None:
    patience = Patience(processors=1)
    patience.slept(waited=100)
    assert patience.now == 0


def test_what_comes_while_the_helper_still_looks_is_handled(loop: EventLoop, eventfd: int, wake: int) -> None:
    calls: list[int] = []
    loop.add_shared(eventfd, lambda: calls.append(1), select.EPOLLIN | select.EPOLLET)
    loop._patience.now = 60 * 10**9
    threading.Timer(0.01, os.eventfd_write, (eventfd, 1)).start()
    loop.help(wake)
    os.eventfd_write(wake, 1)
    loop.help(wake)
    assert calls == [1]
    assert loop._patience.now == 60 * 10**9, "it did not sleep"


def test_an_exception_is_the_helpers(loop: EventLoop, eventfd: int, wake: int) -> None:
    def fail() -> None:
        raise ValueError("a bug")

    loop.add_shared(eventfd, fail, select.EPOLLIN | select.EPOLLET)
    os.eventfd_write(eventfd, 1)
    with pytest.raises(ValueError, match="a bug"):
        loop.help(wake)


def test_no_event_is_lost_between_the_two_threads(loop: EventLoop, wake: int) -> None:
    """As an engine does it: it sleeps until a handler has left a mark, and whoever leaves one wakes it.

    Each event is answered before the next is made, so that one that is lost is the end of it.
    """
    marks: list[int] = []
    answered = threading.Semaphore(0)
    rounds = 3000

    def handler(number: int) -> None:
        marks.append(number)
        os.eventfd_write(wake, 1)

    sources = [os.eventfd(0) for _ in range(3)]
    for number, source in enumerate(sources):
        loop.add_shared(source, lambda number=number: handler(number), select.EPOLLIN | select.EPOLLET)  # type: ignore[misc]
    loop.start(unexpected)

    def make() -> None:
        for number in range(rounds):
            os.eventfd_write(sources[number % 3], 1)
            assert answered.acquire(timeout=60)

    maker = threading.Thread(target=make)
    maker.start()
    for number in range(rounds):
        while not marks:
            loop.help(wake)
        assert marks.pop() == number % 3
        answered.release()
        for _ in range(number % 50):  # for some time nobody helps
            pass
    maker.join()
    loop.stop()
    for source in sources:
        os.close(source)
