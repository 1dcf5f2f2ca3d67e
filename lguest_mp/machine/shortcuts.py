"""A device's notifications and interrupts, where the engine knows ways for them past this process.

An interrupt is a write of the worker's to the queue's *call* eventfd. While the driver has it masked, or takes it by
its pin, that concerns the machine: the eventfd is watched by the event loop, and read, so that what is in it is always
something that nobody has heard of. While it is nothing but a message, the eventfd is the engine's, which hears of what
is in it at that moment, too. So it can change hands at any time, and no interrupt is lost between them.

The change is made under the machine's lock, and so is the read: it never waits, as nobody else reads meanwhile.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from functools import partial
from typing import Protocol

from lguest_mp.bus.virtio_pci import Shortcuts
from lguest_mp.cpu.engine import DirectPaths
from lguest_mp.machine.eventloop import EventLoop
from lguest_mp.machine.lock import BoardLock
from lguest_mp.machine.wiring import DevicePort


class MachineShortcuts(Shortcuts, Protocol):
    """The shortcuts of one device, as the machine has them."""

    def connect(self, queue_interrupt: Callable[[int], None]) -> None:
        """Who is told of interrupts that take no shortcut: all, to begin with."""


#: Those of a device, and the number of its first queue, counted over all devices.
MakeShortcuts = Callable[[DevicePort, int], MachineShortcuts]


class DeviceShortcuts:
    """Those that an engine has (a MachineShortcuts).

    ``first_line``: the number of its first queue, counted over all devices.
    """

    def __init__(self, paths: DirectPaths, port: DevicePort, first_line: int, lock: BoardLock, loop: EventLoop) -> None:
        self._paths = paths
        self._port = port
        self._first_line = first_line
        self._lock = lock
        self._loop = loop
        self._addresses: list[int | None] = [None] * len(port.kicks)
        self._attached = [False] * len(port.calls)
        self._queue_interrupt: Callable[[int], None] = _nobody

    def connect(self, queue_interrupt: Callable[[int], None]) -> None:
        """See MachineShortcuts."""
        self._queue_interrupt = queue_interrupt
        for queue in range(len(self._port.calls)):
            self._watch(queue)

    def notify_at(self, queue: int, address: int | None) -> None:
        """See Shortcuts. An address that cannot be has none: such a store comes to the device."""
        kick = self._port.kicks[queue]
        if (old := self._addresses[queue]) is not None:
            self._paths.detach_notification(old, kick)
        there = address is not None and self._paths.attach_notification(address, kick)
        self._addresses[queue] = address if there else None

    def interrupt_by(self, queue: int, message: tuple[int, int] | None) -> None:
        """See Shortcuts."""
        line, call = self._first_line + queue, self._port.calls[queue]
        if self._attached[queue]:
            if message is None or not self._paths.change_interrupt(line, message):
                self._paths.detach_interrupt(line, call)
                self._attached[queue] = False
                self._watch(queue)
        elif message is not None:
            self._loop.remove(call)
            self._attached[queue] = self._paths.attach_interrupt(line, call, message)
            if not self._attached[queue]:
                self._watch(queue)

    def _watch(self, queue: int) -> None:
        self._loop.add(self._port.calls[queue], partial(self._called, queue))

    def _called(self, queue: int) -> None:
        """On the events' thread: the eventfd was readable, a moment ago."""
        call = self._port.calls[queue]
        with self._lock:
            if self._attached[queue] or not _is_readable(call):
                return
            os.eventfd_read(call)
        self._queue_interrupt(queue)


def _is_readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def _nobody(_queue: int) -> None:
    """Before the device is there."""
