"""What is measured of a guest, ours beside QEMU's: each measure gives rows of numbers from interleaved rounds.

The machine is never quiet and its speed drifts, so ours and QEMU's are measured in turns, and what counts is the ratio
within each round. A measure is a function from a :class:`Bench` to its rows; a new one is added to ``MEASURES``.
"""

from __future__ import annotations

import os
import random
import re
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from guestkit import traffic
from guestkit.deaths import Death, Killer
from guestkit.disk import MIB
from guestkit.growth import unique_size
from guestkit.guest import Guest
from guestkit.kit import GuestKit
from guestkit.namespaces import Namespace, obstacle
from guestkit.progress import step
from guestkit.qemu import QemuGuest
from guestkit.scripts import command, script_archive

MEMORY = 256
DISK_SIZE = 256 * MIB
#: What goes through a TCP connection, in MiB, and how many pings there are in a row.
_STREAM_SIZE = 256
_PINGS = 2000
_IDLE_SECONDS = 10.0
_SETTLE_SECONDS = 3.0
#: How long the guest reads around each death of its disk's worker, in seconds, and how often it dies.
_READING = 0.6
_KILLS_PER_ROUND = 4
_ALWAYS_RESTART = "--on-crash=restart,intensity=1000,period=1"
#: The agent listens on the serial port, so that both guests speak over the same kind of device.
_ARGUMENTS = ("quiet", "agent=ttyS0", "load=virtio_pci,virtio_blk")

_GUESTS = Path(__file__).resolve().parents[2] / "tests" / "lguest" / "guests"

#: Where KVM tells of its machines, if the kernel's debugfs is mounted.
_STATISTICS = Path("/sys/kernel/debug/kvm")
_COUNTED_READS = 2000

