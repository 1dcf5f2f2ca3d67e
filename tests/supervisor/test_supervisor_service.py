"""What a launcher tells the service manager that started it, through a socket that the test listens at."""

from __future__ import annotations

import os
import pwd
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import FAKE_GUEST, PATIENCE, Launch, Launched

from guestkit.manager import Manager

#: How often the manager wants to hear that the launcher lives.
WATCHDOG_USEC = 100_000
POWERED_OFF = "the guest has switched itself off"
WAITING = "waiting for the drivers of console, block0, mule0"


@pytest.fixture(params=["path", "abstract"])
def any_manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    """A manager of every kind of address, in the environment of what is launched."""
    address = str(tmp_path / "notify") if request.param == "path" else f"@lguest-test/{os.getpid()}/{tmp_path.name}"
    with Manager(address) as listening:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        yield listening


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    """A manager, in the environment of what is launched."""
    with Manager(str(tmp_path / "notify")) as listening:
        monkeypatch.setenv("NOTIFY_SOCKET", listening.address)
        yield listening


def start(launch: Launch, *options: str, keys: str = "", launcher: tuple[str, ...] | None = None) -> Launched:
    """A guest that does as typed, and ``keys`` typed."""
    launched = launch("by_keys", *options) if launcher is None else launch("by_keys", *options, launcher=launcher)
    launched.wait_for("^up", PATIENCE)
    launched.type(keys)
    return launched


def test_it_is_ready_when_every_device_has_been_served(launch: Launch, any_manager: Manager) -> None:
    launcher = start(launch, keys="dd")
    any_manager.wait_for("STATUS", "waiting for the drivers of mule0")
    assert not any_manager.said("READY")
    launcher.type("d")
    ready = any_manager.wait_for("READY", "1")
    assert ready.values["STATUS"] == "running"
    launcher.type("c")
    any_manager.wait_for("STATUS", "running, 1 restart")
    launcher.type("c")
    any_manager.wait_for("STATUS", "running, 2 restarts")
    launcher.type("b")
    any_manager.wait_for("STATUS", "running, 2 restarts; block0 needs a reset")
    launcher.type("q")
    end = any_manager.wait_for("STOPPING", "1")
    assert end.values["STATUS"] == POWERED_OFF
    assert launcher.finish() == 0
    any_manager.drain()
    assert any_manager.said("STATUS")[:4] == [
        "starting",
        WAITING,
        "waiting for the drivers of block0, mule0",
        "waiting for the drivers of mule0",
    ]
    assert any_manager.said("READY") == any_manager.said("STOPPING") == ["1"]
    assert not any_manager.said("WATCHDOG"), "nobody asked for it"
    assert {each.pid for each in any_manager.heard} == {launcher.pid}


def test_a_reboot_is_no_end(launch: Launch, manager: Manager) -> None:
    """The next program under the same process ID finds the manager again, and says that it is ready again."""
    launcher = start(launch, keys="dddr")
    manager.wait_for("STATUS", "rebooting")
    launcher.wait_for("^up", PATIENCE)
    manager.wait_for("STATUS", WAITING)
    launcher.type("ddd")
    manager.wait_for("READY", "1")
    assert manager.said("READY") == ["1", "1"]
    assert not manager.said("STOPPING")
    launcher.signal(signal.SIGTERM)
    assert launcher.finish() == -signal.SIGTERM
    assert manager.wait_for("STOPPING", "1").values["STATUS"] == "stopped by SIGTERM"
    assert {each.pid for each in manager.heard} == {launcher.pid}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may change its root directory and its user")
