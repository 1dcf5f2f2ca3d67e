"""What lguestctl prints, does, and answers with, when guests answer and when they do not."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fakelaunchers import QUEUE, Said, running

from guestkit.session import Session
from lguest_mp import registry
from lguest_mp.ctl import cli
from lguest_mp.line import Line
from lguest_mp.screen import Track


def do(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Runs a command that works."""
    status = cli.main(words)
    printed = capsys.readouterr()
    assert (status, printed.err) == (0, "")
    return printed.out


def refusal(capsys: pytest.CaptureFixture[str], *words: str, status: int = 1) -> str:
    """Runs one that does not; the line that says why."""
    assert cli.main(words) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"lguestctl: .*\n", printed.err)
    return printed.err.removeprefix("lguestctl: ").removesuffix("\n")


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert do(capsys, "list") == ""
    with running("one"), running("two"):
        header, first, second = do(capsys, "list").splitlines()
    assert header.split()[0] == "NAME"
    assert first.split()[:3] == ["one", str(os.getpid()), "running"]
    assert first.endswith("vm?[2Jlinuz"), "what others made up does nothing to the terminal"
    assert second.split()[0] == "two"
    assert do(capsys, "list") == ""


def test_ps(capsys: pytest.CaptureFixture[str]) -> None:
    with running("one"):
        lines = do(capsys, "ps", "--long", "one").splitlines()
    assert lines[1].split()[:3] == ["supervisor", str(os.getpid()), "running"]
    row = [*("block0/requestq", "-", "failed", "-", "-", "-", "12", "48K", "3.5s", "4"), "block0", "requestq", "reset"]
    assert lines[2].split() == [*row, "was", "?", "killed"]


def test_a_name_may_be_left_out_where_just_one_guest_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, "ps") == "no guest runs"
    with running("one") as guest:
        assert "block0" in do(capsys, "ps")
        do(capsys, "restart", "block0")
        with running("two"):
            assert refusal(capsys, "ps") == "which guest? There are one, two"
            assert refusal(capsys, "restart", "block0") == "which guest? There are one, two"
    assert guest.calls == ["restart block0"]


