"""Long steps say what they do, on standard error, so that nobody wonders whether anything happens."""

from __future__ import annotations

import sys


class SetupError(Exception):
    """The surroundings lack something; the text is one line for a person: what, and what to do."""


def step(text: str) -> None:
    """Announces what comes next."""
    print(f"==> {text}", file=sys.stderr, flush=True)
