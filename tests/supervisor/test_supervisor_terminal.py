"""The terminal: raw while the guest runs, the user's again on every way out; its size reaches the guest."""

from __future__ import annotations

import os
import signal
import sys
import termios

import pytest
from launching import FAKE_GUEST, JOB_SHELL, PATIENCE, Launch

_IFLAG, _OFLAG, _CFLAG, _LFLAG = range(4)


def test_each_key_is_the_guests(launch: Launch) -> None:
    launcher = launch("echo")
    launcher.wait_for("^up", PATIENCE)
    for key in "a\r\n\x03\x11\x13\x16\x1a\x1c":
        launcher.type(key)
        launcher.wait_for(f"^typed {ord(key):02x}\\b", PATIENCE)
    assert "typed" in launcher.output
    assert "\na" not in launcher.output, "no echo"


def test_output_is_still_lines(launch: Launch) -> None:
    launcher = launch("hang")
    launcher.wait_until_up()
    attributes = launcher.current_settings()
    assert attributes[_OFLAG] == launcher.settings[_OFLAG]
    local_modes = attributes[_LFLAG]
    assert isinstance(local_modes, int)
    assert not local_modes & (termios.ISIG | termios.ICANON | termios.ECHO)


def test_it_is_the_users_before_the_launcher_says_why_it_ends(launch: Launch) -> None:
    """All of ``test_supervisor_endings`` look at the terminal too; this one has the guest's processes end first."""
    launcher = launch("hang")
    members = launcher.wait_until_up()
    assert launcher.current_settings() != launcher.settings
    for pid in members.values():
        os.kill(pid, signal.SIGKILL)
    assert launcher.finish() in (3, 4)


def test_a_new_size_reaches_the_machine(launch: Launch) -> None:
    launcher = launch("sizes")
    launcher.wait_for("^up", PATIENCE)
    launcher.resize(132, 43)
    launcher.wait_for("^size 132 43", PATIENCE)
    launcher.resize(80, 24)
    launcher.wait_for("^size 80 24", PATIENCE)


@pytest.mark.parametrize("number", [signal.SIGTSTP, signal.SIGSTOP])
def test_a_stopped_job_leaves_the_terminal_to_the_shell(launch: Launch, number: signal.Signals) -> None:
    """Restored if it may say so (SIGTSTP), and taken again when it is continued."""
    shell = launch("echo", launcher=(sys.executable, str(JOB_SHELL), "fg", sys.executable, str(FAKE_GUEST)))
    job = int(shell.wait_for(r"^shell: job (\d+)", PATIENCE).groups[0])
    shell.wait_for("^up", PATIENCE)
    shell.type("a")
    shell.wait_for("^typed 61", PATIENCE)
    os.kill(job, number)
    restored = shell.wait_for(r"^shell: stopped, terminal restored: (\w+)", PATIENCE).groups[0]
    assert restored == str(number == signal.SIGTSTP)
    shell.signal(signal.SIGUSR1)
    shell.wait_until_raw()
    shell.type("b")
    shell.wait_for("typed 62", PATIENCE)
    os.kill(job, signal.SIGTERM)
    shell.wait_for(f"^shell: ended {-signal.SIGTERM}, terminal restored: True", PATIENCE)
    assert shell.finish() == 0


def test_a_job_in_the_background_takes_the_terminal_when_it_is_its_own(launch: Launch) -> None:
    shell = launch("echo", launcher=(sys.executable, str(JOB_SHELL), "bg", sys.executable, str(FAKE_GUEST)))
    job = int(shell.wait_for(r"^shell: job (\d+)", PATIENCE).groups[0])
    shell.wait_for("^up", PATIENCE)
    assert shell.current_settings() == shell.settings
    shell.signal(signal.SIGUSR1)
    shell.wait_until_raw()
    shell.type("a")
    shell.wait_for("typed 61", PATIENCE)
    os.kill(job, signal.SIGTERM)
    shell.wait_for(f"^shell: ended {-signal.SIGTERM}, terminal restored: True", PATIENCE)
    assert shell.finish() == 0


def test_a_job_in_the_background_leaves_the_terminal_alone_at_its_end(launch: Launch) -> None:
    shell = launch("echo", launcher=(sys.executable, str(JOB_SHELL), "fg", sys.executable, str(FAKE_GUEST)))
    job = int(shell.wait_for(r"^shell: job (\d+)", PATIENCE).groups[0])
    shell.wait_for("^up", PATIENCE)
    os.kill(job, signal.SIGSTOP)
    shell.wait_for("^shell: stopped", PATIENCE)
    os.kill(job, signal.SIGTERM)
    os.kill(job, signal.SIGCONT)
    shell.wait_for(f"^shell: ended {-signal.SIGTERM}, terminal restored: True", PATIENCE)
    assert shell.finish() == 0
