"""Guests of lguest's own."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

from guestkit.measures.bench import Bench, Row

_GUESTS = Path(__file__).resolve().parents[3] / "tests" / "lguest" / "guests"


def hypercalls(bench: Bench) -> Iterator[Row]:
    """What an lguest guest's hypercalls cost, by a guest of the tests' that does nothing else."""
    command = [*bench.launcher, "4", str(_GUESTS / "speed.elf"), "costs"]
    rounds = []
    for _ in range(bench.rounds):
        shown = subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout
        counts = {name: int(count) for name, count in (line.split() for line in shown.splitlines())}
        khz = counts.pop("tsc_khz")
        rounds.append({name: count / khz * 1000 for name, count in counts.items()})
    for name in rounds[0]:
        costs = tuple(costs[name] for costs in rounds)
        yield Row(f"hypercall {name}", "us", costs)
        yield Row("- per second", "", tuple(1e6 / cost for cost in costs), more_is_better=True)
