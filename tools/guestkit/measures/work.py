"""The guest's own work, in which no device has a part."""

from __future__ import annotations

from collections.abc import Iterator

from guestkit.measures.bench import Bench, Row, interleaved, rows_of, timed

_GOAL = 1.05
_SHA256_MIB = 64
_GZIP_COPIES = 4
_TURNS = 100_000
_PROGRAMS = 1000
_SYSCALLS = 2_000_000

_PREPARE = (
    f"dd if=/dev/zero of=/tmp/zeros bs=1M count={_SHA256_MIB} 2>/dev/null;"
    f" for i in $(seq {_GZIP_COPIES}); do cat /bin/busybox; done >/tmp/programs"
)
_WORK = {
    f"sha256sum of {_SHA256_MIB} MiB": "sha256sum /tmp/zeros",
    f"gzip of {_GZIP_COPIES} busyboxes": "gzip -c /tmp/programs >/dev/null",
    f"shell loop, {_TURNS:,} turns": f"i=0; while [ $i -lt {_TURNS} ]; do i=$((i+1)); done",
    f"{_PROGRAMS:,} fork+exec": f"for i in $(seq {_PROGRAMS}); do /bin/busybox true; done",
    # Each byte is a read and a write.
    f"{_SYSCALLS:,} system calls": f"dd if=/dev/zero of=/dev/null bs=1 count={_SYSCALLS // 2} 2>/dev/null",
}


def work(bench: Bench) -> Iterator[Row]:
    """Programs in the guest."""
    with bench.both() as guests:
        for guest in guests:
            guest.agent.run(_PREPARE)
        for name, command in _WORK.items():
            ours, theirs = interleaved(guests, bench.rounds, timed(command))
            yield from rows_of(name, ours, theirs, _GOAL)
