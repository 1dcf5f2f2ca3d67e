"""The life of one guest, from forking its machine process to its end.

::

    STARTING --Ready/Start--> RUNNING --(the first Ending)--> ENDED

The machine process is forked before the kernel is in guest memory: it imports its engine on one of the host's CPUs
while the supervisor loads the kernel on another. It says Ready when it is confined and has made its machine. Then the
supervisor confines itself, and its Start is what lets the guest execute its first instruction.

From then on the supervisor waits for whatever happens next: the machine's words, the ends of processes, signals. The
machine asks for one thing at a time and waits for it (``devices``); the supervisor never waits for anything in
particular, so that all the others are heard at any moment.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import struct
import time
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING, Any

from lguest_mp import prctl, protocol, terminal
from lguest_mp.errors import LguestError
from lguest_mp.jail.plan import OFF
from lguest_mp.protocol import ProtocolError
from lguest_mp.supervisor import children, ending, resources
from lguest_mp.supervisor.children import Ear
from lguest_mp.supervisor.log import Level
from lguest_mp.supervisor.loop import Loop
from lguest_mp.supervisor.signals import STOPPING
from lguest_mp.virtio.console import Console
from lguest_mp.virtio.device import DeviceId

if TYPE_CHECKING:
    from lguest_mp.cpu.engine import EntryState
    from lguest_mp.line import Attachment
    from lguest_mp.registry import Claim
    from lguest_mp.supervisor.children import Child, Naming
    from lguest_mp.supervisor.control import Control
    from lguest_mp.supervisor.devices import Devices, Request
    from lguest_mp.supervisor.ending import Ending
    from lguest_mp.supervisor.resources import Resources
    from lguest_mp.supervisor.service import Service
    from lguest_mp.supervisor.signals import Signals
    from lguest_mp.terminal import Terminal
    from lguest_mp.virtio.device import Device

#: How long (seconds) a process may take to end when it is told to; then it is killed.
GRACE = 2.0
#: How often (seconds) a launcher in the background looks whether the terminal has become its own.
FOREGROUND_CHECK = 1.0


class Life(Enum):
    """Where the guest is in its life."""

    STARTING = auto()
    RUNNING = auto()
    ENDED = auto()


class _NeverBegan(Exception):
    """The supervisor ended before the guest began."""


class Guest:
    """One guest; :meth:`run` is its life. Nothing of it remains afterwards but what ``resources`` holds."""

    def __init__(  # noqa: PLR0917 -- what a guest is made of
        self,
        owned: Resources,
        naming: Naming,
        signals: Signals,
        screen: Terminal,
        service: Service,
        restarted: dict[str, int] | None = None,
        grace: float = GRACE,
        *,
        reboots: int = 0,
        claim: Claim | None = None,
    ) -> None:
        """``restarted``: how often each queue's workers were replaced in the guest's lives so far; counted on.

        There were so many ``reboots`` before. With a ``claim`` the guest answers lguestctl at the claim's socket.
        """
        self._restarted = {} if restarted is None else restarted
        self._reboots = reboots
        self._claim = claim
        self._control: Control | None = None
        self._resources = owned
        self._naming = naming
        self._signals = signals
        self._screen = screen
        self._service = service
        self._grace = grace
        self._life = Life.STARTING
        self._ending: Ending | None = None
        self._request: Request | None = None
        self._machine: Child | None = None
        self._machine_is_ready = False
        self._machine_said_its_last_word = False
        self._opened = contextlib.ExitStack()

    def run(self) -> Ending:
        """Starts the guest; returns how it ended, with every process of it gone and every file of it closed."""
        with self._opened:
            try:
                self._connect()
                self._fork_machine()
                self._devices = self._make_devices()
            except OSError as error:
                if self._machine is not None:
                    children.end_all([self._machine], self._grace)
                raise LguestError(f"cannot make the guest's channels: {error.strerror}") from error
            try:
                entry = self._start()
                while self._ending is None:
                    self._service.look(self._devices)
                    self._step(entry)
                self._verbose_table()
            finally:
                self._life = Life.ENDED
                left_behind = self._end_processes()
                if left_behind and isinstance(self._ending, ending.Rebooting):
                    self._ending = ending.cannot_reboot(left_behind)
                if self._control is not None:
                    self._control.close(self._ending)
            return self._ending

    # ---- Starting ----

    def _connect(self) -> None:
        """Makes all channels: the machine's, and for each queue of each device two eventfds."""
        from lguest_mp.machine.wiring import DevicePort  # noqa: PLC0415 -- 10 ms

        self._loop = self._opened.enter_context(Loop())
        self._service.begin(self._loop)
        self._requests, self._machine_requests = self._channel_pair()
        self._events, self._machine_events = self._channel_pair()
        self._ports = [
            DevicePort(
                device=device,
                kicks=tuple(self._eventfd() for _ in device.queue_names),
                calls=tuple(self._eventfd() for _ in device.queue_names),
                packed=self._resources.config.rings == "packed",
            )
            for device in self._resources.devices
        ]
        queues = sum(len(port.kicks) for port in self._ports)
        self._watches = self._resources.parts.make_watches(self._resources.memory, queues)
        if self._watches is not None:
            self._opened.callback(self._watches.close)
        for device in self._resources.devices:
            device.attend(self._loop)

    def _answer_others(self) -> None:
        """Begins to answer lguestctl, and whoever has been waiting for that."""
        if self._claim is None or self._control is not None:
            return
        from lguest_mp.supervisor.control import Control  # noqa: PLC0415 -- 20 ms, a tenth of a guest's start
        from lguest_mp.supervisor.facts import Facts  # noqa: PLC0415

        facts = Facts(self._resources, self._devices, self, self._reboots, time.time())
        self._control = Control(self._claim.listener, self._claim.owner, self._loop, facts)

    def _channel_pair(self) -> tuple[socket.socket, socket.socket]:
        ours, theirs = protocol.channel_pair()
        return self._opened.enter_context(ours), self._opened.enter_context(theirs)

    def _eventfd(self) -> int:
        fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._opened.callback(os.close, fd)
        return fd

    def _fork_machine(self) -> None:
        log = self._resources.log
        self._loop.watch(log.fd, log.flush)
        self._machine_plan = self._resources.jail.plan(self._resources.parts.machine_needs)
        self._machine = children.fork("cpu", self._be_machine, Ear(self._loop, log))
        self._machine_requests.close()
        self._machine_events.close()

    def _start(self) -> EntryState:
        """Loads the kernel while the machine process imports its engine; the registers at its first instruction."""
        if not self._resources.confinement.is_empty:
            self._answer_others()  # there may be no Python where we are going
        machine = self._machine
        assert machine is not None
        self._loop.watch(self._signals.fd, self._on_signals, first=True)
        self._loop.watch(self._requests.fileno(), self._on_request)
        self._loop.watch(machine.pidfd, lambda: self._on_machine_exit(machine))
        for device in self._resources.devices:
            if (helper := device.helper) is not None:
                self._loop.watch(helper.pidfd, partial(self._on_helper_exit, device, helper))
        return self._resources.load_kernel()

    def _make_devices(self) -> Devices:
        """Who looks after the workers; it is imported while the machine process imports its engine, and so is the rest.

        Not later than that: there may be no Python where we are going.
        """
        from lguest_mp.supervisor import processes  # noqa: F401, PLC0415
        from lguest_mp.supervisor.devices import Devices, Listener  # noqa: PLC0415
        from lguest_mp.supervisor.news import News  # noqa: PLC0415

        return Devices(
            self._resources,
            self._ports,
            self._watches,
            self._naming,
            self._loop,
            Listener(self.end, News(self._events, self._loop)),
            self._restarted,
            self._grace,
        )

    def _be_machine(self) -> int:
        """The body of the machine process; its exit status."""
        owned, requests, events = self._resources, self._machine_requests, self._machine_events
        supervisor = os.getppid()
        owned.forget_kernel()
        children.keep_only(self._machine_files(), owned.null)
        try:
            run_machine = owned.parts.load_machine()
            self._naming.of("cpu", "lguest/cpu").take()
            owned.confine()
            if not prctl.die_with_parent(supervisor):
                return 0
            self._machine_plan.enter()
            run_machine(owned.config, owned.memory, self._watches, self._ports, self._begin_machine, requests, events)
        except _NeverBegan:
            return 0
        except LguestError as error:
            protocol.send(requests, protocol.Failed(str(error)))
        return 0

    def _begin_machine(self) -> EntryState:
        """The machine process has its machine; waits until the guest may begin, and how. _NeverBegan."""
        protocol.send(self._machine_requests, protocol.Ready())
        start = protocol.receive(self._machine_events)
        if not isinstance(start, protocol.Start):
            raise _NeverBegan
        gc.freeze()  # all that is made; from now on the collector has something to do
        gc.enable()
        return start.entry

    def _machine_files(self) -> list[int]:
        files = [0, 1, self._machine_requests.fileno(), self._machine_events.fileno()]
        files += self._resources.parts.machine_files
        for port in self._ports:
            files += [*port.kicks, *port.calls, *port.device.machine_files]
        if self._watches is not None:
            files += self._watches.files
        if self._resources.confinement.root is not None:
            files.append(self._resources.confinement.root)
        return files

    def _begin_running(self, entry: EntryState) -> None:
        """The machine process is there and confined: so are we now, and the guest may begin.

        What the guest need not wait for comes after that.
        """
        self._resources.confine()
        self._life = Life.RUNNING
        self._screen.take()
        self._tell_machine(self._events, protocol.Start(entry))
        self._naming.of(None, "lguest").take()
        self._plan_workers()
        self._answer_others()
        resources.freeze()
        self._devices.prepare()
        if self._machine is not None:
            self._verbose(f"cpu is process {self._machine.pid}; the guest begins at {entry.rip:#x}")

    def _plan_workers(self) -> None:
        """Has everything ready that a worker needs to enter its jail: whoever is forked shares it."""
        for served in self._devices.served:
            for queue in range(len(served.port.kicks)):
                self._resources.jail.plan(served.port.device.needs(queue))

    # ---- The loop ----

    def _step(self, entry: EntryState) -> None:
        self._loop.wait(FOREGROUND_CHECK if self._screen.is_elsewhere else None)
        if self._ending is not None:
            return
        if self._machine_is_ready:
            self._machine_is_ready = False
            self._begin_running(entry)
        if self._screen.is_elsewhere and self._life is Life.RUNNING:
            self._screen.take()
        if self._request is not None and self._request.is_done():
            request, self._request = self._request, None
            request.finish()
            self._tell_machine(self._requests, protocol.Done())

    def end(self, how: Ending) -> None:
        """The guest ends; the first reason counts."""
        if self._ending is None:
            self._ending = how
            self._service.end(how)

    # ---- The machine ----

    def _on_request(self) -> None:
        try:
            message = protocol.receive(self._requests, socket.MSG_DONTWAIT)
            if message is None:  # its end will tell more
                self._loop.forget(self._requests.fileno())
            elif self._ending is None:
                self._obey(message)
        except BlockingIOError:
            return
        except ProtocolError as error:
            self.end(ending.guest_died(f"the machine process broke the protocol: {error}"))

    def _obey(self, message: protocol.Message) -> None:
        match message:
            case protocol.Log(text, verbose):
                self._resources.log.say(text, Level.INFO if verbose else Level.NOTICE, "cpu")
            case protocol.Interrupted():
                self.end(ending.interrupted())
            case protocol.Failed(reason):
                self._end_by_machine(ending.failed(reason))
            case protocol.Died(reason):
                self._end_by_machine(ending.guest_died(reason))
            case protocol.Ready() if self._life is Life.STARTING:
                self._machine_is_ready = True
            case protocol.PowerOff() if self._life is Life.RUNNING:
                self._verbose("the guest powered off")
                self._end_by_machine(ending.powered_off())
            case protocol.Reboot() if self._life is Life.RUNNING:
                self._verbose("the guest reboots")
                self._end_by_machine(ending.Rebooting())
            case protocol.DriverReady() | protocol.QueueReady() | protocol.QueueReset() | protocol.DeviceReset() if (
                self._life is Life.RUNNING and self._request is None
            ):
                self._request = self._devices.begin(message)
            case _:
                raise ProtocolError(f"{type(message).__name__} comes at the wrong time")

    def _end_by_machine(self, how: Ending) -> None:
        self._machine_said_its_last_word = True
        self.end(how)

    def _on_machine_exit(self, machine: Child) -> None:
        self._loop.finish(self._requests.fileno(), self._on_request)
        self._loop.forget(machine.pidfd)
        self._machine = None
        how = f"the machine process {children.how_it_ended(machine.reap())}"
        self.end(ending.failed(how) if self._life is Life.STARTING else ending.guest_died(how))

    def _tell_machine(self, channel: socket.socket, message: protocol.Message) -> None:
        """Never waits for the machine. If it is gone, its end tells so; if it does not listen, it is no machine."""
        try:
            protocol.send(channel, message, socket.MSG_DONTWAIT)
        except BlockingIOError:
            self.end(ending.guest_died("the machine process does not listen to the supervisor"))
        except OSError:
            return

    # ---- Helpers of devices ----

    def _on_helper_exit(self, device: Device, helper: Child) -> None:
        """A helper is no worker: its device lives on without it, and its worker finds out in its own way."""
        self._loop.forget(helper.pidfd)
        how = children.how_it_ended(helper.reap())
        device.helper_ended()
        text = f"{helper.name} {how}; {device.name} is without it from now on"
        self._resources.log.say(text, Level.WARNING, helper.name)

    # ---- Signals ----

    def _on_signals(self) -> None:
        for signum in sorted(self._signals.take()):
            match signum:
                case signal.SIGUSR1:
                    self._show_table()
                case signal.SIGWINCH:
                    self.resize(0, 0)
                case signal.SIGTSTP:
                    self._suspend()
                case signal.SIGCONT:
                    self._resume()
                case _ if signum in STOPPING:
                    self.end(ending.Signalled(signum))

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
        self.resize(0, 0)

    # ---- The console ----

    def attach(self) -> Attachment:
        """What somebody needs who attaches to the console; the files stay this process's. LguestError: has none."""
        for device in self._resources.devices:
            if isinstance(device, Console) and device.line is not None:
                return device.line.attach()
        raise LguestError("this guest has no console that one can attach to")

    def resize(self, columns: int, rows: int) -> None:
        """The terminal on which the console is looked at now has this size; 0: it is the launcher's own.

        The console is told: le16 cols, le16 rows (virtio 1.2, 5.3.4).
        """
        size = (columns, rows) if columns and rows else terminal.size()
        if size is None or self._life is not Life.RUNNING:
            return
        data = struct.pack("<HH", *(min(side, 0xFFFF) for side in size))
        for served in self._devices.served:
            if served.port.device.device_id is DeviceId.CONSOLE:
                self._devices.reconfigure(served, 0, data)

    # ---- What the user sees ----

    @property
    def stage(self) -> str:
        """Where the guest is in its life, in a word."""
        return self._life.name.lower()

    @property
    def cpu(self) -> Child | None:
        """The machine process, while there is one."""
        return self._machine

    def _verbose(self, text: str) -> None:
        self._resources.log.say(text, Level.INFO)

    def _verbose_table(self) -> None:
        if self._resources.config.verbose:
            self._show_table()

    def _show_table(self) -> None:
        from lguest_mp.supervisor import processes  # noqa: PLC0415 -- which is there by now

        members = [("supervisor", os.getpid()), *((child.name, child.pid) for child in self._children())]
        for line in processes.table(members):
            self._resources.log.say(line)

    def jails(self) -> list[tuple[str, int, dict[str, Any]]]:
        """How each process of the guest was to be jailed: its name, its process ID, what its plan says of itself."""
        found: list[tuple[str, int, dict[str, Any]]] = []
        if self._machine is not None:
            plan = self._machine_plan.describe(tuple(self._machine_files()))
            found.append((self._machine.name, self._machine.pid, plan))
        for served in self._devices.served:
            found += [(each.child.name, each.child.pid, each.jail) for each in self._devices.workers_of(served)]
            if (helper := served.port.device.helper) is not None:
                found.append((helper.name, helper.pid, OFF))
        return found

    # ---- The end ----

    def _children(self) -> list[Child]:
        machine = [] if self._machine is None else [self._machine]
        helpers = [device.helper for device in self._resources.devices if device.helper is not None]
        return [*machine, *self._devices.children(), *helpers]

    def _end_processes(self) -> list[str]:
        """The machine first, so that nobody works for it any more, then the workers; the terminal is the user's.

        Returns the names of those that could not be ended.
        """
        left_behind: list[str] = []
        if self._machine is not None:
            if self._machine_said_its_last_word:
                self._machine.has_ended(self._grace)
            left_behind += children.end_all([self._machine], self._grace)
            self._machine = None
        left_behind += self._devices.end_all()
        self._screen.restore()
        return left_behind
