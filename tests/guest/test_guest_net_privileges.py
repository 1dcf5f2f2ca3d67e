"""Privileges given up: a guest that root starts as another user, in another root, has every kind of network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from netguest import configure, ping

from guestkit.guest import Guest, Launch
from guestkit.namespaces import Namespace
from guestkit.unprivileged import NOBODY

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up what an ordinary user does not have")


@pytest.fixture
def confined(tmp_path: Path) -> list[str]:
    """The options that take everything away."""
    root = tmp_path / "root"
    root.mkdir()
    return ["--username=nobody", f"--chroot={root}"]


def assert_confined(guest: Guest) -> None:
    """Every process of the guest's own is nobody, and may nothing."""
    for name, pid in guest.members().items():
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        status = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
        assert status["Uid"].split() == [str(NOBODY)] * 4, name
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0, name


def test_a_tap(launch: Launch, host: Namespace, confined: list[str]) -> None:
    guest = launch("--tunnet=10.1.0.1", *confined)
    for _ in range(2):
        guest.boot()
        configure(guest, "10.1.0.2/24")
        ping(guest, "10.1.0.1")
        assert_confined(guest)
        guest.agent.start("reboot -f")
    guest.boot()
    guest.power_off()
    assert host.interfaces() == ["lo"]


def test_a_link(launch: Launch, confined: list[str]) -> None:
    guests = [launch("--net=link:confined", *confined, name=name) for name in ("one", "two")]
    for number, guest in enumerate(guests, 1):
        guest.boot()
        configure(guest, f"10.3.0.{number}/24")
    one, two = guests
    ping(one, "10.3.0.2")
    two.agent.start("reboot -f")
    two.boot()
    configure(two, "10.3.0.2/24")
    ping(one, "10.3.0.2")
    for guest in guests:
        assert_confined(guest)
        guest.power_off()


def test_a_users_own(launch: Launch, confined: list[str], with_slirp: dict[str, str]) -> None:
    guest = launch("--net=user", *confined, variables=with_slirp)
    for _ in range(2):
        guest.boot()
        guest.run("modprobe -q virtio_net; udhcpc -q -n -f -i eth0 >/dev/null 2>&1")
        ping(guest, "10.0.2.2")
        assert_confined(guest)
        guest.agent.start("reboot -f")
    guest.boot()
    guest.power_off()
