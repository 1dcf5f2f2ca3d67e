"""Guests reboot, devices are reset, and the supervisor holds no more than before."""

from __future__ import annotations

import itertools
import os
import random

from guestkit.disk import MIB, make_sparse
from guestkit.growth import Holdings, holdings, require_no_growth
from guestkit.guest import Guest
from guestkit.soak.plan import Plan, Report, Room, Unsuitable

#: The drivers, by virtio device ID.
_DRIVERS = {1: "virtio_net", 2: "virtio_blk", 3: "virtio_console", 4: "virtio_rng"}
#: After how many resets the supervisor is looked at.
_LOOK_EVERY = 20


def reboots(room: Room, plan: Plan) -> Report:
    """The launcher executes itself anew at each."""
    return _reboot(room, plan)


def reboots_in_place(room: Room, plan: Plan) -> Report:
    """The launcher, in a root directory where it could not find itself, goes on as it is."""
    if os.geteuid() != 0:
        raise Unsuitable("--chroot takes root")
    root = room.directory / "root"
    root.mkdir()
    return _reboot(room, plan, "--username=nobody", f"--chroot={root}")


def _reboot(room: Room, plan: Plan, *options: str) -> Report:
    disk = make_sparse(room.directory / "disk.img", MIB)
    variables = {"XDG_RUNTIME_DIR": str(room.directory)}
    options = (*options, f"--block={disk}", "--rng", "--net=link:soak")
    with room.guest(plan, *options, variables=variables) as guest:
        held = []
        guest.boot()
        for _ in plan.rounds():
            guest.agent.start("reboot -f")
            guest.boot()
            assert guest.members()[""] == guest.pid
            held.append(holdings(guest))
        guest.power_off()
    return _report(len(held), held)


def resets(room: Room, plan: Plan) -> Report:
    """Drivers are taken off their devices, which resets these, and put on again, in turns."""
    disk = room.directory / "disk.img"
    disk.write_bytes(random.Random(plan.seed).randbytes(MIB))
    options = (f"--block={disk}", "--net=link:soak", "--rng")
    variables = {"XDG_RUNTIME_DIR": str(room.directory)}
    with room.guest(plan, *options, arguments=("quiet", "agent=ttyS0"), variables=variables) as guest:
        guest.boot("ttyS0")
        guest.run("modprobe virtio_net")
        turns = itertools.cycle(_turns(guest))
        held = []
        for number in plan.rounds():
            guest.run(next(turns))
            if number % _LOOK_EVERY == 0:
                held.append(holdings(guest))
        assert guest.run("head -c 1000 /dev/hwrng | wc -c; cat /dev/vd? | wc -c").split() == ["1000", str(MIB)]
        held.append(holdings(guest))
        guest.power_off()
    return _report(number + 1, held)


def _turns(guest: Guest) -> list[str]:
    """The shell commands that reset each device; with the console's driver on, nobody would hear us type."""
    turns = []
    listed = guest.run("cd /sys/bus/virtio/devices; for name in *; do echo $name $(cat $name/device); done")
    for name, kind in (line.split() for line in listed.splitlines()):
        driver = _DRIVERS[int(kind, 16)]
        acts = "bind unbind" if driver == "virtio_console" else "unbind bind"
        turns.append(f"for act in {acts}; do echo {name} >/sys/bus/virtio/drivers/{driver}/$act || exit 1; done")
    return turns


def _report(times: int, held: list[Holdings]) -> Report:
    require_no_growth(held)
    report = Report({"times": times})
    report["the supervisor at first"] = held[0]
    report["the supervisor at last"] = held[-1]
    # A number of them over time: the least of each tenth is what does not hang on who was forked just then.
    size = -(-len(held) // 10)
    tenths = [min(each.memory for each in held[start : start + size]) for start in range(0, len(held), size)]
    report["the least, by tenths"] = f"{' '.join(f'{each / MIB:.2f}' for each in tenths)} MiB"
    return report
