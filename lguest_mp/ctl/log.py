"""``lguestctl log``: what the launcher said, and what it says from now on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from lguest_mp.control import LogLine, ReadLog
from lguest_mp.ctl.client import GuestGone
from lguest_mp.ctl.tables import printable

if TYPE_CHECKING:
    from lguest_mp.ctl.client import Connection, Place

#: syslog(3)'s words for the levels.
_LEVELS = ("emerg", "alert", "crit", "err", "warning", "notice", "info", "debug")


def lines(place: Place, name: str, source: str | None, last: int, *, follow: bool) -> Iterator[str]:
    """The last lines, of one process or all; with ``follow`` those to come, too, until the guest ends (GuestGone).

    ``source``: a process's name; ``supervisor`` is the launcher itself.
    """
    wanted = "" if source == "supervisor" else source
    reach: Callable[[str], Connection] = place.connect
    before = newest = 0.0
    while True:
        try:
            with reach(name) as connection:
                connection.send(ReadLog(wanted, last, follow))
                if follow:
                    connection.channel.settimeout(None)
                for line in connection.answers():
                    if isinstance(line, LogLine) and line.time > before:
                        newest = max(newest, line.time)
                        yield _shown(line)
                return
        except GuestGone as gone:
            if not follow or not gone.reboots:
                raise
            yield f"-- {gone} --"
        before = newest  # a launcher that reboots in place still has what it said before
        reach = place.reconnect


def _shown(line: LogLine) -> str:
    seconds, fraction = divmod(line.time, 1)
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    level = _LEVELS[min(line.level, len(_LEVELS) - 1)]
    source = printable(line.source) or "supervisor"
    return f"{moment}.{int(fraction * 1000):03} {level:<7} {source}: {printable(line.text)}"
