"""No stale code, ever: hundreds of programs that share their addresses, and soon their pages, each with its own result.

A device writes programs into the guest's memory from another process; the guest itself copies programs from page to
page. Either way a page that held one program's code holds another's a moment later.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from guestkit.disk import MIB, make_sparse
from guestkit.guest import Launch
from guestkit.kit import GuestKit
from guestkit.programs import make_program

PROGRAMS = 400


@pytest.fixture(scope="session")
def programs(kit: GuestKit, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A disk with programs ``p1``, ``p2``, ..., and what they print when run one after the other."""
    folder = tmp_path_factory.mktemp("programs")
    source = folder / "source"
    source.mkdir()
    lines = []
    for number in range(1, PROGRAMS + 1):
        program = make_program(number, pages=16)
        path = source / f"p{number}"
        path.write_bytes(program.image)
        path.chmod(0o755)
        lines.append(f"{number} {program.line}\n")
    disk = make_sparse(folder / "disk.img", 64 * MIB)
    made = kit.sysroot.run("mke2fs", "-q", "-t", "ext4", "-d", source, disk)
    assert made.returncode == 0, made.stdout
    return disk, "".join(lines)


# Where the kernel does not clear pages before it gives them out, a page's old translations are seldom noticed by the
# guest's own writes: then it is all up to the device.
@pytest.mark.parametrize("init_on_alloc", [1, 0])
def test_programs_from_a_disk_in_a_guest_short_of_memory(
    launch: Launch, programs: tuple[Path, str], init_on_alloc: int
) -> None:
    disk, expected = programs
    guest = launch(f"--block={disk}", memory=80, arguments=("quiet", f"init_on_alloc={init_on_alloc}"))
    guest.boot()
    guest.run("mount -t ext4 -o ro /dev/vda /mnt")
    available = int(guest.run("awk '/^MemAvailable/ { print $2 }' /proc/meminfo")) // 1024
    assert available < PROGRAMS * 17 * 4096 // MIB, "the programs alone would not fit"
    answer = guest.run(
        f"for i in $(seq {PROGRAMS}); do echo $i $(/mnt/p$i); "
        "[ $((i % 20)) != 0 ] || echo 3 >/proc/sys/vm/drop_caches; done",
        seconds=600,
    )
    assert answer == expected
    guest.power_off()


def test_programs_copied_to_tmpfs(launch: Launch, programs: tuple[Path, str]) -> None:
    disk, expected = programs
    guest = launch(f"--block={disk}")
    guest.boot()
    guest.run("mount -t ext4 -o ro /dev/vda /mnt")
    answer = guest.run(
        f"for i in $(seq {PROGRAMS}); do cp /mnt/p$i /tmp/p$((i % 7)); echo $i $(/tmp/p$((i % 7))); "
        "[ $((i % 3)) != 0 ] || rm /tmp/p*; done",
        seconds=600,
    )
    assert answer == expected
    guest.power_off()
