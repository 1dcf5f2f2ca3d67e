"""Workers that are forked before there is anything to serve, on a host that cannot do it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from itertools import chain, repeat
from types import SimpleNamespace
from typing import Any

import pytest
from launching import PATIENCE

from lguest_mp.errors import LguestError
from lguest_mp.jail import Jail
from lguest_mp.protocol import Assignment
from lguest_mp.supervisor.children import Naming
from lguest_mp.supervisor.log import Log
from lguest_mp.supervisor.loop import Loop
from lguest_mp.supervisor.workers import Post, WorkerListener, Workers
from lguest_mp.virtio.device import Device, DeviceId, QueueLayout
from lguest_mp.virtio.ledger import Ledger


class Silent:
    """An output that shows nothing."""

    fd = -1

    def show(self, level: int, text: str) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class TwoQueues(Device):
    device_id = DeviceId.ENTROPY
    queue_names = ("first", "second")
    features = 0

    def serve(self, queue_index: int, queue: Any, context: Any) -> None: ...


@pytest.fixture
def workers() -> Iterator[Workers]:
    null = os.open(os.devnull, os.O_RDWR)
    parts = SimpleNamespace(make_queue=None)
    owned: Any = SimpleNamespace(jail=Jail(on=False), null=null, log=Log(Silent()), memory=None, parts=parts)
    listener = WorkerListener(*[lambda *_: None] * 4)
    with Loop() as loop:
        yield Workers(owned, None, Naming("test"), loop, listener, PATIENCE)
    os.close(null)


def test_what_could_not_be_forked_in_time_is_forked_when_it_is_needed(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.listdir("/proc/self/fd")
    device = TwoQueues("device")
    posts = [Post(device, queue, queue, 0, 0, Ledger()) for queue in range(2)]
    fork, forks = os.fork, chain([True], repeat(False))

    def fork_once() -> int:
        if next(forks):
            return fork()
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", fork_once)
    workers.prepare(posts)
    assert [workers.waiting(post) is not None for post in posts] == [True, False]
    with pytest.raises(LguestError, match="cannot fork device/second"):
        workers.serve(posts[1], Assignment(0, QueueLayout(8, 0, 0, 0)))
    assert workers.end_all() == []
    assert os.listdir("/proc/self/fd") == before
