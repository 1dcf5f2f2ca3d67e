"""What ``tools/soak`` does for hours, for some seconds: workers die while a guest works, and it loses nothing.

(For reboots by executing the launcher anew, test_guest_life.py is the short form.)

The seeds are fixed, but the moments at which workers die depend on what else this machine does.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from guestkit.deaths import Death, fragile_launcher
from guestkit.disk import MIB, make_sparse
from guestkit.guest import CommandFailed
from guestkit.kit import GuestKit
from guestkit.scripts import Task, command
from guestkit.soak import Plan, Room
from guestkit.soak.enemy import hostile
from guestkit.soak.growth import reboots_in_place, resets
from guestkit.soak.network import link, tap, user
from guestkit.soak.plan import Unsuitable, make_initrd
from guestkit.soak.workers import console, disk, rng

QUICK = (Death.SIGKILL, Death.SIGSEGV, Death.SIGABRT, Death.EXCEPTION)
SOAK_INITRD = "agent-soak.img"


@pytest.fixture
def room(kit: GuestKit, initrd: Path, tmp_path: Path) -> Room:
    """What the soaks need."""
    image = initrd.with_name(SOAK_INITRD)
    if not image.exists():
        image.write_bytes(make_initrd(kit))
    return Room(kit, image, tmp_path, [sys.executable, "-m", "lguest_mp"], fragile_launcher(sys.executable))


def test_a_disk_loses_nothing_when_its_worker_dies(room: Room) -> None:
    disk(room, Plan(seed=1, times=40, deaths=QUICK))


def test_a_disk_loses_nothing_when_its_worker_dies_that_is_all_in_python(room: Room) -> None:
    disk(replace(room, launcher=[*room.launcher, "--core=python"]), Plan(seed=13, times=15))


def test_a_disk_on_a_packed_ring_loses_nothing_when_its_worker_dies(room: Room) -> None:
    launcher, fragile = ([*command, "--rings=packed"] for command in (room.launcher, room.fragile))
    disk(replace(room, launcher=launcher, fragile=fragile), Plan(seed=14, times=20, deaths=QUICK))


def test_a_disk_loses_nothing_when_its_worker_is_stopped(room: Room) -> None:
    disk(room, Plan(seed=2, times=2, deaths=(Death.SIGSTOP,)))


def test_a_disks_load_notices_a_block_that_is_wrong(room: Room) -> None:
    image = make_sparse(room.directory / "disk.img", 4 * MIB)
    with room.guest(Plan(seed=3), f"--block={image}") as guest:
        guest.boot()
        load = Task(guest, "raw")
        load.start(command("raw-load", "/dev/vda", 1024, 3, 2, load.stop))
        guest.read_for(1)
        with image.open("r+b") as content:
            for block in range(0, 1024, 8):
                content.seek(block * 4096 + 512 * random.Random(block).randrange(8))
                content.write(b"wrong")
        with pytest.raises(CommandFailed, match="is not of generation"):
            load.finish()


def test_random_numbers_go_on(room: Room) -> None:
    rng(room, Plan(seed=4, times=25, deaths=QUICK))


def test_a_console_shows_and_hears_everything(room: Room) -> None:
    console(room, Plan(seed=5, times=25, deaths=QUICK))


def test_a_connection_to_the_host_is_whole(room: Room) -> None:
    try:
        tap(room, Plan(seed=6, times=25, deaths=QUICK), size=16)
    except Unsuitable as reason:
        pytest.skip(str(reason))


def test_a_connection_behind_the_hosts_is_whole(room: Room) -> None:
    user(room, Plan(seed=7, times=15, deaths=QUICK), size=16)


def test_a_connection_between_guests_is_whole(room: Room) -> None:
    link(room, Plan(seed=8, times=15, deaths=QUICK), size=16)


def test_the_supervisor_does_not_grow_when_devices_are_reset(room: Room) -> None:
    resets(room, Plan(seed=9, times=60))


def test_a_supervisor_that_cannot_start_anew_does_not_grow_when_the_guest_reboots(room: Room) -> None:
    try:
        reboots_in_place(room, Plan(seed=11, times=3))
    except Unsuitable as reason:
        pytest.skip(str(reason))


def test_a_hostile_driver_harms_its_own_device_only(room: Room) -> None:
    hostile(room, Plan(seed=12, times=4), turn=2)
