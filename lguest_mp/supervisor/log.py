"""The launcher's own words: lines on standard error, each with the launcher's name in front."""

from __future__ import annotations

import contextlib
import os


def say(text: str) -> None:
    """Shows one line. It may hold what a guest made up: no control character in it reaches the terminal."""
    line = "".join(character if character.isprintable() else "?" for character in text)
    with contextlib.suppress(OSError):  # nobody reads it; the guest's life goes on
        os.write(2, f"lguest: {line}\n".encode(errors="replace"))
