"""Launchers in threads of the test: guests that answer lguestctl whatever a test wants them to."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from lguest_mp import registry
from lguest_mp.control import GuestFacts, ProcessFacts, ProcessJail
from lguest_mp.jail.plan import OFF
from lguest_mp.line import Attachment, Line
from lguest_mp.supervisor import ending
from lguest_mp.supervisor.control import Control
from lguest_mp.supervisor.loop import Loop

GUEST = GuestFacts("", os.getpid(), "running", 1e9, 2, "pc", "unicorn", 256 << 20, "vm\x1b[2Jlinuz")
QUEUE = ProcessFacts(
    "block0/requestq", "block0", "requestq", None, "failed", 12, 49152, 3.5, 4, "was \x07 killed", "reset"
)
SUPERVISOR = ProcessFacts("supervisor", None, None, os.getpid(), "running")


@dataclass(frozen=True)
class Said:
    """A line of the log."""

    text: str
    source: str = ""
    time: float = 0.25
    level: int = 4


@dataclass
class FakeGuest:
    """The Subject of one guest; ``calls`` is what it was told to do."""

    name: str
    line: Line
    calls: list[str] = field(default_factory=list)
    log: list[Said] = field(default_factory=lambda: [Said("hello \x1b[31m"), Said("a word", "cpu")])
    rows: tuple[ProcessFacts, ...] = (SUPERVISOR, QUEUE)
    over: Callable[[bool], None] = lambda reboots: None

    def guest(self) -> GuestFacts:
        return GUEST.replace(name=self.name)

    def processes(self) -> Sequence[ProcessFacts]:
        return self.rows

    def jail(self) -> list[ProcessJail]:
        return [ProcessJail("cpu", os.getpid(), OFF)]

    def stop(self) -> None:
        self.calls.append("stop")
        self.over(False)

    def reboot(self) -> None:
        self.calls.append("reboot")
        self.over(True)

    def restart(self, device: str) -> None:
        self.calls.append(f"restart {device}")

    def reset(self, device: str) -> None:
        self.calls.append(f"reset {device}")

    def attach(self) -> Attachment:
        return self.line.attach()

    def resize(self, columns: int, rows: int) -> None:
        self.calls.append(f"resize {columns} {rows}")

    def entries(self, source: str | None, last: int) -> list[Said]:
        return [entry for entry in self.log if source in {None, entry.source}][-last:]

    def subscribe(self, callback: Callable[[Said], None]) -> Callable[[], None]:
        return lambda: None


@contextmanager
def running(name: str) -> Iterator[FakeGuest]:
    """A guest that runs; a reboot is another life of it, and a stop its end."""
    claim = registry.claim(name)
    line = Line()
    subject = FakeGuest(name, line)
    wake = os.eventfd(0)
    thread = threading.Thread(target=_run, args=(claim, subject, wake))
    thread.start()
    try:
        yield subject
    finally:
        os.eventfd_write(wake, 1)
        thread.join()
        os.close(wake)
        line.close()


def _run(claim: registry.Claim, subject: FakeGuest, wake: int) -> None:
    reboots = True
    while reboots:
        over: list[bool] = []
        subject.over = over.append
        with Loop() as loop:
            server = Control(claim.listener, claim.owner, loop, subject)
            loop.watch(wake, partial(over.append, False))
            while not over:
                loop.wait()
            reboots = over[0]
            server.close(ending.Rebooting() if reboots else ending.powered_off())
    claim.release()
