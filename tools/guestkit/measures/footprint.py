"""What a guest that does nothing costs: processor time and memory."""

from __future__ import annotations

import gzip
import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from guestkit.disk import MIB, make_sparse
from guestkit.growth import unique_size
from guestkit.measures.bench import AnyGuest, Bench, Row, cpu_seconds

GIB = 1024 * MIB
_IDLE_SECONDS = 10.0
_SETTLE_SECONDS = 3.0
_DENSE_GUESTS = 3
#: In 64 MiB Debian's kernel runs out of memory on any machine, in 72 now and then.
_DENSE_MEMORY = 96
#: No other mapping of shared memory is as large as the memory of the smallest guest.
_LEAST_MEMORY = 32 * MIB


def idle(bench: Bench) -> Iterator[Row]:
    """How much of a core an idle guest costs, all of its processes, both at the same time."""
    with bench.both() as (ours, theirs):
        time.sleep(_SETTLE_SECONDS)
        samples = [(cpu_seconds(ours), cpu_seconds(theirs), time.monotonic())]
        for _ in range(bench.rounds):
            time.sleep(_IDLE_SECONDS)
            samples.append((cpu_seconds(ours), cpu_seconds(theirs), time.monotonic()))
    shares = [
        [100 * (after[who] - before[who]) / (after[2] - before[2]) for before, after in pairwise(samples)]
        for who in (0, 1)
    ]
    yield Row("idle guest", "% of a core", tuple(shares[0]), tuple(shares[1]), goal=1, absolute=True)


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


def density(bench: Bench) -> Iterator[Row]:
    """How many idle guests of little memory there is room for in a GiB: some of each at once, and what they take."""
    initrd = bench.initrd.with_name("small.img")
    initrd.write_bytes(gzip.compress(bench.initrd.read_bytes()))
    bench = replace(bench, initrd=initrd)
    with ExitStack() as stack:
        ours: list[AnyGuest] = []
        theirs: list[AnyGuest] = []
        for number in range(_DENSE_GUESTS):
            disks = [disk.with_name(f"{number}-{disk.name}") for disk in bench.disks]
            for disk in disks:
                make_sparse(disk, MIB)
                stack.callback(disk.unlink)
            ours.append(stack.enter_context(bench.ours(memory=_DENSE_MEMORY, disk=disks[0])))
            theirs.append(stack.enter_context(bench.theirs(memory=_DENSE_MEMORY, disk=disks[1])))
        for guest in (*ours, *theirs):
            guest.agent.wait_until_ready("ttyS0")
        time.sleep(_SETTLE_SECONDS)
        sizes = [sum(_whole_size(guest) for guest in side) / len(side) for side in (ours, theirs)]
    our_count, their_count = ((GIB / size,) for size in sizes)
    yield Row(f"guests of {_DENSE_MEMORY} MiB per GiB", "", our_count, their_count, more_is_better=True)
    our_size, their_size = ((size / MIB,) for size in sizes)
    yield Row("- one takes", "MiB", our_size, their_size)


def _size_without_ram(pid: int) -> int:
    """Its share of what it has mapped, but for the guest's memory, in bytes."""
    return sum(mapping.share for mapping in _mappings(pid) if not mapping.is_ram)


def _whole_size(guest: AnyGuest) -> int:
    """All that the host has given to a guest's processes, its memory and what they have mapped of it, in bytes."""
    mappings = [mapping for pid in guest.processes() for mapping in _mappings(pid)]
    rams = {mapping.ram: mapping for mapping in mappings if mapping.is_ram}
    return sum(mapping.share for mapping in mappings if not mapping.is_ram) + sum(
        mapping.allocated() for mapping in rams.values()
    )


@dataclass(frozen=True)
class _Mapping:
    """A mapping of a process: its ``share`` of what is there, in bytes; ``ram`` is the inode of a guest's memory."""

    pid: int
    addresses: str
    share: int
    ram: str

    @property
    def is_ram(self) -> bool:
        """Whether it is the shared memory of a guest of ours; QEMU's guests have private memory."""
        return bool(self.ram)

    def allocated(self) -> int:
        """What there is of it on the host, whoever has mapped it: some of it, nobody has any more. It takes root."""
        return os.stat(f"/proc/{self.pid}/map_files/{self.addresses}").st_blocks * 512


def _mappings(pid: int) -> Iterator[_Mapping]:
    addresses = ram = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            addresses = words[0]
            first, last = (int(word, 16) for word in addresses.split("-"))
            ram = words[4] if line.endswith("/dev/zero (deleted)") and last - first >= _LEAST_MEMORY else ""
        elif words[0] == "Pss:":
            yield _Mapping(pid, addresses, int(words[1]) * 1024, ram)