def test_a_confined_launcher_still_reaches_its_manager(
    launch: Launch, jail: Path, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could not find the socket any more; a reboot in place has nothing to say but the status."""
    monkeypatch.setenv("WATCHDOG_USEC", str(WATCHDOG_USEC))
    launcher = start(launch, "--username=nobody", f"--chroot={jail}", keys="ddd")
    ready = manager.wait_for("READY", "1")
    assert (ready.pid, ready.uid) == (launcher.pid, pwd.getpwnam("nobody").pw_uid)
    launcher.type("r")
    manager.wait_for("STATUS", "rebooting")
    launcher.wait_for("^up", PATIENCE)
    launcher.type("ddd")
    manager.wait_for("STATUS", "running")
    for _ in range(3):
        manager.wait_for("WATCHDOG", "1")
    launcher.type("q")
    assert launcher.finish() == 0
    manager.wait_for("STOPPING", "1")
    assert manager.said("READY") == ["1"]


def test_the_watchdog_hears_of_a_supervisor_for_as_long_as_that_runs(
    launch: Launch, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", str(WATCHDOG_USEC))
    launcher = start(launch)
    for _ in range(5):
        manager.wait_for("WATCHDOG", "1")
    launcher.signal(signal.SIGSTOP)
    os.waitid(os.P_PID, launcher.pid, os.WSTOPPED | os.WNOWAIT)
    manager.drain()
    before = len(manager.heard)
    time.sleep(5 * WATCHDOG_USEC / 1e6)
    manager.drain()
    assert len(manager.heard) == before
    launcher.signal(signal.SIGCONT)
    for _ in range(5):
        manager.wait_for("WATCHDOG", "1")
    launcher.type("q")
    assert launcher.finish() == 0


@pytest.mark.parametrize(("whose", "pings"), [("$$", True), ("1", False)])
def test_the_watchdog_may_be_meant_for_another_process(
    launch: Launch, manager: Manager, monkeypatch: pytest.MonkeyPatch, whose: str, pings: bool
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", str(WATCHDOG_USEC))
    shell = ("/bin/sh", "-c", f'WATCHDOG_PID={whose} exec "$0" "$@"', sys.executable, str(FAKE_GUEST))
    launcher = start(launch, keys="dddq", launcher=shell)
    assert launcher.finish() == 0
    manager.wait_for("STOPPING", "1")
    assert bool(manager.said("WATCHDOG")) == pings


def test_a_manager_with_no_room_hears_the_newest_when_it_has(launch: Launch, manager: Manager) -> None:
    manager.stuff()
    launcher = start(launch, keys="dddc")
    launcher.wait_for("restarted", PATIENCE)
    manager.drain()
    ready = manager.wait_for("READY", "1")
    assert ready.values["STATUS"] == "running, 1 restart"
    assert manager.said("STATUS") == ["running, 1 restart"]
    launcher.type("q")
    assert launcher.finish() == 0


def test_a_manager_that_never_reads_holds_up_nobody(
    launch: Launch, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "1000")
    manager.stuff()
    launcher = start(launch, keys="dddcq")
    assert launcher.finish() == 0, launcher.output


def test_a_manager_that_vanishes_is_done_without(
    launch: Launch, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", str(WATCHDOG_USEC))
    launcher = start(launch, keys="ddd")
    manager.wait_for("READY", "1")
    manager.close()
    launcher.type("cq")
    assert launcher.finish() == 0, launcher.output
    assert launcher.lines[-1] == "block0/requestq was killed by SIGSEGV; it is restarted"


@pytest.mark.parametrize(
    "address", ["/no/such/socket", "relative", "vsock:2:1234", "@", "@nobody-listens", "/" + "x" * 200]
)
def test_an_address_where_nobody_is(launch: Launch, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    monkeypatch.setenv("WATCHDOG_USEC", str(WATCHDOG_USEC))
    launcher = launch("power_off")
    assert launcher.finish() == 0, launcher.output
    assert not launcher.lines


def test_why_it_ends_is_the_last_status(launch: Launch, manager: Manager) -> None:
    """On one line, whatever the guest had a hand in."""
    assert launch("die").finish() == 3
    assert manager.wait_for("STOPPING", "1").values == {"STOPPING": "1", "STATUS": "the guest died: triple fault"}


def test_a_launcher_that_cannot_begin_says_why(launch: Launch, manager: Manager) -> None:
    assert launch("forked_only", "--username=no-such-user").finish() == 1
    end = manager.wait_for("STOPPING", "1")
    assert end.values["STATUS"] == "--username=no-such-user: this host has no such user"


def test_no_process_but_the_supervisor_has_the_socket(launch: Launch, manager: Manager) -> None:
    launcher = start(launch, keys="ddd")
    manager.wait_for("READY", "1")
    sockets = Path("/proc/net/unix").read_text().splitlines()
    theirs = {line.split()[6] for line in sockets if line.endswith(manager.address)}
    assert theirs, "the manager's own"
    kinds = {pid: [os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir()] for pid in launcher.processes()}
    datagrams = {f"socket:[{line.split()[6]}]" for line in sockets if line.split()[4] == "0002"}
    assert {pid for pid, files in kinds.items() if datagrams.intersection(files)} == {launcher.pid}
