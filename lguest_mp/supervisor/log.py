"""The launcher's own words, and what the guest's processes say: kept for whoever asks later, and shown.

Each line has a level, as syslog has them, and a source: which process it is of (``block0/requestq``, ``cpu``; the empty
name is the supervisor). All are kept, of late ones so many as there is room for; what is merely informative is shown
only when the user asked for it (``--verbose``).

**Nobody can talk the others down.** When room is short, the source that takes up most of it loses its oldest line. And
a source other than the supervisor may say so many lines at once, so many a second in the long run, and have as much
said about itself; of the rest is said only how many there were. A line has an end, and no control character in it
reaches a terminal: it may hold what a guest made up, or a worker that is no longer itself.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing, suppress
from enum import IntEnum
from itertools import islice
from typing import Protocol

from lguest_mp import legacy
from lguest_mp.record import Record, Value
from lguest_mp.supervisor.stderr import StandardError

#: So many lines are kept, of so many characters together.
MOST_ENTRIES = 1000
MOST_CHARACTERS = 256 << 10
#: What is longer is cut. A character may be four bytes, and no line may be longer than a pipe takes at once.
LONGEST_LINE = 1000
#: What a source other than the supervisor may say, and what the supervisor says about one: lines at once, and lines a
#: second.
BURST = 200
RATE = 2
#: Names the log that is handed on.
_VARIABLE = "LGUEST_LOG"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
#: What each kept line takes beside its text, roughly and in characters: an empty line is not free.
_OVERHEAD = 50


class Level(IntEnum):
    """How important a line is: syslog(3)'s severities, and sd-daemon(3)'s."""

    ERROR = 3
    WARNING = 4
    NOTICE = 5
    INFO = 6
    DEBUG = 7


class Entry(Value):
    """One line. ``time``: seconds since the epoch; ``level``: a :class:`Level`; ``source``: "" is the supervisor."""

    time: float
    level: int
    source: str
    text: str


class Output(Protocol):
    """Where lines are shown. See :class:`lguest_mp.supervisor.stderr.StandardError`."""

    @property
    def fd(self) -> int:
        """Readable when :meth:`flush` has something to do."""

    def show(self, level: int, text: str) -> None:
        """Shows one printable line; never waits."""

    def flush(self) -> None:
        """Shows what could not be shown so far, as far as that is possible now."""

    def close(self) -> None:
        """Shows what is left, if it can be done soon."""


class _Source:
    """What is kept of one source, with each line's number in the whole log."""

    def __init__(self) -> None:
        self.kept: deque[tuple[int, Entry]] = deque()
        self.characters = 0


class _Allowance(Record):
    """How much may still be said, as of the moment ``counted``; and what was ``dropped`` since there was none left."""

    counted: float
    lines: float = BURST
    dropped: int = 0

    def take(self, now: float) -> bool:
        """Whether there may be one more line; counts it."""
        self.lines = min(BURST, self.lines + (now - self.counted) * RATE)
        self.counted = now
        if self.lines < 1:
            self.dropped += 1
            return False
        self.lines -= 1
        return True


