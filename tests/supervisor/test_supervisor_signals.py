"""Signals to the supervisor: what it does with each, and that its children do nothing on their own."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
from launching import FAKE_GUEST, PATIENCE, Launch

from lguest_mp.supervisor import children
from lguest_mp.supervisor.signals import Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_it_clears_up_and_dies_by_the_same_signal(launch: Launch, number: signal.Signals) -> None:
    launcher = launch("hang")
    launcher.wait_until_up()
    launcher.signal(number)
    assert launcher.finish() == -number
    assert launcher.lines == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP])
def test_children_leave_the_terminals_signals_to_the_supervisor(launch: Launch, number: signal.Signals) -> None:
    launcher = launch("hang")
    members = launcher.wait_until_up() | launcher.waiting()
    for pid in members.values():
        os.kill(pid, number)
    launcher.signal(signal.SIGUSR1)
    launcher.wait_for("lguest: block0/requestq", PATIENCE)
    assert launcher.processes().keys() == {launcher.pid, *members.values()}
    launcher.signal(signal.SIGTERM)
    assert launcher.finish() == -signal.SIGTERM


def test_what_its_parent_ignores_it_ignores(launch: Launch) -> None:
    """As under nohup; SIGCHLD too, which would have Linux reap its children."""
    shell = ("/bin/sh", "-c", 'trap "" HUP CHLD; exec "$@"', "sh", sys.executable, str(FAKE_GUEST))
    launcher = launch("hang", "--on-crash=stop", launcher=shell)
    members = launcher.wait_until_up()
    launcher.signal(signal.SIGHUP)
    launcher.signal(signal.SIGUSR1)
    launcher.wait_for("lguest: block0/requestq", PATIENCE)
    os.kill(members["block0/requestq"], signal.SIGKILL)
    assert launcher.finish() == 4


def test_sigusr1_shows_the_processes(launch: Launch) -> None:
    launcher = launch("hang")
    members = launcher.wait_until_up() | launcher.waiting()
    launcher.signal(signal.SIGUSR1)
    launcher.wait_for("lguest: mule0/requestq", PATIENCE)
    header, *rows = [line.split() for line in launcher.lines]
    assert header[:2] == ["process", "pid"]
    assert {row[0]: int(row[1]) for row in rows} == {"supervisor": launcher.pid, **members}
    for row in rows:
        assert row[2] in ("sleeping", "running")
        assert float(row[3]) >= 0
        assert int(row[4]) > 0


def test_a_stopped_launcher_is_a_stopped_guest(launch: Launch) -> None:
    """In a process group without a shell (an orphaned one) Linux stops nobody: the guest goes on at once."""
    launcher = launch("hang")
    members = launcher.wait_until_up() | launcher.waiting()
    launcher.signal(signal.SIGTSTP)
    launcher.signal(signal.SIGUSR1)
    launcher.wait_for("lguest: block0/requestq", PATIENCE)
    launcher.wait_until_raw()
    assert launcher.processes().keys() == {launcher.pid, *members.values()}


def test_a_stopped_worker_can_be_ended(launch: Launch) -> None:
    launcher = launch("hang")
    os.kill(launcher.wait_until_up()["console/receiveq"], signal.SIGSTOP)
    launcher.signal(signal.SIGTERM)
    assert launcher.finish() == -signal.SIGTERM


def test_standard_input_and_output_may_be_closed(launch: Launch, tmp_path: Path) -> None:
    report = tmp_path / "stderr"
    shell = ("/bin/sh", "-c", f'exec <&- >&- 2>{report}; exec "$@"', "sh", sys.executable, str(FAKE_GUEST))
    launcher = launch("power_off", "--verbose", launcher=shell)
    assert launcher.finish() == 0
    assert "the guest powered off" in report.read_text()


def test_a_late_signal_has_no_effect_but_to_stop() -> None:
    """One that comes when the loop has ended, and before the signals are what they were."""

    def body(number: signal.Signals) -> int:
        with Signals():
            os.kill(os.getpid(), number)
        return 7

    for number, status in ((signal.SIGUSR1, 7), (signal.SIGWINCH, 7), (signal.SIGTERM, -signal.SIGTERM)):
        child = children.fork("late", partial(body, number))
        assert os.waitstatus_to_exitcode(child.reap()) == status


def test_signals_come_once_and_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with Signals() as signals:
        assert signals.take() == set()
        # To this thread: another one, the test runner's, would die of it.
        signal.raise_signal(signal.SIGWINCH)
        signal.raise_signal(signal.SIGUSR1)
        assert signals.take() == {signal.SIGWINCH, signal.SIGUSR1}
        assert signals.take() == set()
    assert (signal.getsignal(signal.SIGTERM), signal.pthread_sigmask(signal.SIG_BLOCK, ())) == before
