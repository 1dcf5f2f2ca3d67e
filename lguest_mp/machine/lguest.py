"""The `lguest` machine: a guest that knows its host, and the launcher's half of what is between them.

There is next to no hardware. The host (:class:`lguest_mp.cpu.lguest_host.LguestHost`) runs the guest and is asked for
nearly everything by hypercalls of the guest's. The launcher is needed for three things: a hypercall that speaks to a
device (``bus/lguest_page.py``), instructions that trap and have to be emulated (``emulate.py``), and the guest's end.

Two threads share this process. The *guest's*, the main one, is inside the host, or does what it came out for. The
*events'* (``eventloop.py``) waits for what comes from outside: the workers' interrupts, the supervisor's news, and the
terminal while no console driver reads it. Of that the guest gets nothing, since it has no other way to read; but three
^C end it. What those type who are attached to the console waits for the driver.

The workers' `call` eventfds are never read. The loop watches them edge-triggered: every write is an edge, whatever the
counter says, and there is nothing to drain when a device is reset.

**How the guest ends.** Where the original launcher ended with a message and all of its processes, the guest ends with
the same words, in order, and the supervisor is told. Linux has one hypercall for its death and for switching itself
off, and tells them apart by what it says: :data:`POWER_DOWN` is the second.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Lock

from lguest_mp import protocol
from lguest_mp.bus.lguest_page import LguestBus, LguestDevice, plan
from lguest_mp.cpu.engine import EntryState
from lguest_mp.cpu.lguest_host import (
    GENERAL_PROTECTION,
    NOTIFY,
    PAGE_FAULT,
    GuestDied,
    GuestRestarts,
    LguestHost,
    Pending,
)
from lguest_mp.errors import GuestError, LguestError
from lguest_mp.line import Line
from lguest_mp.machine.control import Control, News, Supervisor, SupervisorGone, bug, live
from lguest_mp.machine.emulate import emulate
from lguest_mp.machine.eventloop import EventLoop
from lguest_mp.machine.stdio import StandardInput, StandardOutput
from lguest_mp.machine.wiring import DevicePort
from lguest_mp.memory import PAGE_SIZE, GuestMemory
from lguest_mp.protocol import Died, Failed, Message, PowerOff, Reboot
from lguest_mp.screen import Track
from lguest_mp.virtio.device import DeviceId

#: How a host says that the guest switched itself off: what it says of every death that the guest asks for, and Linux's
#: words.
POWER_DOWN = "CRASH: Power down"
#: So many bytes of RAM a kernel uses that was built without CONFIG_HIGHMEM4G. It looks for the devices behind them.
_LOW_MEMORY = 891 << 20
#: A guest that does odd things for ever is not worth a line each time.
MOST_WARNINGS = 20


class LguestMachine:
    """The machine around one guest.

    ``memory`` is the guest's RAM, of ``ram`` bytes, and the device pages behind it. ``line``: over
    which others see the console. ``verbose``: the supervisor is told everything that happens.
    """

    def __init__(  # noqa: PLR0917 -- what a machine is connected to
        self,
        memory: GuestMemory,
        ram: int,
        devices: Sequence[DevicePort],
        requests: socket.socket,
        events: socket.socket,
        input_fd: int,
        output_fd: int,
        *,
        line: Line | None = None,
        verbose: bool = False,
    ) -> None:
        self._memory = memory
        self._ram = ram
        self._supervisor = Supervisor(requests)
        self._is_verbose = verbose
        self._warnings = 0
        self._host: LguestHost | None = None
        #: The events' thread; a host in software has it wait for its timer, too.
        self.loop = EventLoop()
        self._output = StandardOutput(output_fd, self.loop, None if line is None else line.writer(Track.SERIAL))
        self._input = StandardInput(
            input_fd,
            self.loop,
            receive=lambda _data: None,
            wanted=lambda: False,
            interrupt=lambda: self._supervisor.tell(protocol.Interrupted()),
        )
        self._plan = plan([port.device for port in devices], ram)
        lock = Lock()
        self._devices = [
            LguestDevice(
                port.device,
                place,
                port.kicks,
                memory,
                lock=lock,
                interrupt=self._interrupt,
                attach=self._attach,
                control=self._control(index, port),
                warn=self._warn,
            )
            for index, (port, place) in enumerate(zip(devices, self._plan.devices, strict=True))
        ]
        self._bus = LguestBus(self._devices, memory, self._plan.end, self._print)
        self._news = News(events, self._devices, self._input.take, self._input.release)
        self.loop.add(events.fileno(), self._news.hear)
        for device, port in zip(self._devices, devices, strict=True):
            for queue, call in enumerate(port.calls):
                self._watch_call(call, device, queue)

    def _control(self, index: int, port: DevicePort) -> Control:
        is_console = port.device.device_id is DeviceId.CONSOLE

        def before_start() -> None:
            if is_console:
                self._input.release()

        def after_reset() -> None:
            # News of the life that has just ended must not reach the next one: what the supervisor said before it
            # answered is there by now.
            self._news.hear()
            if is_console:
                self._input.take()

        return Control(
            index,
            port.device.name,
            self._supervisor,
            before_start=before_start,
            after_start=lambda: None,
            after_reset=after_reset,
        )

    def _watch_call(self, call: int, device: LguestDevice, queue: int) -> None:
        self.loop.add_shared(call, lambda: device.queue_interrupt(queue), select.EPOLLIN | select.EPOLLET)

    def _interrupt(self, irq: int) -> None:
        assert self._host is not None
        self._host.interrupt(irq)

    def _attach(self, address: int, eventfd: int) -> None:
        assert self._host is not None
        self._host.attach(address, eventfd)

    def _print(self, text: bytes) -> None:
        for byte in text:
            self._output.put(byte)

    # What the user hears

    def _warn(self, text: str) -> None:
        self._warnings += 1
        if self._warnings <= MOST_WARNINGS:
            self._supervisor.tell(protocol.Log(text, verbose=False))
        if self._warnings == MOST_WARNINGS:
            self._supervisor.tell(protocol.Log("the guest goes on like this; no more is said of it", verbose=False))

    def _tell_verbosely(self, text: str) -> None:
        self._supervisor.tell(protocol.Log(text))

    def _describe(self) -> None:
        self._tell_verbosely(f"Guest: {self._plan.end:#x} bytes, MMIO up to {self._memory.size:#x}")
        for device in self._devices:
            for name, queue in zip(device.device.queue_names, device.place.queues, strict=True):
                self._tell_verbosely(
                    f"{device.device.name}/{name}: Virtqueue page {queue.address:#x}, interrupt {queue.interrupt}"
                )

    # The life of the machine

    def run(self, host: LguestHost, entry: EntryState) -> None:
        """Runs the guest on this thread until it ends, and tells the supervisor how it did. LguestError: it cannot."""
        self._host = host
        host.initialize(self._plan.end // PAGE_SIZE, entry.rip, self._memory.size // PAGE_SIZE)
        if self._ram > _LOW_MEMORY:
            self._warn(
                f"with more than {_LOW_MEMORY >> 20} MiB a kernel finds its devices only if it was built with"
                " CONFIG_HIGHMEM4G"
            )
        if self._is_verbose:
            self._describe()
        self._input.take()
        live(
            lambda: self._run_to_the_end(host),
            supervisor=self._supervisor,
            loop=self.loop,
            events_failed=self._events_failed,
            output=self._output,
        )

    def _run_to_the_end(self, host: LguestHost) -> Message:
        verbose = self._tell_verbosely if self._is_verbose else None
        try:
            while True:
                self._serve(host, host.run(), verbose)
        except SupervisorGone:
            raise
        except Exception as error:
            return _last_word(error)

    def _serve(self, host: LguestHost, pending: Pending, verbose: Callable[[str], None] | None) -> None:
        """Does what the guest needs the launcher for."""
        if pending.trap == NOTIFY:
            if verbose is not None:
                verbose(f"Notify on address {pending.address:#08x}")
            self._bus.notify(pending.address)
        elif pending.trap in (GENERAL_PROTECTION, PAGE_FAULT):
            # No device of this bus has registers in memory.
            emulate(host, pending, (), warn=self._warn, verbose=verbose)
        else:
            raise GuestError(f"Unknown trap {pending.trap} addr {pending.address:#08x}")

    def _events_failed(self, error: Exception) -> None:
        """The events' thread has ended. The guest's may be inside the host for long, so this one has the last word."""
        if not isinstance(error, SupervisorGone):
            with suppress(SupervisorGone):
                self._supervisor.tell(_last_word(error))

    def close(self) -> None:
        """Gives back what the machine holds of the host; it must not run any more."""
        self._output.close()
        self.loop.close()


def _last_word(error: Exception) -> Message:
    """What the supervisor is told of the exception that ended the guest."""
    reason = str(error).strip()
    match error:
        case GuestRestarts():
            return Reboot()
        case GuestDied() if reason == POWER_DOWN:
            return PowerOff()
        case GuestDied() | GuestError():
            return Died(reason)
        case LguestError():
            return Failed(reason)
    return bug(error)
