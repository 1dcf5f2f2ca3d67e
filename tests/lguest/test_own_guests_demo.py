"""``lguest --demo``, in front of a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from ownguests import LAUNCHER, run

from guestkit.session import Session

CLOCK = r"\[\d\d:\d\d:\d\d\] "


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes.fromhex("4c 47 55 45 53 54").ljust(3 << 20, b"\0"))
    return path


@pytest.fixture
def demo(disk: Path) -> Iterator[Session]:
    """The demo with all that it can show."""
    with Session([*LAUNCHER, "--demo", "--rng", f"--block={disk}"]) as session:
        session.wait_for("Hello. I am lguest's demo")
        yield session


def leave(demo: Session) -> None:
    demo.type("q")
    demo.wait_for(r"Good bye\.")
    assert demo.wait() == 0
    demo.wait_until_gone()
    assert demo.current_settings() == demo.settings


def test_it_shows_what_it_finds(demo: Session) -> None:
    demo.wait_for("16 MiB of memory")
    demo.wait_for(r"My devices, by the descriptors at 0x1000000:")
    demo.wait_for(r"  console  queue of 256 \(irq 1\)  queue of 256 \(irq 2\)")
    demo.wait_for(r"  rng      queue of 256 \(irq 3\)")
    demo.wait_for(r"  block    queue of 256 \(irq 4\).*  feature 9")
    demo.wait_for(r"Random numbers:(?: \d+){6}\r")
    demo.wait_for(r"My disk has 3 MiB. Its first bytes: 4c 47 55 45 53 54(?: 00){10}\r")
    leave(demo)


def test_its_clock_ticks(demo: Session) -> None:
    seen = {demo.wait_for(rf"\r({CLOCK})").groups[0] for _ in range(3)}
    while len(seen) < 3:
        seen.add(demo.wait_for(rf"\r({CLOCK})").groups[0])
    leave(demo)


def test_it_echoes_what_is_typed(demo: Session) -> None:
    demo.wait_for(CLOCK)
    demo.type("Helly\x7fo, queue")
    demo.wait_for(f"{CLOCK}Hello, queue")
    demo.type("\r")
    demo.wait_for(r"You typed: Hello, queue\r")
    leave(demo)


def test_it_does_it_again_on_a_key(demo: Session) -> None:
    first = demo.wait_for(r"Random numbers:((?: \d+){6})\r").groups
    demo.wait_for(CLOCK)
    demo.type("r")
    assert demo.wait_for(r"Random numbers:((?: \d+){6})\r").groups != first
    demo.type("d")
    demo.wait_for("My disk has 3 MiB")
    leave(demo)


def test_it_boots_again_on_a_key(demo: Session) -> None:
    demo.wait_for(CLOCK)
    demo.type("b")
    demo.wait_for(r"Booting again\.")
    demo.wait_for("Hello. I am lguest's demo")
    demo.wait_for(CLOCK)
    leave(demo)


def test_it_crashes_on_a_key(demo: Session) -> None:
    demo.wait_for(CLOCK)
    demo.type("c")
    assert demo.wait() == 3
    assert demo.output.splitlines()[-1] == "lguest: the guest died: CRASH: you wanted it"
    demo.wait_until_gone()


def test_it_does_with_what_it_gets() -> None:
    ended = run([*LAUNCHER, "--demo", "4", "some", "words"], typed=b"Hello\rq")
    assert (ended.status, ended.said) == (0, [])
    text = "\n".join(ended.lines)
    assert "\n4 MiB of memory" in text
    assert "I was told: some words" in text
    assert "no source of random numbers" in text
    assert "no disk" in text
    assert "You typed: Hello" in text
    assert not re.search("^  (rng|block) ", text, re.MULTILINE)
    assert ended.lines[-1] == "Good bye."
