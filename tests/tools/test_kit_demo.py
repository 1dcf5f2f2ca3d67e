"""The demo, as somebody sees it who has just got the sources."""

from __future__ import annotations

import subprocess
from pathlib import Path

from guestkit.session import Session

DEMO = Path(__file__).parent.parent.parent / "tools" / "demo"


def test_without_a_terminal_it_shows_the_guest_and_switches_it_off() -> None:
    finished = subprocess.run([DEMO], check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    for shown in (
        "block at PCI",
        "entropy at PCI",
        "/mnt",
        "virtio_rng.0",
        "10.0.2.15/24",
        "bytes from 10.0.2.2",
        "lguest[demo] block0/requestq",
    ):
        assert shown in finished.stdout


def test_with_a_terminal_it_leaves_the_person_at_a_shell() -> None:
    with Session([str(DEMO)]) as session:
        session.wait_for("Leave with exit", seconds=300)
        session.wait_for("# ")
        session.type("echo $((6 * 7)) >/mnt/answer; cat /mnt/answer; tty\n")
        session.wait_for("^42")
        session.wait_for("/dev/hvc0")
        session.type("exit\n")
        assert session.wait() == 0
        session.wait_until_gone(1.0)
        assert session.current_settings() == session.settings
