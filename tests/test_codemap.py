"""A worker that wrote to translated code asks, waits, and is answered; what is no request is none."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lguest_mp.codemap import MAX_DATAGRAM, MAX_RANGES, CodeMap, parse_request
from lguest_mp.memory import PAGE_SIZE, GuestMemory

PAGES = 4096


@pytest.fixture
def code_map() -> Iterator[CodeMap]:
    code_map = CodeMap(GuestMemory(PAGES * PAGE_SIZE), workers=2)
    yield code_map
    code_map.close()


class Machine(threading.Thread):
    """Answers worker 0 until the channel is closed; remembers what it was asked to forget."""

    def __init__(self, code_map: CodeMap) -> None:
        super().__init__()
        self.forgotten: list[tuple[int, int]] = []
        self._code_map = code_map

    def run(self) -> None:
        end = self._code_map.machine_ends[0]
        while datagram := end.recv(MAX_DATAGRAM):
            parsed = parse_request(datagram, PAGES)
            if parsed is None:
                return
            answer, runs = parsed
            self.forgotten += runs
            end.send(answer)


@pytest.fixture
def machine(code_map: CodeMap) -> Iterator[Machine]:
    machine = Machine(code_map)
    machine.start()
    yield machine
    code_map.machine_ends[0].shutdown(2)
    machine.join()


def test_a_write_to_pages_without_code_asks_nobody(code_map: CodeMap) -> None:
    code_map.marks[4] = code_map.marks[7] = 1
    code_map.writer(0).written([(5 * PAGE_SIZE, 2 * PAGE_SIZE), (0, 4 * PAGE_SIZE), (7 * PAGE_SIZE, 0)])


def test_a_write_that_touches_a_page_with_code_has_it_forgotten(code_map: CodeMap, machine: Machine) -> None:
    code_map.marks[4] = 1
    writer = code_map.writer(0)
    writer.written([(4 * PAGE_SIZE - 1, 1), (4 * PAGE_SIZE - 1, 2), (9 * PAGE_SIZE, 5)])
    assert machine.forgotten == [(3, 4)]
    writer.written([(5 * PAGE_SIZE - 1, 1)])
    assert machine.forgotten == [(3, 4), (4, 4)]


def test_more_ranges_than_a_datagram_holds(code_map: CodeMap, machine: Machine) -> None:
    code_map.marks[:] = b"\1" * PAGES
    ranges = [(page * PAGE_SIZE, 1) for page in range(MAX_RANGES * 2 + 1)]
    code_map.writer(0).written(ranges)
    assert machine.forgotten == [(page, page) for page in range(MAX_RANGES * 2 + 1)]


def test_the_answer_to_a_killed_predecessor_is_not_taken_for_ones_own(code_map: CodeMap, machine: Machine) -> None:
    code_map.machine_ends[0].send(b"\0\0\0\0")
    code_map.marks[1] = 1
    code_map.writer(0).written([(PAGE_SIZE, 1)])
    assert machine.forgotten == [(1, 1)]


def test_without_a_machine_the_worker_ends(code_map: CodeMap) -> None:
    code_map.marks[0] = 1
    code_map.machine_ends[0].close()
    with pytest.raises(OSError, match=r"gone|Broken pipe"):
        code_map.writer(0).written([(0, 1)])


@given(st.binary(max_size=64))
def test_a_request_names_pages_that_exist(datagram: bytes) -> None:
    parsed = parse_request(datagram, PAGES)
    if parsed is not None:
        assert all(0 <= first <= last < PAGES for first, last in parsed[1])
