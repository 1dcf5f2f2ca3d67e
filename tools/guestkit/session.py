"""A program on a terminal, from the side of the person in front of it: what it shows, what is typed, how it ends.

The program is the leader of a session of its own, with a pseudo-terminal as controlling terminal. So whatever it
forks can be found again (:meth:`Session.processes`) even after it died itself, and nothing outlives :meth:`close`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import select
import signal
import struct
import termios
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

#: How long anything may take that should be quick, in seconds: generous, for machines that are busy with other things.
PATIENCE = 120.0


#: How long what a pattern matches may be, in bytes.
_LONGEST_MATCH = 1000


@dataclass(frozen=True)
class Found:
    """What :meth:`Session.wait_for` found: its groups, and what had been shown before it (and after the last one)."""

    before: str
    groups: tuple[str, ...]


class SessionError(AssertionError):
    """The program did not do what was waited for; the text shows the end of its output."""


class Terminal:
    """What somebody shows, from the side of the person in front of it; and what is typed."""

    def __init__(self, file: int) -> None:
        """``file``: its other side, a pseudo-terminal's or a socket; closed by whoever gave it."""
        self._terminal = file
        self._output = bytearray()
        self._seen = 0
        os.set_blocking(file, False)

    @property
    def output(self) -> str:
        """All that it has shown so far, line ends as in Python."""
        return as_text(self._output)

    def ending(self) -> str:
        """The end of what it has shown and said, for a person who wonders why."""
        return self.output[-4000:]

    def has_ended(self) -> bool:
        """Whether nothing will be shown any more."""
        return False

    def type(self, text: str) -> None:
        """Types ``text``; a terminal takes about 4000 bytes that nobody reads."""
        data = text.encode()
        while data:
            try:
                data = data[os.write(self._terminal, data) :]
            except BlockingIOError:
                self._read(time.monotonic() + 0.1)

    def shows(self, pattern: str) -> bool:
        """Whether ``pattern`` appears after the last one found, in what was read so far."""
        return re.compile(pattern.encode(), re.MULTILINE).search(self._output, self._seen) is not None

    def wait_for(self, pattern: str, seconds: float = PATIENCE) -> Found:
        """Waits until ``pattern`` appears after the last one found: a regular expression for at most a few lines.

        ``^`` and ``$`` are at lines; SessionError when the program ends or ``seconds`` pass before.
        """
        regex = re.compile(pattern.encode(), re.MULTILINE)
        deadline = time.monotonic() + seconds
        start = looked = self._seen
        while True:
            if match := regex.search(self._output, looked):
                self._seen = match.end()
                groups = tuple(as_text(group) for group in match.groups())
                return Found(as_text(self._output[start : match.start()]), groups)
            looked = max(looked, len(self._output) - _LONGEST_MATCH)
            if not self._read(deadline):
                why = "it ended" if self.has_ended() else f"{seconds:g} s passed"
                raise SessionError(f"{why} before {pattern!r} appeared; it showed:\n{self.ending()}")

    def read_for(self, seconds: float) -> None:
        """Reads what it shows for so long; a program whose terminal nobody reads stops at some point."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and (self._read(deadline) or not self.has_ended()):
            pass

    def _read(self, deadline: float) -> bool:
        """Reads what is there, waiting for it until ``deadline``; False: nothing came."""
        while True:
            try:
                data = os.read(self._terminal, 65536)
            except BlockingIOError:
                data = b""
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                data = b""
            if data:
                self._output += data
                return True
            left = deadline - time.monotonic()
            if left <= 0 or self.has_ended():
                return False
            # The end of the program is no event of the terminal, as its other side stays open here.
            select.select([self._terminal], [], [], min(left, 0.1))


class Session(Terminal):
    """A running program and its terminal of ``columns`` by ``rows``."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        variables: Mapping[str, str] | None = None,
        columns: int = 100,
        rows: int = 30,
        errors: Path | None = None,
    ) -> None:
        """Starts it; standard error is the terminal, too, unless there is a file for ``errors``."""
        self.started = time.monotonic()
        self._errors = errors
        terminal, slave = os.openpty()
        super().__init__(terminal)
        self.resize(columns, rows)
        #: The terminal's settings before the program began.
        self.settings = termios.tcgetattr(slave)
        name = os.ttyname(slave)
        # The session comes before the files, so that opening the terminal makes it the controlling one.
        self.pid = os.posix_spawn(
            command[0],
            list(command),
            {**os.environ, **(variables or {})},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, name, os.O_RDWR, 0),
                (os.POSIX_SPAWN_DUP2, 0, 1),
                (os.POSIX_SPAWN_DUP2, 0, 2)
                if errors is None
                else (os.POSIX_SPAWN_OPEN, 2, errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
            ],
            setsid=True,
        )
        # The slave stays open here, so that its settings can be looked at after the program has ended.
        self._slave = slave
        self._status: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def errors(self) -> str:
        """All that it has said on standard error so far, if that is a file of its own."""
        return "" if self._errors is None else self._errors.read_text(errors="replace")

    def ending(self) -> str:
        """See Terminal; with what it said elsewhere."""
        said = f"\nIt said:\n{self.errors[-4000:]}" if self._errors is not None else ""
        return self.output[-4000:] + said

    def has_ended(self) -> bool:
        """Whether the program has."""
        return self.exit_status() is not None

    def exit_status(self) -> int | None:
        """How it ended (negative: by that signal), or None when it still runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def wait(self, seconds: float = PATIENCE) -> int:
        """Waits until it has ended, reading what it shows; its exit status (negative: the signal)."""
        deadline = time.monotonic() + seconds
        while self.exit_status() is None:
            if time.monotonic() > deadline:
                raise SessionError(f"it did not end within {seconds:g} s; it showed:\n{self.ending()}")
            self._read(time.monotonic() + 0.05)
        while self._read(time.monotonic()):
            pass
        assert self._status is not None
        return self._status

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the program itself."""
        if self.exit_status() is None:
            os.kill(self.pid, number)

    def resize(self, columns: int, rows: int) -> None:
        """Makes the terminal another size, as a person with a mouse does."""
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def current_settings(self) -> list[int | list[bytes | int]]:
        """The terminal's settings now (compare with ``settings``)."""
        return termios.tcgetattr(self._slave)

    def processes(self) -> dict[int, str]:
        """The session's processes that live: process ID and title."""
        found = {}
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                state, _, _, session = (directory / "stat").read_text(errors="replace").rpartition(")")[2].split()[:4]
                if int(session) == self.pid and state not in "ZX":
                    found[int(directory.name)] = _title(directory)
            except OSError:  # it has just ended
                continue
        return found

    def wait_until_gone(self, seconds: float = PATIENCE) -> None:
        """Waits until no process of the session lives."""
        deadline = time.monotonic() + seconds
        while left := self.processes():
            if time.monotonic() > deadline:
                raise SessionError(f"after {seconds:g} s there still are {left}")
            self.exit_status()
            self._read(time.monotonic() + 0.01)

    def close(self) -> None:
        """Ends whatever still lives of the session, by force."""
        if self._terminal < 0:
            return
        while left := self.processes():
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            self.exit_status()
        self.exit_status()
        os.close(self._terminal)
        os.close(self._slave)
        self._terminal = self._slave = -1


def as_text(output: bytes | bytearray) -> str:
    """What a terminal was sent, line ends as in Python (a guest's terminal and the host's may each add a CR)."""
    return re.sub(r"\r*\n", "\n", output.decode(errors="replace"))


def _title(directory: Path) -> str:
    return (directory / "cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
