"""What a process of the guest writes to its standard error: tracebacks, a crash's last words.

Standard error of a child is a pipe to the supervisor, which puts every line into the log under the child's name. So a
worker does not hold the user's terminal, and what it said is still there when somebody asks why it crashed.

A worker that is no longer itself may write without end. No more is read at a time than a traceback is long; if there is
more, the pipe is left alone for a moment and fills up, and the worker waits. A line has an end (what is longer is cut
into several), and how many there may be is for the log to say.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lguest_mp.supervisor.log import Log
    from lguest_mp.supervisor.loop import Loop, Timer

#: So many bytes are read at a time; if there are as many, the next so many seconds later.
AT_A_TIME = 8192
PAUSE = 0.05
#: The most that is read when the process has ended: what a pipe holds.
LAST_WORDS = 64 << 10
#: A line that is longer, in bytes, is taken for several.
LONGEST = 1000


class Complaints:
    """The reading end of a child's standard error, ``fd``, which this owns from now on; ``name`` is the child's.

    OSError: the host cannot watch it; ``fd`` is the caller's then.
    """

    def __init__(self, name: str, fd: int, loop: Loop, log: Log) -> None:
        os.set_blocking(fd, False)
        self._name = name
        self._fd = fd
        self._loop = loop
        self._log = log
        self._partial = b""
        self._pause: Timer | None = None
        loop.watch(fd, self._read)

    def finish(self, *, crashed: bool = False) -> None:
        """The child has ended: takes its last words, which are of interest if it crashed, and closes the pipe."""
        if crashed:
            self._log.forgive(self._name)
        if self._pause is not None:
            self._pause.cancel()
        self._loop.forget(self._fd)
        for _ in range(LAST_WORDS // AT_A_TIME):
            if not self._take():
                break  # nothing more, whether or not somebody else still has the other end
        if self._partial:
            self._tell(self._partial)
        os.close(self._fd)

    def _read(self) -> None:
        taken = self._take()
        if taken in {0, AT_A_TIME}:  # it has closed it, or has much to say
            self._loop.forget(self._fd)
        if taken == AT_A_TIME:
            self._pause = self._loop.watch_later(PAUSE, self._fd, self._read)

    def _take(self) -> int | None:
        """Reads once and tells all whole lines; how many bytes there were, 0 at the end, None: nothing now."""
        try:
            data = os.read(self._fd, AT_A_TIME)
        except BlockingIOError:
            return None
        *lines, self._partial = (self._partial + data).split(b"\n")
        while len(self._partial) > LONGEST:
            lines.append(self._partial[:LONGEST])
            self._partial = self._partial[LONGEST:]
        for line in lines:
            self._tell(line)
        return len(data)

    def _tell(self, line: bytes) -> None:
        for start in range(0, len(line) or 1, LONGEST):
            self._log.quote(self._name, line[start : start + LONGEST].decode(errors="replace"))
