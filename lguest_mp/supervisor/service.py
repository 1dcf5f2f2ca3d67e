"""What a service manager is told about the guest (through ``notify.py``), and when.

``READY=1``
    when the guest's drivers are up: every device, the console too, has been served once. From then on a guest can do
    what it is there for; a service that waits for it may start. It is said once in the life of a process. A launcher
    that executes itself for the guest's reboot says it again, and the manager, to which the service has never been away
    (same PID), makes nothing of it.
``STATUS=``
    one line for people whenever it changes: ``starting``, ``waiting for the drivers of block0, net0``, ``running, 2
    restarts``, ``rebooting``, and in the end why it ends.
``WATCHDOG=1``
    twice as often as the manager wants to hear it, from the supervisor's loop: whoever says it reacts to everything
    else, too. A supervisor that is stopped, or stuck, says nothing.
``STOPPING=1``
    when the end begins, but for a reboot, which to the manager is no end.

What there is to say is not reported by whoever does something but looked at after each event: it can be seen in the
devices, all of which is a few comparisons.
"""

from __future__ import annotations

import signal
from types import TracebackType
from typing import TYPE_CHECKING, Self

from lguest_mp.errors import LguestError
from lguest_mp.supervisor.devices import DeviceLife
from lguest_mp.supervisor.ending import Exit, Rebooting
from lguest_mp.supervisor.notify import Notifier

if TYPE_CHECKING:
    from lguest_mp.supervisor.devices import Devices
    from lguest_mp.supervisor.ending import Ending
    from lguest_mp.supervisor.loop import Loop, Timer

#: How long, in seconds, until something is sent again that the manager had no room for.
_AGAIN = 0.5
#: How long a loop can wait (epoll_wait(2) takes milliseconds, an int).
_LONGEST_INTERVAL = 86_400.0


class Service:
    """One launcher as its service manager sees it, while it is entered."""

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier
        self._interval = None if notifier.watchdog is None else min(notifier.watchdog / 2, _LONGEST_INTERVAL)
        self._loop: Loop | None = None
        self._again: Timer | None = None
        self._status = ""
        self._is_ready = False
        self._is_over = False
        self._seen: set[str] = set()

    def __enter__(self) -> Self:
        """Opening everything may take a while, after a reboot with the watchdog looking on."""
        self._ping()
        self._show("starting")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not self._is_over:
            reason = str(error) if isinstance(error, LguestError) else type(error).__name__
            self._tell(STOPPING="1", STATUS=_line(reason))
        self._notifier.close()

    def begin(self, loop: Loop) -> None:
        """A guest begins, with this loop around it."""
        self._loop, self._again = loop, None
        self._seen.clear()
        self._tell()
        self._ping()

    def look(self, devices: Devices) -> None:
        """Something has happened to the guest."""
        self._seen |= {each.name for each in devices.served if each.life is DeviceLife.SERVED and each.all_serve()}
        missing = [each.name for each in devices.served if each.name not in self._seen]
        if missing:
            self._show(f"waiting for the drivers of {', '.join(missing)}")
            return
        status = _describe(devices)
        if not self._is_ready:
            self._is_ready = True
            self._status = status
            self._tell(READY="1", STATUS=status)
        self._show(status)

    def end(self, how: Ending) -> None:
        """The guest ends."""
        match how:
            case Rebooting():
                self._show("rebooting")
                return
            case Exit(_, line):
                status = line or "the guest has switched itself off"
            case _:
                status = f"stopped by {signal.Signals(how.signum).name}"
        self._is_over = True
        self._tell(STOPPING="1", STATUS=_line(status))

    def _show(self, status: str) -> None:
        if status != self._status:
            self._status = status
            self._tell(STATUS=status)

    def _ping(self) -> None:
        if self._interval is not None:
            self._tell(WATCHDOG="1")
            if self._loop is not None:
                self._loop.later(self._interval, self._ping)

    def _tell(self, **values: str) -> None:
        if not self._notifier.tell(**values) and self._loop is not None and self._again is None:
            self._again = self._loop.later(_AGAIN, self._tell_again)

    def _tell_again(self) -> None:
        self._again = None
        self._tell()


def _describe(devices: Devices) -> str:
    """How a guest is that runs: ``running, 1 restart; net0 needs a reset``."""
    restarts = sum(devices.restarted.values())
    counted = f", {restarts} restart{'s' if restarts > 1 else ''}" if restarts else ""
    down = [each.name for each in devices.served if each.life in {DeviceLife.BROKEN, DeviceLife.FAILED}]
    needs = f"; {', '.join(down)} need{'' if len(down) > 1 else 's'} a reset" if down else ""
    return f"running{counted}{needs}"


def _line(text: str) -> str:
    """Text that the guest may have had a hand in, as one line that can be shown."""
    return "".join(character if character.isprintable() else " " for character in text)
