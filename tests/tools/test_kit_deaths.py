"""Workers are killed one after the other, each time another process, and a successor is waited for."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from fakelauncher import WORKERS

from guestkit.deaths import Death, Killer
from guestkit.guest import Guest
from guestkit.session import SessionError

LAUNCHER = (sys.executable, str(Path(__file__).with_name("fakelauncher.py")))


def fake_guest(*options: str) -> Guest:
    return Guest(kernel=Path("kernel"), initrd=Path("initrd"), launcher=LAUNCHER, options=options)


def killer(guest: Guest, deaths: Sequence[Death], seed: int = 1) -> Killer:
    return Killer(guest, WORKERS, deaths, random.Random(seed), pause=0.01)


@pytest.mark.parametrize("death", [Death.SIGKILL, Death.SIGSEGV, Death.SIGABRT, Death.SIGSTOP, Death.EXCEPTION])
def test_each_death_is_followed_by_a_successor(death: Death) -> None:
    with fake_guest() as guest:
        killing = killer(guest, [death])
        for _ in range(6):
            killing.kill()
        assert killing.toll.total == killing.toll.workers.total() == killing.toll.deaths[death.value] == 6
        assert len(killing.toll.vacancies) == 6
        assert min(killing.toll.vacancies) >= 0.02, "that long the supervisor waits"
        assert set(guest.members()) == {"", *WORKERS}


def test_another_process_serves_after_a_death() -> None:
    with fake_guest() as guest:
        killing = Killer(guest, WORKERS[:1], [Death.SIGKILL], random.Random(1), pause=0.01)
        served = set()
        for _ in range(4):
            killing.kill()
            served.add(guest.members()[WORKERS[0]])
        assert len(served) == 4


def test_the_seed_says_who_dies_how() -> None:
    tolls = []
    for _ in range(2):
        with fake_guest() as guest:
            killing = killer(guest, [Death.SIGKILL, Death.SIGABRT], seed=7)
            for _ in range(6):
                killing.kill()
            tolls.append((killing.toll.workers, killing.toll.deaths))
    assert tolls[0] == tolls[1]


def test_nobody_dies_where_there_is_no_death() -> None:
    with fake_guest() as guest:
        killing = killer(guest, [])
        killing.kill()
        assert killing.toll.total == 0
        assert str(killing.toll) == "no deaths"


def test_a_worker_without_a_successor_is_told() -> None:
    with fake_guest("--mourn") as guest, pytest.raises(SessionError, match="requestq has no successor"):
        killer(guest, [Death.SIGKILL]).kill()
