"""Who may do what: a guest needs no privileges, and one that root starts can give them up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from guestkit.disk import MIB, make_sparse
from guestkit.guest import Launch
from guestkit.unprivileged import NOBODY

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up what an ordinary user does not have")


def test_an_ordinary_user_boots_the_same_guest(launch_unprivileged: Launch, public: Path) -> None:
    disk = make_sparse(public / "mine.img", 8 * MIB)
    disk.chmod(0o666)
    guest = launch_unprivileged(f"--block={disk}", "--rng")
    guest.boot()
    for pid in guest.members().values():
        status = _status(pid)
        assert status["Uid"].split()[0] != "0"
        assert int(status["CapEff"], 16) == 0
    guest.run("dd if=/dev/hwrng of=/dev/vda bs=4096 count=16 && sync")
    guest.power_off()
    assert any(disk.read_bytes()[:65536])


@only_root
def test_username_and_chroot_hold_in_every_process(launch: Launch, disk: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    guest = launch("--username=nobody", f"--chroot={root}", f"--block={disk}", "--rng")
    guest.boot()
    members = guest.members()
    assert len(members) == 6
    for name, pid in members.items():
        status = _status(pid)
        assert status["Uid"].split() == [str(NOBODY)] * 4, name
        assert status["Groups"].split() in ([], [str(NOBODY)]), name
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0, name
        assert Path(f"/proc/{pid}/root").readlink() == root, name
    guest.run("dd if=/dev/hwrng of=/dev/vda bs=4096 count=16 && sync")
    guest.power_off()


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
