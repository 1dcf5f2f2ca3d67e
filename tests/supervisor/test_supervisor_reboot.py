"""Reboots: by executing the command again, or in place; the same process either way."""

from __future__ import annotations

import getpass
import os
import signal
from pathlib import Path

import pytest
from launching import PATIENCE, Launch

REBOOTS = 20


def test_twenty_reboots_keep_the_process_and_leave_nothing_open(launch: Launch, tmp_path: Path) -> None:
    launcher = launch("reboots", "--verbose", kernel=str(tmp_path / "kernel"), arguments=(str(REBOOTS),))
    opened = set()
    for life in range(REBOOTS + 1):
        pid, files, count = launcher.wait_for(rf"^life {life} pid (\d+) files (\d+) reboots (\d+)", PATIENCE).groups
        assert int(pid) == launcher.pid
        assert int(count) == life
        opened.add(files)
    assert len(opened) == 1
    assert launcher.finish() == 0, launcher.output
    assert f"reboot {REBOOTS}" in launcher.lines


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_confined_launcher_reboots_in_place(launch: Launch, jail: Path) -> None:
    """No Python and no image can be found in the directory that it is confined to."""
    launcher = launch("reboots_in_place", "--verbose", "--username=nobody", f"--chroot={jail}")
    for _ in range(3):
        launcher.wait_for(f"^life of {launcher.pid} served by True", PATIENCE)
        launcher.type("r")
    launcher.wait_for(f"^life of {launcher.pid} served by True", PATIENCE)
    files = len(os.listdir(f"/proc/{launcher.pid}/fd"))
    launcher.type("r")
    launcher.wait_for(f"^life of {launcher.pid} served by True", PATIENCE)
    assert len(os.listdir(f"/proc/{launcher.pid}/fd")) == files
    launcher.type("q")
    assert launcher.finish() == 0, launcher.output
    assert "reboot 4" in launcher.lines


def test_nothing_of_a_life_is_kept_when_it_is_over(launch: Launch) -> None:
    """In place there is no exec to clean up. A life that were kept would be 4 KiB at the least.

    The log grows for a hundred lives, and is full.
    """
    launcher = launch("reboots_in_place", f"--username={getpass.getuser()}")
    held = []
    for _ in range(130):
        launcher.wait_for(f"^life of {launcher.pid} served by True", PATIENCE)
        held.append(_memory(launcher.pid))
        launcher.type("r")
    launcher.wait_for(f"^life of {launcher.pid} served by True", PATIENCE)
    launcher.type("q")
    assert launcher.finish() == 0, launcher.output
    assert held[129] - held[105] < 24 * 2048


def _memory(pid: int) -> int:
    """What a process has written to, in bytes, whether or not its children still share it."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def test_what_cannot_be_executed_again_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from lguest_mp.errors import LguestError  # noqa: PLC0415
    from lguest_mp.supervisor import reboot  # noqa: PLC0415

    monkeypatch.setattr("sys.executable", "/no/such/python")
    monkeypatch.setenv("LGUEST_REBOOTS", "nonsense")
    with pytest.raises(LguestError, match="cannot reboot: /no/such/python"):
        reboot.execute_again()
    assert reboot.count() == 1
    assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN
