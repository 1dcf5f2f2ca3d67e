"""All four devices, driven by guests of our own: through descriptors, rings, notifications and interrupts."""

from __future__ import annotations

import os
import re
import select
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from ownguests import command, lines_of, play

from guestkit.session import Session
from lguest_mp.network.link import Link

MIB = 1 << 20
GUEST_MAC, TEST_MAC = bytes.fromhex("525400000007"), bytes.fromhex("525400000008")
#: What precedes each frame on a link.
WIRE_HEADER = 12
#: For experiments (IEEE 802).
ETHERTYPE = b"\x88\xb5"
DESCRIPTOR = re.compile(
    r"type (\d+)((?: queue 256 irq \d+ page \d+)*) status 0 features ([0-9a-f]*) accepted ([0-9a-f]*)"
    r" configuration ([0-9a-f]*)"
)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk of 1 MiB that begins with a zero and a word."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"\0disk".ljust(MIB, b"\0"))
    return path


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime directory for this test alone, where its links are."""
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def wire(runtime: None) -> Iterator[Link]:
    """The link ``lab``, on which the test is already."""
    with closing(Link("lab", TEST_MAC)) as link:
        yield link


def receive(wire: Link) -> bytes:
    """The next frame."""
    (socket,) = wire.files
    assert select.select([socket], [], [], 60)[0]
    buffer = bytearray(2000)
    return bytes(buffer[WIRE_HEADER : wire.read([memoryview(buffer)])])


def receive_from_guest(wire: Link) -> bytes:
    """What follows the EtherType in the next frame of the guest's."""
    frame = receive(wire)
    assert frame[6:14] == GUEST_MAC + ETHERTYPE
    return frame[14:]


# ---- The descriptor page ----


