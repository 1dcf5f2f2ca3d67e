"""The disk: direct reads and writes in the guest, as many of them at a time as one likes (``c/disk-load.c``)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from guestkit.compiler import compile_static
from guestkit.cpio import CpioArchive
from guestkit.disk import MIB
from guestkit.measures.bench import AnyGuest, Bench, Row, interleaved
from guestkit.progress import SetupError, step

#: Verb, order, bytes of each, how many at a time, how many in all, and the row's name.
_LOADS = (
    ("read", "random", 4096, 1, 8192, "4 KiB random reads, depth 1"),
    ("write", "random", 4096, 1, 8192, "4 KiB random writes, depth 1"),
    ("read", "random", 4096, 32, 16384, "4 KiB random reads, depth 32"),
    ("write", "random", 4096, 32, 16384, "4 KiB random writes, depth 32"),
    ("read", "sequential", MIB, 1, 2048, "1 MiB sequential reads"),
    ("write", "sequential", MIB, 1, 1024, "1 MiB sequential writes"),
)

#: Where KVM tells of its machines, if the kernel's debugfs is mounted.
_STATISTICS = Path("/sys/kernel/debug/kvm")
_COUNTED_READS = 2000


def disk(bench: Bench) -> Iterator[Row]:
    """Requests per second, or bytes, for each load; the host's page cache is between the disks and their files."""
    program = bench.initrd.with_name("disk-load")
    try:
        compile_static("disk-load", program)
    except SetupError as error:
        step(f"disk is left out: {error}")
        return
    archive = CpioArchive()
    archive.file("bin/disk-load", program.read_bytes(), 0o755)
    initrd = bench.initrd.with_name("disk.img")
    initrd.write_bytes(bench.initrd.read_bytes() + archive.finish())
    with replace(bench, initrd=initrd).both() as guests:
        for verb, order, size, depth, count, name in _LOADS:
            command = f"disk-load /dev/vda {verb} {order} {size} {depth} {count}"
            unit, scale = ("/s", count) if size < MIB else ("MiB/s", count * size / MIB)

            def rate(guest: AnyGuest, command: str = command, scale: float = scale) -> float:
                started = time.monotonic()
                guest.agent.run(command)
                return scale / (time.monotonic() - started)

            ours, theirs = interleaved(guests, bench.rounds, rate)
            yield Row(name, unit, ours, theirs, goal=1.0, more_is_better=True)


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
            guest.agent.run(f"dd if=/dev/vda of=/dev/null bs=4096 count={_COUNTED_READS} iflag=direct 2>/dev/null")
            counts.append((_exits(found[0]) - before) / _COUNTED_READS)
    yield Row("exits per 4 KiB read", "", tuple(counts), goal=0.1, absolute=True)


def _exits(statistics_of_guest: Path) -> int:
    return sum(int((statistics_of_guest / name).read_text()) for name in ("mmio_exits", "io_exits"))
