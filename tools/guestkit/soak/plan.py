"""How long a soak goes on, with what, and what it tells."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guestkit.deaths import Death, Killer
from guestkit.guest import Guest
from guestkit.kit import GuestKit
from guestkit.progress import step
from guestkit.scripts import script_archive

#: A worker that dies is replaced, however often: what is counted here is not what the policy is for.
_POLICY = "--on-crash=restart,intensity=1000000,period=1"
_STUCK_AFTER = 1
#: How often a long one says how far it is, in seconds.
_NEWS_EVERY = 30.0
#: What Linux says when a device fails it.
_COMPLAINTS = (
    "I/O error|EXT4-fs (error|warning)|blocked for more|BUG:|Oops|NETDEV WATCHDOG|is not a head|virtio.*broken"
)


class Unsuitable(Exception):
    """A soak cannot be here; the text says what it needs."""


@dataclass(frozen=True)
class Plan:
    """So many times, or so many seconds, whatever is over first; by these deaths, in an order that the seed gives."""

    seed: int
    times: int | None = None
    seconds: float | None = None
    deaths: tuple[Death, ...] = (Death.SIGKILL,)

    def choose(self) -> random.Random:
        """Where all that is random comes from."""
        return random.Random(self.seed)

    def rounds(self) -> Iterator[int]:
        """Their numbers, from 0."""
        started = told = time.monotonic()
        for number in itertools.count():
            now = time.monotonic()
            if self.times is not None and number >= self.times:
                return
            if self.seconds is not None and now - started >= self.seconds:
                return
            if now - told >= _NEWS_EVERY:
                told = now
                step(f"{number} times so far, in {now - started:.0f} s")
            yield number


@dataclass
class Report:
    """What a soak saw: facts by their names."""

    facts: dict[str, object] = field(default_factory=dict)

    def __setitem__(self, name: str, fact: object) -> None:
        self.facts[name] = fact

    def __str__(self) -> str:
        return "\n".join(f"  {name}: {fact}" for name, fact in self.facts.items())


@dataclass(frozen=True)
class Room:
    """What guests are made of: ``initrd`` has the agent, mke2fs, perl and our scripts; ``directory`` is for disks.

    ``launcher`` and ``fragile`` are the commands of ``lguest`` and of the one for :attr:`Death.EXCEPTION`.
    """

    kit: GuestKit
    initrd: Path
    directory: Path
    launcher: Sequence[str]
    fragile: Sequence[str]

    def guest(self, plan: Plan, *options: str, **others: Any) -> Guest:
        """A guest, just launched, whose workers are replaced as often as they die."""
        launcher = self.fragile if Death.EXCEPTION in plan.deaths else self.launcher
        policy = [_POLICY]
        if Death.SIGSTOP in plan.deaths:
            policy.append(f"--stuck-after={_STUCK_AFTER}")
        others.setdefault("kernel", self.kit.kernel.image)
        others.setdefault("initrd", self.initrd)
        others.setdefault("launcher", launcher)
        # What the launcher says of deaths is not to stand in the midst of what the guest shows.
        others.setdefault("errors", self.directory / f"errors-of-{others.get('name', 'guest')}")
        return Guest(options=[*policy, *options], **others)


def make_initrd(kit: GuestKit) -> bytes:
    """The initramfs of a :class:`Room`."""
    return kit.initramfs("agent", ["virtio_net"]) + kit.sysroot.archive() + script_archive()


def killer(guest: Guest, plan: Plan, *workers: str) -> Killer:
    """Who kills these workers as the plan has it."""
    return Killer(guest, workers, plan.deaths, plan.choose())


def require_no_complaints(guest: Guest) -> None:
    """The guest's kernel has nothing to say about its devices."""
    said = guest.run(f"dmesg | grep -E '{_COMPLAINTS}' || true").strip()
    assert not said, f"the guest's kernel says:\n{said}"


@dataclass(frozen=True)
class Soak:
    """A soak, and how long it goes on if nothing else is said."""

    run: Callable[[Room, Plan], Report]
    times: int | None = None
    seconds: float | None = None
