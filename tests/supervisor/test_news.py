"""What the supervisor tells the machine: nobody is flooded, nobody waits, and the last word is true."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from lguest_mp import protocol
from lguest_mp.protocol import ConfigChanged, DeviceBroken, DeviceMended
from lguest_mp.supervisor.loop import Loop
from lguest_mp.supervisor.news import PAUSE, News


class Host:
    """A loop, the news, and the machine's end of its channel."""

    def __init__(self, loop: Loop, ours: socket.socket, machine: socket.socket) -> None:
        self.loop = loop
        self.machine = machine
        self.news = News(ours, loop)

    def heard(self) -> list[protocol.Message]:
        """All that has come so far."""
        messages: list[protocol.Message] = []
        while True:
            try:
                message = protocol.receive(self.machine, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return messages
            assert message is not None
            messages.append(message)

    def hear_until(self, last: protocol.Message) -> list[protocol.Message]:
        """All that comes, to ``last``."""
        messages = self.heard()
        while last not in messages:
            self.loop.wait(PAUSE)
            messages += self.heard()
        return messages

    def fill(self) -> int:
        """Changes until the machine's channel takes no more; how many."""
        for number in range(100_000):
            self.news.tell(ConfigChanged(7, number, "00" * 200))
            self.news.tell(DeviceMended(6))
            if len(self.news._waiting) > 2:
                return number
        raise AssertionError("it takes everything")


@pytest.fixture
def host() -> Iterator[Host]:
    with Loop() as loop:
        ours, machine = protocol.channel_pair()
        with ours, machine:
            yield Host(loop, ours, machine)


def test_what_is_told_is_heard_at_once(host: Host) -> None:
    host.news.tell(ConfigChanged(1, 0, "aa"))
    assert host.heard() == [ConfigChanged(1, 0, "aa")]


def test_of_a_flood_of_changes_the_newest_is_heard(host: Host) -> None:
    began = time.monotonic()
    for number in range(10_000):
        host.news.tell(ConfigChanged(1, 0, f"{number:04x}"))
        host.loop.wait(0)
    last = ConfigChanged(1, 0, f"{9_999:04x}")
    heard = host.hear_until(last)
    assert heard[-1] == last
    assert len(heard) <= 2 + (time.monotonic() - began) / PAUSE


def test_changes_elsewhere_are_not_lost_in_it(host: Host) -> None:
    for number in range(100):
        host.news.tell(ConfigChanged(1, number % 2, f"{number:02x}"))
        host.news.tell(ConfigChanged(2, 0, f"{number:02x}"))
    heard = host.hear_until(ConfigChanged(2, 0, "63"))
    assert {ConfigChanged(1, 0, "62"), ConfigChanged(1, 1, "63"), ConfigChanged(2, 0, "63")} <= set(heard)


def test_a_broken_device_is_told_at_once_and_behind_what_was_said_before(host: Host) -> None:
    host.news.tell(ConfigChanged(1, 0, "01"))
    host.news.tell(ConfigChanged(1, 0, "02"))
    host.news.tell(DeviceBroken(1))
    assert host.heard() == [ConfigChanged(1, 0, "01"), ConfigChanged(1, 0, "02"), DeviceBroken(1)]


class TestAMachineThatDoesNotListen:
    """For a while."""

    def test_it_hears_later_how_things_are(self, host: Host) -> None:
        host.fill()
        host.news.tell(DeviceBroken(1))
        host.news.tell(DeviceMended(1))
        host.news.tell(DeviceBroken(2))
        heard = host.hear_until(DeviceBroken(2))
        assert DeviceMended(1) in heard
        assert DeviceBroken(1) not in heard

    def test_it_does_not_hear_of_a_time_before_a_reset(self, host: Host) -> None:
        host.fill()
        host.news.tell(DeviceBroken(1))
        host.news.forget(1)
        host.news.tell(DeviceBroken(2))
        assert DeviceBroken(1) not in host.hear_until(DeviceBroken(2))


def test_a_machine_that_is_gone_is_told_nothing(host: Host) -> None:
    host.machine.close()
    host.news.tell(DeviceBroken(1))
    host.news.tell(ConfigChanged(1, 0, "01"))
    host.loop.wait(PAUSE)
