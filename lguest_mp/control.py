"""What ``lguestctl`` and a guest's supervisor say to each other: small typed messages on a socket of the guest's owner.

It is a ``SOCK_SEQPACKET`` socket, so a message is a datagram. Messages are JSON, and each side checks every field of
what it gets: the supervisor since it has to outlive whatever connects to it, lguestctl since the supervisor may have
been started by another version, and tells what its guest made up.

The supervisor speaks first: :class:`Welcome`. Then lguestctl asks, one thing at a time, and gets the messages that are
the answer, the last of which is :class:`Done` or :class:`Refused`:

========================  ===================================================================================
:class:`Describe`         one :class:`GuestFacts`, and :class:`ProcessFacts` for each process
:class:`ReadLog`          a :class:`LogLine` each; with ``follow`` it never ends
:class:`ListJail`         a :class:`ProcessJail` each
:class:`Attach`           one :class:`Attached`, which brings three file descriptors (SCM_RIGHTS)
:class:`Resize`           nothing; the size of the terminal of whoever is attached
:class:`Restart`,
:class:`Reset`            nothing; it is begun when the answer comes
:class:`Stop`,
:class:`Reboot`           nothing; it begins after the answer
========================  ===================================================================================

:class:`Goodbye` may come at any moment, and is the last word: the guest ends, or reboots, and who connects anew finds
it in its next life. A connection that ends without it was cut off: by the launcher's death, or as it read too slowly.
"""

from __future__ import annotations

import json
import math
from typing import Any, TypeAlias, get_args

from lguest_mp.record import Value

#: Both sides have to speak the same.
PROTOCOL = 1
#: The longest messages, in bytes: what lguestctl says, and what the supervisor says.
MAX_REQUEST = 1024
MAX_ANSWER = 131072
#: The longest text in an answer, in characters, each of which may take 12 bytes; what is longer is cut.
MAX_TEXT = 1000


# ---- What lguestctl says ----


class Describe(Value):
    """Asks what the guest is, and who serves what."""


class ReadLog(Value):
    """Asks for what the launcher said: the ``last`` lines of ``source`` (a process's name, None: all)."""

    source: str | None
    last: int
    follow: bool


class ListJail(Value):
    """Asks what the guest's processes may not do."""


class Attach(Value):
    """Asks to see the console, and to type; the terminal there has this size (0: there is none)."""

    columns: int
    rows: int


class Resize(Value):
    """Says that the terminal of whoever is attached has another size now."""

    columns: int
    rows: int


class Stop(Value):
    """Asks for the guest's end, in order."""


class Reboot(Value):
    """Asks for the guest to start afresh, whatever it does."""


class Restart(Value):
    """Asks for others in place of the workers of a device (``block0``) or of one of its queues (``net0/receiveq``)."""

    device: str


class Reset(Value):
    """Asks for a device to fail, so that its driver resets it."""

    device: str


Request: TypeAlias = Describe | ReadLog | ListJail | Attach | Resize | Stop | Reboot | Restart | Reset


# ---- What the supervisor says ----


class Welcome(Value):
    """Somebody is connected. ``protocol`` is :data:`PROTOCOL`."""

    protocol: int


class GuestFacts(Value):
    """A guest.

    ``pid`` is its supervisor's; ``life`` is ``starting`` or ``running``; ``started`` (seconds since 1970) is when
    this life of it began, after so many ``reboots``; ``memory`` is in bytes; ``machine``, ``cpu`` and ``kernel`` are as
    on the launcher's command line, the machine never left out.
    """

    name: str
    pid: int
    life: str
    started: float
    reboots: int
    machine: str
    cpu: str
    memory: int
    kernel: str


class ProcessFacts(Value):
    """A process of the guest, or a queue that has none now (``pid`` None).

    ``name`` is as in ``ps``: ``block0/requestq``, ``cpu``; the supervisor's is ``supervisor``. ``device`` and ``queue``
    are None where it serves none. ``life`` is the supervisor's word for where it is in its life.

    Of a queue, whoever served it: ``requests`` and the ``bytes`` in them since the guest began, and how long ago
    (seconds) the last one was completed. ``restarts`` is how often the process was replaced, ``last_end`` how its last
    predecessor ended, ``policy`` what happens when it does.
    """

    name: str
    device: str | None
    queue: str | None
    pid: int | None
    life: str
    requests: int | None = None
    bytes: int | None = None
    age: float | None = None
    restarts: int = 0
    last_end: str | None = None
    policy: str | None = None


class LogLine(Value):
    """What the launcher said.

    ``time`` is in seconds since 1970, ``level`` as of syslog(3), ``source`` a process's name, or empty for the
    supervisor itself.
    """

    time: float
    level: int
    source: str
    text: str


class ProcessJail(Value):
    """How one process was to be jailed when it was forked: its ``plan``, as ``jail/report.py`` goes by it."""

    process: str
    pid: int
    plan: dict[str, Any]


class Attached(Value):
    """Somebody is attached. With this come, in this order, ``screen``, ``news`` and ``keys`` (``screen.py``)."""


class Done(Value):
    """The answer is complete."""


class Refused(Value):
    """What was asked for cannot be done, and ``reason`` is why; one line for a person."""

    reason: str


class Goodbye(Value):
    """The guest ends, or this life of it; ``reason``: why, in words that go after "it has ended:"."""

    reboots: bool
    reason: str | None = None


Answer: TypeAlias = Welcome | GuestFacts | ProcessFacts | LogLine | ProcessJail | Attached | Done | Refused | Goodbye

#: How many file descriptors come with :class:`Attached`.
ATTACHED_FILES = 3


class ControlError(Exception):
    """The other side sent what is no message."""


def encode(message: Request | Answer) -> bytes:
    """The message as bytes for one datagram; texts that are too long are cut."""
    values = {name: value[:MAX_TEXT] if type(value) is str else value for name, value in vars(message).items()}
    return json.dumps([type(message).__name__, values], separators=(",", ":")).encode()


def decode_request(datagram: bytes) -> Request:
    """What lguestctl says, every field checked, or ControlError."""
    request: Request = _decode(datagram, MAX_REQUEST, get_args(Request))
    return request


def decode_answer(datagram: bytes) -> Answer:
    """What the supervisor says, every field checked, or ControlError."""
    answer: Answer = _decode(datagram, MAX_ANSWER, get_args(Answer))
    return answer


def _decode(datagram: bytes, limit: int, kinds: tuple[type[Any], ...]) -> Any:
    if len(datagram) > limit:
        raise ControlError(f"a message of more than {limit} bytes")
    try:
        name, values = json.loads(datagram)
        kind = next(kind for kind in kinds if kind.__name__ == name)
        annotations: dict[str, str] = kind.__annotations__
        if type(values) is not dict or set(values) != set(annotations):
            raise ControlError(f"{name} with other fields than its own")
        return kind(**{field: _checked(annotation, values[field]) for field, annotation in annotations.items()})
    except (ValueError, TypeError, StopIteration, OverflowError, RecursionError) as error:
        raise ControlError(f"no message: {datagram[:80]!r}") from error


def _checked(annotation: str, value: Any) -> Any:
    plain = annotation.removesuffix(" | None")
    if value is None and plain != annotation:
        return None
    match plain:
        case "int" if type(value) is int and 0 <= value < 1 << 64:
            return value
        case "float" if type(value) in {int, float} and math.isfinite(value):
            return float(value)
        case "bool" if type(value) is bool:
            return value
        case "str" if type(value) is str:
            return value
        case "dict[str, Any]" if type(value) is dict:
            return value
    raise ControlError(f"{value!r:.80} is no {annotation}")
