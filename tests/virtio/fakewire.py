"""A wire for tests: what arrives on it, and what becomes of what is sent, is the test's choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mockdriver import Idle

from lguest_mp.network.wire import Wire, WireGone


@dataclass
class FakeWire(Wire):
    """Frames to be read, frames written, and failures in place of either."""

    has_header: bool = True
    is_suspect: bool = False
    arriving: list[bytes | Exception] = field(default_factory=list)
    sent: list[bytes] = field(default_factory=list)
    #: What the next writes raise.
    failures: list[Exception | None] = field(default_factory=list)
    #: Whether the link is up, at the beginning and each time there is nothing to read.
    states: list[bool] = field(default_factory=lambda: [True])
    attached: list[tuple[int, int]] = field(default_factory=list)
    #: What is done whenever there is nothing to read.
    on_wait: Callable[[], object] = lambda: None
    #: Why there is nothing any more, found out while waiting.
    gone: WireGone | None = None
    closed: bool = False

    @property
    def description(self) -> str:
        return "fake"

    @property
    def files(self) -> tuple[int, ...]:
        return (42,)

    def attach(self, features: int, header_size: int) -> None:
        self.attached.append((features, header_size))

    def read(self, views: Sequence[memoryview]) -> int:
        if not self.arriving:
            raise BlockingIOError
        frame = self.arriving.pop(0)
        if isinstance(frame, Exception):
            raise frame
        rest = frame
        for view in views:
            part = rest[: len(view)]
            view[: len(part)] = part
            rest = rest[len(part) :]
        return len(frame) - len(rest)

    def wait(self, status: Callable[[bool], None]) -> None:
        self.on_wait()
        while self.states:
            status(self.states.pop(0))
        if self.gone:
            raise self.gone
        if not self.arriving:
            raise Idle

    def is_up(self) -> bool:
        return self.states.pop(0)

    def write(self, views: Sequence[memoryview]) -> None:
        failure = self.failures.pop(0) if self.failures else None
        if failure:
            raise failure
        self.sent.append(b"".join(views))

    def close(self) -> None:
        self.closed = True
