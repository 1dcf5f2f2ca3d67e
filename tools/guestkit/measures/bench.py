"""What a measure works with: the two guests that are compared, and the rows of the table."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from guestkit.disk import MIB
from guestkit.guest import Guest
from guestkit.kit import GuestKit
from guestkit.qemu import Machine, QemuGuest

MEMORY = 256
DISK_SIZE = 256 * MIB
#: The agent listens on the serial port, so that both guests speak over the same kind of device.
ARGUMENTS = ("quiet", "agent=ttyS0", "load=virtio_pci,virtio_blk")

AnyGuest = Guest | QemuGuest
Number = TypeVar("Number")


@dataclass(frozen=True)
class Times:
    """How long something took by the host's clock, the same for all guests, and what it took of its processors.

    All that the guest's processes did meanwhile counts. On a busy machine that tells more than the clock.
    """

    seconds: float
    processor: float


@dataclass(frozen=True)
class Row:
    """A number of ours in each round, QEMU's in the same rounds where there is one, and what it is to be at most.

    ``goal`` is for the median of the ratios, or of ``ours`` if it is ``absolute``. None: no goal. Where
    ``more_is_better`` it is what the number is to be at least.
    """

    name: str
    unit: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...] = ()
    goal: float | None = None
    absolute: bool = False
    more_is_better: bool = False

    @property
    def ratios(self) -> tuple[float, ...]:
        """Ours to QEMU's, round by round."""
        return tuple(our / their for our, their in zip(self.ours, self.theirs, strict=bool(self.theirs)))

    @property
    def is_met(self) -> bool | None:
        """Whether the goal is reached; None where there is none."""
        if self.goal is None:
            return None
        reached = statistics.median(self.ours if self.absolute else self.ratios)
        return reached >= self.goal if self.more_is_better else reached <= self.goal


@dataclass(frozen=True)
class Bench:
    """What is compared, and how often."""

    kit: GuestKit
    initrd: Path
    disks: tuple[Path, Path]
    launcher: Sequence[str]
    qemu_cpu: str
    rounds: int
    #: The Python that has the package in it, with what the package needs.
    python: Path
    engine: str = "unicorn"

    @contextmanager
    def ours(
        self, *options: str, arguments: Sequence[str] = ARGUMENTS, memory: int = MEMORY, disk: Path | None = None
    ) -> Iterator[Guest]:
        """Our guest, just launched, with its disk and further ``options``."""
        with Guest(
            kernel=self.kit.kernel.image,
            initrd=self.initrd,
            launcher=self.launcher,
            options=[f"--cpu={self.engine}", f"--block={disk or self.disks[0]}", *options],
            memory=memory,
            arguments=arguments,
        ) as guest:
            yield guest

    @contextmanager
    def theirs(
        self,
        tap: str | None = None,
        machine: Machine | None = None,
        *,
        memory: int = MEMORY,
        disk: Path | None = None,
    ) -> Iterator[QemuGuest]:
        """QEMU's guest, just launched, with its disk and, if it has a name, a tap.

        Its ``machine`` is the PC if nothing else is said; on KVM it is microvm.
        """
        kvm = self.engine == "kvm"
        with QemuGuest(
            kernel=self.kit.kernel.image,
            initrd=self.initrd,
            disk=disk or self.disks[1],
            cpu=self.qemu_cpu,
            tap=tap,
            memory=memory,
            arguments=ARGUMENTS,
            machine=machine or (Machine.MICROVM if kvm else Machine.PC),
            kvm=kvm,
        ) as guest:
            yield guest

    @contextmanager
    def both(self, *options: str, tap: str | None = None) -> Iterator[tuple[Guest, QemuGuest]]:
        """Both, ready to do what they are told: ours with further ``options``, QEMU's with a ``tap`` of that name."""
        with ExitStack() as stack:
            ours, theirs = stack.enter_context(self.ours(*options)), stack.enter_context(self.theirs(tap))
            for guest in (ours, theirs):
                guest.agent.wait_until_ready("ttyS0")
            yield ours, theirs


def interleaved(
    guests: Sequence[AnyGuest], rounds: int, measure: Callable[[AnyGuest], Number]
) -> list[tuple[Number, ...]]:
    """What is measured of each guest in each round, one after the other: for each guest its numbers.

    Every other round goes backwards, so that whatever the first one leaves to the second is shared out.
    """
    numbers: list[list[Number]] = [[] for _ in guests]
    for turn in range(rounds):
        order = list(enumerate(guests))
        for index, guest in reversed(order) if turn % 2 else order:
            numbers[index].append(measure(guest))
    return [tuple(each) for each in numbers]


def timed(command: str) -> Callable[[AnyGuest], Times]:
    """How long a command takes in a guest."""

    def times(guest: AnyGuest) -> Times:
        processor, started = cpu_seconds(guest), time.monotonic()
        guest.agent.run(command)
        return Times(time.monotonic() - started, cpu_seconds(guest) - processor)

    return times


def rows_of(name: str, ours: Sequence[Times], theirs: Sequence[Times], goal: float) -> Iterator[Row]:
    """Seconds, with a goal, and processor seconds."""
    yield Row(name, "s", tuple(each.seconds for each in ours), tuple(each.seconds for each in theirs), goal=goal)
    our_processor, their_processor = (tuple(each.processor for each in side) for side in (ours, theirs))
    yield Row("- processor time", "s", our_processor, their_processor)


def cpu_seconds(guest: AnyGuest) -> float:
    """CPU time of all of its processes so far, of the ended ones too."""
    ticks = 0
    for pid in guest.processes():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def make_disks(directory: Path) -> tuple[Path, Path]:
    """Two disks with the same content (each launcher locks its own)."""
    content = random.Random(0).randbytes(MIB)
    disks = directory / "ours.img", directory / "theirs.img"
    for disk in disks:
        with disk.open("wb") as file:
            for _ in range(DISK_SIZE // MIB):
                file.write(content)
    return disks
