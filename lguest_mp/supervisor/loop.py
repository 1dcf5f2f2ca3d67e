"""Waiting for whatever happens next: one thread, many file descriptors, a reaction to each.

A reaction may take away another's descriptor that is ready in the same moment (a process ends, its channel is closed);
then that one is not called any more. Signals are looked at before all others, since they may be why those others end.
"""

from __future__ import annotations

import select
import selectors
from collections.abc import Callable
from types import TracebackType
from typing import Self


class Loop:
    """Reactions to file descriptors that become readable."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._selector.close()

    def watch(self, fd: int, react: Callable[[], None], *, first: bool = False) -> None:
        """Has ``react`` called whenever ``fd`` is readable; before all others if ``first``."""
        self._selector.register(fd, selectors.EVENT_READ, (not first, react))

    def forget(self, fd: int) -> None:
        """Ends that; does nothing if it has ended."""
        if fd in self._selector.get_map():
            self._selector.unregister(fd)

    def finish(self, fd: int, react: Callable[[], None]) -> None:
        """Has ``react`` take what is left to be read, until it forgets ``fd`` or nothing is left; then forgets it.

        For a channel whose other side is gone: those are its last words.
        """
        while fd in self._selector.get_map() and is_readable(fd):
            react()
        self.forget(fd)

    def wait(self, timeout: float | None) -> None:
        """Waits for at most ``timeout`` seconds (None: for ever), and has everybody called who is to be called."""
        ready = [key for key, _ in self._selector.select(timeout)]
        for key in sorted(ready, key=lambda key: key.data[0]):
            if self._selector.get_map().get(key.fd) is key:
                key.data[1]()


def is_readable(fd: int) -> bool:
    """Whether reading would not wait."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(0))
