"""A double of ``/dev/lguest``: a protocol that was written down beforehand, and nothing else.

Each line of a script is a system call as the original launcher makes it, and the answer of the host::

    write 00000000 00005040 03010000 20001000 00010400 = 20
    pread 12 @0 = 1f00000000000000 00100400
    pread 1023 @0 ! ENOENT

Bytes are in hexadecimal as they lie in memory, spaces mean nothing; ``=`` is what the call returns, ``!`` the error
that it ends with. A call that is not the next one, in any byte, is an AssertionError, and so is one that never came.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass

import pytest

_LINE = re.compile(r"(write|pwrite|pread) ([0-9a-f ]+?)(?: @(\d+))? ([=!]) (.+)")
FILE = 7777


@dataclass(frozen=True)
class Call:
    """A system call: its name, the bytes that are written or how many are to be read, and the offset."""

    name: str
    data: bytes | int
    offset: int | None


class RecordedDevice:
    """Behind the file descriptor FILE, a host that follows a script."""

    def __init__(self, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self._expected = [_parse(line.strip()) for line in script.strip().splitlines()]
        self._real = os.write, os.pwrite, os.pread, os.close
        self.closed = False
        monkeypatch.setattr(os, "write", self._write)
        monkeypatch.setattr(os, "pwrite", self._pwrite)
        monkeypatch.setattr(os, "pread", self._pread)
        monkeypatch.setattr(os, "close", self._close)

    def finish(self) -> None:
        """All of it has happened."""
        assert not self._expected

    def _next(self, call: Call) -> bytes | int:
        assert not self.closed
        assert self._expected, f"{call} comes after the end"
        expected, answer = self._expected.pop(0)
        assert call == expected
        if isinstance(answer, OSError):
            raise answer
        return answer

    def _write(self, fd: int, data: bytes) -> int:
        if fd != FILE:
            return self._real[0](fd, data)
        answer = self._next(Call("write", bytes(data), None))
        assert isinstance(answer, int)
        return answer

    def _pwrite(self, fd: int, data: bytes, offset: int) -> int:
        if fd != FILE:
            return self._real[1](fd, data, offset)
        answer = self._next(Call("pwrite", bytes(data), offset))
        assert isinstance(answer, int)
        return answer

    def _pread(self, fd: int, length: int, offset: int) -> bytes:
        if fd != FILE:
            return self._real[2](fd, length, offset)
        answer = self._next(Call("pread", length, offset))
        assert isinstance(answer, bytes)
        assert len(answer) <= length
        return answer

    def _close(self, fd: int) -> None:
        if fd == FILE:
            self.closed = True
        else:
            self._real[3](fd)


def _parse(line: str) -> tuple[Call, bytes | int | OSError]:
    match = _LINE.fullmatch(line)
    assert match, line
    name, data, offset, kind, answer = match.groups()
    call = Call(name, int(data) if name == "pread" else bytes.fromhex(data), None if offset is None else int(offset))
    if kind == "!":
        number = getattr(errno, answer)
        return call, OSError(number, os.strerror(number))
    return call, bytes.fromhex(answer) if name == "pread" else int(answer)
