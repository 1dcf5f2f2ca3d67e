"""--chroot and --username: in every process, before the guest's first instruction."""

from __future__ import annotations

import os
import pwd
import signal
from pathlib import Path

import pytest
from launching import PATIENCE, Launch

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root may change its root directory and its user")


@root_only
def test_every_process_is_confined(launch: Launch, jail: Path) -> None:
    (jail / "this-is-the-jail").touch()
    nobody = pwd.getpwnam("nobody")
    launcher = launch("who", "--username=nobody", f"--chroot={jail}")
    launcher.wait_for("^root this-is-the-jail", PATIENCE)
    found = launcher.wait_for(r"^uid (\d+) gid (\d+) groups ([\d ]+) worker (\d+)", PATIENCE)
    uid, gid, groups, worker = found.groups
    assert (int(uid), int(gid), int(worker)) == (nobody.pw_uid, nobody.pw_gid, nobody.pw_uid)
    assert {int(group) for group in groups.split()} == set(os.getgrouplist("nobody", nobody.pw_gid))
    processes = launcher.processes()
    assert len(processes) >= 3
    for pid in processes:
        assert os.readlink(f"/proc/{pid}/root") == str(jail)
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        ids = {line.split(":")[0]: line.split()[1:] for line in status if line.startswith(("Uid", "Gid"))}
        assert ids == {"Uid": [str(nobody.pw_uid)] * 4, "Gid": [str(nobody.pw_gid)] * 4}


@root_only
def test_a_confined_supervisor_still_takes_everybody_with_it(launch: Launch, jail: Path) -> None:
    launcher = launch("who", "--username=nobody", f"--chroot={jail}")
    launcher.wait_for("^uid", PATIENCE)
    launcher.signal(signal.SIGKILL)
    launcher.wait()
    launcher.wait_until_gone()


@root_only
def test_the_process_table_says_what_can_be_known(launch: Launch, jail: Path) -> None:
    launcher = launch("who", "--username=nobody", f"--chroot={jail}")
    launcher.wait_for("^uid", PATIENCE)
    launcher.signal(signal.SIGUSR1)
    launcher.wait_for(r"^lguest: cpu +\d+ -", PATIENCE)


def test_a_user_that_does_not_exist(launch: Launch) -> None:
    launcher = launch("forked_only", "--username=no-such-user")
    assert launcher.finish() == 1
    assert launcher.lines == ["--username=no-such-user: this host has no such user"]


@root_only
def test_a_directory_that_does_not_exist(launch: Launch) -> None:
    launcher = launch("forked_only", "--chroot=/no/such/directory")
    assert launcher.finish() == 1
    assert launcher.lines == ["--chroot=/no/such/directory: No such file or directory"]
