"""What the machine process and the supervisor say to each other: small typed messages on a socket pair.

The machine runs the guest, so whatever comes from it may be a guest's doing: messages are JSON (never pickles), and
decoding checks every field before anybody acts on it. Two ``SOCK_SEQPACKET`` pairs carry them:

- *requests*: the machine asks, and waits for the one answer (:class:`Done`) before the guest runs on, as the original
  lguest waited: when a device's status reads back as reset, its workers are gone;
- *events*: the supervisor tells the machine what happened outside (:class:`ConfigChanged`, :class:`DeviceBroken`).
"""

from __future__ import annotations

import json
import socket
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from lguest_mp.virtio.device import QueueLayout

#: The longest message, in bytes. A device has few queues, so this is generous.
MAX_MESSAGE = 16384


@dataclass(frozen=True)
class DriverReady:
    """The guest's driver set DRIVER_OK: serve these queues (None: a queue the driver did not enable)."""

    device: int
    features: int
    queues: tuple[QueueLayout | None, ...]


@dataclass(frozen=True)
class QueueReady:
    """The driver enabled one queue again after it had reset it (virtio 1.2, 2.6.1)."""

    device: int
    queue: int
    features: int
    layout: QueueLayout


@dataclass(frozen=True)
class QueueReset:
    """The driver resets one queue: its worker is gone when the answer comes."""

    device: int
    queue: int


@dataclass(frozen=True)
class DeviceReset:
    """The driver resets the device: its workers are gone when the answer comes."""

    device: int


@dataclass(frozen=True)
class PowerOff:
    """The guest switched itself off."""


@dataclass(frozen=True)
class Reboot:
    """The guest wants to start afresh."""


@dataclass(frozen=True)
class Interrupted:
    """The person at the terminal typed ^C three times within a second, before the virtio console was ready."""


@dataclass(frozen=True)
class Died:
    """The guest cannot go on; ``reason`` is one line for a person."""

    reason: str


@dataclass(frozen=True)
class Log:
    """Something the user may want to know, one line; ``verbose`` lines are shown with --verbose only."""

    text: str
    verbose: bool = True


@dataclass(frozen=True)
class Done:
    """The supervisor's answer to a request."""


@dataclass(frozen=True)
class ConfigChanged:
    """A device's configuration space changed: ``data`` (hexadecimal) is now at ``offset``."""

    device: int
    offset: int
    data: str


@dataclass(frozen=True)
class DeviceBroken:
    """A device was stopped because its driver broke the standard: it needs a reset (virtio 1.2, 2.1.2)."""

    device: int


Message: TypeAlias = (
    DriverReady
    | QueueReady
    | QueueReset
    | DeviceReset
    | PowerOff
    | Reboot
    | Interrupted
    | Died
    | Log
    | Done
    | ConfigChanged
    | DeviceBroken
)

_TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        DriverReady,
        QueueReady,
        QueueReset,
        DeviceReset,
        PowerOff,
        Reboot,
        Interrupted,
        Died,
        Log,
        Done,
        ConfigChanged,
        DeviceBroken,
    )
}


class ProtocolError(Exception):
    """The other side sent what is no message."""


def encode(message: Message) -> bytes:
    """The message as bytes for one datagram."""
    return json.dumps([type(message).__name__, asdict(message)], separators=(",", ":")).encode()


def decode(datagram: bytes) -> Message:
    """The message in a datagram, every field checked, or ProtocolError."""
    try:
        name, fields = json.loads(datagram)
        kind = _TYPES[name]
        if set(fields) != set(kind.__dataclass_fields__):
            raise ProtocolError(f"{name} with other fields than its own")
        values = {key: _checked(kind.__dataclass_fields__[key].type, value) for key, value in fields.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProtocolError(f"not a message: {datagram[:80]!r}") from error
    message: Message = kind(**values)
    return message


def _checked(annotation: Any, value: Any) -> Any:
    match annotation:
        case "int" if type(value) is int and 0 <= value < 1 << 64:
            return value
        case "str" if type(value) is str:
            return value
        case "bool" if type(value) is bool:
            return value
        case "QueueLayout":
            return _layout(value)
        case "tuple[QueueLayout | None, ...]" if type(value) is list:
            return tuple(None if entry is None else _layout(entry) for entry in value)
    raise ProtocolError(f"{value!r} is no {annotation}")


def _layout(fields: Any) -> QueueLayout:
    if type(fields) is not dict or set(fields) != set(QueueLayout.__dataclass_fields__):
        raise ProtocolError(f"{fields!r} is no queue layout")
    return QueueLayout(**{key: _checked("int", value) for key, value in fields.items()})


def send(channel: socket.socket, message: Message) -> None:
    """Sends one message."""
    channel.send(encode(message))


def receive(channel: socket.socket) -> Message | None:
    """The next message, or None when the other side is gone."""
    datagram = channel.recv(MAX_MESSAGE)
    return decode(datagram) if datagram else None
