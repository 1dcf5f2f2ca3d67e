"""A wire for tests whose frames are a file's: a readv(2) or a writev(2) each, as a tap's are."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fakewire import FakeWire
from mockdriver import Idle


@dataclass
class FileWire(FakeWire):
    """What is in the ``file`` arrives, what is sent goes there. It does not block, and keeps packets apart."""

    file: int | None = None
    #: What is done, in turns, when there is nothing to read.
    later: list[Callable[[], object]] = field(default_factory=list)

    def read(self, views: Sequence[memoryview]) -> int:
        assert self.file is not None
        return os.readv(self.file, views)

    def wait(self, status: Callable[[bool], None]) -> None:
        if not self.later:
            raise Idle
        self.later.pop(0)()

    def write(self, views: Sequence[memoryview]) -> None:
        assert self.file is not None
        os.writev(self.file, views)
