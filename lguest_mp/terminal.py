"""The terminal: the guest's keyboard while the guest runs, the user's again on every way out.

The guest has a terminal driver of its own, so the host's has to hand over each byte as it is typed: no echo, no lines,
^C is a character and no signal. The original lguest switched off ``ISIG``, ``ICANON`` and ``ECHO``. That leaves the
host eating ^S and ^Q and giving the guest a line feed where Return was typed (editors tell them apart), so input
translation and flow control go too. Output processing stays: what the launcher itself prints is still lines.

Only a terminal that is ours to change is changed: standard input has to be one, and this process has to be in its
foreground. A launcher in the background takes it when it is continued in the foreground.

``kill -9`` of the supervisor is the one way out on which nobody can restore it: type ``stty sane``.
"""

from __future__ import annotations

import os
import signal
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeAlias

#: What termios.tcgetattr gives, and where in it.
_Attributes: TypeAlias = list[Any]
_IFLAG, _LFLAG, _CC = 0, 3, 6


class Terminal:
    """The terminal behind a file descriptor, if it is one. As a context manager it is restored at the end."""

    def __init__(self, fd: int = 0) -> None:
        self._fd = fd
        self._original: _Attributes | None = None
        self._raw: _Attributes | None = None
        #: Whether it is a terminal that is another job's at the moment; :meth:`take` it later.
        self.is_elsewhere = False

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def take(self) -> None:
        """Makes it raw, if it is a terminal and ours.

        Also when it was raw through us before: a shell that had it meanwhile (we were stopped) has changed it.
        """
        if not os.isatty(self._fd):
            return
        self.is_elsewhere = not self._is_ours()
        if self.is_elsewhere:
            return
        raw = termios.tcgetattr(self._fd)
        if raw == self._raw:
            return
        self._original = termios.tcgetattr(self._fd)
        raw[_IFLAG] &= ~(termios.BRKINT | termios.ISTRIP | termios.INLCR | termios.IGNCR | termios.ICRNL | termios.IXON)
        raw[_LFLAG] &= ~(termios.ISIG | termios.ICANON | termios.ECHO | termios.IEXTEN)
        characters = raw[_CC]
        characters[termios.VMIN] = 1
        characters[termios.VTIME] = 0
        self._set(raw)
        self._raw = termios.tcgetattr(self._fd)

    def restore(self) -> None:
        """Gives it back as it was; does nothing if it was not taken, or is somebody else's by now."""
        original, self._original, self._raw = self._original, None, None
        if original is not None and self._is_ours():
            self._set(original)

    def _is_ours(self) -> bool:
        try:
            return os.tcgetpgrp(self._fd) == os.getpgrp()
        except OSError:
            return True  # not our controlling terminal: it has no foreground that concerns us

    def _set(self, attributes: _Attributes) -> None:
        """Sets without waiting for output, which may be held for ever, and without being stopped for it."""
        with _blocked(signal.SIGTTOU):
            try:
                termios.tcsetattr(self._fd, termios.TCSANOW, attributes)
            except termios.error:
                return  # the terminal is gone: nobody is left to care


@contextmanager
def _blocked(signum: signal.Signals) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signum})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def size(fds: tuple[int, ...] = (1, 0)) -> tuple[int, int] | None:
    """(columns, rows) of the first of these that is a terminal."""
    for fd in fds:
        try:
            columns, rows = os.get_terminal_size(fd)
        except OSError:
            continue
        return columns, rows
    return None
