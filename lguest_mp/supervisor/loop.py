"""Waiting for whatever happens next: one thread, many file descriptors, a reaction to each, and some at their time.

A reaction may take away another's descriptor that is ready in the same moment (a process ends, its channel is closed);
then that one is not called any more. Signals are looked at before all others, since they may be why those others end.
"""

from __future__ import annotations

import heapq
import select
import selectors
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from lguest_mp.record import Record


class Timer(Record):
    """Something that is done at ``due`` (time.monotonic), unless it is cancelled before."""

    due: float
    number: int
    react: Callable[[], None] | None

    def __lt__(self, other: Timer) -> bool:
        return (self.due, self.number) < (other.due, other.number)

    def cancel(self) -> None:
        """Does nothing if it is done."""
        self.react = None


class Loop:
    """Reactions to file descriptors that become readable, and to time."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[Timer] = []
        self._number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._selector.close()

    def watch(self, fd: int, react: Callable[[], None], *, first: bool = False) -> None:
        """Has ``react`` called whenever ``fd`` is readable; before all others if ``first``."""
        self._selector.register(fd, selectors.EVENT_READ, (not first, react))

    def watch_later(self, seconds: float, fd: int, react: Callable[[], None]) -> Timer:
        """Watches ``fd`` in so many seconds; while the host has no memory for that, in so many more."""

        def attempt() -> None:
            try:
                self.watch(fd, react)
            except OSError:
                self._push(timer, seconds, attempt)

        timer = self.later(seconds, attempt)
        return timer

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

    def later(self, seconds: float, react: Callable[[], None]) -> Timer:
        """Has ``react`` called once in so many seconds."""
        self._number += 1
        timer = Timer(0.0, self._number, None)
        self._push(timer, seconds, react)
        return timer

    def _push(self, timer: Timer, seconds: float, react: Callable[[], None]) -> None:
        timer.due, timer.react = time.monotonic() + seconds, react
        heapq.heappush(self._timers, timer)

    def wait(self, timeout: float | None = None) -> None:
        """Waits for at most ``timeout`` seconds (None: for ever), and has everybody called who is to be called."""
        ready = [key for key, _ in self._selector.select(self._until_next(timeout))]
        for key in sorted(ready, key=lambda key: key.data[0]):
            if self._selector.get_map().get(key.fd) is key:
                key.data[1]()
        now = time.monotonic()
        while self._timers and self._timers[0].due <= now:
            if react := heapq.heappop(self._timers).react:
                react()

    def _until_next(self, timeout: float | None) -> float | None:
        while self._timers and self._timers[0].react is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return timeout
        left = max(0.0, self._timers[0].due - time.monotonic())
        return left if timeout is None else min(left, timeout)


def is_readable(fd: int) -> bool:
    """Whether reading would not wait."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(0))
