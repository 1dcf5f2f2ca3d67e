"""A stock kernel comes up, finds what it was given, and goes down again."""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path

import psutil
import pytest
from hugepages import guest_memory_of, mapped_huge, needs_huge_pages

from guestkit.disk import MIB, make_sparse
from guestkit.guest import Launch


def test_each_virtqueue_is_served_by_a_process_that_says_so(launch: Launch, disk: Path) -> None:
    guest = launch(f"--block={disk}", "--rng")
    guest.boot()
    members = guest.members()
    assert set(members) == {
        "",
        "cpu",
        "console/receiveq",
        "console/transmitq",
        "block0/requestq",
        "rng0/requestq",
    }
    assert len(set(guest.processes())) == len(members)
    comms = {Path(f"/proc/{pid}/comm").read_text() for pid in members.values()}
    assert len(comms) == len(members), "top shows 15 characters; they have to tell the processes apart"
    guest.power_off()


@needs_huge_pages
def test_guest_memory_is_in_huge_pages(launch: Launch, disk: Path) -> None:
    """All but a few blocks: one may have been busy, and the last may not be whole. It is the same memory to all."""
    guest = launch("--cpu=unicorn", f"--block={disk}")
    guest.boot()
    guest.run("dd if=/dev/urandom of=/tmp/some bs=1M count=16")
    process = guest.members()["cpu"]
    address = guest_memory_of(process)
    assert mapped_huge(address, process) >= 0.9 * mapped_huge(address, process, "Rss")
    guest.run("dd if=/tmp/some of=/dev/vda bs=1M && dd if=/dev/vda bs=1M count=16 iflag=direct | cmp - /tmp/some")
    guest.power_off()


def test_guest_memory_is_in_small_pages_if_so_asked(launch: Launch) -> None:
    guest = launch("--cpu=unicorn", "--huge-pages=off")
    guest.boot()
    process = guest.members()["cpu"]
    assert mapped_huge(guest_memory_of(process), process) == 0
    guest.power_off()


@needs_huge_pages
def test_on_a_host_without_huge_pages_a_guest_runs_all_the_same(launch: Launch) -> None:
    """Who has had them switched off for itself (prctl(2), PR_SET_THP_DISABLE) and its children is on such a host."""
    program = "import ctypes, os, sys; ctypes.CDLL(None).prctl(41, 1, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])"
    launcher = [sys.executable, "-c", program, sys.executable, "-m", "lguest_mp"]
    guest = launch("--cpu=unicorn", "--verbose", launcher=launcher)
    guest.boot()
    assert "the host has no huge pages for the guest's memory" in guest.output
    process = guest.members()["cpu"]
    assert mapped_huge(guest_memory_of(process), process) == 0
    guest.power_off()


def test_devices_appear_in_the_order_of_the_command_line(launch: Launch, disk: Path, tmp_path: Path) -> None:
    small = make_sparse(tmp_path / "small.img", 3 * MIB)
    guest = launch(f"--block={disk}", "--rng", f"--block={small}")
    guest.boot()
    listed = guest.run("for device in /sys/bus/virtio/devices/virtio?; do cat $device/device; done")
    types = listed.split()
    assert sorted(types) == ["0x0002", "0x0002", "0x0003", "0x0004"]
    assert [kind for kind in types if kind != "0x0003"] == ["0x0002", "0x0004", "0x0002"]
    assert guest.run("cat /sys/block/vda/size /sys/block/vdb/size").split() == ["131072", "6144"]
    guest.power_off()


def test_the_kernel_gets_the_command_line(launch: Launch) -> None:
    # The first "--" ends the launcher's own options, as getopt_long has it.
    guest = launch(arguments=("quiet", "one", "--", 'two="a b"', "--", "-x"))
    guest.boot()
    assert guest.run("cat /proc/cmdline").rstrip().endswith('quiet one two="a b" -- -x')
    guest.power_off()


def test_each_virtqueue_has_a_message_signalled_interrupt_of_its_own(launch: Launch, disk: Path) -> None:
    guest = launch(f"--block={disk}", "--rng")
    guest.boot()
    interrupts = guest.run("grep virtio /proc/interrupts").splitlines()
    for queue in ("input", "output", "req.0"):
        assert [line for line in interrupts if "MSI" in line and queue in line], (queue, interrupts)
    guest.power_off()


def test_a_guest_without_message_signalled_interrupts_works(launch: Launch, disk: Path) -> None:
    guest = launch(f"--block={disk}", "--rng", arguments=("quiet", "pci=nomsi"))
    guest.boot()
    interrupts = guest.run("grep virtio /proc/interrupts")
    assert "MSI" not in interrupts
    assert "IO-APIC" in interrupts
    guest.run("dd if=/dev/hwrng of=/dev/vda bs=4096 count=16 && sync")
    guest.run("echo 3 >/proc/sys/vm/drop_caches")
    read = guest.run("head -c 65536 /dev/vda | sha256sum").split()[0]
    guest.power_off()
    with disk.open("rb") as image:
        assert read == hashlib.sha256(image.read(65536)).hexdigest()


def test_a_large_guest_costs_what_it_touches(launch: Launch) -> None:
    guest = launch(memory=5000)
    guest.boot()
    total = int(guest.run("awk '/^MemTotal/ { print $2 }' /proc/meminfo")) // 1024
    assert 4700 < total < 5000
    above = guest.run("grep -c '^1[0-9a-f]*: System RAM\\|^1[0-9a-f]*-.*System RAM' /proc/iomem")
    assert int(above) == 1, "the RAM that does not fit below 3 GiB continues at 4 GiB"
    used = psutil.Process(guest.members()["cpu"]).memory_info().rss
    assert used < 700 * MIB
    guest.power_off()


@pytest.mark.parametrize("load", ["idle", "busy"])
def test_the_guests_clocks_keep_the_hosts_time(launch: Launch, load: str) -> None:
    launched = time.monotonic()
    guest = launch()
    guest.boot()
    booted_in = time.monotonic() - launched
    work = {"idle": "sleep 10", "busy": "timeout 10 sh -c 'while :; do :; done'"}[load]
    times = []
    uptimes = []
    for command in ("true", work):
        guest.run(f"{command}; true", seconds=300)
        before = time.monotonic()
        uptimes.append(float(guest.run("cut -d' ' -f1 /proc/uptime")))
        times.append((before, time.monotonic()))
    elapsed = uptimes[1] - uptimes[0]
    shortest, longest = times[1][0] - times[0][1], times[1][1] - times[0][0]
    assert shortest - 0.1 <= elapsed <= longest + 0.1
    before_date = time.time()
    shown = guest.run("adjtimex | grep -o 'time.tv_.*'").split()
    date = int(shown[1]) + int(shown[3]) / 1e6
    # Linux counts ticks in the first half of its start, and a busy host loses some of them.
    assert before_date - max(1, booted_in / 2) <= date <= time.time() + 0.1
    guest.power_off()
