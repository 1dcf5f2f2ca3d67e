"""Packed virtqueues (virtio 1.2, 2.8), which Linux's drivers accept where they are offered."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

from netguest import configure, copy, ping

from guestkit.disk import MIB
from guestkit.guest import Guest, Launch

RING_PACKED = 34


def accepted(guest: Guest, feature: int) -> set[str]:
    """For all of the guest's devices, whether their drivers accepted a feature: "0", "1"."""
    return set(guest.run(f"cut -c{feature + 1} /sys/bus/virtio/devices/*/features").split())


def test_all_devices_on_packed_rings(launch: Launch, disk: Path, runtime: dict[str, str]) -> None:
    """The other guest on the wire has split ones."""
    content = random.Random(1).randbytes(32 * MIB)
    disk.write_bytes(content)
    options = ("--rings=packed", "--rng", f"--block={disk}", "--net=link:lab")
    packed = launch(*options, name="packed", variables=runtime, tools=True)
    split = launch("--net=link:lab", name="split", variables=runtime, tools=True)
    for number, guest in enumerate((packed, split), 1):
        guest.boot()
        configure(guest, f"10.3.0.{number}/24")
    assert accepted(packed, RING_PACKED) == {"1"}
    assert accepted(split, RING_PACKED) == {"0"}

    read = packed.run("dd if=/dev/vda bs=64k iflag=direct 2>/dev/null | sha256sum").split()[0]
    assert read == hashlib.sha256(content).hexdigest()
    packed.run("head -c 8000000 /dev/urandom >/tmp/data && dd if=/tmp/data of=/dev/vda bs=4k conv=fsync 2>/dev/null")
    written = packed.run("sha256sum /tmp/data").split()[0]
    assert written == hashlib.sha256(disk.read_bytes()[:8000000]).hexdigest()
    assert packed.run("head -c 100000 /dev/hwrng | wc -c").strip() == "100000"
    ping(packed, "10.3.0.2")
    copy(packed, split, "10.3.0.2", 8)
    copy(split, packed, "10.3.0.1", 8)

    # A reset, and a reboot: wrap counters begin with 1 again (2.8.1).
    packed.run("cd /sys/bus/virtio/drivers/virtio_blk && for d in virtio*; do echo $d >unbind && echo $d >bind; done")
    assert packed.run("dd if=/dev/vda bs=4k count=1 iflag=direct 2>/dev/null | wc -c").strip() == "4096"
    packed.agent.start("reboot -f")
    packed.boot()
    configure(packed, "10.3.0.1/24")
    ping(packed, "10.3.0.2")
    assert accepted(packed, RING_PACKED) == {"1"}
    packed.power_off()
    split.power_off()
