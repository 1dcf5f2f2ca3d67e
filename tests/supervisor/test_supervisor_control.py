"""lguestctl and a launcher: what is asked from outside happens to the guest, and to nobody else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest
from launching import PATIENCE, Launch, Launched, open_files

from guestkit.session import Session

LGUESTCTL = (sys.executable, "-m", "lguest_mp.ctl")


def ctl(launcher: Launched, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs ``lguestctl`` as the launcher's user does."""
    variables = {**os.environ, "XDG_RUNTIME_DIR": str(launcher.runtime.parent)}
    return subprocess.run(
        [*LGUESTCTL, *words], check=False, env=variables, capture_output=True, text=True, timeout=PATIENCE
    )


def do(launcher: Launched, *words: str) -> str:
    """The same, which works; what it prints."""
    done = ctl(launcher, *words)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def refusal(launcher: Launched, *words: str) -> str:
    """Why it does not work."""
    done = ctl(launcher, *words)
    assert done.returncode == 1, done
    assert done.stderr.count("\n") == 1
    return done.stderr.removeprefix("lguestctl: ").removesuffix("\n")


def processes(launcher: Launched) -> dict[str, dict[str, Any]]:
    """The guest's processes by name."""
    (guest,) = json.loads(do(launcher, "stats", "--json"))["guests"]
    return {each["process"]: each for each in guest["processes"]}


def remains(launcher: Launched) -> list[str]:
    """What is left of guests in the runtime directory."""
    return os.listdir(launcher.runtime / "guests")


def test_who_serves_what(launch: Launch) -> None:
    launcher = launch("hang", "--on-crash=block0:stop")
    workers = launcher.wait_until_up()
    found = processes(launcher)
    pids = {name: each["pid"] for name, each in found.items()}
    waiting = pids.pop("mule0/requestq")
    assert pids == {"supervisor": launcher.pid, **workers}
    # Its driver never comes; a process waits for it.
    assert waiting in {child.pid for child in psutil.Process(launcher.pid).children()}
    assert found["mule0/requestq"]["life"] == "unused"
    assert found["block0/requestq"]["life"] == "serving"
    assert (found["block0/requestq"]["device"], found["block0/requestq"]["queue"]) == ("block0", "requestq")
    assert found["block0/requestq"]["policy"] == "stop"
    assert found["console/receiveq"]["policy"] == "restart,intensity=5,period=30"
    assert [line.split()[0] for line in do(launcher, "ps").splitlines()] == ["PROCESS", *found]
    assert do(launcher, "list").splitlines()[1].split()[:3] == ["test", str(launcher.pid), "running"]


def test_stop_ends_the_guest_as_sigterm_does(launch: Launch) -> None:
    launcher = launch("hang")
    launcher.wait_until_up()
    assert do(launcher, "stop", "test") == ""
    assert launcher.finish() == -signal.SIGTERM
    assert remains(launcher) == []
    assert do(launcher, "list") == ""
    assert refusal(launcher, "ps", "test") == "there is no guest test; lguestctl list shows those that run"
    assert refusal(launcher, "ps") == "no guest runs"


def test_a_reboot_keeps_the_name_the_counters_and_the_log(launch: Launch) -> None:
    launcher = launch("hang", "--verbose")
    before = launcher.wait_until_up()
    do(launcher, "restart", "test", "block0")
    do(launcher, "reboot", "test")
    after = launcher.wait_until_up()
    assert not set(before.values()) & set(after.values())
    said = do(launcher, "log", "test")
    assert said.count("guest test: 16 MiB of memory") == 2
    assert said.index(f"block0/requestq is process {before['block0/requestq']}") < said.index("reboot 1")
    assert processes(launcher)["block0/requestq"]["restarts"] == 1
    (guest,) = json.loads(do(launcher, "stats"))["guests"]
    assert (guest["pid"], guest["reboots"]) == (launcher.pid, 1)
    do(launcher, "stop", "test")
    assert launcher.finish() == -signal.SIGTERM
    assert remains(launcher) == []


