"""A queue's eventfds change hands between the event loop and the engine, and nothing that is in them is lost."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from lguest_mp.machine.eventloop import EventLoop
from lguest_mp.machine.lock import BoardLock
from lguest_mp.machine.shortcuts import DeviceShortcuts
from lguest_mp.machine.wiring import DevicePort
from lguest_mp.virtio.device import Device

MESSAGE = (0xFEE0_0000, 0x41)


@dataclass
class FakePaths:
    """An engine that says no to what is in ``refused``."""

    asked: list[tuple[object, ...]] = field(default_factory=list)
    refused: set[object] = field(default_factory=set)

    def _ask(self, name: str, *arguments: object) -> bool:
        self.asked.append((name, *arguments))
        return not self.refused.intersection(arguments)

    def attach_interrupt(self, line: int, call: int, message: tuple[int, int]) -> bool:
        return self._ask("attach", line, call, message)

    def change_interrupt(self, line: int, message: tuple[int, int]) -> bool:
        return self._ask("change", line, message)

    def detach_interrupt(self, line: int, call: int) -> None:
        self._ask("detach", line, call)

    def attach_notification(self, address: int, kick: int) -> bool:
        return self._ask("notify", address, kick)

    def detach_notification(self, address: int, kick: int) -> None:
        self._ask("no longer", address, kick)


class NoDevice(Device):
    """Nothing is asked of it."""

    features = 0

    def serve(self, *_arguments: object) -> None:
        raise NotImplementedError


class Rig:
    """The shortcuts of a device with two queues, which are lines 5 and 6."""

    def __init__(self) -> None:
        self.paths = FakePaths()
        self.lock = BoardLock()
        self.loop = EventLoop()
        self.kicks = (os.eventfd(0), os.eventfd(0))
        self.calls = (os.eventfd(0), os.eventfd(0))
        port = DevicePort(NoDevice("device"), self.kicks, self.calls)
        self.shortcuts = DeviceShortcuts(self.paths, port, 5, self.lock, self.loop)
        self.heard: list[int] = []
        self.shortcuts.connect(self.heard.append)

    def close(self) -> None:
        self.loop.close()
        for fd in (*self.kicks, *self.calls):
            os.close(fd)

    def interrupt_by(self, queue: int, message: tuple[int, int] | None) -> None:
        with self.lock:
            self.shortcuts.interrupt_by(queue, message)

    def notify_at(self, queue: int, address: int | None) -> None:
        with self.lock:
            self.shortcuts.notify_at(queue, address)

    def unread(self, queue: int) -> bool:
        poll = select.poll()
        poll.register(self.calls[queue], select.POLLIN)
        return bool(poll.poll(0))


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def test_without_a_shortcut_the_device_hears_of_an_interrupt_once(rig: Rig) -> None:
    os.eventfd_write(rig.calls[1], 3)
    rig.loop.step()
    rig.loop.step()
    assert rig.heard == [1]
    assert not rig.unread(1)


def test_with_one_nobody_here_does(rig: Rig) -> None:
    rig.interrupt_by(1, MESSAGE)
    os.eventfd_write(rig.calls[1], 1)
    rig.loop.step()
    assert rig.heard == []
    assert rig.unread(1)
    assert rig.paths.asked == [("attach", 6, rig.calls[1], MESSAGE)]


def test_what_was_left_unheard_is_heard_when_it_comes_back(rig: Rig) -> None:
    rig.interrupt_by(0, MESSAGE)
    os.eventfd_write(rig.calls[0], 1)
    rig.interrupt_by(0, None)
    rig.loop.step()
    assert rig.heard == [0]
    assert rig.paths.asked[-1] == ("detach", 5, rig.calls[0])


def test_an_event_that_was_under_way_is_left_to_the_engine(rig: Rig) -> None:
    os.eventfd_write(rig.calls[0], 1)
    with rig.lock:
        rig.shortcuts.interrupt_by(0, MESSAGE)
    rig.shortcuts._called(0)  # as the loop does that had woken up before
    assert rig.heard == []
    assert rig.unread(0)


def test_another_message_needs_no_new_shortcut(rig: Rig) -> None:
    other = (0xFEE0_1000, 0x99)
    rig.interrupt_by(0, MESSAGE)
    rig.interrupt_by(0, other)
    assert rig.paths.asked[1:] == [("change", 5, other)]


def test_an_interrupt_that_the_engine_refuses_is_the_devices(rig: Rig) -> None:
    rig.paths.refused.add(MESSAGE)
    rig.interrupt_by(0, MESSAGE)
    os.eventfd_write(rig.calls[0], 1)
    rig.loop.step()
    assert rig.heard == [0]


def test_a_change_that_the_engine_refuses_ends_the_shortcut(rig: Rig) -> None:
    rig.interrupt_by(0, (0xFEE0_1000, 1))
    rig.paths.refused.add(MESSAGE)
    rig.interrupt_by(0, MESSAGE)
    os.eventfd_write(rig.calls[0], 1)
    rig.loop.step()
    assert rig.heard == [0]
    rig.interrupt_by(0, None)  # it has none to take back
    assert [name for name, *_ in rig.paths.asked] == ["attach", "change", "detach"]


def test_notifications_follow_their_address(rig: Rig) -> None:
    for address in (0xC000_3000, 0xD000_3000, None):
        rig.notify_at(0, address)
    kick = rig.kicks[0]
    assert rig.paths.asked == [
        ("notify", 0xC000_3000, kick),
        ("no longer", 0xC000_3000, kick),
        ("notify", 0xD000_3000, kick),
        ("no longer", 0xD000_3000, kick),
    ]


def test_an_address_that_the_engine_refuses_is_not_taken_back(rig: Rig) -> None:
    rig.paths.refused.add(0xC000_3000)
    rig.notify_at(0, 0xC000_3000)
    rig.notify_at(0, None)
    assert rig.paths.asked == [("notify", 0xC000_3000, rig.kicks[0])]
