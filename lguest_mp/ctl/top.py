"""``lguestctl top``: the processes of guests, live, the busiest first.

On a terminal it is a screen of its own, taken and given back whole (the terminal's alternate screen), on every way out.
Keys choose the order. Anywhere else it is one table after another.

Each look asks anew who runs: guests may come, reboot and go meanwhile.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING

from lguest_mp import terminal
from lguest_mp.ctl import samples, tables
from lguest_mp.ctl.client import Description, NoGuestError
from lguest_mp.ctl.samples import Moment, Process, Rates
from lguest_mp.record import Value
from lguest_mp.supervisor.ending import die_by
from lguest_mp.supervisor.signals import STOPPING, Signals
from lguest_mp.terminal import Terminal

if TYPE_CHECKING:
    from lguest_mp.ctl.client import Place

#: How long (seconds) a look waits for guests that do not answer.
PATIENCE = 1.0
_NOTHING = Rates()
_HEADER = (
    *("PROCESS", ">PID", "STATE", ">%CPU", ">MEMORY", ">REQ/S", ">BYTES/S"),
    *(">REQUESTS", ">BYTES", ">LAST", ">RESTARTS"),
)
#: Alternate screen (xterm's 1049) and no cursor; and back.
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _TO_END_OF_LINE, _TO_END = "\x1b[H", "\x1b[K", "\x1b[J"
_BOLD, _INVERSE, _PLAIN = "\x1b[1m", "\x1b[7m", "\x1b[m"
_CONTROL_C, _CONTROL_Z = "\x03", "\x1a"


class Order(Enum):
    """What comes first; the value is its key."""

    CPU = "c"
    MEMORY = "m"
    REQUESTS = "r"
    BYTES = "b"


class View(Value):
    """What one look found: everything now, how fast it goes, and guests that do not answer."""

    moment: Moment
    rates: Mapping[tuple[str, str], Rates]
    silent: tuple[str, ...]

    def sorted(self, order: Order) -> list[Process]:
        """The processes; what is not known comes last, and what is the same stays as it was."""

        def weight(process: Process) -> float:
            rates = self.rates.get(process.key, _NOTHING)
            value: float | None
            match order:
                case Order.CPU:
                    value = rates.cpu
                case Order.MEMORY:
                    value = None if process.host is None else process.host.own_memory
                case Order.REQUESTS:
                    value = rates.requests
                case Order.BYTES:
                    value = rates.bytes
            return -1.0 if value is None else value

        return sorted(self.moment.processes, key=weight, reverse=True)

    def table(self, order: Order) -> list[str]:
        """A heading, and a line for each process."""
        several = len(self.moment.guests) != 1
        header = ("GUEST", *_HEADER) if several else _HEADER
        rows = [((each.guest, *self._row(each)) if several else self._row(each)) for each in self.sorted(order)]
        return tables.columns(header, rows)

    def _row(self, process: Process) -> Sequence[str]:
        facts, rates = process.facts, self.rates.get(process.key, _NOTHING)
        return (
            facts.name,
            tables.or_dash(facts.pid),
            process.state,
            tables.percent(rates.cpu),
            tables.size(None if process.host is None else process.host.own_memory),
            tables.number(rates.requests),
            tables.size(rates.bytes),
            tables.number(facts.requests),
            tables.size(facts.bytes),
            tables.age(facts.age),
            str(facts.restarts),
        )

    def summary(self, order: Order) -> str:
        """One line above the table."""
        if len(self.moment.guests) == 1:
            guest = self.moment.guests[0]
            who = f"guest {guest.name}, up {tables.age(time.time() - guest.started)}, {guest.reboots} reboots"
        else:
            who = f"{len(self.moment.guests)} guests"
        if self.silent:
            who += f"; no answer from {', '.join(self.silent)}"
        return f"{time.strftime('%H:%M:%S')}  {who}; {len(self.moment.processes)} processes by {order.name.lower()}"


class Watch:
    """Looks at a guest (None: at all there are), again and again."""

    def __init__(self, place: Place, name: str | None) -> None:
        self._place = place
        self._name = name
        self._before: Moment | None = None

    def look(self) -> View:
        """Looks once more. NoGuestError: the guest is gone."""
        names = self._place.names()
        if self._name is not None:
            if self._name not in names:
                raise NoGuestError(self._name)
            names = [self._name]
        found = self._place.describe_all(names, PATIENCE)
        moment = samples.take(each for each in found.values() if isinstance(each, Description))
        rates = samples.rates(self._before, moment)
        self._before = moment
        return View(moment, rates, tuple(name for name, each in found.items() if not isinstance(each, Description)))


def show(place: Place, name: str | None, order: Order, interval: float, count: int | None) -> None:
    """Shows it every ``interval`` seconds, ``count`` times (None: until ``q``, or for ever). LguestError."""
    watch = Watch(place, name)
    view = watch.look()
    if os.isatty(0) and os.isatty(1):
        with Signals() as signals:
            ending = _Screen(watch, view, order, interval, signals).run(count)
        if ending is not None:
            die_by(ending)
        return
    while count is None or count > 0:
        time.sleep(interval)
        view = watch.look()
        count = None if count is None else count - 1
        print("\n".join([view.summary(order), *view.table(order), ""]), flush=True)


class _Screen:
    """The terminal, and what is typed."""

    def __init__(self, watch: Watch, view: View, order: Order, interval: float, signals: Signals) -> None:
        self._watch = watch
        self._view = view
        self._order = order
        self._interval = interval
        self._signals = signals
        self._is_over = False
        self._ending: int | None = None

    def run(self, count: int | None) -> int | None:
        """Until the end, which may be a signal's. LguestError."""
        with _alternate_screen() as raw:
            while True:
                self._draw()
                self._wait(time.monotonic() + self._interval, raw)
                if count is not None:
                    count -= 1
                if self._is_over or count == 0:
                    return self._ending
                self._view = self._watch.look()

    def _wait(self, deadline: float, raw: Terminal) -> None:
        """Reacts to keys and signals until it is time to look again."""
        poller = select.poll()
        poller.register(0, select.POLLIN)
        poller.register(self._signals.fd, select.POLLIN)
        while not self._is_over and (left := deadline - time.monotonic()) > 0:
            for fd, _ in poller.poll(left * 1000):
                if fd == self._signals.fd:
                    self._on_signals(raw)
                else:
                    self._on_keys(raw)

    def _on_keys(self, raw: Terminal) -> None:
        try:
            keys = os.read(0, 100).decode(errors="replace")
        except OSError:  # the terminal is gone
            keys = ""
        if not keys:
            self._is_over = True
        for key in keys:
            if key in {"q", "Q", _CONTROL_C}:
                self._is_over = True
            elif key == _CONTROL_Z:
                self._suspend(raw)
            elif key in (each.value for each in Order):
                self._order = Order(key)
                self._draw()

    def _on_signals(self, raw: Terminal) -> None:
        for signum in self._signals.take():
            match signum:
                case signal.SIGWINCH:
                    self._draw()
                case signal.SIGTSTP:
                    self._suspend(raw)
                case signal.SIGCONT:
                    _enter(raw)
                    self._draw()
                case _ if signum in STOPPING:
                    self._is_over, self._ending = True, signum

    def _suspend(self, raw: Terminal) -> None:
        _leave(raw)
        self._signals.stop_process()
        _enter(raw)
        self._draw()

    def _draw(self) -> None:
        width, height = terminal.size() or (80, 25)
        keys = "c cpu  m memory  r requests  b bytes  q quit"
        heading, *rows = self._view.table(self._order)
        lines = [self._view.summary(self._order), keys, "", heading, *rows][:height]
        shown = [line[:width] for line in lines]
        if len(shown) > 3:
            shown[3] = f"{_INVERSE}{shown[3].ljust(width)}{_PLAIN}"
        shown[0] = f"{_BOLD}{shown[0]}{_PLAIN}"
        _write(_HOME + f"{_TO_END_OF_LINE}\n".join(shown) + _TO_END_OF_LINE + _TO_END)


@contextmanager
def _alternate_screen() -> Iterator[Terminal]:
    raw = Terminal()
    _enter(raw)
    try:
        yield raw
    finally:
        _leave(raw)


def _enter(raw: Terminal) -> None:
    raw.take()
    _write(_ENTER)


def _leave(raw: Terminal) -> None:
    _write(_LEAVE)
    raw.restore()


def _write(text: str) -> None:
    data = text.encode(errors="replace")
    while data:
        try:
            data = data[os.write(1, data) :]
        except BlockingIOError:
            select.select([], [1], [])
        except OSError:  # the terminal is gone, and a hang-up will follow
            return
