"""What a network device is plugged into: the host's end of its cable.

A :class:`Wire` is opened by the supervisor before anything is forked, and the workers of the device inherit it. The
receiveq's worker reads frames from it and the transmitq's worker writes frames to it, each a system call for a frame,
from or to the guest's memory. Neither knows of the other, and neither has anything of the host's but its files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from lguest_mp.jail.calls import plain
from lguest_mp.jail.needs import Needs

if TYPE_CHECKING:
    from lguest_mp.supervisor.children import Child
    from lguest_mp.supervisor.loop import Loop

T = TypeVar("T")

#: The longest frame on any wire, in bytes, header included: 64 KiB of IP packet that is cut up later, on Ethernet with
#: a VLAN tag or two, and the virtio header.
LONGEST_FRAME = 65536 + 14 + 8 + 12


class WireGone(Exception):
    """Nothing will ever come from this wire again, nor go there; its text says why."""


class Wire(ABC):
    """One cable. ``read`` and ``write`` are called in workers, everything else in the supervisor."""

    #: Whether each frame on the wire has a virtio_net_hdr in front (virtio 1.2, 5.1.6), with what it says of checksums
    #: and segmentation. Without: the frame alone, complete, and no longer than the MTU.
    has_header: bool
    #: Whether that header comes from somebody who may lie (another guest) and has to be checked.
    is_suspect: bool = False
    #: Where a frame is one readv(2) or one writev(2), and nothing more has to be done for one that succeeds; None: ask
    #: ``read`` and ``write``.
    file: int | None = None
    #: Whether frames are lost at once, until one can be written (see ``write``).
    is_stuck: bool = False

    def connect(self) -> None:  # noqa: B027 -- most wires are ready at once
        """Finishes what the constructor began and somebody else had to do; before anything is forked. LguestError."""

    @property
    @abstractmethod
    def description(self) -> str:
        """For a person: ``tap tap0, 192.168.19.1``."""

    @property
    @abstractmethod
    def files(self) -> tuple[int, ...]:
        """The file descriptors that the receiveq's worker needs."""

    @property
    def files_of_writer(self) -> tuple[int, ...]:
        """Those that the transmitq's worker needs: for most wires, the same."""
        return self.files

    def attend(self, loop: Loop) -> None:  # noqa: B027 -- most wires' workers need nobody
        """In the supervisor: serves the workers that are forked from now on, when ``loop`` comes to it. OSError."""

    def needs_of_reader(self) -> Needs:
        """What the receiveq's worker needs besides (jail/): for most wires, to read its files."""
        return Needs(plain("readv"))

    def needs_of_writer(self) -> Needs:
        """What the transmitq's worker needs besides: for most wires, to write to its files."""
        return Needs(plain("writev"))

    @property
    def helper(self) -> Child | None:
        """The process that makes this network, where there is one; the supervisor watches it."""
        return None

    def helper_ended(self) -> None:  # noqa: B027 -- most wires have none
        """In the supervisor, which has reaped the helper."""

    def attach(self, features: int, header_size: int) -> None:  # noqa: B027 -- most wires need not know
        """In a worker, before it serves: the guest's driver accepted ``features``.

        ``header_size``: how long the virtio_net_hdr of a frame is, 12 bytes or (a legacy driver's) 10.
        """

    @abstractmethod
    def read(self, views: Sequence[memoryview]) -> int:
        """The next frame, put into ``views``: its length. What does not fit is lost.

        BlockingIOError when there is none now; WireGone; any other OSError says that this frame was lost.
        """

    def read_by(self, receive: Callable[[], T]) -> T:
        """Has ``receive`` read the ``file``: what it returns. The errors of that are those of :meth:`read`."""
        return receive()

    @abstractmethod
    def wait(self, status: Callable[[bool], None]) -> None:
        """Sleeps until there may be a frame. ``status`` is told when the link goes down (False) or comes up."""

    @abstractmethod
    def is_up(self) -> bool:
        """In the receiveq's worker: whether the link is up now."""

    @abstractmethod
    def write(self, views: Sequence[memoryview]) -> None:
        """Puts one frame on the wire. OSError says why it was lost; WireGone.

        It may wait for room: for a moment (the wire's WRITE_PATIENCE, at most a second) and once. When that was in vain
        it loses frames immediately until one can be written.
        """

    @abstractmethod
    def close(self) -> None:
        """In the supervisor: unplugs it."""
