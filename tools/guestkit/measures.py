"""What is measured of a guest, ours beside QEMU's: each measure gives rows of numbers from interleaved rounds.

The machine is never quiet and its speed drifts, so ours and QEMU's are measured in turns, and what counts is the ratio
within each round. A measure is a function from a :class:`Bench` to its rows; a new one is added to ``MEASURES``.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from guestkit.disk import MIB
from guestkit.guest import Guest
from guestkit.kit import GuestKit
from guestkit.qemu import QemuGuest

MEMORY = 256
DISK_SIZE = 256 * MIB
_IDLE_SECONDS = 10.0
_SETTLE_SECONDS = 3.0
#: The agent listens on the serial port, so that both guests speak over the same kind of device.
_ARGUMENTS = ("quiet", "agent=ttyS0", "load=virtio_pci,virtio_blk")

AnyGuest = Guest | QemuGuest


@dataclass(frozen=True)
class Row:
    """A number of ours in each round, QEMU's in the same rounds where there is one, and what it is to be at most.

    ``goal`` is for the median of the ratios, or of ``ours`` if it is ``absolute``. None: no goal.
    """

    name: str
    unit: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...] = ()
    goal: float | None = None
    absolute: bool = False

    @property
    def ratios(self) -> tuple[float, ...]:
        """Ours to QEMU's, round by round: less is better."""
        return tuple(our / their for our, their in zip(self.ours, self.theirs, strict=bool(self.theirs)))

    @property
    def is_met(self) -> bool | None:
        """Whether the goal is reached; None where there is none."""
        if self.goal is None:
            return None
        return statistics.median(self.ours if self.absolute else self.ratios) <= self.goal


@dataclass(frozen=True)
class Bench:
    """What is compared, and how often."""

    kit: GuestKit
    initrd: Path
    disks: tuple[Path, Path]
    launcher: Sequence[str]
    qemu_cpu: str
    rounds: int

    @contextmanager
    def ours(self, *options: str, arguments: Sequence[str] = _ARGUMENTS) -> Iterator[Guest]:
        """Our guest, just launched, with its disk and further ``options``."""
        with Guest(
            kernel=self.kit.kernel.image,
            initrd=self.initrd,
            launcher=self.launcher,
            options=[f"--block={self.disks[0]}", *options],
            memory=MEMORY,
            arguments=arguments,
        ) as guest:
            yield guest

    @contextmanager
    def theirs(self) -> Iterator[QemuGuest]:
        """QEMU's guest, just launched."""
        with QemuGuest(
            kernel=self.kit.kernel.image,
            initrd=self.initrd,
            disk=self.disks[1],
            cpu=self.qemu_cpu,
            memory=MEMORY,
            arguments=_ARGUMENTS,
        ) as guest:
            yield guest

    @contextmanager
    def both(self) -> Iterator[tuple[Guest, QemuGuest]]:
        """Both, ready to do what they are told."""
        with ExitStack() as stack:
            ours, theirs = stack.enter_context(self.ours()), stack.enter_context(self.theirs())
            for guest in (ours, theirs):
                guest.agent.wait_until_ready("ttyS0")
            yield ours, theirs


def boot(bench: Bench) -> Iterator[Row]:
    """From launching to the first line of the guest's init, over the serial port."""

    def seconds(launched: AbstractContextManager[AnyGuest]) -> float:
        with launched as guest:
            guest.wait_for("^init: started")
            return time.monotonic() - guest.started

    for launched in (bench.ours(), bench.theirs()):
        seconds(launched)  # not counted: it reads everything from the host's disk
    rounds = [(seconds(bench.ours()), seconds(bench.theirs())) for _ in range(bench.rounds)]
    ours, theirs = zip(*rounds, strict=True)
    yield Row("launch to init", "s", ours, theirs, goal=1.1)


def reads(bench: Bench) -> Iterator[Row]:
    """Direct reads of the disk in the guest, one at a time."""
    with bench.both() as guests:
        for size, name, count, repeat in ((4096, "4 KiB", 8192, 1), (MIB, "1 MiB", 256, 8)):
            read = f"dd if=/dev/vda of=/dev/null bs={size} count={count} iflag=direct"
            command = f"for i in $(seq {repeat}); do {read}; done"

            def microseconds(guest: AnyGuest, command: str = command, reads: int = repeat * count) -> float:
                started = time.monotonic()  # the host's clock, the same for both
                guest.agent.run(command)
                return (time.monotonic() - started) / reads * 1e6

            rounds = [[microseconds(guest) for guest in guests] for _ in range(bench.rounds)]
            ours, theirs = zip(*rounds, strict=True)
            yield Row(f"{name} direct read", "us", ours, theirs, goal=1.2)


def idle(bench: Bench) -> Iterator[Row]:
    """How much of a core an idle guest costs, all of its processes, both at the same time."""
    with bench.both() as (ours, theirs):
        time.sleep(_SETTLE_SECONDS)
        samples = [(_cpu_seconds(ours), _cpu_seconds(theirs), time.monotonic())]
        for _ in range(bench.rounds):
            time.sleep(_IDLE_SECONDS)
            samples.append((_cpu_seconds(ours), _cpu_seconds(theirs), time.monotonic()))
    shares = [
        [100 * (after[who] - before[who]) / (after[2] - before[2]) for before, after in pairwise(samples)]
        for who in (0, 1)
    ]
    yield Row("idle guest", "% of a core", tuple(shares[0]), tuple(shares[1]), goal=2, absolute=True)


def memory(bench: Bench) -> Iterator[Row]:
    """What each process has for itself (unique set size) while a guest with every device is idle."""
    with bench.ours("--rng", arguments=("quiet",)) as guest:
        guest.boot()
        time.sleep(_SETTLE_SECONDS)
        sizes = {name: _unique_size(pid) / MIB for name, pid in guest.members().items()}
    yield Row("USS of the supervisor", "MiB", (sizes.pop(""),), goal=16, absolute=True)
    yield Row("USS of the machine", "MiB", (sizes.pop("cpu"),))
    for name, size in sorted(sizes.items()):
        yield Row(f"USS of {name}", "MiB", (size,), goal=2, absolute=True)


MEASURES: dict[str, Callable[[Bench], Iterator[Row]]] = {"boot": boot, "reads": reads, "idle": idle, "memory": memory}


def make_disks(directory: Path) -> tuple[Path, Path]:
    """Two disks with the same content (each launcher locks its own)."""
    content = random.Random(0).randbytes(MIB)
    disks = directory / "ours.img", directory / "theirs.img"
    for disk in disks:
        with disk.open("wb") as file:
            for _ in range(DISK_SIZE // MIB):
                file.write(content)
    return disks


def _cpu_seconds(guest: AnyGuest) -> float:
    """CPU time of all of its processes so far, of the ended ones too."""
    ticks = 0
    for pid in guest.processes():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _unique_size(pid: int) -> int:
    """What would be free if the process ended, in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))
