"""Two processes, a driver and a worker, that go to sleep as often as they can: nobody may sleep for ever.

Both handshakes are "store, fence, look" on both sides (virtio 1.2, 2.7.7 and 2.7.10). A lost notification or interrupt
shows as a driver that waits for an answer in vain, which is what ``PATIENCE`` is for; it is no measure of speed.
"""

from __future__ import annotations

import os
import random
import signal
import struct
from collections.abc import Iterator

import pytest
from mockdriver import HANGS, DriverFactory, MockDriver

from lguest_mp.virtio.device import Feature
from lguest_mp.virtio.ledger import Ledger

REQUESTS = 20_000
#: After so many seconds without an interrupt it is lost.
PATIENCE = 20


def answer(number: int) -> int:
    return number * 0x9E3779B97F4A7C15 & (1 << 64) - 1


def serve(driver: MockDriver, account: Ledger) -> None:
    """A device that answers numbers."""
    queue = driver.sleeping_queue(account)
    while True:
        chain = queue.wait()
        (number,) = struct.unpack("<Q", chain.readable[0])
        chain.writable[0].cast("Q")[0] = answer(number)
        queue.push(chain, 8)


class Workers:
    """Worker processes, one at a time."""

    def __init__(self) -> None:
        self._pid = 0
        self._account = Ledger()

    def start(self, driver: MockDriver) -> None:
        with self._account.inherited():
            self._pid = os.fork()
        if not self._pid:
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(HANGS)
                serve(driver, self._account)
            finally:
                os._exit(1)

    def kill(self) -> int:
        """By SIGKILL: the wait status."""
        pid, self._pid = self._pid, 0
        if not pid:
            return 0
        os.kill(pid, signal.SIGKILL)
        return os.waitpid(pid, 0)[1]


@pytest.fixture
def workers() -> Iterator[Workers]:
    workers = Workers()
    yield workers
    workers.kill()


def converse(driver: MockDriver, requests: int, chance: random.Random, *, most: int = 8) -> None:
    """Asks ``requests`` numbers, up to ``most`` at a time, and waits for the answers in between."""
    asked = answered = 0
    waiting: list[tuple[int, int]] = []
    while answered < requests:
        for _ in range(min(chance.randint(1, most), requests - asked) if not waiting else 0):
            question = driver.add([struct.pack("<Q", asked)], [8], indirect=bool(asked & 1))
            waiting.append((asked, question.writable[0][0]))
            asked += 1
        driver.notify()
        assert driver.wait(PATIENCE), f"no interrupt: {answered} of {asked} answered, used index {driver.used_index}"
        for _ in driver.used():
            number, address = waiting.pop(0)
            assert struct.unpack("<Q", driver.memory.read(address, 8)) == (answer(number),)
            answered += 1
        if not waiting:
            driver.forget_buffers()


@pytest.mark.parametrize("features", [0, Feature.RING_EVENT_IDX], ids=["flags", "event_idx"])
@pytest.mark.parametrize("most", [1, 8])
def test_nothing_is_lost(new_driver: DriverFactory, workers: Workers, features: int, most: int) -> None:
    driver = new_driver(features=features | Feature.RING_INDIRECT_DESC)
    workers.start(driver)
    converse(driver, REQUESTS, random.Random(most), most=most)
    assert os.WTERMSIG(workers.kill()) == signal.SIGKILL, "it was alive until then"


@pytest.mark.parametrize("features", [0, Feature.RING_EVENT_IDX], ids=["flags", "event_idx"])
def test_workers_that_are_killed_and_replaced(
    new_driver: DriverFactory, workers: Workers, monkeypatch: pytest.MonkeyPatch, features: int
) -> None:
    """What a successor needs is in ring and ledger; an interrupt that fell into the gap is made up for by another."""
    chance = random.Random(3)
    driver = new_driver(features=features | Feature.RING_INDIRECT_DESC)
    workers.start(driver)
    notify = driver.notify

    def notify_and_kill() -> None:
        notify()
        if chance.random() < 0.02:
            for _ in range(chance.randrange(3000)):
                pass
            workers.kill()
            workers.start(driver)
            os.eventfd_write(driver.called, 1)

    monkeypatch.setattr(driver, "notify", notify_and_kill)
    converse(driver, REQUESTS // 4, chance)
