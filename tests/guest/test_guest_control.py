"""lguestctl and a real guest: who serves it, and what it notices of what is done to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from guestkit.attached import Attached
from guestkit.guest import Guest, Launch


def ctl(runtime: dict[str, str], *words: str) -> str:
    """Runs ``lguestctl``, which works; what it prints."""
    command = [sys.executable, "-m", "lguest_mp.ctl", *words]
    done = subprocess.run(command, check=False, env={**os.environ, **runtime}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def processes(runtime: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The processes of the only guest, by name."""
    (guest,) = json.loads(ctl(runtime, "stats", "--json"))["guests"]
    return {each["process"]: each for each in guest["processes"]}


def read_disk(guest: Guest) -> None:
    guest.run("dd if=/dev/vda of=/dev/null bs=64k count=16 iflag=direct 2>/dev/null")


def test_a_day_in_the_life_of_a_guest(launch: Launch, runtime: dict[str, str], disk: Path) -> None:
    guest = launch(f"--block={disk}", "--rng", name="day")
    guest.boot()
    assert ctl(runtime, "list").splitlines()[1].split()[:3] == ["day", str(guest.pid), "running"]
    found = processes(runtime)
    assert {name: each["pid"] for name, each in found.items()} == {"supervisor": guest.pid, **_workers(guest)}
    assert {line.split()[0] for line in ctl(runtime, "ps", "day").splitlines()} == {"PROCESS", *found}

    read_disk(guest)
    after = processes(runtime)["block0/requestq"]
    assert after["bytes"] - found["block0/requestq"]["bytes"] >= 1 << 20
    assert after["requests"] > found["block0/requestq"]["requests"]

    ctl(runtime, "restart", "day", "block0")
    read_disk(guest)
    again = processes(runtime)["block0/requestq"]
    assert (again["restarts"], again["pid"]) == (1, guest.members()["block0/requestq"])
    assert again["pid"] != after["pid"]
    assert again["requests"] > after["requests"], "counting goes on"

    ctl(runtime, "reset", "day", "rng0")
    assert processes(runtime)["rng0/requestq"]["pid"] is None
    ctl(runtime, "restart", "day", "rng0")
    read_disk(guest)

    guest.run("echo the-first-life > /dev/hvc0")
    ctl(runtime, "reboot", "day")
    guest.boot()
    with Attached(guest.pid) as person:
        person.wait_for(rb"^the-first-life.*\n(.*\n)+")
    (described,) = json.loads(ctl(runtime, "stats"))["guests"]
    assert (described["pid"], described["reboots"]) == (guest.pid, 1)
    assert processes(runtime)["block0/requestq"]["restarts"] == 1

    ctl(runtime, "stop", "day")
    assert guest.wait() == -signal.SIGTERM
    guest.wait_until_gone(1.0)
    assert ctl(runtime, "list") == ""


def _workers(guest: Guest) -> dict[str, int]:
    members = guest.members()
    del members[""]
    return members