@pytest.mark.parametrize("words", [("stop",), ("reboot",), ("frobnicate",), (), ("ps", "--no"), ("log", "-n", "0")])
def test_what_is_no_command(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    with running("one") as guest:
        assert "lguestctl" in refusal(capsys, *words, status=2)
    assert guest.calls == []


@pytest.mark.parametrize("words", [("restart", "one", "block0"), ("reset", "one", "net0")])
def test_orders(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    with running("one") as guest:
        assert do(capsys, *words) == ""
    assert guest.calls == [f"{words[0]} {words[2]}"]


def test_a_reboot_can_be_asked_for_again_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with running("one") as guest:
        for _ in range(5):
            do(capsys, "reboot", "one")
    assert guest.calls == ["reboot"] * 5


def test_jail(capsys: pytest.CaptureFixture[str]) -> None:
    with running("one"):
        lines = do(capsys, "jail").splitlines()
    assert re.split("  +", lines[1])[:3] == ["cpu", "jail", "NOT in force"]


def test_log(capsys: pytest.CaptureFixture[str]) -> None:
    with running("one"):
        lines = do(capsys, "log").splitlines()
        assert do(capsys, "log", "--source=supervisor").splitlines() == lines[:1]
        assert do(capsys, "log", "-n", "1").splitlines() == lines[1:]
        assert do(capsys, "log", "--source", "cpu").splitlines() == lines[1:]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.250 warning supervisor: hello \?\[31m", lines[0])
    assert lines[1].endswith(" cpu: a word")


def test_log_goes_on_in_the_guests_next_life_and_ends_with_the_guest() -> None:
    command = [sys.executable, "-m", "lguest_mp.ctl", "log", "--follow"]
    with (
        running("one") as guest,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program,
    ):
        assert program.stdout
        assert program.stderr
        assert program.stdout.readline().endswith("supervisor: hello ?[31m\n")
        assert program.stdout.readline().endswith("cpu: a word\n")
        guest.log.append(Said("in the next life", time=2.5))
        assert cli.main(["reboot", "one"]) == 0
        assert program.stdout.readline() == "-- guest one reboots --\n"
        assert program.stdout.readline().endswith("supervisor: in the next life\n"), "nothing is said twice"
        assert cli.main(["stop", "one", "--no-wait"]) == 0
        assert program.stderr.readline() == "lguestctl: guest one has ended: it switched itself off\n"
        assert program.wait() == 0


# ---- For programs ----


def test_stats_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    with running("one"):
        stats = json.loads(do(capsys, "stats"))
        assert json.loads(do(capsys, "stats", "one", "--json")).keys() == stats.keys()
    (guest,) = stats["guests"]
    supervisor, queue = guest.pop("processes")
    assert stats["schema"] == 1
    assert guest == {
        "name": "one",
        "answers": True,
        "pid": os.getpid(),
        "life": "running",
        "started": 1e9,
        "reboots": 2,
        "machine": "pc",
        "cpu": "unicorn",
        "memory_bytes": 256 << 20,
        "kernel": "vm\x1b[2Jlinuz",
    }
    assert queue == {
        "process": "block0/requestq",
        "device": "block0",
        "queue": "requestq",
        "pid": None,
        "life": "failed",
        "state": None,
        "cpu_seconds": None,
        "own_memory_bytes": None,
        "requests": 12,
        "bytes": 49152,
        "last_request_age_seconds": 3.5,
        "restarts": 4,
        "last_end": "was \x07 killed",
        "policy": "reset",
    }
    assert supervisor.keys() == queue.keys()
    assert supervisor["cpu_seconds"] > 0
    assert supervisor["own_memory_bytes"] > 0


#: prometheus.io/docs/instrumenting/exposition_formats, "Text-based format".
_SAMPLE = re.compile(r'([a-zA-Z_:][\w:]*)\{((?:[a-zA-Z_]\w*="(?:[^"\\\n]|\\[\\"n])*",?)*)\} (\S+)')


def test_stats_for_prometheus(capsys: pytest.CaptureFixture[str]) -> None:
    with running("one") as guest:
        guest.rows += (QUEUE.replace(name='odd"\\\n', device=None),)
        text = do(capsys, "stats", "--prometheus")
    assert text.endswith("\n")
    kinds: dict[str, str] = {}
    seen = set()
    current = ""
    for line in text.splitlines():
        if line.startswith("# HELP "):
            current = line.split()[2]
            assert current not in kinds, "all of a metric is in one group"
        elif line.startswith("# TYPE "):
            assert line.split()[2] == current
            kinds[current] = line.split()[3]
        else:
            match = _SAMPLE.fullmatch(line)
            assert match, line
            assert match[1] == current
            assert (match[1], match[2]) not in seen
            seen.add((match[1], match[2]))
            float(match[3])
    assert set(kinds.values()) == {"counter", "gauge"}
    assert all(name.endswith("_total") is (kind == "counter") for name, kind in kinds.items())
    assert 'lguest_queue_requests_total{guest="one",device="block0",queue="requestq"} 12\n' in text
    assert 'lguest_process_up{guest="one",process="block0/requestq"} 0\n' in text
    assert r'process="odd\"\\\n"' in text


def test_the_two_forms_of_stats_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert "exclude each other" in refusal(capsys, "stats", "--json", "--prometheus", status=2)


# ---- Launchers that are not themselves ----


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        (b'["Welcome",{"protocol":2}]', "guest bad was started by another version of lguest; use its lguestctl"),
        (b"HTTP/1.1 400", "guest bad was started by another version of lguest; use its lguestctl"),
        (b'["Goodbye",{"reboots":false,"reason":"it is tired"}]', "guest bad has ended: it is tired"),
        (b'["Refused",{"reason":"no \\u001b[2J"}]', "guest bad: no ?[2J"),
    ],
)
def test_what_a_launcher_may_say_first(capsys: pytest.CaptureFixture[str], says: bytes, reason: str) -> None:
    claim = registry.claim("bad")
    connected, greeted = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with connected, greeted:
        pid = os.fork()
        if pid == 0:
            claim.listener.setblocking(True)
            claim.listener.accept()[0].send(says)
            os._exit(0)
        assert refusal(capsys, "ps", "bad") == reason
        os.waitpid(pid, 0)
    claim.release()


# ---- The console ----


def attached(place: Path, *words: str) -> Session:
    return Session(
        [sys.executable, "-m", "lguest_mp.ctl", "console", *words],
        variables={"XDG_RUNTIME_DIR": str(place.parent)},
        columns=90,
        rows=20,
    )


def typed(line: Line, count: int) -> bytes:
    """So many bytes that somebody typed."""
    os.set_blocking(line.keys, True)
    data = b""
    while len(data) < count:
        data += os.read(line.keys, count - len(data))
    return data


def test_console_shows_what_was_and_what_comes_and_types(place: Path) -> None:
    with running("one") as guest:
        writer = guest.line.writer(Track.CONSOLE)
        writer.append(b"kept\r\n")
        with attached(place, "one") as console:
            console.wait_for("attached to one; Ctrl-] detaches")
            console.wait_for("kept")
            writer.append(b"new\r\n")
            console.wait_for("new")
            console.type("ls\x03")
            assert typed(guest.line, 3) == b"ls\x03", "every key is the guest's"
            console.type("x\x1dy")
            assert typed(guest.line, 1) == b"x"
            assert console.wait() == 0
            assert console.output.splitlines()[-1].endswith("detached from one")
            assert console.current_settings() == console.settings
        assert guest.calls[0] == "resize 90 20"


def test_console_goes_on_in_the_guests_next_life_and_ends_with_the_guest(place: Path) -> None:
    with running("one") as guest, attached(place) as console:
        writer = guest.line.writer(Track.CONSOLE)
        console.wait_for("attached")
        guest.line.attach()
        assert cli.main(["reboot", "one"]) == 0
        writer.append(b"again\r\n")
        console.wait_for("again")
        while guest.calls.count("resize 90 20") < 2:
            pass
        assert cli.main(["stop", "one", "--no-wait"]) == 0
        assert console.wait() == 0
        assert console.output.splitlines()[-1].endswith("guest one has ended: it switched itself off")


def test_console_gives_the_terminal_back_when_it_is_ended(place: Path) -> None:
    with running("one"), attached(place, "one", "--escape=none") as console:
        while console.current_settings() == console.settings:
            pass
        console.type("\x1d")
        console.signal(signal.SIGTERM)
        assert console.wait() == -signal.SIGTERM
        assert console.current_settings() == console.settings


def test_escape_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with running("one"):
        assert "give a control character like ^]" in refusal(capsys, "console", "--escape=Ctrl-A")
