"""The lives of the devices and of the processes that serve them, as the guest's drivers decide them.

::

          +--DeviceReset----------------------------------+
          v                                               |
        RESET --DriverReady--> SERVED --a worker's 65--> BROKEN
          ^                      |
          +------DeviceReset-----+

While a device is SERVED there is a worker for each queue that the driver enabled; QueueReset and QueueReady end and
fork one of them. A worker that ends and was not told to ends the guest. The one exception is a worker that stops
because the driver broke the standard (exit status 65): its device is BROKEN, and only that driver is worse off.

What the machine asks for is done when a condition holds: all workers of the device are gone; all new ones serve. Nobody
waits for that here; the condition (:class:`Request`) is looked at after every event.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING

from lguest_mp import protocol, worker
from lguest_mp.errors import LguestError
from lguest_mp.protocol import DeviceReset, DriverReady, ProtocolError, QueueReady, QueueReset
from lguest_mp.supervisor import children, ending
from lguest_mp.supervisor.children import Child
from lguest_mp.supervisor.log import say
from lguest_mp.supervisor.loop import is_readable

if TYPE_CHECKING:
    from lguest_mp.machine.wiring import DevicePort
    from lguest_mp.supervisor.children import Naming
    from lguest_mp.supervisor.ending import Ending
    from lguest_mp.supervisor.loop import Loop
    from lguest_mp.supervisor.parts import WriteWatches
    from lguest_mp.supervisor.resources import Resources
    from lguest_mp.virtio.device import QueueLayout


class DeviceLife(Enum):
    """Where a device is in its life."""

    RESET = auto()
    SERVED = auto()
    BROKEN = auto()


class WorkerLife(Enum):
    """Where a worker is in its life."""

    STARTING = auto()
    SERVING = auto()
    STOPPING = auto()


@dataclass(eq=False)
class Worker:
    """A process that serves one queue."""

    served: ServedDevice
    queue: int
    child: Child
    reports: socket.socket
    life: WorkerLife = WorkerLife.STARTING
    #: When it is killed if it has not ended (time.monotonic), once it was told to end.
    deadline: float | None = None
    #: What it said about the driver before it stopped.
    broken: str = "the driver broke the virtio standard"


@dataclass(eq=False)
class ServedDevice:
    """A device with its eventfds, and those who serve it now, by queue."""

    index: int
    port: DevicePort
    #: The number of its first queue, counted over all devices of the guest.
    first_queue: int
    life: DeviceLife = DeviceLife.RESET
    workers: dict[int, Worker] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.port.device.name

    def all_serve(self) -> bool:
        """Whether every worker has got as far as serving (or ending)."""
        return all(each.life is not WorkerLife.STARTING for each in self.workers.values())


@dataclass(frozen=True)
class Request:
    """What the machine waits for: ``finish`` is called when ``is_done`` holds, and then it gets its answer."""

    is_done: Callable[[], bool]
    finish: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Listener:
    """Whom the devices tell: that the guest is to end; what the machine has to know, of devices by their index."""

    end: Callable[[Ending], None]
    tell_machine: Callable[[protocol.DeviceBroken | protocol.ConfigChanged], None]


class Devices:
    """All devices of one guest."""

    def __init__(  # noqa: PLR0917 -- what the devices are connected to
        self,
        owned: Resources,
        served: list[ServedDevice],
        watches: WriteWatches | None,
        naming: Naming,
        loop: Loop,
        listener: Listener,
        grace: float,
    ) -> None:
        """``grace``: how many seconds a worker has to end before it is killed."""
        self._resources = owned
        self._served = served
        self._watches = watches
        self._naming = naming
        self._loop = loop
        self._listener = listener
        self._grace = grace

    def begin(self, message: DriverReady | QueueReady | QueueReset | DeviceReset) -> Request:
        """Begins what the machine asks for. ProtocolError: there is no such thing, or not now."""
        if message.device >= len(self._served):
            raise ProtocolError(f"there is no device {message.device}")
        served = self._served[message.device]
        if isinstance(message, QueueReady | QueueReset) and message.queue >= len(served.port.kicks):
            raise ProtocolError(f"{served.name} has no queue {message.queue}")
        match message:
            case DriverReady():
                return self._serve_device(served, message.features, message.queues)
            case QueueReady():
                return self._serve_queue(served, message.queue, message.features, message.layout)
            case QueueReset():
                return self._reset_queue(served, message.queue)
            case DeviceReset():
                return self._reset_device(served)

    def reconfigure(self, served: ServedDevice, offset: int, data: bytes) -> None:
        """Changes a device's configuration space; ValueError if it has nothing there."""
        served.port.device.apply_config(offset, data)
        self._listener.tell_machine(protocol.ConfigChanged(served.index, offset, data.hex()))

    def workers(self) -> Iterator[Worker]:
        """Those who serve now, whatever device."""
        for served in self._served:
            yield from served.workers.values()

    def next_deadline(self) -> float | None:
        """When :meth:`kill_overdue` is to be called (time.monotonic)."""
        return min((each.deadline for each in self.workers() if each.deadline is not None), default=None)

    def kill_overdue(self) -> None:
        """Kills the workers that were told to end and did not in time."""
        now = time.monotonic()
        for each in self.workers():
            if each.deadline is not None and each.deadline <= now:
                each.child.signal(signal.SIGKILL)
                each.deadline = None

    def end_all(self) -> None:
        """Ends every worker, waits for it, and hears what it still had to say."""
        children.end_all([each.child for each in self.workers()], self._grace)
        for each in self.workers():
            self._loop.finish(each.reports.fileno(), partial(self._on_report, each))
            each.reports.close()
        for served in self._served:
            served.workers.clear()

    # ---- What the machine asks for ----

    def _serve_device(self, served: ServedDevice, features: int, queues: tuple[QueueLayout | None, ...]) -> Request:
        if served.life is not DeviceLife.RESET:
            raise ProtocolError(f"{served.name} is ready without having been reset")
        if len(queues) != len(served.port.kicks):
            raise ProtocolError(f"{served.name} is ready with {len(queues)} queues")
        served.life = DeviceLife.SERVED
        offered = served.port.device.features
        self._verbose(f"device {served.name} OK: offered {offered:#x} and the bus's, accepted {features:#x}")
        for index, layout in enumerate(queues):
            if layout is not None:
                self._fork_worker(served, index, features, layout)
        return Request(served.all_serve)

    def _serve_queue(self, served: ServedDevice, queue: int, features: int, layout: QueueLayout) -> Request:
        if served.life is DeviceLife.RESET or queue in served.workers:
            raise ProtocolError(f"{served.name} cannot serve queue {queue} now")
        if served.life is DeviceLife.SERVED:
            self._fork_worker(served, queue, features, layout)
        return Request(served.all_serve)

    def _reset_queue(self, served: ServedDevice, queue: int) -> Request:
        if served.life is DeviceLife.RESET:
            raise ProtocolError(f"{served.name} has no running queue {queue} to reset")
        self._verbose(f"resetting queue {served.port.device.queue_names[queue]} of device {served.name}")
        if queue in served.workers:
            self._stop(served.workers[queue])
        return Request(lambda: queue not in served.workers, lambda: drain(served.port.kicks[queue]))

    def _reset_device(self, served: ServedDevice) -> Request:
        self._verbose(f"resetting device {served.name}")
        for each in served.workers.values():
            self._stop(each)

        def finish() -> None:
            served.life = DeviceLife.RESET
            for kick in served.port.kicks:
                drain(kick)

        return Request(lambda: not served.workers, finish)

    # ---- A worker's life ----

    def _fork_worker(self, served: ServedDevice, queue: int, features: int, layout: QueueLayout) -> None:
        device, kick, call = served.port.device, served.port.kicks[queue], served.port.calls[queue]
        name = f"{device.name}/{device.queue_names[queue]}"
        number = served.first_queue + queue
        try:
            ours, theirs = protocol.channel_pair()
        except OSError as error:
            raise LguestError(f"cannot make a channel for {name}: {error.strerror}") from error
        keep = [kick, call, theirs.fileno(), *device.files]
        if self._watches is not None:
            keep += self._watches.worker_files(number)
        make_queue, memory = self._resources.parts.make_queue, self._resources.memory

        def body() -> int:
            children.keep_only(keep, self._resources.null)
            self._naming.take(name, name)
            watch = None if self._watches is None else self._watches.writer(number)
            return worker.run(device, queue, lambda: make_queue(memory, layout, features, kick, call, watch), theirs)

        with theirs:
            try:
                child = children.fork(name, body)
            except BaseException:
                ours.close()
                raise
        each = served.workers[queue] = Worker(served, queue, child, ours)
        self._loop.watch(ours.fileno(), lambda: self._on_report(each))
        self._loop.watch(child.pidfd, lambda: self._on_exit(each))
        self._verbose(f"{name} is process {child.pid}")

    def _stop(self, each: Worker) -> None:
        """Tells a worker to end. Whoever waits for that looks at ``workers``."""
        if each.life is not WorkerLife.STOPPING:
            each.life = WorkerLife.STOPPING
            each.deadline = time.monotonic() + self._grace
            each.child.end()

    def _on_report(self, each: Worker) -> None:
        try:
            message = protocol.receive(each.reports, socket.MSG_DONTWAIT)
            if message is None:
                self._loop.forget(each.reports.fileno())
            else:
                self._hear(each, message)
        except BlockingIOError:
            return
        except (ProtocolError, ValueError):
            self._loop.forget(each.reports.fileno())
            self._listener.end(ending.worker_died(each.child.name, "broke the protocol"))

    def _hear(self, each: Worker, message: protocol.Message) -> None:
        match message:
            case protocol.Serving():
                if each.life is WorkerLife.STARTING:
                    each.life = WorkerLife.SERVING
            case protocol.Log(text, verbose):
                if not verbose or self._resources.config.verbose:
                    say(text)
            case protocol.Interrupted():
                self._listener.end(ending.Signalled(signal.SIGINT))
            case protocol.Reconfigured(offset, data):
                self.reconfigure(each.served, offset, bytes.fromhex(data))
            case protocol.Broken(text):
                each.broken = text
            case _:
                raise ProtocolError(f"{type(message).__name__} comes from a worker")

    def _on_exit(self, each: Worker) -> None:
        self._loop.finish(each.reports.fileno(), lambda: self._on_report(each))
        each.reports.close()
        self._loop.forget(each.child.pidfd)
        status = each.child.reap()
        del each.served.workers[each.queue]
        if each.life is WorkerLife.STOPPING:
            return
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == worker.DRIVER_BROKE_STANDARD:
            self._break_device(each)
        else:
            self._listener.end(ending.worker_died(each.child.name, children.how_it_ended(status)))

    def _break_device(self, each: Worker) -> None:
        say(f"{each.child.name}: {each.broken}; the device needs a reset")
        each.served.life = DeviceLife.BROKEN
        for other in each.served.workers.values():
            self._stop(other)
        self._listener.tell_machine(protocol.DeviceBroken(each.served.index))

    def _verbose(self, text: str) -> None:
        if self._resources.config.verbose:
            say(text)


def drain(eventfd: int) -> None:
    """Takes back notifications that nobody has read and nobody will: the reader is gone."""
    if is_readable(eventfd):
        os.eventfd_read(eventfd)
