"""What ``top`` makes of two looks at the same guests."""

from __future__ import annotations

import pytest
from fakelaunchers import GUEST, QUEUE, SUPERVISOR

from lguest_mp.control import ProcessFacts
from lguest_mp.ctl import samples
from lguest_mp.ctl.samples import Moment, Process, Rates
from lguest_mp.ctl.top import Order, View
from lguest_mp.supervisor.processes import Sample

WORKER = QUEUE.replace(name="net0/receiveq", pid=9, requests=100, bytes=1000)


def process(facts: ProcessFacts, seconds: float = 0.0, memory: int = 0, guest: str = "one") -> Process:
    host = None if facts.pid is None else Sample(facts.name, facts.pid, "running", seconds, memory)
    return Process(guest, facts, host)


def moment(time: float, *processes: Process) -> Moment:
    return Moment(time, (GUEST.replace(name="one"),), processes)


@pytest.mark.parametrize(
    ("before", "after", "rates"),
    [
        ((WORKER, 1.0), (WORKER.replace(requests=150, bytes=3000), 2.0), Rates(0.5, 25.0, 1000.0)),
        ((WORKER, 5.0), (WORKER.replace(pid=10, requests=150, bytes=3000), 0.5), Rates(0.25, 25.0, 1000.0)),
        ((WORKER, 1.0), (WORKER.replace(requests=10, bytes=20), 1.0), Rates(0.0, 5.0, 10.0)),
        ((WORKER, 1.0), (WORKER.replace(pid=None), 0.0), Rates(None, 0.0, 0.0)),
        ((SUPERVISOR, 1.0), (SUPERVISOR, 2.0), Rates(0.5, None, None)),
    ],
    ids=["it works", "another took its place", "the guest rebooted", "it is gone", "no queue"],
)
def test_how_fast_things_go(
    before: tuple[ProcessFacts, float], after: tuple[ProcessFacts, float], rates: Rates
) -> None:
    found = samples.rates(moment(10.0, process(*before)), moment(12.0, process(*after)))
    assert found == {("one", after[0].name): rates}


def test_the_first_look_knows_no_speed() -> None:
    assert samples.rates(None, moment(1.0, process(WORKER))) == {}


def test_the_busiest_comes_first_and_what_is_not_known_last() -> None:
    lazy, big = process(WORKER, memory=5), process(WORKER.replace(name="net0/transmitq"), memory=50)
    gone = process(QUEUE)
    speeds = {lazy.key: Rates(0.1, 9.0, 1.0), big.key: Rates(0.9, 1.0, 9.0), gone.key: Rates(None, 0.0, 0.0)}
    view = View(moment(1.0, gone, lazy, big), speeds, ())
    assert view.sorted(Order.CPU) == [big, lazy, gone]
    assert view.sorted(Order.MEMORY) == [big, lazy, gone]
    assert view.sorted(Order.REQUESTS) == [lazy, big, gone]
    assert view.sorted(Order.BYTES) == [big, lazy, gone]


def test_a_row() -> None:
    view = View(moment(1.0, process(WORKER, memory=3 << 20)), {("one", WORKER.name): Rates(0.5, 25.0, 1024.0)}, ())
    (_, row) = view.table(Order.CPU)
    assert row.split() == [
        *("net0/receiveq", "9", "running", "50.0", "3.0M", "25", "1.0K", "100", "1.0K", "3.5s", "4"),
    ]


def test_silent_guests_are_named_in_the_summary() -> None:
    view = View(moment(1.0), {}, ("two",))
    assert view.summary(Order.MEMORY).endswith("; no answer from two; 0 processes by memory")
