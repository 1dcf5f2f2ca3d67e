"""What serving the host's less reliable things has in common: what is lost is told once, and an end is no failure."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from lguest_mp.virtio.queue import Queue


class Losses:
    """Tells the user why something is lost: of each kind the first one. A guest must not be able to make up kinds."""

    def __init__(self, name: str, log: Callable[[str], None]) -> None:
        self._name = name
        self._log = log
        self._told: set[str | int | None] = set()

    def note(self, kind: str | int | None, reason: str) -> None:
        """``kind`` is an error number, or a word of ours."""
        if kind not in self._told:
            self._told.add(kind)
            self._log(f"{self._name}: {reason}")


def sleep_for_ever(queue: Queue) -> NoReturn:
    """For a worker with nothing left to serve: it does not end, since a worker that ends is a failure."""
    queue.is_waiting(True)
    while True:
        signal.pause()
