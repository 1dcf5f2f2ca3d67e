"""A real guest whose launcher is a service: ready when Linux's drivers are, and the same service after a reboot."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from guestkit.guest import Launch
from guestkit.manager import Manager


def test_a_guest_as_a_service(launch: Launch, disk: Path, tmp_path: Path) -> None:
    with Manager(str(tmp_path / "notify")) as manager:
        variables = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "2000000"}
        guest = launch(f"--block={disk}", "--rng", variables=variables)
        ready = manager.wait_for("READY", "1")
        assert ready.values["STATUS"] == "running"
        guest.boot()
        os.kill(guest.members()["block0/requestq"], signal.SIGKILL)
        manager.wait_for("STATUS", "running, 1 restart")
        guest.agent.start("reboot -f")
        manager.wait_for("STATUS", "rebooting")
        manager.wait_for("READY", "1")
        guest.boot()
        manager.drain()
        assert manager.said("STATUS")[-1] == "running, 1 restart", "counted on in the guest's next life"
        assert not manager.said("STOPPING")
        guest.power_off()
        manager.wait_for("STOPPING", "1")
        assert manager.said("WATCHDOG")
        assert {each.pid for each in manager.heard} == {guest.pid}


def test_a_guest_with_no_driver_for_a_device_is_not_ready(launch: Launch, disk: Path, tmp_path: Path) -> None:
    """And the manager can tell a person which one it is that is missing."""
    with Manager(str(tmp_path / "notify")) as manager:
        guest = launch(
            f"--block={disk}",
            "--rng",
            arguments=("quiet", "agent=ttyS0", "load=virtio_pci,virtio_blk"),
            variables={"NOTIFY_SOCKET": manager.address},
        )
        guest.boot("ttyS0")
        guest.power_off()
        manager.wait_for("STOPPING", "1")
        assert not manager.said("READY")
        assert manager.said("STATUS")[-2:] == [
            "waiting for the drivers of console, rng0",
            "the guest has switched itself off",
        ]
