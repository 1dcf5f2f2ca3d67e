"""What the guest notices when a worker is killed: how long it waits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

from guestkit.deaths import Death, Killer
from guestkit.measures.bench import Bench, Row
from guestkit.scripts import command, script_archive

#: How long the guest reads around each death of its disk's worker, in seconds, and how often it dies.
_READING = 0.6
_KILLS_PER_ROUND = 4
_ALWAYS_RESTART = "--on-crash=restart,intensity=1000,period=1"


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
