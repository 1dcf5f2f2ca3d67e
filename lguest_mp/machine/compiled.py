"""The board of the compiled core: as in Python, which specifies it (lock, local APIC, event loop), but native.

What is usual (an interrupt that is a message, the timer's, its end and its next deadline, a notification) is done by
``_board.pxi``, on whichever thread it happens; all else by the specification's own code, on the same state.

ImportError where the extension module was not built (``core.py`` knows why).
"""

from __future__ import annotations

import select
from collections.abc import Callable
from functools import partial

from lguest_mp._compiled import Apic, Events, Lines, Lock
from lguest_mp.machine import exits
from lguest_mp.machine.clock import HostClock
from lguest_mp.machine.embedded import Board
from lguest_mp.machine.eventloop import EventLoop
from lguest_mp.machine.exits import ExitCount
from lguest_mp.machine.lapic import TSC_DEADLINE_MSR, LocalApic
from lguest_mp.machine.lock import BoardLock
from lguest_mp.machine.timer import HostTimer
from lguest_mp.machine.wiring import DevicePort


class CompiledLock(Lock, BoardLock):
    """Does the same as a BoardLock, and holds what the others here have in common."""


class CompiledApic(Apic, LocalApic):
    """Does the same as a LocalApic; what :class:`Apic` does not have is that class's own code, on the same state."""


class CompiledLoop(Events, EventLoop):
    """Does the same as an EventLoop."""

    def __init__(self, lock: CompiledLock) -> None:
        super().__init__()
        self._begin(lock)


class CompiledShortcuts(Lines):
    """Between a device's driver and its workers, past Python (a :class:`lguest_mp.machine.shortcuts.MachineShortcuts`).

    The event loop hears of every interrupt, edge-triggered, and nobody reads the eventfds; those that are no message
    alone come to the device.
    """

    def __init__(self, lock: CompiledLock, port: DevicePort, loop: EventLoop) -> None:
        super().__init__(lock, port.kicks, port.calls)
        self._calls = port.calls
        self._loop = loop

    def connect(self, queue_interrupt: Callable[[int], None]) -> None:
        """See MachineShortcuts."""
        for queue, call in enumerate(self._calls):
            self._loop.add_shared(call, partial(queue_interrupt, queue), select.EPOLLIN | select.EPOLLET)


def compiled_board(lock: CompiledLock, timer: HostTimer, clock: HostClock) -> Board:
    """The board around ``lock``, as :func:`lguest_mp.machine.embedded.specified_board` makes it."""
    local_apic = CompiledApic(lock, timer, clock)
    local_apic.use_timer(timer.fd)
    clock.line_drawn = local_apic.line_drawn
    loop = CompiledLoop(lock)

    def make_shortcuts(port: DevicePort, _first_line: int) -> CompiledShortcuts:
        return CompiledShortcuts(lock, port, loop)

    def count_unseen(count: ExitCount) -> None:
        vectors, ends, deadlines, notifications = lock.counts()
        for vector, times in vectors.items():
            count.add(exits.INTERRUPT, vector, times)
        if ends:
            count.add(exits.STORE, local_apic.page, ends)
        if deadlines:
            count.add(exits.WRMSR, TSC_DEADLINE_MSR, deadlines)
        for address, times in notifications.items():
            count.add(exits.STORE, address >> exits.PAGE_SHIFT, times)

    return Board(lock, local_apic, loop, make_shortcuts, count_unseen)
