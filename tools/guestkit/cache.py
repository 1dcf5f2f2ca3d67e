"""Where everything that is downloaded or made goes: one folder, which may be deleted at any time.

``$LGUEST_CACHE``, or ``lguest-mp`` in the user's cache folder (``$XDG_CACHE_HOME``, ``~/.cache``). Several processes
may fill it at once (tests run side by side): who makes something holds the folder's lock, and a thing appears under
its name only when it is whole.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_directory() -> Path:
    """The folder, made if need be."""
    chosen = os.environ.get("LGUEST_CACHE")
    if chosen:
        directory = Path(chosen)
    else:
        base = os.environ.get("XDG_CACHE_HOME")
        directory = (Path(base) if base else Path.home() / ".cache") / "lguest-mp"
    directory.mkdir(parents=True, exist_ok=True)
    return directory.resolve()


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps other processes from making things in ``directory``, which is made if need be."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
