"""Deaths of a guest's processes at random moments, and how long it takes until there is a successor."""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from guestkit.guest import Guest
from guestkit.session import PATIENCE, SessionError

#: How often it is looked whether there is a successor, in seconds.
_LOOK = 0.002


class Death(Enum):
    """What is done to a worker; the value is what people call it."""

    SIGKILL = "SIGKILL"
    SIGSEGV = "SIGSEGV"
    SIGABRT = "SIGABRT"
    #: It lives, but does nothing any more.
    SIGSTOP = "SIGSTOP"
    #: An exception in the midst of its Python code; takes the launcher of :func:`fragile_launcher`.
    EXCEPTION = "exception"

    @property
    def signal(self) -> signal.Signals:
        """The signal that does it."""
        return signal.SIGUSR2 if self is Death.EXCEPTION else signal.Signals[self.value]


def fragile_launcher(python: str | Path) -> list[str]:
    """The command that runs ``lguest`` with workers in which SIGUSR2 raises an exception."""
    return [str(python), str(Path(__file__).with_name("fragile.py"))]


@dataclass
class Toll:
    """Who died how often, how, and how long (s) it took until a successor with the same title was there."""

    workers: Counter[str] = field(default_factory=Counter)
    deaths: Counter[str] = field(default_factory=Counter)
    vacancies: list[float] = field(default_factory=list)

    @property
    def total(self) -> int:
        """All deaths."""
        return self.deaths.total()

    def __str__(self) -> str:
        who = ", ".join(f"{name} {count}" for name, count in sorted(self.workers.items()))
        how = ", ".join(f"{name} {count}" for name, count in sorted(self.deaths.items()))
        if not self.vacancies:
            return "no deaths"
        median, longest = statistics.median(self.vacancies), max(self.vacancies)
        return (
            f"{self.total} deaths ({who}; {how}), a successor after {median * 1e3:.0f} ms (at most {longest * 1e3:.0f})"
        )


class Killer:
    """Kills some of a guest's workers, one at a time, and reads the guest's terminal meanwhile.

    The next one is killed up to ``pause`` seconds after the last one's successor has got its title, half of them in the
    first tenth: while that prepares itself, while it works off what was left, or while it serves.
    """

    def __init__(
        self, guest: Guest, workers: Sequence[str], deaths: Sequence[Death], choose: random.Random, pause: float = 0.1
    ) -> None:
        self._guest = guest
        self._workers = tuple(workers)
        self._deaths = tuple(deaths)
        self._choose = choose
        self._pause = pause
        self.toll = Toll()

    def kill(self) -> None:
        """Waits for a random moment, kills one of the workers, and waits for its successor.

        Only waits if there are no deaths to choose from, to see what is there without them.
        """
        self._guest.read_for(self._choose.uniform(0, self._choose.choice((self._pause / 10, self._pause))))
        if not self._deaths:
            return
        worker, death = self._choose.choice(self._workers), self._choose.choice(self._deaths)
        pid = self._wait_for(worker)
        # The number may be another process's by now, but a pidfd cannot.
        pidfd = os.pidfd_open(pid)
        try:
            if self._guest.members().get(worker) != pid:
                raise SessionError(f"{worker} ended without our doing:\n{self._guest.ending()}")
            signal.pidfd_send_signal(pidfd, death.signal)
        finally:
            os.close(pidfd)
        killed = time.monotonic()
        self._wait_for(worker, pid)
        self.toll.vacancies.append(time.monotonic() - killed)
        self.toll.workers[worker] += 1
        self.toll.deaths[death.value] += 1

    def _wait_for(self, worker: str, dead: int | None = None) -> int:
        """Waits until somebody other than ``dead`` serves as ``worker``; its process ID."""
        deadline = time.monotonic() + PATIENCE
        while (pid := self._guest.members().get(worker, dead)) in (dead, None):
            if time.monotonic() > deadline or self._guest.exit_status() is not None:
                raise SessionError(f"{worker} has no successor; the guest showed:\n{self._guest.ending()}")
            self._guest.read_for(_LOOK)
        return pid
