"""A worker has translated code dropped: its request is answered when, and only when, the CPU's thread has done it."""

from __future__ import annotations

import select
import threading
from collections.abc import Callable, Iterator

import pytest

from lguest_mp.codemap import CodeMap
from lguest_mp.machine.stalecode import answer_workers
from lguest_mp.memory import PAGE_SIZE, GuestMemory

#: Much longer than anything takes, in seconds.
PATIENCE = 30.0


class FakeCpu:
    """A translator whose jobs wait until the test has them done."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], None]] = []
        self.forgotten: list[tuple[int, int]] = []

    def call(self, job: Callable[[], None]) -> None:
        self.jobs.append(job)

    def forget_code(self, first_page: int, last_page: int) -> None:
        self.forgotten.append((first_page, last_page))


@pytest.fixture
def code_map() -> Iterator[CodeMap]:
    code_map = CodeMap(GuestMemory(16 * PAGE_SIZE), workers=2)
    yield code_map
    code_map.close()


def connected(code_map: CodeMap) -> tuple[FakeCpu, dict[int, Callable[[], None]]]:
    """A CPU, and what the events' thread calls, by file descriptor."""
    cpu = FakeCpu()
    handlers: dict[int, Callable[[], None]] = {}
    answer_workers(code_map, cpu, handlers.__setitem__)
    return cpu, handlers


def test_a_worker_waits_until_the_cpu_has_forgotten(code_map: CodeMap) -> None:
    cpu, handlers = connected(code_map)
    assert list(handlers) == list(code_map.files)
    code_map.marks[3] = 1
    worker = threading.Thread(target=lambda: code_map.writer(1).written([(3 * PAGE_SIZE, 1)]))
    worker.start()
    select.select([code_map.files[1]], [], [], PATIENCE)
    handlers[code_map.files[1]]()
    assert not cpu.forgotten
    assert worker.is_alive()
    cpu.jobs.pop()()
    worker.join()
    assert cpu.forgotten == [(3, 3)]


def test_nobody_asks_is_nothing(code_map: CodeMap) -> None:
    cpu, handlers = connected(code_map)
    handlers[code_map.files[0]]()
    assert not cpu.jobs


@pytest.mark.parametrize("request_", [b"", b"x", bytes(4) + b"\xff" * 8])
def test_what_is_no_request_is_nothing(code_map: CodeMap, request_: bytes) -> None:
    cpu, handlers = connected(code_map)
    code_map._worker_ends[0].send(request_)
    handlers[code_map.files[0]]()
    assert not cpu.jobs


def test_a_worker_that_asked_and_died_stops_nobody(code_map: CodeMap) -> None:
    cpu, handlers = connected(code_map)
    code_map._worker_ends[0].send(bytes(4))
    handlers[code_map.files[0]]()
    code_map._worker_ends[0].close()
    cpu.jobs.pop()()
