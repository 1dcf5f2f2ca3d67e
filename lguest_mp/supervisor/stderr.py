"""Standard error, to which the supervisor writes and for which it never waits.

Whoever reads it may have stopped doing so: a terminal that is stopped, a pager on the other side of a pipe. The
supervisor must not stand still for that, since it is the one who hears of crashes. Making the descriptor non-blocking
is no way out: the open file is shared with the user's shell and with everybody else there, who would be surprised. So
we open the terminal or pipe once more, for ourselves, and make that non-blocking; to a socket (the journal's) one can
send without waiting. Where a second opening is refused (a terminal of another user's, after ``su``) it is asked first
whether it would take something, by poll(2). What cannot be written waits here, and what does not fit here is counted.

Where standard error is the journal, each line begins with its level, as sd-daemon(3) has it.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

#: What may wait, in bytes; more is dropped.
BACKLOG = 64 << 10
#: How long, in seconds, what waits is waited for in the end.
PATIENCE = 1.0


class StandardError:
    """The file descriptor ``fd`` as somewhere to show lines."""

    def __init__(self, fd: int = 2) -> None:
        self._opened = ExitStack()
        self._with_level = _is_journal(fd)
        self._target, self._write = self._open(fd)
        self._waiting = bytearray()
        self._lost = 0
        self._writable = self._opened.enter_context(select.epoll())

    @property
    def fd(self) -> int:
        """Readable when something waits and could be written."""
        return self._writable.fileno()

    def show(self, level: int, text: str) -> None:
        """Shows one printable line, at the latest when it becomes possible. Never waits."""
        line = self._line(level, text)
        if self._waiting:
            self.flush()
        if not self._waiting:
            line = line[self._try(line) :]
            if not line:
                return
            with suppress(OSError):  # no file that one waits for
                self._writable.register(self._target, select.EPOLLOUT)
        elif self._lost or len(self._waiting) + len(line) > BACKLOG:
            # Those after the first that is lost are, too: so the line that says so stands where they are missing.
            self._lost += 1
            return
        self._waiting += line

    def flush(self) -> None:
        """Writes of what waits as much as is possible now."""
        del self._waiting[: self._try(self._waiting)]
        if not self._waiting:
            with suppress(OSError):
                self._writable.unregister(self._target)
            lost, self._lost = self._lost, 0
            if lost:
                self.show(4, f"{lost} lines were not shown: standard error was stuck")

    def close(self) -> None:
        """Shows what waits, if it can be done soon."""
        deadline = time.monotonic() + PATIENCE
        while self._waiting and self._writable.poll(max(0.0, deadline - time.monotonic())):
            self.flush()
        self._opened.close()

    def _line(self, level: int, text: str) -> bytes:
        prefix = f"<{level}>" if self._with_level else ""
        return f"{prefix}lguest: {text}\n".encode(errors="replace")

    def _try(self, data: bytes | bytearray) -> int:
        """How many bytes of ``data`` need no more be written: they are, or nobody will ever read them."""
        try:
            return self._write(data)
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)

    def _open(self, fd: int) -> tuple[int, Callable[[bytes | bytearray], int]]:
        """What to wait for, and how to write without waiting (BlockingIOError)."""
        try:
            mode = os.fstat(fd).st_mode
            if stat.S_ISSOCK(mode):
                channel = self._opened.enter_context(socket.socket(fileno=os.dup(fd)))
                return channel.fileno(), lambda data: channel.send(data, socket.MSG_DONTWAIT)
            if not stat.S_ISFIFO(mode) and not stat.S_ISCHR(mode):
                return fd, lambda data: os.write(fd, data)
            own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            return fd, lambda data: _write_if_ready(fd, data)
        self._opened.callback(os.close, own)
        return own, lambda data: os.write(own, data)


def _write_if_ready(fd: int, data: bytes | bytearray) -> int:
    """A pipe that is ready takes PIPE_BUF bytes at once, a terminal nearly always does."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    if not poll.poll(0):
        raise BlockingIOError
    return os.write(fd, data[: select.PIPE_BUF])


def _is_journal(fd: int) -> bool:
    """Whether ``fd`` is what systemd connected to the journal (systemd.exec(5), $JOURNAL_STREAM)."""
    try:
        found = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
