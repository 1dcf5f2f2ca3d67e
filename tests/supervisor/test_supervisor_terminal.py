"""The terminal: raw while the guest runs, the user's again on every way out; its size reaches the guest."""

from __future__ import annotations

import os
import signal
import termios

from launching import PATIENCE, Launch

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
