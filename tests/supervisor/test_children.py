"""What a forked process is: its name, its files, its end."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from launching import PATIENCE, Launch, open_files

from lguest_mp.supervisor import children

NAMES = {
    "cpu": "lguest/cpu",
    "console/receiveq": "console/receive",
    "console/transmitq": "console/transmi",
    "block0/requestq": "block0/requestq",
    "mule0/requestq": "mule0/requestq",
}


def test_ps_and_top_tell_who_serves_what(launch: Launch) -> None:
    launcher = launch("hang")
    members = launcher.wait_until_up() | launcher.waiting()
    for name, pid in members.items():
        title = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode()
        assert title == f"lguest[test] {name}"
        assert Path(f"/proc/{pid}/comm").read_text() == f"{NAMES[name]}\n"
    assert Path(f"/proc/{launcher.pid}/cmdline").read_bytes().rstrip(b"\0") == b"lguest[test]"
    assert Path(f"/proc/{launcher.pid}/comm").read_text() == "lguest\n"


def test_the_machine_holds_its_channels_and_nothing_else(launch: Launch) -> None:
    launcher = launch("files")
    launcher.wait_for(r"^more\b", PATIENCE)
    launcher.wait_for(r"^less\b", PATIENCE)


def test_a_worker_holds_its_queue_its_channel_and_standard_error(launch: Launch) -> None:
    launcher = launch("hang")
    members = launcher.wait_until_up() | launcher.waiting()
    for name in ("block0/requestq", "mule0/requestq"):
        files = open_files(members[name])
        assert files.pop(0) == files.pop(1) == os.devnull
        files.pop(2)
        kinds = sorted(target.split(":")[0].rstrip("0123456789[]") for target in files.values())
        assert kinds == ["anon_inode", "anon_inode", "socket"]


def test_nothing_is_inherited_by_what_a_process_executes(launch: Launch) -> None:
    ours = {fd for fd in open_files(os.getpid()) if _survives_exec(os.getpid(), fd)}
    launcher = launch("hang")
    for pid in (launcher.pid, *launcher.wait_until_up().values(), *launcher.waiting().values()):
        surviving = {fd for fd in open_files(pid) if _survives_exec(pid, fd)}
        assert surviving - {0, 1, 2} <= ours


def _survives_exec(pid: int, fd: int) -> bool:
    try:
        flags = Path(f"/proc/{pid}/fdinfo/{fd}").read_text().split("flags:")[1].split()[0]
    except FileNotFoundError:  # what the directory was listed with
        return False
    return not int(flags, 8) & os.O_CLOEXEC


def test_a_child_runs_its_body_and_is_reaped() -> None:
    child = children.fork("seven", lambda: 7)
    assert child.has_ended(PATIENCE)
    assert os.waitstatus_to_exitcode(child.reap()) == 7
    with pytest.raises(ChildProcessError):
        os.waitpid(child.pid, 0)


def test_a_child_that_has_ended_takes_no_signal_amiss() -> None:
    child = children.fork("gone", lambda: 0)
    assert child.has_ended(PATIENCE)
    child.signal(signal.SIGTERM)
    os.waitpid(child.pid, 0)
    child.signal(signal.SIGTERM)
    os.close(child.pidfd)


def test_a_child_that_cannot_be_ended_is_left_behind(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that waits for a disk."""
    before = os.listdir("/proc/self/fd")
    child = children.fork("block0/requestq", lambda: 0)
    monkeypatch.setattr(child, "has_ended", lambda timeout=0: False)
    assert children.end_all([child], 0) == ["block0/requestq"]
    assert "cannot be ended" in capfd.readouterr().err
    child.signal(signal.SIGKILL)  # concerns nobody
    assert os.listdir("/proc/self/fd") == before
    os.waitpid(child.pid, 0)


@pytest.mark.parametrize("has_close_range", [True, False])
def test_a_child_keeps_only_its_files(monkeypatch: pytest.MonkeyPatch, *, has_close_range: bool) -> None:
    """Also on Linux before 5.9."""
    if not has_close_range:
        monkeypatch.setattr(children, "_SYS_CLOSE_RANGE", 10_000)
    null = os.open(os.devnull, os.O_RDWR)
    kept, dropped, far = os.dup(null), os.dup(null), os.open(os.devnull, os.O_RDONLY)

    def body() -> int:
        children.keep_only([kept, far], null)
        return sum(_is_open(fd) << bit for bit, fd in enumerate((kept, dropped, far, null)))

    child = children.fork("keeper", body)
    assert os.waitstatus_to_exitcode(child.reap()) == 0b0101
    for fd in (null, kept, dropped, far):
        os.close(fd)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "exited with status 0"),
        (70 << 8, "exited with status 70"),
        (9, "was killed by SIGKILL"),
        (11 | 0x80, "was killed by SIGSEGV"),
        (40, "was killed by signal 40"),
    ],
)
def test_a_wait_status_in_words(status: int, words: str) -> None:
    assert children.how_it_ended(status) == words
