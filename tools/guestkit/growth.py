"""What a supervisor holds: whether it is more every time that something happens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from guestkit.disk import MIB
from guestkit.guest import Guest


class Grown(AssertionError):
    """It is more than it was."""


@dataclass(frozen=True)
class Holdings:
    """File descriptors and memory (unique set size, bytes) of a guest's supervisor, and the guest's processes."""

    files: int
    memory: int
    processes: int

    def require_no_more_than(self, before: Holdings, memory: int = MIB) -> None:
        """Grown if there are more files or processes than before, or over ``memory`` bytes more."""
        if self.files > before.files or self.processes > before.processes or self.memory > before.memory + memory:
            raise Grown(f"the supervisor had {before}; now it has {self}")

    def __str__(self) -> str:
        return f"{self.files} files, {self.memory / MIB:.2f} MiB, {self.processes} processes"


def require_no_growth(held: Sequence[Holdings]) -> None:
    """Grown unless one after the other, from the first on, it is no more.

    Memory goes up and down, with what is still shared with processes that were just forked. So what counts is the least
    of it, of the last third and of the first.
    """
    first = held[0]
    for each in held:
        replace(each, memory=0).require_no_more_than(first)
    third = -(-len(held) // 3)
    least, least_later = (min(part, key=lambda each: each.memory) for part in (held[:third], held[-third:]))
    least_later.require_no_more_than(least)


def holdings(guest: Guest) -> Holdings:
    """Those of a guest's supervisor now."""
    files = list(Path(f"/proc/{guest.pid}/fd").iterdir())
    return Holdings(len(files), unique_size(guest.pid), len(guest.processes()))


def unique_size(pid: int) -> int:
    """What would be free if the process ended, in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))
