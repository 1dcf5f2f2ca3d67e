"""The environment's side of sd_notify: who wants to hear how often that we live, and who must not say it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestkit.manager import Manager
from lguest_mp.supervisor.notify import Notifier, environment_of_others


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    with Manager(str(tmp_path / "notify")) as listening:
        monkeypatch.setenv("NOTIFY_SOCKET", listening.address)
        yield listening


@pytest.mark.parametrize(
    ("microseconds", "seconds"),
    [("30000000", 30.0), ("1", 1e-6), ("0", None), ("", None), ("-5", None), ("1.5", None), ("9" * 30, None)],
)
def test_how_often_the_watchdog_looks(
    manager: Manager, monkeypatch: pytest.MonkeyPatch, microseconds: str, seconds: float | None
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", microseconds)
    notifier = Notifier()
    assert notifier.watchdog == seconds
    notifier.close()


def test_without_a_manager_all_is_said_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    notifier = Notifier()
    assert notifier.watchdog is None
    assert notifier.tell(READY="1")
    notifier.close()


def test_what_there_was_no_room_for_comes_later_once(manager: Manager) -> None:
    notifier = Notifier()
    manager.stuff()
    assert not notifier.tell(READY="1", STATUS="old")
    assert not notifier.tell(STATUS="new")
    manager.drain()
    assert notifier.tell()
    assert notifier.tell()
    manager.drain()
    assert (manager.said("READY"), manager.said("STATUS")) == (["1"], ["new"])
    notifier.close()


def test_other_programs_are_no_part_of_the_service(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    names = {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}
    assert os.environ.keys() - environment_of_others().keys() == names
