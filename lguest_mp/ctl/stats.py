"""``lguestctl stats``: guests and their processes in numbers, for programs. Units are base units: bytes, seconds.

Two forms of the same. :func:`as_json` has all there is; :func:`as_prometheus` has what changes, in the text format that
Prometheus scrapes (version 0.0.4), for its node exporter's textfile collector or whatever serves it. docs/lguestctl.md
describes both, and what will not change about them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lguest_mp.ctl import samples
from lguest_mp.ctl.client import Description
from lguest_mp.record import Value

if TYPE_CHECKING:
    from lguest_mp.control import GuestFacts
    from lguest_mp.ctl.samples import Process
    from lguest_mp.errors import LguestError

#: Of the JSON form: raised when a field changes its meaning or goes. New fields do not count.
SCHEMA = 1


class Stats(Value):
    """All guests, ``silent`` ones by name only, and their processes, at one ``time`` (seconds since 1970)."""

    time: float
    guests: tuple[GuestFacts, ...]
    processes: tuple[Process, ...]
    silent: tuple[str, ...]


def take(found: Mapping[str, Description | LguestError]) -> Stats:
    """Looks at the processes of these guests now."""
    moment = samples.take(each for each in found.values() if isinstance(each, Description))
    silent = tuple(name for name, each in found.items() if not isinstance(each, Description))
    return Stats(time.time(), moment.guests, moment.processes, silent)


# ---- JSON ----


def as_json(stats: Stats) -> str:
    """One JSON object."""
    guests: list[dict[str, Any]] = [_guest(guest, stats) for guest in stats.guests]
    guests += [{"name": name, "answers": False} for name in stats.silent]
    return json.dumps({"schema": SCHEMA, "time": stats.time, "guests": guests}, indent=2) + "\n"


def _guest(guest: GuestFacts, stats: Stats) -> dict[str, Any]:
    return {
        "name": guest.name,
        "answers": True,
        "pid": guest.pid,
        "life": guest.life,
        "started": guest.started,
        "reboots": guest.reboots,
        "machine": guest.machine,
        "cpu": guest.cpu,
        "memory_bytes": guest.memory,
        "kernel": guest.kernel,
        "processes": [_process(each) for each in stats.processes if each.guest == guest.name],
    }


def _process(process: Process) -> dict[str, Any]:
    facts, host = process.facts, process.host
    return {
        "process": facts.name,
        "device": facts.device,
        "queue": facts.queue,
        "pid": facts.pid,
        "life": facts.life,
        "state": None if host is None else host.state,
        "cpu_seconds": None if host is None else host.seconds,
        "own_memory_bytes": None if host is None else host.own_memory,
        "requests": facts.requests,
        "bytes": facts.bytes,
        "last_request_age_seconds": facts.age,
        "restarts": facts.restarts,
        "last_end": facts.last_end,
        "policy": facts.policy,
    }


# ---- Prometheus ----


class _Metric(Value):
    """A metric: its ``name`` without the prefix, its ``kind``, what it ``means``, and its samples, None left out."""

    name: str
    kind: str
    means: str
    samples: Callable[[Stats], Iterable[tuple[dict[str, str], float | None]]]


def _of_guests(value: Callable[[GuestFacts], float]) -> Callable[[Stats], Iterator[tuple[dict[str, str], float]]]:
    return lambda stats: (({"guest": guest.name}, value(guest)) for guest in stats.guests)


def _of_processes(
    value: Callable[[Process], float | None],
) -> Callable[[Stats], Iterator[tuple[dict[str, str], float | None]]]:
    return lambda stats: (({"guest": each.guest, "process": each.facts.name}, value(each)) for each in stats.processes)


def _of_queues(
    value: Callable[[Process], float | None],
) -> Callable[[Stats], Iterator[tuple[dict[str, str], float | None]]]:
    return lambda stats: (
        ({"guest": each.guest, "device": each.facts.device, "queue": each.facts.queue}, value(each))
        for each in stats.processes
        if each.facts.device is not None and each.facts.queue is not None
    )


def _up(stats: Stats) -> Iterator[tuple[dict[str, str], float]]:
    yield from (({"guest": guest.name}, 1) for guest in stats.guests)
    yield from (({"guest": name}, 0) for name in stats.silent)


def _info(stats: Stats) -> Iterator[tuple[dict[str, str], float]]:
    for guest in stats.guests:
        yield {"guest": guest.name, "machine": guest.machine, "cpu": guest.cpu, "kernel": guest.kernel}, 1


_METRICS = (
    _Metric("up", "gauge", "Whether the guest's launcher answers.", _up),
    _Metric("guest_info", "gauge", "What the guest is made of; always 1.", _info),
    _Metric(
        *("guest_start_time_seconds", "gauge", "When the guest last began, since 1970."),
        _of_guests(lambda guest: guest.started),
    ),
    _Metric(
        *("guest_reboots_total", "counter", "How often the guest has rebooted."),
        _of_guests(lambda guest: guest.reboots),
    ),
    _Metric("guest_memory_bytes", "gauge", "The guest's memory.", _of_guests(lambda guest: guest.memory)),
    _Metric(
        *("process_up", "gauge", "Whether there is such a process now."),
        _of_processes(lambda each: each.facts.pid is not None),
    ),
    _Metric(
        *("process_cpu_seconds_total", "counter", "CPU time of the process; begins anew when it is replaced."),
        _of_processes(lambda each: None if each.host is None else each.host.seconds),
    ),
    _Metric(
        *("process_own_memory_bytes", "gauge", "Memory of the process that no other shares."),
        _of_processes(lambda each: None if each.host is None else each.host.own_memory),
    ),
    _Metric(
        *("process_restarts_total", "counter", "How often the process was replaced."),
        _of_processes(lambda each: each.facts.restarts),
    ),
    _Metric(
        *("queue_requests_total", "counter", "Requests that were completed."),
        _of_queues(lambda each: each.facts.requests),
    ),
    _Metric(
        *("queue_data_bytes_total", "counter", "Bytes of data in these requests."),
        _of_queues(lambda each: each.facts.bytes),
    ),
    _Metric(
        *("queue_last_request_age_seconds", "gauge", "How long ago the last request was completed."),
        _of_queues(lambda each: each.facts.age),
    ),
)


def as_prometheus(stats: Stats) -> str:
    """The text exposition format."""
    return "".join(f"{line}\n" for metric in _METRICS for line in _lines(metric, stats))


def _lines(metric: _Metric, stats: Stats) -> Iterator[str]:
    name = f"lguest_{metric.name}"
    yield f"# HELP {name} {metric.means}"
    yield f"# TYPE {name} {metric.kind}"
    for labels, value in metric.samples(stats):
        if value is not None:
            text = ",".join(f'{label}="{_escaped(content)}"' for label, content in labels.items())
            yield f"{name}{{{text}}} {_number(value)}"


def _escaped(label: str) -> str:
    """A label's value: backslash, quote and line feed are escaped, and what is no text is made some."""
    text = label.encode(errors="replace").decode()
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
