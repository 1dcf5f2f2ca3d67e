"""What every machine has between its guest and its supervisor, whatever the guest finds in it.

The machine asks the supervisor to make true what the guest's drivers decide (:class:`Control`), hears from it what
happened outside (:class:`News`), and is told by its events' thread when that fails. Its life (:func:`living`) is the
same for all: the guest runs on the main thread until something ends it, and how it ended is the machine's last word.
"""

from __future__ import annotations

import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Protocol

from lguest_mp import protocol
from lguest_mp.machine.eventloop import EventLoop
from lguest_mp.machine.stdio import StandardOutput
from lguest_mp.protocol import Died, Message
from lguest_mp.virtio.device import Device, DeviceId, QueueLayout

#: How long one thread may keep the interpreter from the other, seconds (Python's default is 5 ms).
_SWITCH_INTERVAL = 0.0005
#: How long output that the terminal does not take is waited for at the end, seconds.
_LAST_WORDS = 1.0


class SupervisorGone(Exception):
    """Nobody answers any more; there is nothing to run for."""


class Supervisor:
    """The machine's end of the requests."""

    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests

    def tell(self, message: Message) -> None:
        """Says something that is not answered. From any thread."""
        try:
            protocol.send(self._requests, message)
        except OSError as error:
            raise SupervisorGone from error

    def ask(self, message: Message) -> None:
        """Asks for something and waits until it is done. On the CPU's thread."""
        self.tell(message)
        answer = protocol.receive(self._requests)
        if answer is None:
            raise SupervisorGone
        if not isinstance(answer, protocol.Done):
            raise protocol.ProtocolError(f"{answer!r} is no answer")


class Control:
    """What a device on the bus decides, made true by the supervisor."""

    def __init__(
        self,
        index: int,
        name: str,
        supervisor: Supervisor,
        *,
        before_start: Callable[[], None],
        after_start: Callable[[], None],
        after_reset: Callable[[], None],
    ) -> None:
        """``before_start`` and ``after_reset`` are called around the time in which the device is served."""
        self._index = index
        self._name = name
        self._supervisor = supervisor
        self._before_start = before_start
        self._after_start = after_start
        self._after_reset = after_reset

    def start(self, features: int, queues: tuple[QueueLayout | None, ...]) -> None:
        """The driver is ready: has the queues served."""
        self._before_start()
        self._supervisor.ask(protocol.DriverReady(self._index, features, queues))
        self._after_start()

    def reset(self) -> None:
        """Stops serving the device; its workers are gone on return."""
        self._supervisor.ask(protocol.DeviceReset(self._index))
        self._after_reset()

    def start_queue(self, queue: int, features: int, layout: QueueLayout) -> None:
        """Has one queue served again."""
        self._supervisor.ask(protocol.QueueReady(self._index, queue, features, layout))

    def reset_queue(self, queue: int) -> None:
        """Stops serving one queue."""
        self._supervisor.ask(protocol.QueueReset(self._index, queue))

    def log(self, text: str) -> None:
        """One line for the user."""
        self._supervisor.tell(protocol.Log(f"{self._name}: {text}", verbose=False))


class BusDevice(Protocol):
    """A device as it is on a machine's bus."""

    @property
    def device(self) -> Device:
        """What it is behind the bus."""

    def config_changed(self, offset: int, data: bytes) -> None:
        """Its configuration space has changed. From any thread."""

    def broken(self) -> bool:
        """It is not served any more; False: its driver has reset it already. From any thread."""

    def mended(self) -> bool:
        """It is served again after that, from where it stopped; False: it has been reset since. From any thread."""


class News:
    """What the supervisor says of its own accord, and whom it concerns.

    ``console_broken`` is called when a console is not served any more, ``console_mended`` when it is again.
    """

    def __init__(
        self,
        channel: socket.socket,
        devices: Sequence[BusDevice],
        console_broken: Callable[[], None],
        console_mended: Callable[[], None],
    ) -> None:
        self._channel = channel
        self._devices = devices
        self._console_broken = console_broken
        self._console_mended = console_mended
        self._lock = threading.Lock()

    def hear(self) -> None:
        """Takes all that is there. From any thread."""
        with self._lock:
            while self._hear_one():
                pass

    def _hear_one(self) -> bool:
        try:
            message = protocol.receive(self._channel, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        match message:
            case None:
                raise SupervisorGone
            case protocol.ConfigChanged(device, offset, data):
                self._devices[device].config_changed(offset, bytes.fromhex(data))
            case protocol.DeviceBroken(device):
                concerned = self._devices[device]
                if concerned.broken() and concerned.device.device_id is DeviceId.CONSOLE:
                    self._console_broken()
            case protocol.DeviceMended(device):
                concerned = self._devices[device]
                if concerned.mended() and concerned.device.device_id is DeviceId.CONSOLE:
                    self._console_mended()
            case _:
                raise protocol.ProtocolError(f"{message!r} is no news for the machine")
        return True


def live(
    run: Callable[[], Message],
    *,
    supervisor: Supervisor,
    loop: EventLoop,
    events_failed: Callable[[Exception], None],
    output: StandardOutput,
) -> None:
    """Runs the guest with the events' thread beside it, and tells the supervisor the machine's last word.

    ``run`` returns it, or raises SupervisorGone. ``events_failed`` gets the exception that ends the events' thread.
    """
    switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_INTERVAL)
    # Reading a terminal whose foreground is somebody else's is an error then, and does not stop this process.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTTIN, signal.SIGTTOU)}
    loop.start(events_failed)
    try:
        end = run()
        loop.stop()
        output.flush(_LAST_WORDS)
        supervisor.tell(end)
    except SupervisorGone:
        pass
    finally:
        loop.stop()
        sys.setswitchinterval(switch_interval)
        for number, handler in before.items():
            signal.signal(number, handler)


def bug(error: Exception) -> Died:
    """The last word after an exception that nobody expected; it is shown, for whoever mends it."""
    traceback.print_exception(error)
    return Died(f"internal error: {type(error).__name__}: {error}")
