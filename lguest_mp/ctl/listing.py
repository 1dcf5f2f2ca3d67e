"""``lguestctl list``, ``ps`` and ``jail``: what there is at this moment, in columns."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lguest_mp.control import ListJail, ProcessJail
from lguest_mp.ctl import samples, tables
from lguest_mp.ctl.client import Description
from lguest_mp.jail.report import report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lguest_mp.ctl.client import Place
    from lguest_mp.ctl.samples import Process
    from lguest_mp.errors import LguestError

_GUESTS = ("NAME", ">PID", "STATE", ">UP", ">REBOOTS", ">MEMORY", "MACHINE", "CPU", ">PROCESSES", ">RESTARTS", "KERNEL")
_PROCESSES = (
    *("PROCESS", ">PID", "LIFE", "STATE", ">CPU", ">MEMORY"),
    *(">REQUESTS", ">BYTES", ">LAST", ">RESTARTS"),
)
_MORE = ("DEVICE", "QUEUE", "POLICY", "LAST END")


def list_guests(place: Place) -> list[str]:
    """A line for each guest, also for those that do not answer."""
    described = place.describe_all(place.names())
    if not described:
        return []
    return tables.columns(_GUESTS, [_guest_row(place, name, found) for name, found in described.items()])


def _guest_row(place: Place, name: str, found: Description | LguestError) -> Sequence[str]:
    if not isinstance(found, Description):
        return (name, tables.or_dash(place.pid(name)), "no answer", *("-" for _ in _GUESTS[3:]))
    guest = found.guest
    return (
        guest.name,
        str(guest.pid),
        guest.life,
        tables.age(time.time() - guest.started),
        str(guest.reboots),
        tables.size(guest.memory),
        guest.machine,
        guest.cpu,
        str(sum(each.pid is not None for each in found.processes)),
        str(sum(each.restarts for each in found.processes)),
        guest.kernel,
    )


def list_processes(place: Place, name: str, *, more: bool) -> list[str]:
    """A line for each process of a guest, and for each queue that nobody serves."""
    with place.connect(name) as connection:
        moment = samples.take([connection.describe()])
    header = (*_PROCESSES, *_MORE) if more else _PROCESSES
    return tables.columns(header, [_process_row(each, more=more) for each in moment.processes])


def _process_row(process: Process, *, more: bool) -> Sequence[str]:
    facts, host = process.facts, process.host
    row = (
        facts.name,
        tables.or_dash(facts.pid),
        facts.life,
        tables.or_dash(None if host is None else host.state),
        tables.cpu_time(None if host is None else host.seconds),
        tables.size(None if host is None else host.own_memory),
        tables.number(facts.requests),
        tables.size(facts.bytes),
        tables.age(facts.age),
        str(facts.restarts),
    )
    if not more:
        return row
    return (*row, *map(tables.or_dash, (facts.device, facts.queue, facts.policy, facts.last_end)))


def list_jail(place: Place, name: str) -> list[str]:
    """A line for each restriction of each process."""
    with place.connect(name) as connection:
        jails = connection.ask(ListJail(), ProcessJail)
    rows = [row for each in jails for row in report(each.process, each.pid, each.plan)]
    header = ("PROCESS", "RESTRICTION", "STATE", "DETAIL")
    return tables.columns(header, [tuple(row[column.lower()] for column in header) for row in rows])