def test_reboots_and_questions_leave_no_file_behind(launch: Launch) -> None:
    launcher = launch("hang")
    launcher.wait_until_up()
    counts = []
    for _ in range(3):
        do(launcher, "reboot", "test")
        launcher.wait_until_up()
        for command in ("ps", "list", "stats"):
            do(launcher, command)
        refusal(launcher, "reset", "test", "tape0")
        counts.append(len(open_files(launcher.pid)))
    assert len(set(counts)) == 1


def test_restart_replaces_the_workers_of_a_device_or_one_queues(launch: Launch) -> None:
    launcher = launch("hang")
    launcher.wait_until_up()
    before = processes(launcher)
    do(launcher, "restart", "test", "console/transmitq")
    do(launcher, "restart", "block0")
    changed: set[str] = set()
    while changed != {"console/transmitq", "block0/requestq"}:
        after = processes(launcher)
        changed = {name for name in before if after[name]["pid"] not in {before[name]["pid"], None}}
        assert changed <= {"console/transmitq", "block0/requestq"}
    assert [name for name, each in after.items() if each["restarts"]] == ["console/transmitq", "block0/requestq"]


def test_a_device_that_is_reset_can_be_had_served_again(launch: Launch) -> None:
    launcher = launch("hang")
    launcher.wait_until_up()
    do(launcher, "reset", "test", "block0")
    assert refusal(launcher, "reset", "test", "block0") == "guest test: block0 is not served now (failed)"
    do(launcher, "restart", "test", "block0/requestq")
    while processes(launcher)["block0/requestq"]["life"] != "serving":
        pass
    launcher.wait_for("block0 is served again", PATIENCE)


def test_what_its_processes_may_not_do(launch: Launch) -> None:
    """Its workers are in jails; the machine of a test is not."""
    launcher = launch("hang")
    launcher.wait_until_up()
    rows = [line.split() for line in do(launcher, "jail").splitlines()]
    assert ["cpu", "jail", "NOT", "in", "force"] in [row[:5] for row in rows]
    assert ["block0/requestq", "capabilities", "in", "force"] in [row[:4] for row in rows]
    assert not [row for row in rows if row[0] == "block0/requestq" and "NOT" in row]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("restart", "test", "tape0"), "guest test: it has no device tape0; there is console, block0, mule0"),
        (("reset", "test", "block0/requestq"), "guest test: it has no device block0/requestq; there is console, "),
        (("restart", "test", "mule0"), "guest test: mule0 is not in use: the guest has no driver for it now"),
    ],
)
def test_what_cannot_be(launch: Launch, words: tuple[str, ...], reason: str) -> None:
    launcher = launch("hang")
    launcher.wait_until_up()
    assert refusal(launcher, *words).startswith(reason)
    assert launcher.exit_status() is None


def test_what_the_launcher_said_is_kept(launch: Launch) -> None:
    launcher = launch("hang")
    launcher.wait_until_up()
    do(launcher, "restart", "block0")
    do(launcher, "reset", "test", "console")
    assert do(launcher, "log", "--lines=1").endswith(" needs a reset\n")


def test_a_name_is_one_guests(launch: Launch) -> None:
    first = launch("hang")
    first.wait_until_up()
    second = launch("power_off", runtime=str(first.runtime.parent))
    assert second.finish() == 1
    assert second.lines == [
        f"a guest named test runs already (process {first.pid}); give this one another name with --name"
    ]
    do(first, "stop", "test")
    assert first.finish() == -signal.SIGTERM
    assert launch("power_off", runtime=str(first.runtime.parent)).finish() == 0


def test_a_killed_launcher_is_no_guest(launch: Launch) -> None:
    launcher = launch("hang")
    launcher.wait_until_up()
    launcher.signal(signal.SIGKILL)
    launcher.wait_until_gone(PATIENCE)
    assert launcher.exit_status() == -signal.SIGKILL
    assert do(launcher, "list") == ""
    assert remains(launcher) == []


