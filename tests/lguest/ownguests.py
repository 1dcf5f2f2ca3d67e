"""Runs guests of our own under the ``lguest`` command."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

GUESTS = Path(__file__).with_name("guests")
LAUNCHER = (sys.executable, "-m", "lguest_mp")
#: Enough for all of them, in MiB.
MEMORY = 4
PATIENCE = 120.0


def command(guest: str, scene: str, *options: str, memory: int = MEMORY) -> list[str]:
    """The command line that has ``guest`` play ``scene``."""
    return [*LAUNCHER, *options, str(memory), str(GUESTS / f"{guest}.elf"), scene]


@dataclass(frozen=True)
class Ended:
    """A guest that is over: the launcher's exit status, the lines of the console, and what the launcher said."""

    status: int
    lines: list[str]
    said: list[str]


def run(arguments: Sequence[str], typed: bytes = b"") -> Ended:
    """Runs a launcher that is not at a terminal."""
    finished = subprocess.run(arguments, check=False, input=typed, capture_output=True, timeout=PATIENCE)
    return Ended(finished.returncode, _lines(finished.stdout), _lines(finished.stderr))


def play(guest: str, scene: str, *options: str, typed: bytes = b"") -> Ended:
    """Has ``guest`` play ``scene`` to its end."""
    return run(command(guest, scene, *options), typed)


def lines_of(guest: str, scene: str, *options: str) -> list[str]:
    """What a guest prints that switches itself off afterwards, and of which the launcher has nothing to tell."""
    ended = play(guest, scene, *options)
    assert (ended.status, ended.said) == (0, []), ended
    return ended.lines


def _lines(output: bytes) -> list[str]:
    return output.decode(errors="replace").replace("\r", "").splitlines()
