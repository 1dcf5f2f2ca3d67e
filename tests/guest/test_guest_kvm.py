"""What is KVM's alone: several processors, and I/O that nobody in the machine process hears of.

Only where ``$LGUEST_TEST_ENGINE`` has ``--cpu=kvm``; ``tests/nested`` runs these where there is no KVM, too.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
from pathlib import Path

import pytest

from guestkit.disk import MIB
from guestkit.guest import Guest, Launch
from guestkit.session import SessionError

READS = 500


@pytest.fixture(autouse=True)
def cpus(engine: list[str]) -> int:
    """How many processors the guests have."""
    if "--cpu=kvm" not in engine:
        pytest.skip("the guests do not run on KVM")
    return next((int(option.partition("=")[2]) for option in engine if option.startswith("--cpus=")), 1)


@pytest.fixture
def statistics() -> Path:
    """KVM's statistics of each machine, by the process that runs it (the kernel's debugfs)."""
    folder = Path("/sys/kernel/debug/kvm")
    if not folder.exists():
        mounted = subprocess.run(["mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug"], check=False)
        if mounted.returncode or not folder.exists():
            pytest.skip("KVM's statistics are not here: they take root and debugfs")
    return folder


def count(statistics: Path, guest: Guest, name: str) -> int:
    """How often something happened so far, on all processors."""
    (machine,) = statistics.glob(f"{guest.members()['cpu']}-*")
    return int((machine / name).read_text())


def test_a_disk_read_leaves_the_guest_for_nobody(launch: Launch, disk: Path, statistics: Path) -> None:
    """Not the read's notification, not its interrupt: exits to the machine process are what else the guest does."""
    guest = launch(f"--block={disk}")
    guest.boot()
    read = f"dd if=/dev/vda of=/dev/null bs=4k count={READS} iflag=direct 2>/dev/null"
    guest.run(read)
    interrupts = interrupts_of_disk(guest)
    exits = {name: count(statistics, guest, name) for name in ("mmio_exits", "io_exits")}
    guest.run(read)
    assert interrupts_of_disk(guest) - interrupts >= READS
    for name, before in exits.items():
        assert count(statistics, guest, name) - before < READS / 10, name
    guest.power_off()


def interrupts_of_disk(guest: Guest) -> int:
    """How often the disk's queue interrupted the guest so far."""
    line = guest.run("grep req.0 /proc/interrupts").split()
    return sum(int(word) for word in line[1:] if word.isdecimal())


def test_a_kvm_that_can_is_used_without_being_asked_for(launch: Launch) -> None:
    guest = launch("--cpu=auto", "--verbose")
    guest.wait_for(r"executed by KVM\r*\n")
    guest.boot()
    guest.power_off()


def test_a_guest_has_the_processors_that_it_was_given(launch: Launch, cpus: int) -> None:
    guest = launch()
    guest.boot()
    assert guest.run("nproc") == f"{cpus}\n"
    threads = {path.read_text().strip() for path in Path(f"/proc/{guest.members()['cpu']}/task").glob("*/comm")}
    assert threads >= {"lguest/cpu", *(f"lguest/cpu{number}" for number in range(1, cpus))}
    assert guest.run("cat /sys/devices/system/clocksource/clocksource0/current_clocksource") == "kvm-clock\n"
    guest.power_off()


def test_a_processor_that_goes_takes_no_interrupt_with_it(launch: Launch, disk: Path, cpus: int) -> None:
    if cpus == 1:
        pytest.skip("the only one cannot go")
    guest = launch(f"--block={disk}")
    guest.boot()
    guest.run(
        "for i in 1 2 3; do for on in 0 1; do echo $on >/sys/devices/system/cpu/cpu1/online; "
        "dd if=/dev/vda of=/dev/null bs=4k count=20 iflag=direct 2>/dev/null; done; done"
    )
    guest.power_off()


def test_a_killed_worker_is_replaced_and_the_guest_does_not_notice(launch: Launch, disk: Path) -> None:
    """The new one takes over the eventfds, which are KVM's, with whatever was in them."""
    content = random.Random(6).randbytes(4 * MIB)
    disk.write_bytes(content)
    guest = launch(f"--block={disk}")
    guest.boot()
    number = guest.agent.start(
        "for i in 1 2 3 4 5 6; do dd if=/dev/vda bs=4k iflag=direct 2>/dev/null | sha256sum; done"
    )
    for _ in range(2):
        guest.wait_for(r"^[0-9a-f]{64} ")
        os.kill(guest.members()["block0/requestq"], signal.SIGKILL)
        guest.wait_for("block0/requestq was killed by SIGKILL; it is restarted")
    assert guest.agent.finish(number).count(hashlib.sha256(content).hexdigest()) >= 3
    guest.power_off()


def test_a_guest_that_only_halts_has_switched_itself_off(launch: Launch) -> None:
    guest = launch(arguments=("quiet", "reboot=k"))
    guest.boot()
    guest.agent.start("halt -f")
    assert guest.wait() == 0


def test_a_triple_fault_is_told_with_the_registers(launch: Launch) -> None:
    guest = launch("--verbose", arguments=("quiet", "reboot=t"))
    guest.boot()
    guest.agent.start("echo b >/proc/sysrq-trigger")
    assert guest.wait() == 3
    assert "the guest died: triple fault" in guest.output
    assert "CR3 0x" in guest.output


def test_a_paused_guest_goes_on(launch: Launch) -> None:
    """SIGSTOP and SIGCONT get every thread out of KVM, and back in."""
    guest = launch()
    guest.boot()
    machine = guest.members()["cpu"]
    number = guest.agent.start("for i in $(seq 100); do usleep 1000; done; echo done")
    for _ in range(5):
        os.kill(machine, signal.SIGSTOP)
        with pytest.raises(SessionError):
            guest.wait_for("nobody says this", seconds=0.05)
        os.kill(machine, signal.SIGCONT)
    assert guest.agent.finish(number) == "done\n"
    guest.power_off()
