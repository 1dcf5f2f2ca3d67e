"""What a guest does to its disk, checked from both sides."""

from __future__ import annotations

import hashlib
import random
import struct
from pathlib import Path

import pytest

from guestkit.disk import MIB
from guestkit.guest import CommandFailed, Launch
from guestkit.kit import GuestKit

#: Reads COUNT pieces of /dev/vda past the guest's page cache, each of 1 to 32 sectors anywhere, chosen by a linear
#: congruential generator, and prints a checksum that depends on every byte and on the order.
READER = r"""
($x, $sectors, $count) = @ARGV;
sysopen(D, "/dev/vda", 040000) or die;
sub pick { $x = ($x * 1103515245 + 12345) & 0x7fffffff; return ($x >> 8) % $_[0]; }
$b = "\0" x 32768; $shift = -unpack("J", pack("p", $b)) % 4096;
for (1..$count) {
    $n = 1 + pick(32); $at = pick($sectors - 32);
    sysseek(D, $at * 512, 0); sysread(D, $b, $n * 512, $shift) == $n * 512 or die "read $n at $at: $!";
    $sum = ($sum * 31 + unpack("%32N*", substr($b, $shift, $n * 512))) & 0xffffffff;
}
print "$sum\n";
"""


class Reader:
    """The same reads and the same checksum on the host."""

    def __init__(self, seed: int, data: bytes) -> None:
        self._state = seed
        self._data = data

    def checksum(self, count: int) -> int:
        total = 0
        for _ in range(count):
            sectors = 1 + self._pick(32)
            start = self._pick(len(self._data) // 512 - 32) * 512
            words = struct.unpack_from(f">{sectors * 128}I", self._data, start)
            total = (total * 31 + sum(words)) & 0xFFFFFFFF
        return total

    def _pick(self, below: int) -> int:
        self._state = (self._state * 1103515245 + 12345) & 0x7FFFFFFF
        return (self._state >> 8) % below


def test_a_filesystem_made_in_the_guest_is_whole_on_the_host(launch: Launch, disk: Path, kit: GuestKit) -> None:
    guest = launch(f"--block={disk}", tools=True)
    guest.boot()
    guest.run("/sysroot/bin/mke2fs -q -t ext4 /dev/vda && mount -t ext4 /dev/vda /mnt")
    guest.run("for i in $(seq 40); do head -c $((i * 40000)) /dev/urandom >/mnt/file$i || exit 1; done")
    written = guest.run("cd /mnt && sha256sum file*")
    guest.run("umount /mnt && echo 3 >/proc/sys/vm/drop_caches && mount -t ext4 /dev/vda /mnt")
    assert guest.run("cd /mnt && sha256sum file*") == written
    guest.run("rm /mnt/file?; sync; umount /mnt")
    guest.power_off()

    checked = kit.sysroot.run("e2fsck", "-fn", disk)
    assert checked.returncode == 0, checked.stdout
    copy = disk.with_name("file17")
    kit.sysroot.run("debugfs", "-R", f"dump /file17 {copy}", disk)
    assert f"{hashlib.sha256(copy.read_bytes()).hexdigest()}  file17" in written.splitlines()


def test_the_whole_disk_holds_what_is_written(launch: Launch, disk: Path) -> None:
    content = random.Random(1).randbytes(64 * MIB)
    disk.write_bytes(content)
    guest = launch(f"--block={disk}")
    guest.boot()
    read = guest.run("dd if=/dev/vda bs=1M iflag=direct 2>/dev/null | sha256sum").split()[0]
    assert read == hashlib.sha256(content).hexdigest()
    guest.run("dd if=/dev/zero of=/dev/vda bs=1M count=3 seek=60 oflag=direct 2>/dev/null")
    guest.run("head -c 12345678 /dev/urandom >/tmp/data && dd if=/tmp/data of=/dev/vda bs=64k conv=fsync 2>/dev/null")
    written = guest.run("sha256sum /tmp/data").split()[0]
    with disk.open("rb") as image:
        assert hashlib.sha256(image.read(12345678)).hexdigest() == written, "what is flushed is in the file"
        image.seek(12345678)
        assert image.read(60 * MIB - 12345678) == content[12345678 : 60 * MIB]
        assert image.read(3 * MIB) == bytes(3 * MIB)
        assert image.read() == content[63 * MIB :]
    guest.power_off()


def test_ten_thousand_random_reads(launch: Launch, disk: Path) -> None:
    content = random.Random(2).randbytes(64 * MIB)
    disk.write_bytes(content)
    guest = launch(f"--block={disk}", tools=True)
    guest.boot()
    sectors = len(content) // 512
    answer = guest.run(f"/sysroot/bin/perl -e '{' '.join(READER.split())}' 4711 {sectors} 10000", seconds=600)
    assert int(answer) == Reader(4711, content).checksum(10000)
    guest.power_off()


def test_a_read_only_image_is_a_read_only_disk(launch_unprivileged: Launch, public: Path) -> None:
    content = random.Random(3).randbytes(MIB)
    disk = public / "disk.img"
    disk.write_bytes(content)
    disk.chmod(0o444)
    guest = launch_unprivileged(f"--block={disk}")
    guest.boot()
    assert guest.run("cat /sys/block/vda/ro").strip() == "1"
    assert guest.run("sha256sum </dev/vda").split()[0] == hashlib.sha256(content).hexdigest()
    with pytest.raises(CommandFailed):
        guest.run("dd if=/dev/zero of=/dev/vda bs=4096 count=1")
    guest.power_off()
    assert disk.read_bytes() == content


def test_a_second_launcher_on_the_same_image_is_refused(launch: Launch, disk: Path) -> None:
    guest = launch(f"--block={disk}")
    guest.boot()
    second = launch(f"--block={disk}")
    assert second.wait() == 1
    assert str(disk) in second.output
    assert len(second.output.splitlines()) == 1
    guest.run("dd if=/dev/vda of=/dev/null bs=1M count=1 2>/dev/null")
    guest.power_off()


def test_space_that_is_discarded_is_given_back_to_the_host(launch: Launch, disk: Path) -> None:
    disk.write_bytes(random.Random(4).randbytes(64 * MIB))
    before = disk.stat().st_blocks
    guest = launch(f"--block={disk}")
    guest.boot()
    guest.run("blkdiscard -o 1048576 -l 33554432 /dev/vda")
    assert (
        guest.run("dd if=/dev/vda bs=1M skip=8 count=1 iflag=direct 2>/dev/null | tr -d '\\0' | wc -c").strip() == "0"
    )
    guest.power_off()
    assert disk.stat().st_size == 64 * MIB
    assert (before - disk.stat().st_blocks) * 512 >= 30 * MIB