def test_a_stopped_launcher_is_told_from_a_dead_one(launch: Launch) -> None:
    launcher = launch("hang")
    launcher.wait_until_up()
    launcher.signal(signal.SIGSTOP)
    row = do(launcher, "list").splitlines()[1]
    assert row.split()[:4] == ["test", str(launcher.pid), "no", "answer"]
    (guest,) = json.loads(do(launcher, "stats"))["guests"]
    assert guest == {"name": "test", "answers": False}
    launcher.signal(signal.SIGCONT)
    do(launcher, "stop", "test")
    assert launcher.finish() == -signal.SIGTERM


def test_a_guest_without_a_place_for_it_runs_all_the_same(launch: Launch) -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name, "lguest").touch()
        launcher = launch("power_off", runtime=name)
        assert launcher.finish() == 0
        (line,) = launcher.lines
        assert line == f"{name}/lguest is in the way: it is no directory; remove it; lguestctl will not find this guest"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_launcher_that_is_nobody_elsewhere_answers_root(launch: Launch, jail: Path) -> None:
    launcher = launch("reboots_in_place", "--username=nobody", f"--chroot={jail}")
    launcher.wait_for("life of")
    assert processes(launcher)["supervisor"]["pid"] == launcher.pid
    assert ["block0/requestq", "capabilities", "in", "force"] in [
        row.split()[:4] for row in do(launcher, "jail").split("\n")
    ]
    do(launcher, "reboot", "test")
    launcher.wait_for("life of")
    (guest,) = json.loads(do(launcher, "stats"))["guests"]
    assert guest["reboots"] == 1
    do(launcher, "stop", "test")
    assert launcher.finish() == -signal.SIGTERM
    assert do(launcher, "list") == "", "what it could not remove itself"
    assert remains(launcher) == []


def test_top_shows_them_until_q(launch: Launch) -> None:
    launcher = launch("hang")
    workers = launcher.wait_until_up()
    variables = {"XDG_RUNTIME_DIR": str(launcher.runtime.parent)}
    with Session([*LGUESTCTL, "top", "test", "-d", "0.1"], variables=variables, columns=120) as top:
        for key, order in (("m", "memory"), ("r", "requests"), ("c", "cpu")):
            top.type(key)
            top.wait_for(f"guest test, .* by {order}", PATIENCE)
        top.wait_for(rf"block0/requestq +{workers['block0/requestq']} ", PATIENCE)
        top.resize(30, 4)
        top.wait_for(r"\x1b\[H\x1b\[1m.{30}\x1b\[m\x1b\[K\r", PATIENCE)
        top.type("q")
        assert top.wait(PATIENCE) == 0
        assert top.output.endswith("\x1b[?25h\x1b[?1049l"), "the screen is as before"
        assert top.current_settings() == top.settings


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP])
def test_top_gives_the_terminal_back_when_it_is_ended(launch: Launch, ending: signal.Signals) -> None:
    launcher = launch("hang")
    launcher.wait_until_up()
    with Session([*LGUESTCTL, "top"], variables={"XDG_RUNTIME_DIR": str(launcher.runtime.parent)}) as top:
        top.wait_for("guest test", PATIENCE)
        top.signal(ending)
        assert top.wait(PATIENCE) == -ending
        assert top.current_settings() == top.settings
        assert "\x1b[?1049l" in top.output


def test_top_ends_with_its_guest(launch: Launch) -> None:
    launcher = launch("hang")
    launcher.wait_until_up()
    variables = {"XDG_RUNTIME_DIR": str(launcher.runtime.parent)}
    with Session([*LGUESTCTL, "top", "test", "-d", "0.1"], variables=variables) as top:
        top.wait_for("guest test", PATIENCE)
        launcher.signal(signal.SIGKILL)
        assert top.wait(PATIENCE) == 1
        assert top.output.splitlines()[-1].endswith("there is no guest test; lguestctl list shows those that run")
        assert top.current_settings() == top.settings
