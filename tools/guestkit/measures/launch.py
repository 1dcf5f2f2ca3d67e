"""Launching: to the guest's first instruction, and to its init."""

from __future__ import annotations

import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from guestkit.guest import Guest
from guestkit.measures.bench import ARGUMENTS, MEMORY, AnyGuest, Bench, Row, Times, cpu_seconds, rows_of
from guestkit.progress import step
from guestkit.qemu import Machine

_TOOLS = Path(__file__).resolve().parents[2]
_GOAL = 0.8
_GOAL_OF_START = 150.0
_STARTS = ("launch to first instruction", "the same, kernel not cached")
#: What microVMs promise on KVM, in seconds.
_GOAL_ON_KVM = 0.125


def start(bench: Bench) -> Iterator[Row]:
    """From launching to the guest's first instruction, with a kernel whose first instruction says so.

    It is the stock kernel in all else (``firstword.py``), so it is read, found good, unpacked and put into guest memory
    like that. The cache of unpacked kernels is one of the measure's own.
    """
    kernel = bench.initrd.with_name("firstword.bin")
    command = [str(bench.python), "-m", "guestkit.firstword", str(bench.kit.kernel.image), str(kernel)]
    made = subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": str(_TOOLS)})
    if made.returncode != 0:
        step("start is left out: its kernel cannot be made; see above")
        return
    with tempfile.TemporaryDirectory(dir=bench.initrd.parent) as scratch:
        warm, cold = Path(scratch) / "warm", Path(scratch) / "cold"
        launching = _Launching(bench, kernel)
        launching.times(warm)  # not counted: it reads everything from the host's disk, and fills the cache
        rounds = [(launching.times(warm), launching.times(cold / str(number))) for number in range(2 * bench.rounds)]
    for name, goal, times in zip(_STARTS, (_GOAL_OF_START, None), zip(*rounds, strict=True), strict=True):
        yield Row(name, "ms", tuple(each.seconds * 1000 for each in times), goal=goal, absolute=True)
        yield Row("- processor time, and end", "ms", tuple(each.processor * 1000 for each in times))


@dataclass(frozen=True)
class _Launching:
    """A guest that ends with its first word."""

    bench: Bench
    kernel: Path

    def times(self, cache: Path) -> Times:
        """How long it takes to be heard, the launcher's cache in this directory, and what all of it took."""
        bench, before = self.bench, _of_children()
        with Guest(
            kernel=self.kernel,
            initrd=bench.initrd,
            launcher=bench.launcher,
            options=[f"--cpu={bench.engine}", f"--block={bench.disks[0]}"],
            memory=MEMORY,
            arguments=ARGUMENTS,
            variables={"XDG_CACHE_HOME": str(cache)},
        ) as guest:
            guest.wait_for("^!")
            seconds = time.monotonic() - guest.started
            guest.wait()
            return Times(seconds, _of_children() - before)


def _of_children() -> float:
    """Processor seconds of all children of this process that have ended, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def boot(bench: Bench) -> Iterator[Row]:
    """From launching to the first line of the guest's init, over the serial port."""

    def times(launched: AbstractContextManager[AnyGuest]) -> Times:
        with launched as guest:
            guest.wait_for("^init: started")
            return Times(time.monotonic() - guest.started, cpu_seconds(guest))

    machines = [Machine.MICROVM] if bench.engine == "kvm" else [Machine.PC, Machine.MICROVM]

    def one_round() -> list[Times]:
        return [times(bench.ours()), *(times(bench.theirs(machine=machine)) for machine in machines)]

    one_round()  # not counted: it reads everything from the host's disk
    ours, *others = zip(*(one_round() for _ in range(bench.rounds)), strict=True)
    for machine, theirs in zip(machines, others, strict=True):
        yield from rows_of(f"launch to init, {machine.value}", ours, theirs, goal=_GOAL)
    if bench.engine == "kvm":
        yield Row(
            "- what microVMs promise", "s", tuple(each.seconds for each in ours), goal=_GOAL_ON_KVM, absolute=True
        )
