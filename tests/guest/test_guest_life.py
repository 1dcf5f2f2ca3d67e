"""How a guest ends, and that nothing but its exit status remains."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import psutil
import pytest

from guestkit.disk import MIB
from guestkit.guest import Guest, Launch
from guestkit.session import SessionError

REBOOTS = 10


def assert_nothing_remains(guest: Guest) -> None:
    """No process of it, and the terminal is the person's again."""
    guest.wait_until_gone(1.0)
    assert guest.current_settings() == guest.settings


def test_power_off(launch: Launch, disk: Path) -> None:
    guest = launch(f"--block={disk}", "--rng")
    guest.boot()
    assert guest.current_settings() != guest.settings, "while the guest runs, each key is the guest's"
    guest.agent.start("poweroff -f")
    assert guest.wait() == 0
    assert_nothing_remains(guest)


def test_many_reboots_in_a_row(launch: Launch, disk: Path) -> None:
    guest = launch("--verbose", f"--block={disk}", "--rng")
    guest.boot()
    files = []
    memory = []
    for _ in range(REBOOTS):
        guest.agent.start("reboot -f")
        guest.boot()
        members = guest.members()
        assert members[""] == guest.pid
        assert len(members) == 6
        files.append(len(os.listdir(f"/proc/{guest.pid}/fd")))
        memory.append(psutil.Process(guest.pid).memory_full_info().uss)
    assert len(set(files)) == 1
    assert max(memory[-5:]) <= max(memory[:5]) + MIB // 2
    assert len(guest.processes()) == 6
    assert f"reboot {REBOOTS}" in guest.output
    guest.power_off()
    assert re.search(r"exits of the guest:(.*\n)+.* port read: PCI configuration", guest.output)
    assert_nothing_remains(guest)


def test_a_panic_that_the_kernel_answers_with_a_reboot(launch: Launch) -> None:
    guest = launch(arguments=("quiet", "panic=-1"))
    guest.boot()
    guest.agent.start("echo c >/proc/sysrq-trigger")
    guest.boot()
    guest.power_off()


def test_a_panic_that_the_launcher_hears_of(launch: Launch) -> None:
    guest = launch(arguments=("quiet",))
    guest.boot()
    guest.run("modprobe pvpanic_mmio")
    guest.agent.start("echo c >/proc/sysrq-trigger")
    assert guest.wait() == 3
    assert "panic" in guest.output.splitlines()[-1]
    assert_nothing_remains(guest)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_guest_that_hangs_after_a_panic_is_stopped_by_a_signal(launch: Launch, number: signal.Signals) -> None:
    guest = launch(arguments=("quiet", "panic=0"))
    guest.boot()
    guest.agent.start("dmesg -n 8; echo c >/proc/sysrq-trigger")
    guest.wait_for("end Kernel panic")
    with pytest.raises(SessionError):
        guest.wait(seconds=1)
    guest.signal(number)
    assert guest.wait() == -number
    assert_nothing_remains(guest)


@pytest.mark.parametrize("worker", ["console/receiveq", "console/transmitq", "block0/requestq", "rng0/requestq"])
def test_a_workers_death_ends_the_guest_if_the_user_wants_it(launch: Launch, disk: Path, worker: str) -> None:
    guest = launch(f"--block={disk}", "--rng", "--on-crash=stop")
    guest.boot()
    os.kill(guest.members()[worker], signal.SIGKILL)
    assert guest.wait() == 4
    assert [line for line in guest.output.splitlines() if worker in line and "SIGKILL" in line]
    assert_nothing_remains(guest)


def test_the_machines_death_is_the_guests(launch: Launch, disk: Path) -> None:
    guest = launch(f"--block={disk}", "--rng")
    guest.boot()
    os.kill(guest.members()["cpu"], signal.SIGKILL)
    assert guest.wait() == 3
    assert "SIGKILL" in guest.output.splitlines()[-1]
    assert_nothing_remains(guest)


def test_nothing_outlives_the_supervisor(launch: Launch, disk: Path) -> None:
    guest = launch(f"--block={disk}", "--rng")
    guest.boot()
    guest.agent.start("while :; do cat /dev/vda >/dev/null; done")
    assert len(guest.members()) == 6
    guest.signal(signal.SIGKILL)
    assert guest.wait() == -signal.SIGKILL
    guest.wait_until_gone(1.0)
