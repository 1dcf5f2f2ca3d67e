"""The ways in which a guest ends: one exit status and one line each, and nothing remains."""

from __future__ import annotations

import os
import signal

import pytest
from launching import Launch


def test_the_guest_powers_off(launch: Launch) -> None:
    launcher = launch("power_off")
    assert launcher.finish() == 0
    assert launcher.lines == []


@pytest.mark.parametrize(
    ("scenario", "line"),
    [
        ("die", "the guest died: triple?fault"),
        ("vanish", "the guest died: the machine process exited with status 0"),
        ("crash", "the guest died: the machine process exited with status 70"),
    ],
)
def test_the_guest_dies(launch: Launch, scenario: str, line: str) -> None:
    launcher = launch(scenario)
    assert launcher.finish() == 3
    assert launcher.lines[-1:] == [line]


def test_the_machine_process_is_killed(launch: Launch) -> None:
    launcher = launch("hang")
    os.kill(launcher.wait_until_up()["cpu"], signal.SIGKILL)
    assert launcher.finish() == 3
    assert launcher.lines == ["the guest died: the machine process was killed by SIGKILL"]


def test_a_bug_in_the_machine_shows_its_traceback(launch: Launch) -> None:
    launcher = launch("crash")
    launcher.finish()
    assert launcher.lines[0] == "cpu: Traceback (most recent call last):"
    assert launcher.lines[-2] == "cpu: RuntimeError: a bug in the machine"


@pytest.mark.parametrize("worker", ["console/receiveq", "console/transmitq", "block0/requestq"])
def test_a_worker_is_killed(launch: Launch, worker: str) -> None:
    launcher = launch("hang", "--on-crash=stop")
    os.kill(launcher.wait_until_up()[worker], signal.SIGKILL)
    assert launcher.finish() == 4
    assert launcher.lines == [f"the worker {worker} was killed by SIGKILL; the guest is stopped"]


@pytest.mark.parametrize(
    ("order", "how"),
    [("crash", "was killed by SIGSEGV"), ("exit", "exited with status 9"), ("have_a_bug", "exited with status 70")],
)
def test_a_worker_ends_by_itself(launch: Launch, order: str, how: str) -> None:
    launcher = launch(f"worker_{order}", "--on-crash=stop")
    assert launcher.finish() == 4
    assert launcher.lines[-1:] == [f"the worker block0/requestq {how}; the guest is stopped"]


def test_a_bug_in_a_worker_shows_its_traceback(launch: Launch) -> None:
    launcher = launch("worker_have_a_bug", "--on-crash=stop")
    launcher.finish()
    assert launcher.lines[0] == "block0/requestq: Traceback (most recent call last):"
    assert launcher.lines[-2] == "block0/requestq: RuntimeError: a bug of ours"


def test_a_crash_leaves_the_stack_of_python(launch: Launch) -> None:
    launcher = launch("worker_crash", "--on-crash=stop")
    launcher.finish()
    assert launcher.lines[0] == "block0/requestq: Fatal Python error: Segmentation fault"
    assert any(" in _obey" in line for line in launcher.lines)


@pytest.mark.parametrize(
    "scenario",
    [
        "babble",
        "unknown_device",
        "unknown_queue",
        "wrong_queue_count",
        "ready_twice",
        "two_requests_at_once",
        "queue_of_a_reset_device",
        "an_answer_of_its_own",
        "ready_again",
    ],
)
def test_a_machine_that_breaks_the_protocol_is_a_dead_guest(launch: Launch, scenario: str) -> None:
    launcher = launch(scenario)
    assert launcher.finish() == 3
    [line] = launcher.lines
    assert line.startswith("the guest died: the machine process broke the protocol: ")


@pytest.mark.parametrize(
    ("scenario", "line"),
    [
        ("no_engine", "unicorn 2.1.4 is needed"),
        ("cannot", "this host is no good"),
        ("broken_engine", "the machine process exited with status 70"),
        ("short_of_memory", "cannot make the guest's channels: Cannot allocate memory"),
    ],
)
def test_a_machine_that_cannot_start(launch: Launch, scenario: str, line: str) -> None:
    launcher = launch(scenario)
    assert launcher.finish() == 1
    assert launcher.lines[-1:] == [line]


@pytest.mark.parametrize("scenario", ["ctrl_c", "worker_interrupt_guest"])
def test_three_times_control_c_is_an_interrupt(launch: Launch, scenario: str) -> None:
    launcher = launch(scenario)
    assert launcher.finish() == -signal.SIGINT
    assert launcher.lines == []


def test_a_supervisor_that_is_killed_takes_everybody_with_it(launch: Launch) -> None:
    launcher = launch("hang")
    members = launcher.wait_until_up() | launcher.waiting()
    assert launcher.processes().keys() == {launcher.pid, *members.values()}
    launcher.signal(signal.SIGKILL)
    assert launcher.wait() == -signal.SIGKILL
    launcher.wait_until_gone()


def test_what_the_guest_says_cannot_reach_the_terminal_as_control_characters(launch: Launch) -> None:
    launcher = launch("broken_device")
    launcher.finish()
    assert "\33" not in launcher.output
