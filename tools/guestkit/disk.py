"""Disk images."""

from __future__ import annotations

from pathlib import Path

MIB = 1 << 20


def make_sparse(path: Path, size: int) -> Path:
    """A file of ``size`` bytes, all zeros, that takes no room yet; ``path``."""
    with path.open("wb") as image:
        image.truncate(size)
    return path
