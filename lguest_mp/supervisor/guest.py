"""The life of one guest, from forking its machine process to its end.

::

    STARTING --Ready/Start--> RUNNING --(the first Ending)--> ENDED

The machine process is forked while the kernel is not yet in guest memory: it imports its engine on one CPU while the
supervisor loads the kernel on another. It says Ready when it has what it needs and is confined; then the supervisor
confines itself, and its Start is what lets the guest execute its first instruction.

Each device has a life of its own, which the guest's driver decides::

          +--DeviceReset---------------------------------+
          v                                              |
        RESET --DriverReady--> SERVED --Broken, exit 65--> BROKEN
          ^                      |
          +------DeviceReset-----+

While it is SERVED there is a worker for each queue that the driver enabled; QueueReset and QueueReady end and fork one
of them. A worker that ends and was not told to ends the guest. The one exception is a worker that stops because the
driver broke the standard: its device is BROKEN, and only that driver is worse off.

The machine asks for one thing at a time and waits. What it asked for is done when a condition holds (all workers of
the device are gone; all new ones serve), and the condition is looked at after every event, so that the loop never
waits for anything in particular: signals and the ends of other processes are heard at any moment.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import signal
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from lguest_mp import prctl, protocol, terminal, worker
from lguest_mp.errors import LguestError
from lguest_mp.protocol import ProtocolError
from lguest_mp.supervisor import children, ending, processes, resources
from lguest_mp.supervisor.children import Child
from lguest_mp.supervisor.log import say
from lguest_mp.supervisor.signals import STOPPING
from lguest_mp.virtio.device import DeviceId

if TYPE_CHECKING:
    from lguest_mp.machine.wiring import DevicePort
    from lguest_mp.supervisor.children import Naming
    from lguest_mp.supervisor.ending import Ending
    from lguest_mp.supervisor.resources import Resources
    from lguest_mp.supervisor.signals import Signals
    from lguest_mp.terminal import Terminal
    from lguest_mp.virtio.device import Device, QueueLayout

#: How long (seconds) a process may take to end when it is told to; then it is killed.
GRACE = 2.0


class Life(Enum):
    """Where the guest is in its life."""

    STARTING = auto()
    RUNNING = auto()
    ENDED = auto()


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
    #: When it is killed if it has not ended (time.monotonic).
    deadline: float | None = None
    #: What it said about the driver, before it stopped.
    broken: str = "the driver broke the virtio standard"


@dataclass(eq=False)
class ServedDevice:
    """A device, its eventfds, and those who serve it now (by queue index)."""

    index: int
    port: DevicePort
    #: The number of its first queue, counted over all devices of the guest.
    first_queue: int
    life: DeviceLife = DeviceLife.RESET
    workers: dict[int, Worker] = field(default_factory=dict)

    @property
    def device(self) -> Device:
        return self.port.device


@dataclass(frozen=True)
class Request:
    """What the machine waits for: ``finish`` runs when ``is_done`` holds, and then it gets its answer."""

    is_done: Callable[[], bool]
    finish: Callable[[], None] = lambda: None


class Guest:
    """One guest; :meth:`run` is its life. Nothing of it remains afterwards but what ``resources`` holds."""

    def __init__(
        self,
        owned: Resources,
        naming: Naming,
        signals: Signals,
        screen: Terminal,
        grace: float = GRACE,
    ) -> None:
        self._resources = owned
        self._naming = naming
        self._signals = signals
        self._screen = screen
        self._grace = grace
        self._life = Life.STARTING
        self._ending: Ending | None = None
        self._request: Request | None = None
        self._machine: Child | None = None
        self._machine_is_done = False
        self._served: list[ServedDevice] = []
        self._opened = contextlib.ExitStack()

    def run(self) -> Ending:
        """Starts the guest, returns how it ended, with every process of it gone and every file of it closed."""
        with self._opened:
            try:
                self._start()
                while self._ending is None:
                    self._step()
                if self._resources.config.verbose:
                    self._show_processes()
            finally:
                self._life = Life.ENDED
                self._end_processes()
            return self._ending

    # ---- Starting ----

    def _start(self) -> None:
        try:
            self._connect()
        except OSError as error:
            raise LguestError(f"cannot make the guest's channels: {error.strerror}") from error
        self._machine = machine = self._fork_machine()
        self._machine_requests.close()
        self._machine_events.close()
        self._watch(self._signals.fd, self._on_signals)
        self._watch(self._requests.fileno(), self._on_request)
        self._watch(machine.pidfd, lambda: self._on_machine_exit(machine))
        self._naming.take(None, "lguest")
        self._entry = self._resources.load_kernel()
        resources.freeze()

    def _connect(self) -> None:
        """Makes the socket pairs, and the eventfds of every queue, of every device."""
        from lguest_mp.machine.wiring import DevicePort  # noqa: PLC0415

        self._selector = self._opened.enter_context(selectors.DefaultSelector())
        self._requests, self._machine_requests = self._channel_pair()
        self._events, self._machine_events = self._channel_pair()
        queues = 0
        for index, device in enumerate(self._resources.devices):
            count = len(device.queue_names)
            port = DevicePort(
                device=device,
                kicks=tuple(self._eventfd() for _ in range(count)),
                calls=tuple(self._eventfd() for _ in range(count)),
            )
            self._served.append(ServedDevice(index, port, queues))
            queues += count
        self._code_watch = self._resources.parts.make_code_watch(self._resources.memory, queues)
        if self._code_watch is not None:
            self._opened.callback(self._code_watch.close)

    def _channel_pair(self) -> tuple[socket.socket, socket.socket]:
        ours, theirs = protocol.channel_pair()
        return self._opened.enter_context(ours), self._opened.enter_context(theirs)

    def _eventfd(self) -> int:
        fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._opened.callback(os.close, fd)
        return fd

    def _fork_machine(self) -> Child:
        requests, events = self._machine_requests, self._machine_events
        ports = [served.port for served in self._served]
        eventfds = (fd for port in ports for fd in (*port.kicks, *port.calls))
        root = self._resources.confinement.root
        code_files = () if self._code_watch is None else self._code_watch.files
        keep = [0, 1, requests.fileno(), events.fileno(), *eventfds, *code_files]
        if root is not None:
            keep.append(root)
        supervisor = os.getpid()

        def body() -> int:
            self._resources.forget_kernel()
            children.keep_only(keep, self._resources.null)
            try:
                run_machine = self._resources.parts.load_machine()
                self._naming.take("cpu", "lguest/cpu")
                self._resources.confine()
                if not prctl.die_with_parent(supervisor):
                    return 0
                protocol.send(requests, protocol.Ready())
                start = protocol.receive(events)
                if not isinstance(start, protocol.Start):
                    return 0
                run_machine(
                    self._resources.config,
                    self._resources.memory,
                    self._code_watch,
                    ports,
                    start.entry,
                    requests,
                    events,
                )
            except LguestError as error:
                protocol.send(requests, protocol.Failed(str(error)))
            return 0

        return children.fork("cpu", body)

    def _on_ready(self) -> None:
        """The machine process is there and confined: so are we now, and the guest may begin."""
        self._resources.confine()
        self._life = Life.RUNNING
        self._screen.take()
        self._tell_machine(self._events, protocol.Start(self._entry))

    # ---- The loop ----

    def _watch(self, fd: int, react: Callable[[], None]) -> None:
        self._selector.register(fd, selectors.EVENT_READ, react)

    def _step(self) -> None:
        """Waits for events and reacts to each. Signals come first: they may be why everybody else is ending."""
        keys = [key for key, _ in self._selector.select(self._next_deadline())]
        for key in sorted(keys, key=lambda key: key.fd != self._signals.fd):
            if self._ending is None and self._selector.get_map().get(key.fd) is key:
                key.data()
        self._kill_overdue()
        if self._ending is None and self._request is not None and self._request.is_done():
            request, self._request = self._request, None
            request.finish()
            self._tell_machine(self._requests, protocol.Done())

    def _next_deadline(self) -> float | None:
        deadlines = [worker.deadline for worker in self._workers() if worker.deadline is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _kill_overdue(self) -> None:
        for late in self._workers():
            if late.deadline is not None and late.deadline <= time.monotonic():
                self._verbose(f"{late.child.name} does not end: killing it")
                late.child.signal(signal.SIGKILL)
                late.deadline = None

    def _workers(self) -> list[Worker]:
        return [each for served in self._served for each in served.workers.values()]

    def _end(self, how: Ending) -> None:
        """The guest ends; the first reason counts."""
        if self._ending is None:
            self._ending = how

    def _end_by_machine(self, how: Ending) -> None:
        """The machine said its last word: it ends by itself."""
        self._machine_is_done = True
        self._end(how)

    # ---- What the machine says ----

    def _on_request(self) -> None:
        try:
            message = protocol.receive(self._requests, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except ProtocolError as error:
            self._end(ending.guest_died(f"the machine process broke the protocol: {error}"))
            return
        if message is None:  # it closed the channel: its end will tell more
            self._selector.unregister(self._requests)
            return
        try:
            self._obey(message)
        except ProtocolError as error:
            self._end(ending.guest_died(f"the machine process broke the protocol: {error}"))

    def _obey(self, message: protocol.Message) -> None:
        match message:
            case protocol.Log(text, verbose):
                if not verbose or self._resources.config.verbose:
                    say(text)
            case protocol.Interrupted():
                self._end(ending.Signalled(signal.SIGINT))
            case protocol.Failed(reason):
                self._end_by_machine(ending.failed(reason))
            case protocol.Died(reason):
                self._end_by_machine(ending.guest_died(reason))
            case protocol.Ready() if self._life is Life.STARTING:
                self._on_ready()
            case protocol.PowerOff() if self._life is Life.RUNNING:
                self._verbose("the guest powered off")
                self._end_by_machine(ending.powered_off())
            case protocol.Reboot() if self._life is Life.RUNNING:
                self._verbose("the guest reboots")
                self._end_by_machine(ending.Rebooting())
            case protocol.DriverReady() | protocol.QueueReady() | protocol.QueueReset() | protocol.DeviceReset() if (
                self._life is Life.RUNNING and self._request is None
            ):
                self._request = self._begin(message)
            case _:
                raise ProtocolError(f"{type(message).__name__} comes at the wrong time")

    def _begin(
        self, message: protocol.DriverReady | protocol.QueueReady | protocol.QueueReset | protocol.DeviceReset
    ) -> Request:
        if message.device >= len(self._served):
            raise ProtocolError(f"there is no device {message.device}")
        served = self._served[message.device]
        if isinstance(message, protocol.QueueReady | protocol.QueueReset) and message.queue >= len(served.port.kicks):
            raise ProtocolError(f"{served.device.name} has no queue {message.queue}")
        match message:
            case protocol.DriverReady():
                return self._serve_device(served, message.features, message.queues)
            case protocol.QueueReady():
                return self._serve_queue(served, message.queue, message.features, message.layout)
            case protocol.QueueReset():
                return self._reset_queue(served, message.queue)
            case protocol.DeviceReset():
                return self._reset_device(served)

    def _serve_device(self, served: ServedDevice, features: int, queues: tuple[QueueLayout | None, ...]) -> Request:
        name = served.device.name
        if served.life is not DeviceLife.RESET:
            raise ProtocolError(f"{name} is ready without having been reset")
        if len(queues) != len(served.port.kicks):
            raise ProtocolError(f"{name} is ready with {len(queues)} queues")
        served.life = DeviceLife.SERVED
        self._verbose(f"device {name} OK: offered {served.device.features:#x}, accepted {features:#x}")
        for index, layout in enumerate(queues):
            if layout is not None:
                self._fork_worker(served, index, features, layout)
        return Request(lambda: self._all_serve(served))

    def _serve_queue(self, served: ServedDevice, queue: int, features: int, layout: QueueLayout) -> Request:
        if served.life is DeviceLife.RESET or queue in served.workers:
            raise ProtocolError(f"{served.device.name} cannot serve queue {queue} now")
        if served.life is DeviceLife.SERVED:
            self._fork_worker(served, queue, features, layout)
        return Request(lambda: self._all_serve(served))

    @staticmethod
    def _all_serve(served: ServedDevice) -> bool:
        return all(each.life is not WorkerLife.STARTING for each in served.workers.values())

    def _reset_queue(self, served: ServedDevice, queue: int) -> Request:
        if served.life is DeviceLife.RESET:
            raise ProtocolError(f"{served.device.name} has no running queue {queue} to reset")
        if queue in served.workers:
            self._stop(served.workers[queue])
        return Request(lambda: queue not in served.workers, lambda: drain(served.port.kicks[queue]))

    def _reset_device(self, served: ServedDevice) -> Request:
        self._verbose(f"resetting device {served.device.name}")
        for each in served.workers.values():
            self._stop(each)

        def finish() -> None:
            served.life = DeviceLife.RESET
            for kick in served.port.kicks:
                drain(kick)

        return Request(lambda: not served.workers, finish)

    def _tell_machine(self, channel: socket.socket, message: protocol.Message) -> None:
        """Never waits for the machine. If it is gone, its end tells so; if it does not listen, it is no machine."""
        try:
            protocol.send(channel, message, socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._end(ending.guest_died("the machine process does not listen to the supervisor"))
        except OSError:
            return

    def _on_machine_exit(self, machine: Child) -> None:
        while self._ending is None and self._requests in self._selector.get_map() and _is_readable(self._requests):
            self._on_request()  # its last words
        self._selector.unregister(machine.pidfd)
        self._machine = None
        how = children.how_it_ended(machine.reap())
        if self._life is Life.STARTING:
            self._end(ending.failed(f"the machine process {how} before the guest began"))
        self._end(ending.guest_died(f"the machine process {how}"))

    # ---- Workers ----

    def _fork_worker(self, served: ServedDevice, queue: int, features: int, layout: QueueLayout) -> None:
        device, port = served.device, served.port
        kick, call = port.kicks[queue], port.calls[queue]
        ours, theirs = protocol.channel_pair()
        with theirs:
            name = f"{device.name}/{device.queue_names[queue]}"

            number = served.first_queue + queue
            keep = [kick, call, theirs.fileno(), *device.files]
            if self._code_watch is not None:
                keep += self._code_watch.worker_files(number)

            def body() -> int:
                children.keep_only(keep, self._resources.null)
                self._naming.take(name, name)
                watch = None if self._code_watch is None else self._code_watch.writer(number)
                make_queue = self._resources.parts.make_queue
                memory = self._resources.memory
                return worker.run(
                    device, queue, lambda: make_queue(memory, layout, features, kick, call, watch), theirs
                )

            child = children.fork(name, body)
        each = Worker(served, queue, child, ours)
        served.workers[queue] = each
        self._watch(ours.fileno(), lambda: self._on_report(each))
        self._watch(child.pidfd, lambda: self._on_worker_exit(each))
        self._verbose(f"{name} is process {child.pid}")

    def _stop(self, each: Worker) -> None:
        """Tells a worker to end; whoever waits for that looks at ``workers``."""
        if each.life is not WorkerLife.STOPPING:
            each.life = WorkerLife.STOPPING
            each.deadline = time.monotonic() + self._grace
            each.child.signal(signal.SIGTERM)
            each.child.signal(signal.SIGCONT)

    def _on_report(self, each: Worker) -> None:
        try:
            message = protocol.receive(each.reports, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except ProtocolError:
            self._end(ending.worker_died(each.child.name, "broke the protocol"))
            return
        match message:
            case None:
                self._selector.unregister(each.reports)
            case protocol.Serving() if each.life is WorkerLife.STARTING:
                each.life = WorkerLife.SERVING
            case protocol.Serving() if each.life is WorkerLife.STOPPING:
                pass
            case protocol.Log(text, verbose):
                if not verbose or self._resources.config.verbose:
                    say(f"{each.child.name}: {text}")
            case protocol.Interrupted():
                self._end(ending.Signalled(signal.SIGINT))
            case protocol.Broken(text):
                each.broken = text
            case _:
                self._end(ending.worker_died(each.child.name, "broke the protocol"))

    def _on_worker_exit(self, each: Worker) -> None:
        while self._ending is None and each.reports in self._selector.get_map() and _is_readable(each.reports):
            self._on_report(each)  # its last words
        self._selector.unregister(each.child.pidfd)
        with contextlib.suppress(KeyError):
            self._selector.unregister(each.reports)
        each.reports.close()
        status = each.child.reap()
        del each.served.workers[each.queue]
        if each.life is WorkerLife.STOPPING:
            return
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == worker.DRIVER_BROKE_STANDARD:
            self._break_device(each)
        else:
            self._end(ending.worker_died(each.child.name, children.how_it_ended(status)))

    def _break_device(self, each: Worker) -> None:
        served = each.served
        say(f"{each.child.name}: {each.broken}; the device needs a reset")
        served.life = DeviceLife.BROKEN
        for other in served.workers.values():
            self._stop(other)
        self._tell_machine(self._events, protocol.DeviceBroken(served.index))

    # ---- Signals ----

    def _on_signals(self) -> None:
        for signum in sorted(self._signals.take()):
            match signum:
                case signal.SIGUSR1:
                    self._show_processes()
                case signal.SIGWINCH:
                    self._on_resize()
                case signal.SIGTSTP:
                    self._suspend()
                case signal.SIGCONT:
                    self._resume()
                case _ if signum in STOPPING:
                    self._end(ending.Signalled(signum))

    def _on_resize(self) -> None:
        """Tells the console's new size: columns and rows, le16 each (virtio 1.2, 5.3.4)."""
        size = terminal.size()
        if size is None:
            return
        for served in self._served:
            if served.device.device_id is DeviceId.CONSOLE:
                data = struct.pack("<HH", *size).hex()
                self._tell_machine(self._events, protocol.ConfigChanged(served.index, 0, data))

    def _suspend(self) -> None:
        """Stops the whole guest, as the shell's job that it is, until somebody continues it."""
        for child in self._children():
            child.signal(signal.SIGSTOP)
        self._screen.restore()
        self._signals.stop_process()
        self._resume()

    def _resume(self) -> None:
        if self._life is Life.RUNNING:
            self._screen.take()
        for child in self._children():
            child.signal(signal.SIGCONT)
        self._on_resize()

    # ---- What the user sees ----

    def _verbose(self, text: str) -> None:
        if self._resources.config.verbose:
            say(text)

    def _show_processes(self) -> None:
        members = [("supervisor", os.getpid()), *((child.name, child.pid) for child in self._children())]
        for line in processes.table(members):
            say(line)

    # ---- The end ----

    def _children(self) -> list[Child]:
        workers = [each.child for each in self._workers()]
        return workers if self._machine is None else [self._machine, *workers]

    def _end_processes(self) -> None:
        """The machine first, so that nobody works for it any more, then the workers; the terminal is the user's."""
        if self._machine is not None:
            if self._machine_is_done:
                self._machine.has_ended(self._grace)
            children.end_all([self._machine], self._grace)
            self._machine = None
        children.end_all([each.child for each in self._workers()], self._grace)
        for served in self._served:
            for each in served.workers.values():
                each.reports.close()
            served.workers.clear()
        self._screen.restore()


def drain(eventfd: int) -> None:
    """Takes back notifications that nobody has read, and nobody will: the reader is gone."""
    poller = select.poll()
    poller.register(eventfd, select.POLLIN)
    if poller.poll(0):
        os.eventfd_read(eventfd)


def _is_readable(channel: socket.socket) -> bool:
    poller = select.poll()
    poller.register(channel, select.POLLIN)
    return bool(poller.poll(0))
