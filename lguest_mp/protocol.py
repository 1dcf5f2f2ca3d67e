"""What the processes of a guest say to each other: small typed messages on socket pairs.

The machine runs the guest and a worker reads the guest's rings, so whatever comes from them may be a guest's doing:
messages are JSON (never pickles), and decoding checks every field before anybody acts on it. The supervisor holds one
end of each ``SOCK_SEQPACKET`` pair:

- *requests*, from the machine. :class:`DriverReady`, :class:`QueueReady`, :class:`QueueReset` and
  :class:`DeviceReset` are answered by one :class:`Done`, and the machine waits for it before the guest runs on, as the
  original lguest waited: when a device's status reads back as reset, its workers are gone. The machine asks one at a
  time. Nothing else is answered: :class:`Ready`, :class:`PowerOff`, :class:`Reboot`, :class:`Died`,
  :class:`Failed`, :class:`Interrupted`, :class:`Log`.
- *events*, to the machine: :class:`Start`, once; then what happened outside, :class:`ConfigChanged`,
  :class:`DeviceBroken` and :class:`DeviceMended`.
- *reports*, one from each worker: :class:`Serving`, once; :class:`Log`, :class:`Interrupted`, :class:`Reconfigured`,
  :class:`Broken`. Over the same pair the worker has heard its :class:`Assignment` before that.
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any, TypeAlias, get_args

from lguest_mp.cpu.engine import EntryState
from lguest_mp.record import Value
from lguest_mp.virtio.device import QueueLayout

#: The longest message, in bytes. A device has few queues, so this is generous.
MAX_MESSAGE = 16384
#: Features, and a QueueLayout. It is not JSON since that would cost each worker memory, and it comes from us.
_ASSIGNMENT = struct.Struct("=5Q")


class Ready(Value):
    """The machine process has made its machine and waits for :class:`Start`."""


class Start(Value):
    """The supervisor's word to execute the guest's first instruction, with these registers."""

    entry: EntryState


class DriverReady(Value):
    """The guest's driver set DRIVER_OK: serve these queues (None: a queue the driver did not enable)."""

    device: int
    features: int
    queues: tuple[QueueLayout | None, ...]


class QueueReady(Value):
    """The driver enabled one queue again after it had reset it (virtio 1.2, 2.6.1)."""

    device: int
    queue: int
    features: int
    layout: QueueLayout


class QueueReset(Value):
    """The driver resets one queue: its worker is gone when the answer comes."""

    device: int
    queue: int


class DeviceReset(Value):
    """The driver resets the device: its workers are gone when the answer comes."""

    device: int


class PowerOff(Value):
    """The guest switched itself off."""


class Reboot(Value):
    """The guest wants to start afresh."""


class Interrupted(Value):
    """The person at the terminal typed ^C three times within a second."""


class Died(Value):
    """The guest cannot go on; ``reason`` is one line for a person."""

    reason: str


class Failed(Value):
    """The machine process cannot run any guest here; ``reason`` is one line for a person."""

    reason: str


class Log(Value):
    """Something the user may want to know, one line; ``verbose`` lines are shown with --verbose only."""

    text: str
    verbose: bool = True


class Done(Value):
    """The supervisor's answer to a request."""


class ConfigChanged(Value):
    """A device's configuration space changed: ``data`` (hexadecimal) is now at ``offset``."""

    device: int
    offset: int
    data: str


class DeviceBroken(Value):
    """A device was stopped, because its driver broke the standard or its workers crashed: it needs a reset.

    (Virtio 1.2, 2.1.2.)
    """

    device: int


class DeviceMended(Value):
    """A device that was said to be broken is served again, from where it stopped, without a reset."""

    device: int


class Assignment(Value):
    """What a worker hears, once (:func:`assign`): what the driver has decided for its queue."""

    features: int
    layout: QueueLayout


class Serving(Value):
    """A worker has its queue and serves it."""


class Reconfigured(Value):
    """A worker changes its device's configuration space: ``data`` (hexadecimal) is now at ``offset``."""

    offset: int
    data: str


class Broken(Value):
    """A worker stops because the driver broke the standard; ``text`` says how."""

    text: str


Message: TypeAlias = (
    Ready
    | Start
    | DriverReady
    | QueueReady
    | QueueReset
    | DeviceReset
    | PowerOff
    | Reboot
    | Interrupted
    | Died
    | Failed
    | Log
    | Done
    | ConfigChanged
    | DeviceBroken
    | DeviceMended
    | Serving
    | Reconfigured
    | Broken
)

_TYPES: dict[str, type[Message]] = {kind.__name__: kind for kind in get_args(Message)}

#: Values inside messages; all of their fields are unsigned integers of at most 64 bits.
_RECORDS: dict[str, type[QueueLayout] | type[EntryState]] = {"QueueLayout": QueueLayout, "EntryState": EntryState}


class ProtocolError(Exception):
    """The other side sent what is no message, or a message that it may not send now."""


def encode(message: Message) -> bytes:
    """The message as bytes for one datagram."""
    return json.dumps([type(message).__name__, vars(message)], default=vars, separators=(",", ":")).encode()


def decode(datagram: bytes) -> Message:
    """The message in a datagram, every field checked, or ProtocolError."""
    try:
        name, values = json.loads(datagram)
        kind = _TYPES[name]
        return kind(**_checked_fields(kind, values))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProtocolError(f"no message: {datagram[:80]!r}") from error


def _checked_fields(kind: type[Any], values: Any) -> dict[str, Any]:
    annotations: dict[str, str] = kind.__annotations__
    if type(values) is not dict or set(values) != set(annotations):
        raise ProtocolError(f"{kind.__name__} with other fields than its own")
    return {name: _checked(annotation, values[name]) for name, annotation in annotations.items()}


def _checked(annotation: str, value: Any) -> Any:
    match annotation:
        case "int" if type(value) is int and 0 <= value < 1 << 64:
            return value
        case "str" if type(value) is str:
            return value
        case "bool" if type(value) is bool:
            return value
        case "QueueLayout" | "EntryState":
            record = _RECORDS[annotation]
            return record(**_checked_fields(record, value))
        case "tuple[QueueLayout | None, ...]" if type(value) is list:
            return tuple(None if entry is None else _checked("QueueLayout", entry) for entry in value)
    raise ProtocolError(f"{value!r:.80} is no {annotation}")


def channel_pair() -> tuple[socket.socket, socket.socket]:
    """A new socket pair for messages; not inherited across exec."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(channel: socket.socket, message: Message, flags: int = 0) -> None:
    """One message to the other side, with the system call's flags. OSError when it is gone."""
    channel.send(encode(message), flags)


def assign(channel: socket.socket, assignment: Assignment) -> None:
    """Tells a worker what to serve. OSError when it is gone."""
    layout = assignment.layout
    numbers = layout.size, layout.descriptor_table, layout.available_ring, layout.used_ring
    channel.send(_ASSIGNMENT.pack(assignment.features, *numbers), socket.MSG_DONTWAIT)


def assigned(channel: socket.socket) -> Assignment | None:
    """What this worker is to serve, when it is told; None when the other side is gone."""
    datagram = channel.recv(_ASSIGNMENT.size)
    if not datagram:
        return None
    features, *numbers = _ASSIGNMENT.unpack(datagram)
    return Assignment(features, QueueLayout(*numbers))


def receive(channel: socket.socket, flags: int = 0) -> Message | None:
    """The next message, or None when the other side is gone; with the flags of recv(2)."""
    try:
        datagram = channel.recv(MAX_MESSAGE, flags)
    except ConnectionResetError:
        return None
    return decode(datagram) if datagram else None
