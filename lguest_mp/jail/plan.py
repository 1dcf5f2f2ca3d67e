"""What the host offers, what a process needs, and what becomes of the two: made before a fork, entered after it."""

from __future__ import annotations

from typing import Any

from lguest_mp import steps
from lguest_mp.errors import LguestError
from lguest_mp.jail import calls, landlock, limits, privileges, seccomp
from lguest_mp.jail.limits import Limit
from lguest_mp.jail.needs import Needs
from lguest_mp.jail.seccomp import Program
from lguest_mp.record import Value
from lguest_mp.steps import Step

#: What the plan of a process that is not jailed says.
OFF: dict[str, Any] = {"on": False}


class Mechanisms(Value):
    """What the host has: a filter for system calls, this ABI of Landlock (0: none); and in words what it lacks."""

    seccomp: bool
    landlock: int
    lacks: tuple[str, ...] = ()


def detect() -> Mechanisms:
    """Asks the kernel. What is always there is not asked for."""
    lacks = []
    if (reason := seccomp.missing()) is not None:
        lacks.append(f"seccomp (system calls) {reason}")
    try:
        abi = landlock.abi()
    except OSError as error:
        abi = 0
        lacks.append(f"Landlock (files) {landlock.missing(error)}")
    if 0 < abi < landlock.COMPLETE_ABI:
        lacks.append(f"Landlock is of ABI {abi} and does not know all that {landlock.COMPLETE_ABI} does")
    return Mechanisms(reason is None, abi, tuple(lacks))


class Plan(Value):
    """How one kind of process is jailed. Whoever is forked after it was made can enter it."""

    needs: Needs | None
    limits: tuple[Limit, ...] = ()
    program: Program | None = None
    abi: int = 0
    #: Which all this is, for the process that enters.
    steps: tuple[Step, ...] = ()

    def enter(self) -> None:
        """Takes effect in this process, which has one thread, for good. LguestError if the host refuses after all."""
        try:
            steps.make(self.steps)
        except OSError as error:
            raise LguestError(f"cannot enter the jail: {error}; --jail=off does without") from error

    def describe(self, files: tuple[int, ...] = ()) -> dict[str, Any]:
        """What ``report.py`` goes by, of values that JSON has. ``files``: what else the process was left."""
        if self.needs is None:
            return OFF
        return {
            "on": True,
            "files": sorted({0, 1, 2, *files}),
            "opens": self.needs.more_files,
            "limits": {limit.name: limit.value for limit in self.limits},
            "landlock": self.abi,
            "calls": None if self.program is None else [str(call) for call in _allowed(self.needs)],
        }


class Jail:
    """What the supervisor has of it: :attr:`lacks`, and a plan for whom it forks."""

    def __init__(self, on: bool = True) -> None:
        """``on``: --jail."""
        self._on = on
        self._plans: dict[Needs | None, Plan] = {None: Plan(None)}
        self._mechanisms = detect() if on else Mechanisms(seccomp=False, landlock=0)
        #: Of this process, from which all others are forked, when everything is loaded that it will need.
        self._memory = limits.memory()

    @property
    def lacks(self) -> str | None:
        """What this host lacks, as a line for the user; None: nothing."""
        if not self._mechanisms.lacks:
            return None
        return f"the guest's processes are jailed less well: {'; '.join(self._mechanisms.lacks)} (docs/jail.md)"

    def plan(self, needs: Needs | None) -> Plan:
        """How a process with these needs is jailed; None: it is not. The same plan every time."""
        if needs is None or not self._on:
            return self._plans[None]
        if needs not in self._plans:
            self._plans[needs] = self._make(needs)
        return self._plans[needs]

    def _make(self, needs: Needs) -> Plan:
        abi = self._mechanisms.landlock
        limited = limits.of(needs, self._memory)
        program = seccomp.assemble(_allowed(needs), calls.REFUSED) if self._mechanisms.seccomp else None
        entry = (
            *privileges.FORBID_NEW,
            *(landlock.restrict(abi) if abi else ()),
            *limits.lower(limited),
            *privileges.drop_all(),
            *(program.steps if program is not None else ()),
        )
        return Plan(needs, limited, program, abi, entry)


def _allowed(needs: Needs) -> tuple[calls.Call, ...]:
    return (*calls.COMMON, *(calls.THREADS if needs.threads else ()), *needs.calls)