class Log:
    """The log of one launcher. ``verbose``: everything is shown. ``clock`` (seconds, any origin) is for tests."""

    def __init__(self, output: Output, *, verbose: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._output = output
        self._lowest = Level.DEBUG if verbose else Level.NOTICE
        self._clock = clock
        self._sources: dict[str, _Source] = {}
        #: By source: what it may say itself, and what may be said about it.
        self._own_words: dict[str, _Allowance] = {}
        self._about: dict[str, _Allowance] = {}
        self._number = 0
        self._entries = 0
        self._characters = 0
        self._subscribers: list[Callable[[Entry], None]] = []

    # ---- Saying something ----

    def say(self, text: str, level: Level = Level.NOTICE, source: str = "") -> None:
        """One line of ``source``'s for a person, which names by itself what it is about."""
        if self._allows(self._own_words, source, level):
            self._add(level, source, text, text)

    def tell(self, text: str, level: Level, about: str) -> None:
        """One line of the supervisor's about ``about``, however much that has to say itself."""
        if self._allows(self._about, about, level):
            self._add(level, about, text, text)

    def quote(self, source: str, text: str, level: Level = Level.WARNING) -> None:
        """One line that is no message to anybody: a process's words as it wrote them."""
        if self._allows(self._own_words, source, level):
            self._add(level, source, text, f"{source}: {text}")

    def forgive(self, source: str) -> None:
        """Whatever ``source`` said so far, it may say as much again as at first. For the last words before a crash."""
        if (known := self._own_words.pop(source, None)) is not None:
            self._tell_dropped(source, known)

    def _allows(self, allowances: dict[str, _Allowance], source: str, level: Level) -> bool:
        """Whether there may be one more line. Those that nobody is shown are free: what is kept is bounded."""
        if not source or (level > self._lowest and not self._subscribers):
            return True
        known = allowances.setdefault(source, _Allowance(self._clock()))
        if not known.take(self._clock()):
            if known.dropped == 1:
                self._add(Level.WARNING, source, "too many lines", f"{source}: too many lines; some are dropped")
            return False
        self._tell_dropped(source, known)
        return True

    def _tell_dropped(self, source: str, known: _Allowance) -> None:
        dropped, known.dropped = known.dropped, 0
        if dropped:
            text = f"{dropped} lines were dropped"
            self._add(Level.WARNING, source, text, f"{source}: {text}")

    def _add(self, level: Level, source: str, text: str, shown: str) -> None:
        entry = Entry(time.time(), level, source, printable(text))
        self._keep(entry)
        if level <= self._lowest:
            self._output.show(level, printable(shown))
        for tell in tuple(self._subscribers):
            tell(entry)

    def _keep(self, entry: Entry) -> None:
        source = self._sources.setdefault(entry.source, _Source())
        size = len(entry.text) + _OVERHEAD
        source.kept.append((self._number, entry))
        source.characters += size
        self._number += 1
        self._entries += 1
        self._characters += size
        while self._entries > MOST_ENTRIES or self._characters > MOST_CHARACTERS:
            self._lose_one()

    def _lose_one(self) -> None:
        loudest = max(self._sources.values(), key=lambda source: source.characters)
        _, lost = loudest.kept.popleft()
        size = len(lost.text) + _OVERHEAD
        loudest.characters -= size
        self._entries -= 1
        self._characters -= size

    # ---- Across a reboot ----

    def hand_on(self) -> None:
        """Leaves what is kept to the program that this process executes next; if the host cannot, that begins anew."""
        with suppress(OSError):
            fd = os.memfd_create("lguest-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            with open(fd, "w", closefd=False) as file:
                json.dump([[*vars(entry).values()] for entry in self.entries()], file)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            legacy.leave(_VARIABLE, fd)

    def take_over(self) -> None:
        """Keeps what the last program has said, too."""
        fd = legacy.take_sealed(_VARIABLE, _SEALS)
        if fd is None:
            return
        with suppress(OSError, ValueError, TypeError), open(fd) as file:
            file.seek(0)
            for seconds, level, source, text in json.load(file):
                self._keep(Entry(float(seconds), int(level), str(source), str(text)))

    # ---- Asking what was said ----

    def entries(self, source: str | None = None, last: int = MOST_ENTRIES) -> list[Entry]:
        """The ``last`` lines (at most) that are kept of ``source``, or of all (None), in the order they were said."""
        wanted = self._sources.values() if source is None else filter(None, [self._sources.get(source)])
        newest = [pair for each in wanted for pair in islice(reversed(each.kept), max(0, last))]
        newest.sort(key=lambda pair: pair[0])
        return [entry for _, entry in newest[max(0, len(newest) - last) :]]

    def subscribe(self, callback: Callable[[Entry], None]) -> Callable[[], None]:
        """Has ``callback`` called with every line from now on, whatever its level, until what is returned is called.

        The callback must not say anything itself, nor wait.
        """
        self._subscribers.append(callback)

        def unsubscribe() -> None:
            if callback in self._subscribers:
                self._subscribers.remove(callback)

        return unsubscribe

    # ---- Showing what could not be shown at once ----

    @property
    def fd(self) -> int:
        """Readable when :meth:`flush` is to be called."""
        return self._output.fd

    def flush(self) -> None:
        """Shows what could not be shown so far."""
        self._output.flush()

    def close(self) -> None:
        """Shows what is left, if it can be done soon."""
        self._output.close()


def say(text: str, level: Level = Level.NOTICE) -> None:
    """Shows one line when there is no :class:`Log` yet, or none any more."""
    with closing(StandardError()) as output:
        output.show(level, printable(text))


def printable(text: str) -> str:
    """``text`` as one line that does nothing to a terminal, and is not too long."""
    if len(text) > LONGEST_LINE:
        text = text[: LONGEST_LINE - 1] + "…"
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else "?" for character in text)
