"""Workers die while the guest works with their devices, and it notices nothing: disk, random numbers, console."""

from __future__ import annotations

from guestkit.disk import MIB, make_sparse
from guestkit.growth import holdings
from guestkit.guest import Guest
from guestkit.scripts import Task, command
from guestkit.soak.plan import Plan, Report, Room, killer, require_no_complaints
from guestkit.soak.text import Text

_DISK_SIZE = 64 * MIB
#: Much more than the files have. What was deleted is free only when the journal has been written, and that does not
#: happen while the disk's worker stands still.
_FILES_DISK_SIZE = 512 * MIB
_BLOCK = 4096
_RAW_PROCESSES = 4
_FILES_PROCESSES = 3
#: How long the guest may take to come to an end with what it does, and to verify it.
_VERIFYING = 600.0


def disk(room: Room, plan: Plan) -> Report:
    """Two disks under load, one raw and one with a file system: each byte is verified, the file system is whole."""
    report = Report()
    raw = make_sparse(room.directory / "raw.img", _DISK_SIZE)
    files = make_sparse(room.directory / "files.img", _FILES_DISK_SIZE)
    with room.guest(plan, f"--block={raw}", f"--block={files}") as guest:
        guest.boot()
        guest.run("/sysroot/bin/mke2fs -q -t ext4 -b 4096 /dev/vdb && mount -t ext4 /dev/vdb /mnt")
        before = holdings(guest)
        on_raw, on_files, trimming = Task(guest, "raw"), Task(guest, "files"), Task(guest, "trim")
        on_raw.start(command("raw-load", "/dev/vda", _DISK_SIZE // _BLOCK, plan.seed, _RAW_PROCESSES, on_raw.stop))
        on_files.start(command("files-load", "work", "/mnt", plan.seed, _FILES_PROCESSES, on_files.stop))
        trimming.start(f"until [ -e {trimming.stop} ]; do fstrim /mnt && usleep 300000 || exit 1; done")
        killing = killer(guest, plan, "block0/requestq", "block1/requestq")
        for _ in plan.rounds():
            killing.kill()
        done = [task.finish(_VERIFYING) for task in (trimming, on_raw, on_files)]
        guest.run("umount /mnt && echo 3 >/proc/sys/vm/drop_caches && mount -t ext4 /dev/vdb /mnt")
        done.append(guest.run(command("files-load", "verify", "/mnt", 0, _FILES_PROCESSES, "-"), _VERIFYING))
        guest.run("umount /mnt")
        require_no_complaints(guest)
        after = holdings(guest)
        after.require_no_more_than(before)
        guest.power_off()
    checked = room.kit.sysroot.run("e2fsck", "-fn", files)
    assert checked.returncode == 0, checked.stdout
    report["killed"] = killing.toll
    report["the guest"] = "; ".join("".join(done).split("\n")).strip("; ")
    report["the supervisor before"] = before
    report["the supervisor after"] = after
    return report


def rng(room: Room, plan: Plan) -> Report:
    """Random numbers go on, each as long as it was asked for."""
    report = Report()
    with room.guest(plan, "--rng") as guest:
        guest.boot()
        reading = Task(guest, "entropy")
        reading.start(command("entropy", reading.stop))
        killing = killer(guest, plan, "rng0/requestq")
        for _ in plan.rounds():
            killing.kill()
        report["killed"] = killing.toll
        report["the guest"] = reading.finish().strip()
        require_no_complaints(guest)
        guest.power_off()
    return report


def console(room: Room, plan: Plan) -> Report:
    """A known text is shown, all of it, at most one buffer twice for each death; each line that is typed is heard."""
    report = Report()
    with room.guest(plan) as guest:
        guest.boot()
        killing = killer(guest, plan, "console/receiveq", "console/transmitq")
        # The terminal adds nothing to the text.
        number = guest.agent.start(f"stty -opost; {command('chatter')}; status=$?; stty opost; exit $status")
        typed = []
        for round_number in plan.rounds():
            killing.kill()
            typed.append(f"round {round_number}")
            guest.type(typed[-1] + "\n")
        guest.type("end\n")
        shown = guest.agent.finish(number)
        text, heard = _take_apart(shown)
        repeats = text.repeats()
        assert len(repeats) <= killing.toll.total, f"{len(repeats)} repeats: {repeats}"
        # What is read from the terminal in the very moment of a death is lost (docs/crashes.md).
        lost = [line for line in typed if line not in heard]
        assert len(lost) <= 1, f"typed and not heard: {lost}"
        assert heard == [line for line in [*typed, "end"] if line not in lost], f"typed {typed}, heard {heard}"
        report["killed"] = killing.toll
        report["shown"] = f"{len(shown)} characters, {len(repeats)} pieces of them twice ({sum(repeats)} characters)"
        report["typed"] = f"{len(typed)} lines, {len(lost)} of them not heard"
        _settle(guest)
        guest.power_off()
    return report


def _take_apart(shown: str) -> tuple[Text, list[str]]:
    """What ``perl/chatter.pl`` printed: its text, and the lines that it heard."""
    text, mark, rest = shown.rpartition("\nlines ")
    assert mark, f"the end of the text is missing: {shown[-1000:]}"
    lines, *heard = rest.splitlines()
    return Text(int(lines), text + "\n"), [line.removeprefix("heard ") for line in heard]


def _settle(guest: Guest) -> None:
    """Whatever of the last command's end is shown again is out of the way."""
    guest.run("true")
