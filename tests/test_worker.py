"""The life of a worker process: what it reports, and how it ends."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lguest_mp import protocol, worker
from lguest_mp.errors import DeviceProtocolError, GuestAddressError
from lguest_mp.protocol import Assignment
from lguest_mp.virtio.device import Device, DeviceId, QueueLayout
from lguest_mp.worker import WorkerContext


class ServingDevice(Device):
    """Serves by calling a function."""

    device_id = DeviceId.ENTROPY
    queue_names = ("first", "second")

    def __init__(self, serve: Callable[[int, Any, WorkerContext], None]) -> None:
        super().__init__("device")
        self._serve = serve

    @property
    def features(self) -> int:
        return 0

    def serve(self, queue_index: int, queue: Any, context: WorkerContext) -> None:
        self._serve(queue_index, queue, context)


@pytest.fixture
def channel() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The supervisor's end and the worker's."""
    ours, theirs = protocol.channel_pair()
    with ours, theirs:
        yield ours, theirs


Channel = tuple[socket.socket, socket.socket]


ASSIGNMENT = Assignment(1 << 63, QueueLayout(256, 0x1000, 0x2000, 1 << 40))


def make_queue(assignment: Assignment) -> Any:
    return f"the queue of {assignment}"


def run(channel: Channel, serve: Callable[[int, Any, WorkerContext], None]) -> tuple[int, list[Any]]:
    """A worker's exit status and its reports."""
    protocol.assign(channel[0], ASSIGNMENT)
    status = worker.run(ServingDevice(serve), 1, make_queue, channel[1])
    channel[1].close()
    return status, list(iter(lambda: protocol.receive(channel[0]), None))


def test_it_serves_the_queue_that_it_is_told_of_and_says_so(channel: Channel) -> None:
    served = []
    _, reports = run(channel, lambda index, queue, context: served.append((index, queue)))
    assert served == [(1, f"the queue of {ASSIGNMENT}")]
    assert reports == [protocol.Serving()]


@pytest.mark.parametrize("error", [DeviceProtocolError("2.7.5", "a loop"), GuestAddressError(0x1000, 8)])
def test_a_driver_that_breaks_the_standard(channel: Channel, error: Exception) -> None:
    def serve(index: int, queue: Any, context: WorkerContext) -> None:
        raise error

    assert run(channel, serve) == (65, [protocol.Serving(), protocol.Broken(str(error))])


def test_rings_that_cannot_be(channel: Channel) -> None:
    def make_queue(assignment: Assignment) -> Any:
        raise DeviceProtocolError("2.7", "a queue size of 3")

    protocol.assign(channel[0], ASSIGNMENT)
    status = worker.run(ServingDevice(lambda *_: None), 0, make_queue, channel[1])
    assert status == 65
    assert protocol.receive(channel[0]) == protocol.Broken("a queue size of 3 (virtio 1.2, 2.7)")


def test_a_bug_shows_its_traceback(channel: Channel, capfd: pytest.CaptureFixture[str]) -> None:
    def serve(index: int, queue: Any, context: WorkerContext) -> None:
        raise RuntimeError("a bug")

    assert run(channel, serve) == (70, [protocol.Serving()])
    assert "RuntimeError: a bug" in capfd.readouterr().err


def test_a_device_that_stops_serving_is_a_bug(channel: Channel) -> None:
    assert run(channel, lambda *_: None)[0] == 70


def test_its_words_reach_the_supervisor(channel: Channel) -> None:
    def serve(index: int, queue: Any, context: WorkerContext) -> None:
        context.log("a line")
        context.log("long " * 10_000)
        context.interrupt_guest()

    _, (_, line, long, interrupted) = run(channel, serve)
    assert line == protocol.Log("a line", verbose=False)
    assert len(long.text) == worker.MAX_TEXT
    assert interrupted == protocol.Interrupted()


def test_it_never_waits_for_a_supervisor_that_does_not_listen(channel: Channel) -> None:
    def serve(index: int, queue: Any, context: WorkerContext) -> None:
        for _ in range(10_000):
            context.log("blah")

    assert run(channel, serve)[0] == 70


def test_it_survives_a_supervisor_that_is_gone(channel: Channel) -> None:
    protocol.assign(channel[0], ASSIGNMENT)
    channel[0].close()
    assert worker.run(ServingDevice(lambda *_: None), 0, make_queue, channel[1]) == 70


def test_it_ends_when_nobody_can_tell_it_what_to_serve(channel: Channel) -> None:
    channel[0].close()
    assert worker.run(ServingDevice(lambda *_: None), 0, make_queue, channel[1]) == 0