def test_every_device_has_its_descriptor(runtime: None, disk: Path) -> None:
    lines = lines_of("drivers", "bus", "--rng", f"--block={disk}", "--net=link:lab,mac=52:54:00:00:00:07")
    found = [match.groups() for match in map(DESCRIPTOR.fullmatch, lines) if match]
    assert len(found) == len(lines)
    assert [(kind, queues.count("queue")) for kind, queues, *_ in found] == [("3", 2), ("4", 1), ("2", 1), ("1", 2)]
    assert [int(irq) for irq in re.findall(r"irq (\d+)", "".join(lines))] == [1, 2, 3, 4, 5, 6]
    assert [int(page) for page in re.findall(r"page (\d+)", "".join(lines))] == [1, 4, 7, 10, 13, 16]
    offered = [int.from_bytes(bytes.fromhex(features), "little") for _, _, features, _, _ in found]
    assert all(int(accepted, 16) == 0 for _, _, _, accepted, _ in found)
    _console, _rng, block, net = offered
    assert block & (1 << 2 | 1 << 9) == 1 << 2 | 1 << 9
    assert net & 1 << 5
    assert bytes.fromhex(found[2][4])[:8] == (MIB // 512).to_bytes(8, "little")
    assert bytes.fromhex(found[3][4])[:6] == GUEST_MAC


# ---- The console ----


def test_the_console_carries_both_directions() -> None:
    with Session(command("drivers", "console")) as session:
        session.wait_for(r"ready\r*\n")
        for word in ("hello", "world"):
            session.type(word)
            session.wait_for(word.upper())
        session.type("bye.")
        session.wait_for(r"BYE\.")
        assert session.wait() == 0
        session.wait_until_gone()
        assert session.current_settings() == session.settings


def test_chains_of_descriptors() -> None:
    assert lines_of("drivers", "console_chains") == ["ready", "ready", "ready", "used 4 3 0"]


def test_the_rings_indices_wrap() -> None:
    assert lines_of("drivers", "console_wrap") == ["sent 66000"]


def test_a_text_for_the_early_console() -> None:
    assert lines_of("drivers", "long_text") == ["x" * 2046, "alive"]


# ---- The disk ----


def test_a_disk_is_written_and_read(disk: Path) -> None:
    assert lines_of("drivers", "disk", f"--block={disk}") == [
        f"sectors {MIB // 512}",
        "write 0",
        "flush 0",
        "read 0",
        "before 00000000",
        "written 00fffefd",
        "behind 00000000",
        "read past the end 1",
        "no request 2",
    ]
    assert disk.read_bytes()[3 * 512 : 4 * 512] == bytes(-number % 256 for number in range(512))


def test_a_device_may_be_reset_and_started_again(disk: Path) -> None:
    first = "status 0 first bytes 00646973"
    assert lines_of("drivers", "disk_again", f"--block={disk}") == [first, "used index 0 accepted 00000000", first]


def test_a_guest_that_boots_again(disk: Path) -> None:
    assert lines_of("drivers", "boot_twice", f"--block={disk}") == [
        "status 0 first bytes 00646973",
        "restart 0",
        "status 0 first bytes 01646973",
        "second life",
    ]


# ---- Random numbers, the network ----


def test_random_numbers() -> None:
    lines = lines_of("drivers", "rng", "--rng")
    draws = [match[1] for match in (re.fullmatch(r"bytes 16 are (.{32})00", line) for line in lines) if match]
    assert len(set(draws)) == 2
    assert "0" * 32 not in draws


def test_the_network_carries_both_directions(wire: Link) -> None:
    with Session(command("drivers", "net", "--net=link:lab,mac=52:54:00:00:00:07")) as session:
        session.wait_for(r"mac 525400000007\r*\n")
        assert receive_from_guest(wire) == b"GL".ljust(60 - 14, b"\0")
        frame = GUEST_MAC + TEST_MAC + ETHERTYPE + b"question".ljust(100, b"?")
        wire.write([memoryview(bytes(WIRE_HEADER) + frame)])
        session.wait_for(rf"received {10 + len(frame)} {b'question'.hex()}\r*\nsent")
        assert receive_from_guest(wire) == frame[14:]
        assert session.wait() == 0


# ---- Misunderstandings ----


@pytest.mark.parametrize(
    ("scene", "reason"),
    [
        ("kick_too_early", "Notification on console before setup!"),
        ("ready_twice", "Device console features finalized twice"),
        ("bad_notify", "Bad NOTIFY 0x10400000"),
    ],
)
def test_what_the_launcher_does_not_put_up_with(scene: str, reason: str) -> None:
    ended = play("drivers", scene)
    assert (ended.status, ended.lines) == (3, [])
    assert ended.said == [f"lguest: the guest died: {reason}"]


def test_a_driver_that_gives_up() -> None:
    ended = play("drivers", "failed", "--rng")
    assert (ended.status, ended.lines) == (0, ["bytes 16"])
    assert ended.said == ["lguest: Device rng0 configuration FAILED"] * 2


@pytest.mark.parametrize(
    ("scene", "option", "said"),
    [
        ("endless_chain", (), "console/transmitq: a chain of more descriptors than"),
        ("wild_buffer", ("--rng",), "rng0/requestq: a descriptor names memory that is none"),
    ],
)
def test_a_driver_that_breaks_the_rules_loses_its_device_only(scene: str, option: tuple[str, ...], said: str) -> None:
    with Session(command("drivers", scene, *option)) as session:
        session.wait_for(said)
        assert session.exit_status() is None
        session.signal(signal.SIGTERM)
        assert session.wait() == -signal.SIGTERM
        session.wait_until_gone()


def test_a_workers_death_ends_the_guest_if_the_user_wants_it() -> None:
    with Session(command("drivers", "console", "--on-crash=stop")) as session:
        session.wait_for(r"ready\r*\n")
        (worker,) = (pid for pid, title in session.processes().items() if title.endswith("console/transmitq"))
        os.kill(worker, signal.SIGKILL)
        assert session.wait() == 4
        session.wait_until_gone()
