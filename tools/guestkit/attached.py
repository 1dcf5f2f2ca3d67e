"""Somebody who is attached to a guest's console without having been given anything: who owns a process can do that."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from guestkit.session import PATIENCE, SessionError
from lguest_mp.screen import ScreenReader


class Attached:
    """Attached to the guest whose supervisor is process ``pid``; ``seen`` is all that was on the screen."""

    def __init__(self, pid: int) -> None:
        with ExitStack() as opened:
            screen = _open(pid, os.O_RDONLY, lambda target, _: target.startswith("/memfd:lguest-screen"))
            opened.callback(os.close, screen)
            self._reader = ScreenReader(screen)
            writing = os.O_WRONLY | os.O_NONBLOCK
            self._keys = _open(pid, os.O_WRONLY, lambda target, flags: target.startswith("pipe:") and flags == writing)
            opened.callback(os.close, self._keys)
            self._opened = opened.pop_all()
        self.seen = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    def type(self, text: str) -> None:
        """Types; at most what a pipe takes."""
        os.write(self._keys, text.encode())

    def wait_for(self, pattern: bytes, seconds: float = PATIENCE) -> None:
        """Waits until ``pattern`` is somewhere in what was seen; ``^`` and ``$`` are at lines."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.seen, re.MULTILINE):
            if time.monotonic() > deadline:
                raise SessionError(f"{seconds:g} s passed before {pattern!r} appeared; seen:\n{self.seen[-2000:]!r}")
            self.seen += self._reader.read_new()
            time.sleep(0.01)


def _open(pid: int, flags: int, is_it: Callable[[str, int], bool]) -> int:
    """Opens the file of a process of which that is true, given what it refers to and its flags but O_CLOEXEC."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        found = re.search(r"^flags:\s+(\d+)", Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text(), re.MULTILINE)
        assert found is not None
        if is_it(os.readlink(entry), int(found[1], 8) & ~os.O_CLOEXEC):
            return os.open(entry, flags | os.O_CLOEXEC)
    raise SessionError(f"process {pid} has no such file")
