"""The lives of the devices and of those who serve them, as the guest's drivers and their own ends decide them.

::

          +---------------DeviceReset------+-----------------+
          v                                |                 |
        RESET --DriverReady--> SERVED --a worker's 65--> BROKEN
          ^                    |    ^
          |       its crashes, |    | somebody has
          |         too many   v    | it restarted
          +---DeviceReset---- FAILED

While a device is SERVED there is a worker for each queue that the driver enabled; QueueReset and QueueReady end and
begin one of them. (The first one of each queue waits for that from the guest's beginning.) A worker that stops because
the driver broke the standard (exit status 65) leaves its device BROKEN, and only that driver is worse off.

**A worker that ends and was not told to** has crashed, and the device's policy says what becomes of it. With *restart*
there is another one at once that goes on where it stopped (``virtio/queue.py``), and the guest notices nothing. If it
happens too often (``restarts.py``), or with *reset*, the device has FAILED: all its workers are ended, the guest is
told that it needs a reset. With *stop* the guest ends. A worker that is stuck (``watch.py``) is killed: a crash.

What the machine asks for is done when a condition holds: all workers of the device are gone; all new ones serve. Nobody
waits for that here; the condition (:class:`Request`) is looked at after every event.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from enum import Enum, auto
from typing import TYPE_CHECKING

from lguest_mp import protocol, worker
from lguest_mp.config import OnCrash
from lguest_mp.errors import LguestError
from lguest_mp.protocol import Assignment, DeviceReset, DriverReady, ProtocolError, QueueReady, QueueReset
from lguest_mp.record import Record, Value
from lguest_mp.supervisor import children, ending
from lguest_mp.supervisor.log import Level
from lguest_mp.supervisor.loop import is_readable
from lguest_mp.supervisor.restarts import Restarts
from lguest_mp.supervisor.watch import Watch
from lguest_mp.supervisor.workers import Post, Worker, WorkerLife, WorkerListener, Workers
from lguest_mp.virtio.ledger import Ledger

if TYPE_CHECKING:
    from lguest_mp.config import CrashPolicy
    from lguest_mp.machine.wiring import DevicePort
    from lguest_mp.supervisor.children import Child, Naming
    from lguest_mp.supervisor.ending import Ending
    from lguest_mp.supervisor.loop import Loop, Timer
    from lguest_mp.supervisor.news import News
    from lguest_mp.supervisor.parts import WriteWatches
    from lguest_mp.supervisor.resources import Resources

#: How long, in seconds, until it is tried again to fork a worker when the host could not.
_FORK_AGAIN = 1.0


class DeviceLife(Enum):
    """Where a device is in its life."""

    RESET = auto()
    SERVED = auto()
    #: Its driver broke the standard.
    BROKEN = auto()
    #: Its workers crashed, and nobody replaces them.
    FAILED = auto()


class QueueService(Record):
    """How one queue is served: what its driver decided (None: not to use it), by whom, and when by whom next."""

    post: Post
    restarts: Restarts
    assignment: Assignment | None = None
    worker: Worker | None = None
    #: Until there is another worker.
    gap: Timer | None = None
    #: How the last worker ended that was not told to, in words.
    last_end: str | None = None

    def close_gap(self) -> None:
        """Nobody is to come any more."""
        if self.gap is not None:
            self.gap.cancel()
            self.gap = None


class ServedDevice(Record):
    """A device with its eventfds, and how its queues are served."""

    index: int
    port: DevicePort
    policy: CrashPolicy
    queues: list[QueueService]
    life: DeviceLife = DeviceLife.RESET

    @property
    def name(self) -> str:
        return self.port.device.name

    def workers(self) -> list[Worker]:
        return [queue.worker for queue in self.queues if queue.worker is not None]

    def all_serve(self) -> bool:
        """Whether every worker has got as far as serving (or ending)."""
        return all(each.life is not WorkerLife.STARTING for each in self.workers())


class Request(Value):
    """What the machine waits for: ``finish`` is called when ``is_done`` holds, and then it gets its answer."""

    is_done: Callable[[], bool]
    finish: Callable[[], None] = lambda: None


class Listener(Value):
    """Whom the devices tell: that the guest is to end; what the machine has to know."""

    end: Callable[[Ending], None]
    news: News


class Devices:
    """All devices of one guest. ``restarted`` says by name how often each queue's workers were replaced so far."""

    def __init__(  # noqa: PLR0917 -- what the devices are connected to
        self,
        owned: Resources,
        ports: list[DevicePort],
        watches: WriteWatches | None,
        naming: Naming,
        loop: Loop,
        listener: Listener,
        restarted: dict[str, int],
        grace: float,
    ) -> None:
        """``grace``: how many seconds a worker has to end before it is killed."""
        self._resources = owned
        self._loop = loop
        self._listener = listener
        self.restarted = restarted
        config = owned.config
        self.served: list[ServedDevice] = []
        self._of: dict[Post, tuple[ServedDevice, QueueService]] = {}
        for index, port in enumerate(ports):
            policy = config.crash_policy_of(port.device.name)
            queues = [
                QueueService(Post(port.device, queue, len(self._of) + queue, kick, call, Ledger()), Restarts(policy))
                for queue, (kick, call) in enumerate(zip(port.kicks, port.calls, strict=True))
            ]
            served = ServedDevice(index, port, policy, queues)
            self.served.append(served)
            self._of.update({queue.post: (served, queue) for queue in queues})
        self._workers = Workers(
            owned,
            watches,
            naming,
            loop,
            WorkerListener(
                ended=self._on_end,
                reconfigured=lambda each, offset, data: self.reconfigure(self._of[each.post][0], offset, data),
                interrupted=lambda: listener.end(ending.interrupted()),
                broke_protocol=self._on_broken_protocol,
            ),
            grace,
        )
        if config.stuck_after:
            Watch(loop, lambda: self._workers, config.stuck_after, self._on_stuck)

    def begin(self, message: DriverReady | QueueReady | QueueReset | DeviceReset) -> Request:
        """Begins what the machine asks for. ProtocolError: there is no such thing, or not now."""
        if message.device >= len(self.served):
            raise ProtocolError(f"there is no device {message.device}")
        served = self.served[message.device]
        if isinstance(message, QueueReady | QueueReset) and message.queue >= len(served.queues):
            raise ProtocolError(f"{served.name} has no queue {message.queue}")
        match message:
            case DriverReady(_, features, layouts):
                assignments = [None if layout is None else Assignment(features, layout) for layout in layouts]
                return self._serve_device(served, features, assignments)
            case QueueReady(_, queue, features, layout):
                return self._serve_queue(served, served.queues[queue], Assignment(features, layout))
            case QueueReset(_, queue):
                return self._reset_queue(served, served.queues[queue])
            case DeviceReset():
                return self._reset_device(served)

    def reconfigure(self, served: ServedDevice, offset: int, data: bytes) -> None:
        """Changes a device's configuration space; ValueError if it has nothing there."""
        device = served.port.device
        before = device.config_space()
        device.apply_config(offset, data)
        if device.config_space() == before:
            return
        self._listener.news.tell(protocol.ConfigChanged(served.index, offset, data.hex()))

    def children(self) -> list[Child]:
        """The workers' processes, device by device."""
        return [each.child for served in self.served for each in self.workers_of(served)]

    def workers_of(self, served: ServedDevice) -> list[Worker]:
        """A device's workers, those that wait for its driver, too."""
        return [each for each in map(self.worker_of, served.queues) if each is not None]

    def worker_of(self, queue: QueueService) -> Worker | None:
        """A queue's worker, also if that waits for the queue's driver."""
        return queue.worker or self._workers.waiting(queue.post)

    def prepare(self) -> None:
        """Forks a worker for each queue, which waits for the queue's driver."""
        self._workers.prepare(queue.post for served in self.served for queue in served.queues)

    def end_all(self) -> list[str]:
        """Ends every worker, waits for it, and hears what it still had to say; the names of those left behind."""
        left_behind = self._workers.end_all()
        for _, queue in self._of.values():
            queue.worker = None
            queue.close_gap()
        return left_behind

    # ---- What the machine asks for ----

    def _serve_device(self, served: ServedDevice, features: int, assignments: list[Assignment | None]) -> Request:
        if served.life is not DeviceLife.RESET:
            raise ProtocolError(f"{served.name} is ready without having been reset")
        if len(assignments) != len(served.queues):
            raise ProtocolError(f"{served.name} is ready with {len(assignments)} queues")
        served.life = DeviceLife.SERVED
        offered = served.port.device.features
        self._verbose(f"device {served.name} OK: offered {offered:#x} and the bus's, accepted {features:#x}")
        for queue, assignment in zip(served.queues, assignments, strict=True):
            if assignment is not None:
                self._open_queue(queue, assignment)
        return Request(served.all_serve)

    def _serve_queue(self, served: ServedDevice, queue: QueueService, assignment: Assignment) -> Request:
        if served.life is DeviceLife.RESET or queue.assignment is not None:
            raise ProtocolError(f"{served.name} cannot serve queue {queue.post.queue} now")
        if served.life is DeviceLife.SERVED:
            self._open_queue(queue, assignment)
        else:
            queue.post.account.open()
            queue.assignment = assignment
        return Request(served.all_serve)

    def _reset_queue(self, served: ServedDevice, queue: QueueService) -> Request:
        if served.life is DeviceLife.RESET:
            raise ProtocolError(f"{served.name} has no running queue {queue.post.queue} to reset")
        self._verbose(f"resetting queue {queue.post.device.queue_names[queue.post.queue]} of device {served.name}")
        self._close_queue(queue)
        return Request(lambda: queue.worker is None, lambda: drain(queue.post.kick))

    def _reset_device(self, served: ServedDevice) -> Request:
        self._verbose(f"resetting device {served.name}")
        for queue in served.queues:
            self._close_queue(queue)

        def finish() -> None:
            served.life = DeviceLife.RESET
            self._listener.news.forget(served.index)
            for queue in served.queues:
                drain(queue.post.kick)

        return Request(lambda: not served.workers(), finish)

    # ---- Who serves a queue ----

    def _open_queue(self, queue: QueueService, assignment: Assignment) -> None:
        """The driver has set the queue up: its first worker."""
        queue.assignment = assignment
        queue.post.account.open()
        self._fill_gap(queue)

    def _close_queue(self, queue: QueueService) -> None:
        """The driver takes the queue back. Whoever waits for its worker's end looks at ``worker``."""
        queue.assignment = None
        self._dismiss(queue)

    def _dismiss(self, queue: QueueService) -> None:
        queue.close_gap()
        if queue.worker is not None:
            self._workers.stop(queue.worker)

    def _replace(self, queue: QueueService, delay: float) -> None:
        """Has another worker go on with the queue, in ``delay`` seconds."""
        name = queue.post.name
        self.restarted[name] = self.restarted.get(name, 0) + 1
        if delay:
            queue.gap = self._loop.later(delay, lambda: self._fill_gap(queue))
        else:
            self._fill_gap(queue)

    def _fill_gap(self, queue: QueueService) -> None:
        """A worker, now; a host that cannot is asked again, and the guest waits as for a slow device."""
        queue.gap = None
        if queue.assignment is None:
            return
        try:
            queue.worker = self._workers.serve(queue.post, queue.assignment)
        except LguestError as error:
            self._warn(f"{error}; trying again in {_FORK_AGAIN:g} s", queue.post.name)
            queue.gap = self._loop.later(_FORK_AGAIN, lambda: self._fill_gap(queue))

    # ---- When a worker ends ----

    def _on_end(self, each: Worker, status: int) -> None:
        served, queue = self._of[each.post]
        queue.worker = None
        match each.life:
            case WorkerLife.STOPPING:
                return
            case WorkerLife.LEAVING:
                self._replace(queue, 0.0)
            case _ if os.WIFEXITED(status) and os.WEXITSTATUS(status) == worker.DRIVER_BROKE_STANDARD:
                self._warn(f"{each.child.name}: {each.broken}; the device needs a reset", each.child.name)
                self._give_up(served, DeviceLife.BROKEN)
            case _:
                self._on_crash(served, queue, each, each.verdict or children.how_it_ended(status))

    def _on_crash(self, served: ServedDevice, queue: QueueService, each: Worker, how: str) -> None:
        name, policy = each.child.name, served.policy
        queue.last_end = how
        match policy.action:
            case OnCrash.STOP:
                self._listener.end(ending.worker_died(name, how))
            case OnCrash.RESET:
                self._warn(f"{name} {how}; the device needs a reset", name)
                self._give_up(served, DeviceLife.FAILED)
            case OnCrash.RESTART:
                delay = queue.restarts.delay(time.monotonic(), fruitful=each.was_fruitful)
                if delay is None:
                    often = f"after {policy.intensity} restarts within {policy.period:g} s"
                    self._warn(f"{name} {how}, {often}; the device is stopped and needs a reset", name)
                    self._give_up(served, DeviceLife.FAILED)
                else:
                    self._warn(f"{name} {how}; it is restarted{f' in {delay:g} s' if delay else ''}", name)
                    self._replace(queue, delay)

    def _on_stuck(self, each: Worker, how: str) -> None:
        name, patience = each.child.name, f"{self._resources.config.stuck_after:g} s"
        self._warn(f"{name} {how}, and has done nothing of its work for {patience}; it is killed", name)
        self._workers.kill(each, f"was stuck ({how})")

    def _on_broken_protocol(self, each: Worker) -> None:
        """What it says makes no sense: it is not itself any more."""
        self._workers.kill(each, "broke the protocol")

    def _give_up(self, served: ServedDevice, life: DeviceLife) -> None:
        """Nobody serves the device any more, and the guest is told so."""
        served.life = life
        for queue in served.queues:
            self._dismiss(queue)
        self._listener.news.tell(protocol.DeviceBroken(served.index))

    # ---- What a person asks for ----

    def restart(self, served: ServedDevice, only: QueueService | None = None) -> None:
        """Has workers replaced: a device's, or ``only`` that of one queue. LguestError: that cannot be.

        A device that has FAILED is served again, by all.
        """
        queues = served.queues if only is None or served.life is DeviceLife.FAILED else [only]
        match served.life:
            case DeviceLife.RESET:
                raise LguestError(f"{served.name} is not in use: the guest has no driver for it now")
            case DeviceLife.BROKEN:
                raise LguestError(f"{served.name} waits for its driver to reset it, since that broke the standard")
            case DeviceLife.FAILED:
                self._warn(f"{served.name} is served again", served.name)
                served.life = DeviceLife.SERVED
                self._listener.news.tell(protocol.DeviceMended(served.index))
        for queue in queues:
            queue.restarts.forget()
            self._restart_queue(queue)

    def _restart_queue(self, queue: QueueService) -> None:
        if queue.assignment is None:
            return
        if queue.worker is None:
            queue.close_gap()
            self._replace(queue, 0.0)
            return
        if queue.worker.life is WorkerLife.STOPPING:  # its device was given up a moment ago
            queue.worker.life = WorkerLife.LEAVING
        self._workers.stop(queue.worker, WorkerLife.LEAVING)

    def reset(self, served: ServedDevice) -> None:
        """Stops a device; the guest is told that it needs a reset (virtio 1.2, 2.1.2). LguestError: not in use."""
        if served.life is not DeviceLife.SERVED:
            raise LguestError(f"{served.name} is not served now ({served.life.name.lower()})")
        self._warn(f"{served.name} needs a reset", served.name)
        self._give_up(served, DeviceLife.FAILED)

    def _verbose(self, text: str) -> None:
        self._resources.log.say(text, Level.INFO)

    def _warn(self, text: str, about: str) -> None:
        self._resources.log.tell(text, Level.WARNING, about)


def drain(eventfd: int) -> None:
    """Takes back notifications that nobody has read and nobody will: the reader is gone."""
    if is_readable(eventfd):
        os.eventfd_read(eventfd)
