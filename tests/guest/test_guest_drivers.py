"""Drivers come and go while their devices are in use: each is taken off and put on 20 times."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

from guestkit.disk import MIB
from guestkit.guest import Guest, Launch

TIMES = 20


def device_of(guest: Guest, driver: str) -> str:
    """The name (``virtio1``) of the device that a driver has."""
    return guest.run(f"basename /sys/bus/virtio/drivers/{driver}/virtio*").strip()


def pci_address_of(guest: Guest, device: str) -> str:
    """Where a virtio device is on the PCI bus."""
    return guest.run(f"basename $(readlink -f /sys/bus/virtio/devices/{device}/..)").strip()


def rebind(device: str, driver: str, bus: str = "virtio") -> str:
    """The shell command that takes a driver off a device and puts it on again."""
    return f"for act in unbind bind; do echo {device} >/sys/bus/{bus}/drivers/{driver}/$act || exit 1; done"


def test_the_block_driver(launch: Launch, disk: Path) -> None:
    content = random.Random(5).randbytes(MIB)
    disk.write_bytes(content)
    guest = launch(f"--block={disk}")
    guest.boot()
    device = device_of(guest, "virtio_blk")
    good = hashlib.sha256(content).hexdigest()
    answer = guest.run(
        "(while [ ! -e /tmp/stop ]; do cat /dev/vd? >/dev/null 2>&1; done) & "
        f"for i in $(seq {TIMES}); do {rebind(device, 'virtio_blk')}; "
        f"sha256sum </dev/$(ls /sys/bus/virtio/devices/{device}/block); done; touch /tmp/stop; wait",
        seconds=300,
    )
    assert answer.split() == [good, "-"] * TIMES
    workers = {name for name in guest.members() if name.startswith("block0")}
    assert workers == {"block0/requestq"}
    guest.power_off()


def test_the_entropy_driver(launch: Launch) -> None:
    guest = launch("--rng")
    guest.boot()
    device = device_of(guest, "virtio_rng")
    answer = guest.run(
        "(while [ ! -e /tmp/stop ]; do head -c 1000 /dev/hwrng >/dev/null 2>&1; done) & "
        f"for i in $(seq {TIMES}); do {rebind(device, 'virtio_rng')}; head -c 1000 /dev/hwrng | wc -c; done; "
        "touch /tmp/stop; wait",
        seconds=300,
    )
    assert answer.split() == ["1000"] * TIMES
    guest.power_off()


def test_the_console_driver(launch: Launch) -> None:
    guest = launch(arguments=("quiet", "agent=ttyS0", "load=virtio_pci"))
    guest.boot("ttyS0")
    # While there is a virtio console, what is typed goes there and not to the agent: one command does it all.
    # Who writes when the driver goes gets an error, amid a line perhaps, and has to close the terminal before Linux
    # gives its number to the next one.
    answer = guest.run(
        "console_driver bind; cd /sys/bus/virtio/drivers/virtio_console; device=$(echo virtio*); "
        f"for i in $(seq {TIMES}); do "
        "(while echo chatter; do :; done) >/dev/hvc0 2>/dev/null & "
        "usleep 20000; echo $device >unbind; wait; echo $device >bind; printf '\\nround %s\\n' $i >/dev/hvc0; "
        "done; echo $device >unbind; echo done",
        seconds=300,
    )
    lines = [line for line in answer.splitlines() if line.startswith("round")]
    assert lines == [f"round {i}" for i in range(1, TIMES + 1)]
    assert answer.endswith("done\n")
    assert set(guest.members()) == {"", "cpu"}
    assert guest.run("echo still here") == "still here\n"
    guest.power_off()


def test_the_pci_driver_of_every_device(launch: Launch, disk: Path) -> None:
    guest = launch(f"--block={disk}", "--rng")
    guest.boot()
    addresses = [pci_address_of(guest, device_of(guest, driver)) for driver in ("virtio_blk", "virtio_rng")]
    for address in addresses:
        guest.run(f"for i in $(seq {TIMES}); do {rebind(address, 'virtio-pci', 'pci')}; done", seconds=300)
    assert guest.run("head -c 100000 /dev/vda | wc -c; head -c 1000 /dev/hwrng | wc -c").split() == ["100000", "1000"]
    assert len(guest.members()) == 6
    guest.power_off()
