"""One worker process: it serves one virtqueue of one device, from the driver's DRIVER_OK to the next reset.

A worker holds its queue, the files of its device and guest memory. It waits until the supervisor tells it where its
queue is, which may be at once, or when the device's driver comes, tells the supervisor that it serves, and then hears
of it only by a signal; what it has to say goes over its report channel. It ends in one of three ways:

- the supervisor ends it (SIGTERM), because the guest reset the device or all ends;
- the driver broke the standard: it reports how, and exits with status 65 (``EX_DATAERR``). The device is stopped and
  needs a reset, the guest runs on;
- a bug of ours, or of the host's: a traceback on standard error and status 70 (``EX_SOFTWARE``), or a signal.
"""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from lguest_mp import protocol
from lguest_mp.errors import GuestError

if TYPE_CHECKING:
    from lguest_mp.protocol import Assignment
    from lguest_mp.virtio.device import Device
    from lguest_mp.virtio.queue import Queue

#: Exit statuses of a worker (sysexits.h): the driver broke the standard; a bug.
DRIVER_BROKE_STANDARD = os.EX_DATAERR
BUG = os.EX_SOFTWARE

#: What is longer is cut: a line for a person, well below the longest message.
MAX_TEXT = 1000
#: Encoded before anything is forked: the encoder's memory would be each worker's own, for one message.
_SERVING = protocol.encode(protocol.Serving())


class WorkerContext(Protocol):
    """What a device's ``serve`` may use of the worker that it runs in."""

    def log(self, text: str) -> None:
        """Shows one line to the user; lost rather than waited for when the supervisor does not listen."""

    def interrupt_guest(self) -> None:
        """Asks the supervisor to stop the guest as SIGINT would."""

    def config_changed(self, offset: int, data: bytes) -> None:
        """Has ``data`` appear at ``offset`` in the device's configuration space, and the driver told."""


class Reports:
    """A worker's words to its supervisor (a WorkerContext)."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel

    def log(self, text: str) -> None:
        self._say(protocol.Log(text[:MAX_TEXT], verbose=False))

    def interrupt_guest(self) -> None:
        self._say(protocol.Interrupted())

    def config_changed(self, offset: int, data: bytes) -> None:
        self._say(protocol.Reconfigured(offset, data.hex()))

    def serving(self) -> None:
        """The queue is set up."""
        self._send(_SERVING)

    def broken(self, text: str) -> None:
        """The driver broke the standard."""
        self._say(protocol.Broken(text[:MAX_TEXT]))

    def _say(self, message: protocol.Message) -> None:
        self._send(protocol.encode(message))

    def _send(self, datagram: bytes) -> None:
        try:
            self._channel.send(datagram, socket.MSG_DONTWAIT)
        except OSError:
            return  # it has more from us than it reads, or it is gone and so are we


def run(device: Device, queue_index: int, make_queue: Callable[[Assignment], Queue], channel: socket.socket) -> int:
    """The whole life of a worker; returns its exit status."""
    reports = Reports(channel)
    try:
        assignment = protocol.assigned(channel)
        if assignment is None:
            return 0
        queue = make_queue(assignment)
        reports.serving()
        device.serve(queue_index, queue, reports)
    except GuestError as error:
        reports.broken(str(error))
        return DRIVER_BROKE_STANDARD
    except Exception:  # a bug, or the host's doing; nobody else could say what happened
        os.write(2, traceback.format_exc().encode(errors="replace"))
    return BUG
