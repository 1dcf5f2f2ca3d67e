"""The lives of devices and their workers, as a driver decides them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from launching import PATIENCE, Launch

from lguest_mp.supervisor.log import BURST


@pytest.mark.parametrize(
    "scenario",
    [
        "resets",
        "resets_under_load",
        "resets_of_nothing",
        "queue_resets",
        "stubborn_worker",
        "stubborn_worker_at_the_end",
    ],
)
def test_a_reset_is_done_when_the_workers_are_gone(launch: Launch, scenario: str) -> None:
    """Each scenario checks it from the machine's side; a failed assertion would be a dead guest."""
    launcher = launch(scenario)
    assert launcher.finish() == 0, launcher.output
    assert launcher.lines == []


def test_a_worker_waits_for_its_driver(launch: Launch) -> None:
    launcher = launch("by_keys")
    launcher.wait_for("^up", PATIENCE)
    pids = {**launcher.waiting("console/receiveq"), **launcher.waiting("console/transmitq")}
    launcher.type("d")
    launcher.wait_for(f"^served by {pids['console/receiveq']} {pids['console/transmitq']}\r", PATIENCE)
    launcher.type("q")
    assert launcher.finish() == 0, launcher.output


def test_a_worker_that_ends_while_it_waits_has_a_successor_and_nobody_notices(launch: Launch) -> None:
    launcher = launch("by_keys")
    launcher.wait_for("^up", PATIENCE)
    pid = launcher.waiting("console/receiveq")["console/receiveq"]
    os.kill(pid, signal.SIGKILL)
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.01)
    launcher.type("d")
    assert int(launcher.wait_for(r"^served by (\d+)", PATIENCE).groups[0]) != pid
    launcher.type("q")
    assert launcher.finish() == 0, launcher.output
    assert launcher.lines == []


def test_a_broken_device_is_one_line_and_nobody_else_notices(launch: Launch) -> None:
    launcher = launch("broken_device")
    assert launcher.finish() == 0, launcher.output
    assert launcher.lines == [
        "console/receiveq: a descriptor?[2J beyond all (virtio 1.2, 2.7.5); the device needs a reset"
    ]


def test_a_driver_that_breaks_the_standard_for_ever_does_not_fill_the_log(launch: Launch) -> None:
    launcher = launch("breaks_the_standard_for_ever", arguments=(str(2 * BURST),))
    assert launcher.finish() == 0, launcher.output
    assert "block0/requestq: too many lines; some are dropped" in launcher.lines
    assert len(launcher.lines) < 1.7 * BURST


def test_a_worker_that_never_stops_talking_is_heard_by_nobody_to_death(launch: Launch) -> None:
    launcher = launch("flood", "--verbose")
    assert launcher.finish() == 0, launcher.output
    assert "block0/requestq: too many lines; some are dropped" in launcher.lines
    assert launcher.lines.count("x" * 900) < 2 * BURST


def test_a_worker_says_something(launch: Launch) -> None:
    launcher = launch("log")
    assert launcher.finish() == 0, launcher.output
    short, long = launcher.lines
    assert short == "block0: a word"
    assert set(long) == {"x"}
    assert len(long) <= 1000


def test_verbose_tells_what_happens(launch: Launch) -> None:
    launcher = launch("queue_resets", "--verbose", "--initrd=some.img")
    assert launcher.finish() == 0, launcher.output
    told = "\n".join(launcher.lines)
    for words in (
        "guest test: 16 MiB of memory, kernel kernel",
        "initrd some.img",
        "device 0: console",
        "device 1: block0",
        "the guest begins at 0x1000000",
        "device console OK: offered 0x20 and the bus's, accepted 0x20",
        "console/transmitq is process ",
        "resetting queue transmitq of device console",
        "the guest powered off",
    ):
        assert words in told
