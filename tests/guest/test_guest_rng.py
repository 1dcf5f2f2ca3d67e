"""Random numbers for the guest."""

from __future__ import annotations

import zlib
from pathlib import Path

from guestkit.disk import MIB
from guestkit.guest import Launch


def test_a_mebibyte_of_random_numbers(launch: Launch, disk: Path) -> None:
    guest = launch(f"--block={disk}", "--rng")
    guest.boot()
    assert guest.run("cat /sys/class/misc/hw_random/rng_current") == "virtio_rng.0\n"
    # Through a disk, so that the host sees the very bytes.
    guest.run("dd if=/dev/hwrng of=/dev/vda iflag=fullblock bs=64k count=16 conv=fsync 2>/dev/null")
    guest.power_off()
    with disk.open("rb") as image:
        data = image.read(MIB)
    assert len(zlib.compress(data, 9)) >= MIB, "random bytes cannot be compressed"
    blocks = {data[i : i + 16] for i in range(0, MIB, 16)}
    assert len(blocks) == MIB // 16, "no 16 bytes come twice"
