"""What is usual of a device's requests, said in data: so that a core can serve it by itself (``Queue.waiter``).

A device describes here, once, what a compiled core may do in its place. It is a part of what the device's own code
does, with the same result; everything else comes back to that code. The core in Python leaves all of it to the devices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lguest_mp.record import Value

if TYPE_CHECKING:
    from lguest_mp.screen import ScreenWriter


class DiskRequests(Value):
    """Reads and writes of a disk of ``size`` bytes (``virtio/block.py``), which succeed.

    The header and the status have a descriptor each. ``write_flags`` are pwritev2(2)'s.
    """

    file: int
    size: int
    read_only: bool
    write_flags: int


class Frames(Value):
    """Frames of ``header_size`` to ``longest`` bytes (``virtio/net.py``).

    Each is one writev(2) to, or one readv(2) from, the ``file``.
    """

    file: int
    header_size: int
    longest: int


class RandomBuffers(Value):
    """Buffers to be filled with random bytes, in pieces of at most ``longest`` bytes (``virtio/rng.py``)."""

    longest: int


class Output(Value):
    """Bytes to be put on the ``screen``, if there is one, and then written to the ``file`` (``virtio/console.py``).

    The queue is flushed after each buffer. ``lost`` is told the error number for which the rest of one was dropped.
    """

    file: int
    screen: ScreenWriter | None
    lost: Callable[[int], None]


#: What Queue.waiter takes.
Usual = DiskRequests | Frames | RandomBuffers | Output
