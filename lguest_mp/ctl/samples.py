"""What the host says of a guest's processes, beside what its supervisor says, as of one moment.

psutil reads it from /proc. Another user's processes, and those that gave up being looked into, do not tell all: what
cannot be known is None.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from lguest_mp.record import Value
from lguest_mp.supervisor.processes import Sample, look_at

if TYPE_CHECKING:
    from lguest_mp.control import GuestFacts, ProcessFacts
    from lguest_mp.ctl.client import Description


class Process(Value):
    """One process (or a queue without one): what the supervisor says, what the host says, and whose it is."""

    guest: str
    facts: ProcessFacts
    host: Sample | None

    @property
    def key(self) -> tuple[str, str]:
        """What is the same from one moment to the next."""
        return self.guest, self.facts.name

    @property
    def state(self) -> str:
        """What it does, in a word: the host's if there is a process, else the supervisor's."""
        return self.facts.life if self.host is None or self.host.state is None else self.host.state


class Moment(Value):
    """All processes of some guests at one moment (``time``, of time.monotonic)."""

    time: float
    guests: tuple[GuestFacts, ...]
    processes: tuple[Process, ...]


def take(descriptions: Iterable[Description]) -> Moment:
    """Looks at all processes of these guests."""
    guests, processes = [], []
    for each in descriptions:
        guests.append(each.guest)
        for facts in each.processes:
            host = None if facts.pid is None else look_at(facts.name, facts.pid)
            processes.append(Process(each.guest.name, facts, host))
    return Moment(time.monotonic(), tuple(guests), tuple(processes))


class Rates(Value):
    """How fast things go: ``cpu`` in CPU seconds per second, ``requests`` and ``bytes`` per second. None: unknown."""

    cpu: float | None = None
    requests: float | None = None
    bytes: float | None = None


def rates(before: Moment | None, after: Moment) -> Mapping[tuple[str, str], Rates]:
    """How fast each process of ``after`` was since ``before``.

    A process that took another's place began from nothing; so did a queue whose guest rebooted.
    """
    if before is None:
        return {}
    known = {process.key: process for process in before.processes}
    seconds = max(after.time - before.time, 1e-3)
    return {
        process.key: _rates(known[process.key], process, seconds) for process in after.processes if process.key in known
    }


def _rates(before: Process, after: Process, seconds: float) -> Rates:
    return Rates(
        _rate(_cpu(before) if before.facts.pid == after.facts.pid else 0.0, _cpu(after), seconds),
        _rate(before.facts.requests, after.facts.requests, seconds),
        _rate(before.facts.bytes, after.facts.bytes, seconds),
    )


def _cpu(process: Process) -> float | None:
    return None if process.host is None else process.host.seconds


def _rate(before: float | None, after: float | None, seconds: float) -> float | None:
    if before is None or after is None:
        return None
    return (after - before if after >= before else after) / seconds
