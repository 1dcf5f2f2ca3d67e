"""What a process may still do, as it looks from outside: what the kernel says of it, and its plan where that is mute.

The kernel tells in /proc (proc(5)) of privileges, capabilities, limits, open files, and that there is a filter for
system calls. It tells neither what is in the filter nor what Landlock keeps away; the process entered both before it
did anything else, or it would not be there (``plan.py``).
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from lguest_mp.record import Value

_FORCE, _NOT, _UNKNOWN = "in force", "NOT in force", "not known"
#: Seccomp: in /proc/<pid>/status: SECCOMP_MODE_FILTER.
_FILTERED = "2"


class Restriction(Value):
    """One restriction of one process: whether it is in force, and what is to be known of it."""

    process: str
    restriction: str
    state: str
    detail: str


def report(name: str, pid: int, plan: dict[str, Any]) -> list[dict[str, str]]:
    """All of them for process ``pid``, whose plan says this of itself (``Plan.describe``)."""
    if not plan["on"]:
        return [vars(Restriction(name, "jail", _NOT, "it may do what its user may (--jail=off, or it has its own)"))]
    seen = _Seen(pid)
    rows = [
        ("no new privileges", _is(seen.status.get("NoNewPrivs"), "1"), "nothing that it executes gives it any"),
        ("capabilities", seen.capabilities(), "none"),
        ("files", *seen.files(plan)),
        ("system calls", *_calls(seen, plan)),
        ("file system, TCP, signals", *_landlock(plan)),
        *((f"limit: {limit.removeprefix('Max ')}", *seen.limit(limit, most)) for limit, most in plan["limits"].items()),
    ]
    return [vars(Restriction(name, *row)) for row in rows]


def _is(found: str | None, expected: str) -> str:
    if found is None:
        return _UNKNOWN
    return _FORCE if found == expected else _NOT


def _calls(seen: _Seen, plan: dict[str, Any]) -> tuple[str, str]:
    if plan["calls"] is None:
        return _NOT, "the host has no filter for system calls"
    names = sorted({call.partition("(")[0] for call in plan["calls"]})
    return _is(seen.status.get("Seccomp"), _FILTERED), f"{len(names)} may be made: {' '.join(names)}"


def _landlock(plan: dict[str, Any]) -> tuple[str, str]:
    if not plan["landlock"]:
        return _NOT, "the host has no Landlock; no system call in the list opens a file or makes a TCP socket"
    return _FORCE, f"Landlock, ABI {plan['landlock']}: none"


class _Seen:
    """What /proc says of a process; in another root directory, or of one that has just ended, nothing."""

    def __init__(self, pid: int) -> None:
        self._place = Path("/proc") / str(pid)
        self.status = dict(self._pairs("status"))
        #: Soft and hard limit by name, as text; the name has spaces, the columns are 26 and 21 wide.
        self._limits = {line[:26].strip(): tuple(line[26:].split()[:2]) for line in self._lines("limits")[1:]}

    def _lines(self, name: str) -> list[str]:
        # A process may call itself by any bytes.
        try:
            return (self._place / name).read_bytes().decode("ascii", "replace").split("\n")
        except OSError:
            return []

    def _pairs(self, name: str) -> list[tuple[str, str]]:
        return [(key, value.strip()) for key, _, value in (line.partition(":") for line in self._lines(name))]

    def capabilities(self) -> str:
        sets = [self.status.get(name) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")]
        if None in sets:
            return _UNKNOWN
        return _FORCE if all(int(each or "0", 16) == 0 for each in sets) else _NOT

    def files(self, plan: dict[str, Any]) -> tuple[str, str]:
        opened = {}
        with suppress(OSError):
            for name in os.listdir(self._place / "fd"):
                with suppress(OSError):
                    opened[int(name)] = os.readlink(self._place / "fd" / name)
        if not opened:
            return _UNKNOWN, ""
        more = len(opened.keys() - set(plan["files"]))
        return _FORCE if more <= plan["opens"] else _NOT, ", ".join(opened[fd] for fd in sorted(opened))

    def limit(self, name: str, most: int) -> tuple[str, str]:
        found = self._limits.get(name)
        if found is None or len(found) < 2:
            return _UNKNOWN, str(most)
        state = _FORCE if all(each.isdecimal() and int(each) <= most for each in found) else _NOT
        return state, str(most)
