"""docs/lguest@.service, as systemd reads it, and what it promises about the launcher."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lguest_mp import cli
from lguest_mp.errors import LguestError
from lguest_mp.supervisor.ending import ExitStatus

UNIT = Path(__file__).parents[1] / "docs" / "lguest@.service"
LAUNCHER = "/usr/local/bin/lguest"
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="this host has no systemd-analyze")


def settings() -> dict[str, str]:
    lines = (line.partition("=") for line in UNIT.read_text().splitlines() if not line.startswith("#"))
    return {name: value for name, separator, value in lines if separator}


def verify(text: str, directory: Path) -> str:
    """What systemd does not like about a unit that runs a program that exists."""
    unit = directory / UNIT.name
    unit.write_text(text.replace(LAUNCHER, sys.executable))
    command = ["systemd-analyze", "verify", str(unit)]
    finished = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return finished.stdout + (f"exit status {finished.returncode}" if finished.returncode else "")


@needs_systemd
def test_systemd_has_nothing_to_say_about_it(tmp_path: Path) -> None:
    assert not verify(UNIT.read_text(), tmp_path)


@needs_systemd
def test_systemd_would_say_something(tmp_path: Path) -> None:
    assert "WatchdocSec" in verify(UNIT.read_text().replace("WatchdogSec", "WatchdocSec"), tmp_path)


def test_what_cannot_succeed_is_not_tried_again() -> None:
    assert settings()["RestartPreventExitStatus"].split() == [str(int(ExitStatus.USAGE))]


def test_its_example_is_a_command_line() -> None:
    """The line of its comment that shows what a guest's file looks like, and the name that systemd puts in front."""
    example = next(line for line in UNIT.read_text().splitlines() if line.startswith("#     LGUEST_ARGUMENTS="))
    arguments = example.partition('="')[2].removesuffix('"').split()
    command = settings()["ExecStart"].replace("%i", "demo").replace("$LGUEST_ARGUMENTS", " ".join(arguments)).split()
    assert command[0] == LAUNCHER
    config = cli.parse(command[1:])
    assert (config.name, config.memory, config.arguments) == ("demo", 512 << 20, ("root=/dev/vda1",))


def test_a_name_that_no_guest_can_have_is_refused() -> None:
    r"""systemd-escape(1) makes ``\x20`` of what is no letter."""
    with pytest.raises(LguestError, match="a name has"):
        cli.parse([r"--name=a\x20guest", "256", "vmlinuz"])
