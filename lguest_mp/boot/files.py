"""A file that the user named: opened once, measured, and then only read where asked.

Whatever can be wrong with it is one line: it is not there, may not be read, is a directory, has nothing in it, or has
become shorter since it was measured. It stays open from the checks to the loading, so that both see the same file,
whatever its name means by then; it closes when the last one who knows it lets go of it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from lguest_mp.errors import LguestError

CHUNK_SIZE = 1 << 20


class HostFile:
    """A regular file, open for reading; ``what`` it is to the user ("kernel"), ``size`` in bytes, never 0."""

    def __init__(self, what: str, path: Path) -> None:
        self.name = f"{what} {path}"
        self._fd = -1
        try:
            # O_NONBLOCK: a FIFO without a writer must be an error, not a wait.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise LguestError(f"cannot open {self.name}: {reason}") from error
        status = os.fstat(fd)
        problem = _problem(status)
        if problem:
            os.close(fd)
            raise LguestError(f"{self.name} is {problem}")
        self._fd = fd
        self.size = status.st_size

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` on; LguestError where the file ends before."""
        parts = []
        while length:
            try:
                part = os.pread(self._fd, length, offset)
            except OSError as error:
                raise self._unreadable(offset, error) from error
            if not part:
                raise self._shorter()
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills ``buffer`` from ``offset`` on; LguestError where the file ends before."""
        while buffer:
            try:
                count = os.preadv(self._fd, [buffer], offset)
            except OSError as error:
                raise self._unreadable(offset, error) from error
            if not count:
                raise self._shorter()
            buffer = buffer[count:]
            offset += count

    def chunks(self, length: int, start: int = 0) -> Iterator[bytes]:
        """``length`` bytes from ``start`` on, in pieces."""
        end = start + length
        for offset in range(start, end, CHUNK_SIZE):
            yield self.read(offset, min(CHUNK_SIZE, end - offset))

    def _unreadable(self, offset: int, error: OSError) -> LguestError:
        return LguestError(f"cannot read {self.name} at byte {offset}: {error.strerror}")

    def _shorter(self) -> LguestError:
        return LguestError(f"{self.name} became shorter while it was read; start again")


def _problem(status: os.stat_result) -> str | None:
    if stat.S_ISDIR(status.st_mode):
        return "a directory; give a file"
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file; give one"
    return None if status.st_size else "empty"
