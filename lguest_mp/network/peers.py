"""The other guests on a link, as the transmitq's worker of one knows them, and how its frames get to them."""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lguest_mp.network.introductions import Source

#: How long (seconds) senders wait for a guest whose queue is full, and how much of that each second earns it. By the
#: frame it would be at a guest's choice how long others wait.
PATIENCE = 0.02
EARNED = 0.02
#: How long (seconds) after a look for those who have come there is no other, unless somebody has gone.
INTERVAL = 0.05

#: Errors of a write that are the frame's or the host's doing and not the receiver's.
_OWN_ERRORS = frozenset({errno.EMSGSIZE, errno.ENOBUFS, errno.ENOMEM, errno.EINVAL, errno.EFAULT})


class Peers:
    """All that are known to the guest with the MAC address ``own``, from ``source``.

    There is a connected socket for each, since the kernel counts what is under way by sender's socket: what one does
    not read takes no room from the others.

    Frames to a known address need no more than that. Whether guests have come is looked up only when a frame is for all
    or for nobody known, every :data:`INTERVAL` at most. That guests have gone shows when sending to them, and by
    nothing else: a runtime directory may be removed under guests that go on (with its user's last login).
    """

    def __init__(self, source: Source, own: bytes) -> None:
        self._source = source
        self._own = own
        self._known: dict[bytes, Peer] = {}
        #: When there may be another look (time.monotonic).
        self._next_look = 0.0

    def send(self, destination: bytes, frame: Sequence[memoryview]) -> None:
        """Sends ``frame`` to whom it is for. OSError: it could not be, or not all of them could be found."""
        peer = self._known.get(destination)
        if peer is not None:
            if not self._offer(peer, frame):
                self._wait_for([peer], frame)
        elif destination != self._own:
            shortage = None
            try:
                self._look()
            except OSError as error:
                shortage = error
            known = self._known.get(destination)
            peers = [known] if known is not None else list(self._known.values())
            full = [each for each in peers if not self._offer(each, frame)]
            if full:
                self._wait_for(full, frame)
            if shortage is not None and known is None:
                raise shortage

    def close(self) -> None:
        """Forgets them."""
        for peer in list(self._known.values()):
            self._forget(peer)

    def _offer(self, peer: Peer, frame: Sequence[memoryview]) -> bool:
        """Whether no more can be done for this frame and ``peer``; False: its queue is full."""
        try:
            os.writev(peer.fd, frame)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in _OWN_ERRORS:
                raise
            # It has gone. Or it has gone and come again, and no look has told: it was known each time.
            self._forget(peer)
            with suppress(OSError):
                self._look()
                if (successor := self._known.get(peer.mac)) is not None:
                    os.writev(successor.fd, frame)
            return True
        peer.is_stuck = False
        return True

    def _wait_for(self, full: list[Peer], frame: Sequence[memoryview]) -> None:
        """Offers ``frame`` to peers whose queues are full, as these get room. Who is stuck is not waited for."""
        begin = now = time.monotonic()
        waiting = {peer.fd: peer for peer in full if not peer.is_stuck and peer.patience_at(begin) > 0}
        poll = select.poll()
        for fd in waiting:
            poll.register(fd, select.POLLOUT)
        deadline = begin + max((peer.patience for peer in waiting.values()), default=0)
        while waiting and now < deadline:
            ready = poll.poll((deadline - now) * 1000)
            now = time.monotonic()
            for fd, _ in ready:
                peer = waiting[fd]
                if self._offer(peer, frame):
                    peer.patience -= now - begin
                    poll.unregister(fd)
                    del waiting[fd]
        for peer in waiting.values():
            peer.patience -= now - begin
            peer.is_stuck = True

    def _look(self) -> None:
        """Gets to know who has come. OSError: not all, since the host is out of files."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + INTERVAL
        found = self._source.newcomers(self._known.keys())
        for mac, fd in found.lines.items():
            self._known[mac] = Peer(mac, fd)
        if found.more:
            self._next_look = 0.0
        if found.error:
            raise OSError(found.error, os.strerror(found.error))

    def _forget(self, peer: Peer) -> None:
        self._next_look = 0.0
        del self._known[peer.mac]
        os.close(peer.fd)


class Peer:
    """Another guest: its MAC address, and a socket (file descriptor) that is connected to its."""

    __slots__ = ("_since", "fd", "is_stuck", "mac", "patience")

    def __init__(self, mac: bytes, fd: int) -> None:
        self.mac = mac
        self.fd = fd
        #: Whether it was waited for in vain, and has taken nothing since.
        self.is_stuck = False
        #: How long (seconds) it is waited for while its queue is full, as of then (time.monotonic).
        self.patience = PATIENCE
        self._since = time.monotonic()

    def patience_at(self, now: float) -> float:
        """``patience``, with what was earned until ``now``."""
        self.patience = min(PATIENCE, self.patience + (now - self._since) * EARNED)
        self._since = now
        return self.patience