AnyGuest = Guest | QemuGuest


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
    engine: str = "unicorn"

    @contextmanager
    def ours(self, *options: str, arguments: Sequence[str] = _ARGUMENTS) -> Iterator[Guest]:
        """Our guest, just launched, with its disk and further ``options``."""
        with Guest(
            kernel=self.kit.kernel.image,
            initrd=self.initrd,
            launcher=self.launcher,
            options=[f"--cpu={self.engine}", f"--block={self.disks[0]}", *options],
            memory=MEMORY,
            arguments=arguments,
        ) as guest:
            yield guest

    @contextmanager
    def theirs(self, tap: str | None = None) -> Iterator[QemuGuest]:
        """QEMU's guest, just launched, with its disk and, if it has a name, a tap."""
        with QemuGuest(
            kernel=self.kit.kernel.image,
            initrd=self.initrd,
            disk=self.disks[1],
            cpu=self.qemu_cpu,
            tap=tap,
            memory=MEMORY,
            arguments=_ARGUMENTS,
            kvm=self.engine == "kvm",
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
    if bench.engine == "kvm":
        yield Row("- what microVMs promise", "s", ours, goal=0.125, absolute=True)


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


def depths(bench: Bench) -> Iterator[Row]:
    """Direct reads and writes of 4 KiB, one at a time and 32 at a time: as many programs have one each under way."""
    with bench.both() as guests:
        for verb, words in (
            ("read", "if=/dev/vda of=/dev/null iflag=direct skip"),
            ("write", "if=/dev/zero of=/dev/vda oflag=direct seek"),
        ):
            for depth in (1, 32):
                count = 4096 // depth
                program = f"dd bs=4096 count={count} {words}=$((i * {count})) 2>/dev/null"
                command = f"for i in $(seq 0 {depth - 1}); do {program} & done; wait"

                def per_second(guest: AnyGuest, command: str = command, requests: int = depth * count) -> float:
                    started = time.monotonic()
                    guest.agent.run(command)
                    return requests / (time.monotonic() - started)

                rounds = [[per_second(guest) for guest in guests] for _ in range(bench.rounds)]
                ours, theirs = zip(*rounds, strict=True)
                yield Row(f"4 KiB {verb}s, depth {depth}", "/s", ours, theirs, goal=0.8, more_is_better=True)


def exits(bench: Bench) -> Iterator[Row]:
    """How often a direct read of 4 KiB leaves the guest for our machine process (KVM's own statistics, as root)."""
    if bench.engine != "kvm":
        return
    with bench.ours() as guest:
        guest.agent.wait_until_ready("ttyS0")
        found = list(_STATISTICS.glob(f"{guest.members()['cpu']}-*"))
        if not found:
            step(f"exits is left out: there is nothing about the guest in {_STATISTICS} (it takes root, and debugfs)")
            return
        counts = []
        for _ in range(bench.rounds):
            before = _exits(found[0])
            guest.agent.run(f"dd if=/dev/vda of=/dev/null bs=4096 count={_COUNTED_READS} iflag=direct")
            counts.append((_exits(found[0]) - before) / _COUNTED_READS)
    yield Row("exits per 4 KiB read", "", tuple(counts), goal=0.1, absolute=True)


def _exits(statistics_of_guest: Path) -> int:
    return sum(int((statistics_of_guest / name).read_text()) for name in ("mmio_exits", "io_exits"))


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
    with bench.ours("--rng", "--net=link:bench", arguments=("quiet",)) as guest:
        guest.boot()
        guest.run("modprobe -q virtio_net; ip link set eth0 up")
        time.sleep(_SETTLE_SECONDS)
        sizes = {name: unique_size(pid) / MIB for name, pid in guest.members().items()}
        overhead = sum(_size_without_ram(pid) for pid in guest.members().values()) / MIB
    yield Row(
        "all memory but the guest's", "MiB", (overhead,), goal=5 if bench.engine == "kvm" else None, absolute=True
    )
    yield Row("USS of the supervisor", "MiB", (sizes.pop(""),), goal=16, absolute=True)
    yield Row("USS of the machine", "MiB", (sizes.pop("cpu"),))
    for name, size in sorted(sizes.items()):
        yield Row(f"USS of {name}", "MiB", (size,), goal=2, absolute=True)


def net(bench: Bench) -> Iterator[Row]:
    """TCP between guest and host over a tap, both ways, and pings; left out where no tap can be made.

    QEMU moves the frames itself (no vhost), with all its offloads.
    """
    if reason := obstacle():
        step(f"net is left out: {reason}")
        return
    initrd = bench.initrd.with_name("net.img")
    initrd.write_bytes(bench.initrd.read_bytes() + bench.kit.sysroot.archive())
    bench = replace(bench, initrd=initrd)
    with (
        Namespace() as host,
        host.entered(),
        bench.both("--net=tap,ip=10.1.0.1/24,interface=ours", tap="theirs") as guests,
    ):
        host.set_address("theirs", "10.2.0.1")
        host.set_up("theirs")
        ends = [_End(guests[0], "10.1.0"), _End(guests[1], "10.2.0")]
        for end in ends:
            end.configure()
        for name, transfer in (("TCP to the guest", _End.read), ("TCP from the guest", _End.send)):
            rounds = [[transfer(end) for end in ends] for _ in range(bench.rounds)]
            ours, theirs = zip(*rounds, strict=True)
            our_speed, their_speed = (tuple(stream.speed for stream in side) for side in (ours, theirs))
            yield Row(name, "MiB/s", our_speed, their_speed, goal=0.8, more_is_better=True)
            our_packets, their_packets = (tuple(stream.per_interrupt for stream in side) for side in (ours, theirs))
            yield Row("- packets per interrupt", "", our_packets, their_packets, more_is_better=True)
        times = [[end.round_trip() for end in ends] for _ in range(bench.rounds)]
        our_times, their_times = zip(*times, strict=True)
        yield Row("ping round trip", "us", our_times, their_times, goal=1.2)


@dataclass(frozen=True)
class _Stream:
    """How fast many bytes went through, in MiB/s, and how many packets there were to an interrupt of their queue."""

    speed: float
    per_interrupt: float


@dataclass(frozen=True)
class _End:
    """A guest at the end of a tap: in its ``network`` (``10.1.0``) the host is number 1, and it is number 2."""

    guest: AnyGuest
    network: str

    def configure(self) -> None:
        """Loads the driver and gives the interface its address; each side learns where the other one is."""
        address = f"{self.network}.2/24"
        self.guest.agent.run(f"modprobe -q virtio_net; ip link set eth0 up && ip addr add {address} dev eth0")
        self.round_trip()

    def read(self) -> _Stream:
        """The host sends, the guest reads."""
        return self._transfer(traffic.guest_reads, traffic.seconds_to_send, "rx_packets", "input")

    def send(self) -> _Stream:
        """The guest sends, the host reads."""
        return self._transfer(traffic.guest_sends, traffic.seconds_to_receive, "tx_packets", "output")

    def round_trip(self) -> float:
        """How long a ping takes, program and all, in microseconds by the host's clock."""
        started = time.monotonic()
        self.guest.agent.run(f"ping -A -q -c {_PINGS} {self.network}.1")
        return (time.monotonic() - started) / _PINGS * 1e6

    def _transfer(
        self,
        in_guest: Callable[[str, int, int], str],
        here: Callable[[socket.socket, int], float],
        counter: str,
        queue: str,
    ) -> _Stream:
        packets, interrupts = self._counts(counter, queue)
        host = f"{self.network}.1"
        with traffic.listener(host) as listening:
            number = self.guest.agent.start(in_guest(host, traffic.port_of(listening), _STREAM_SIZE))
            with traffic.accepted(listening) as connection:
                seconds = here(connection, _STREAM_SIZE)
            self.guest.agent.finish(number)
        packets_after, interrupts_after = self._counts(counter, queue)
        return _Stream(_STREAM_SIZE / seconds, (packets_after - packets) / max(1, interrupts_after - interrupts))

    def _counts(self, counter: str, queue: str) -> tuple[int, int]:
        """Packets and interrupts of a queue so far."""
        answer = self.guest.agent.run(
            f"cat /sys/class/net/eth0/statistics/{counter}; awk '/-{queue}/ {{ print $2 }}' /proc/interrupts"
        )
        packets, interrupts = map(int, answer.split())
        return packets, interrupts


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


def crash(bench: Bench) -> Iterator[Row]:
    """How long the guest waits for the disk when its worker is killed amid direct reads, by the guest's clock.

    It is the longest time between the ends of two reads, one after the other, so it begins a little before the kill.
    For comparison, the longest one while nobody is killed.
    """
    initrd = bench.initrd.with_name("crash.img")
    initrd.write_bytes(bench.initrd.read_bytes() + bench.kit.sysroot.archive() + script_archive())
    gaps: dict[bool, list[float]] = {True: [], False: []}
    with replace(bench, initrd=initrd).ours(_ALWAYS_RESTART) as guest:
        guest.agent.wait_until_ready("ttyS0")
        killing = Killer(guest, ["block0/requestq"], [Death.SIGKILL], random.Random(0), pause=_READING / 3)
        for _ in range(_KILLS_PER_ROUND * bench.rounds):
            for killed in (True, False):
                number = guest.agent.start(command("gap", "/dev/vda", _READING))
                guest.wait_for("^reading")
                if killed:
                    guest.read_for(_READING / 3)
                    killing.kill()
                gaps[killed].append(float(guest.agent.finish(number).split()[-2]))
    yield Row("read when a worker dies", "ms", tuple(gaps[True]), goal=50, absolute=True)
    yield Row("- when nobody dies", "ms", tuple(gaps[False]))


MEASURES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "boot": boot,
    "reads": reads,
    "depths": depths,
    "exits": exits,
    "net": net,
    "idle": idle,
    "memory": memory,
    "hypercalls": hypercalls,
    "crash": crash,
}


#: Those of ours alone, for which there need be no QEMU.
ALONE = frozenset({"memory", "hypercalls", "crash"})


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


def _size_without_ram(pid: int) -> int:
    """Its share of what it has mapped, but for the guest's memory, in bytes."""
    total, is_ram = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            first, last = (int(word, 16) for word in line.split()[0].split("-"))
            is_ram = line.endswith("/dev/zero (deleted)") and last - first >= MEMORY * MIB
        elif line.startswith("Pss:") and not is_ram:
            total += int(line.split()[1]) * 1024
    return total
