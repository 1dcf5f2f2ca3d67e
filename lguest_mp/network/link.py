"""A wire between guests of one user: each is a Unix datagram socket in a directory, and there is nothing else.

A link is a directory below the user's runtime directory (``runtime.py``). Each guest that is on it has a socket there
whose name is its MAC address, and sends each frame, in one datagram with the virtio_net_hdr in front, to the socket
that has the destination's name. What is for all, or for an address that is no name here (a guest may use others than
the one it was given, or be a bridge), goes to every other guest. So there is no switch to start, to lose or to wait
for, and nothing to learn: guests come and go in any order.

Each of these is met in practice:

- *A guest that was killed* leaves its name. Nobody can connect to it any more; the next one to join or to leave takes
  it away. Who joins with the same address replaces it.
- *A guest whose last life is still ending* when its next one joins: its socket still answers, as one does that another
  guest with the same address has. Only after :data:`TAKEOVER` it is taken for that, and refused.
- *A name that cannot be connected to yet*: none is seen, since a socket gets its final name only when it is bound.
- *A guest that does not read* (it is stopped, it has no driver now, it is slow): the kernel keeps a few datagrams for
  it (net.unix.max_dgram_qlen, 10 or 512 usually). Then whoever sends to it waits, which slows a fast sender down
  without a loss, but not longer than :data:`PATIENCE`, and no more than :data:`EARNED` of the time. Who was waited for
  in vain is *stuck*: until it takes a frame, what does not go into its queue at once is lost. So one that reads nothing
  costs a sender 20 ms once, and a slow one, even on purpose, 2 % of its time. The others get theirs before anybody is
  waited for. The price is that a sender that is faster than its receiver loses frames: of TCP between two guests on a
  busy host 0.6 % had to be sent again, instead of 0.1 % with patience for every frame.
- *A guest that had no driver* (it booted, it reset its device) gets what waited for it meanwhile, a queue at most. That
  harms nobody: each header is checked against what the driver accepts that gets it. To throw it away when a worker
  begins would lose frames of a driver that is there, after a crash or a reset of one queue.
- *A path longer than a socket's address may be* (107 bytes): every name is used relative to its directory.

**Who may do what.** The directory is its user's alone. A guest can send what it likes to the others (their devices do
not trust it), with any address as its own and as fast as they read, as on any wire. A guest that has broken into a
worker of this device holds the directory, as its user: it can take away the others' names or bind their addresses, and
so cut the link or listen to it. And the directory is a way out of a root directory that was given with ``--chroot``
(``..``), to whatever the worker's user may reach.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import select
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from lguest_mp import runtime
from lguest_mp.errors import LguestError
from lguest_mp.jail.calls import Call, Check, ioctls, plain
from lguest_mp.jail.needs import Needs
from lguest_mp.network import header
from lguest_mp.network.wire import LONGEST_FRAME, Wire

if TYPE_CHECKING:
    from pathlib import Path

    from lguest_mp.jail import User

#: How long (seconds) senders wait for a guest whose queue is full, and how much of that each second earns it. By the
#: frame it would be at a guest's choice how long others wait.
PATIENCE = 0.02
EARNED = 0.02
#: How long (seconds) a guest has to go away before the next one with its MAC address is refused.
TAKEOVER = 1.0
#: How long (seconds) to wait for others who are joining or leaving; each takes a millisecond.
LOCKED = 5.0
#: A directory's time of change may stay the same for so long (seconds) while the directory changes: the kernel reads
#: the clock for it once in a timer's tick, which is 10 ms at most.
SETTLING = 0.05

#: Room in a socket for what it has sent and nobody has read: more than one of the longest frames, so that the reader
#: has one while the sender makes the next. The kernel grants net.core.wmem_max at most.
_SEND_BUFFER = 4 * LONGEST_FRAME
#: Destination, source, type.
_ETHERNET_HEADER = 14
_DESTINATION = slice(header.LENGTH, header.LENGTH + 6)
#: How opendir(3) opens, what stat(2) of a file descriptor is to some C libraries, how Python makes a socket and
#: switches it to non-blocking (include/uapi/linux/fcntl.h, include/uapi/asm-generic/ioctls.h).
_LISTING = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_DIRECTORY
_AT_EMPTY_PATH = 0x1000
_DATAGRAMS = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
_FIONBIO = 0x5421
_SHORTEST_FRAME = header.LENGTH + _ETHERNET_HEADER
#: How often (seconds) it is tried again to join or to lock.
_RETRY = 0.01
#: Errors of a write that are the frame's or the host's doing and not the receiver's.
_OWN_ERRORS = frozenset({errno.EMSGSIZE, errno.ENOBUFS, errno.ENOMEM, errno.EINVAL, errno.EFAULT})

#: What the transmitq's worker does besides writing. A directory is all that it may open, and with Landlock the link's.
_SENDING = (
    *plain("writev", "fchdir", "getdents64"),
    Call("openat", (Check(2, _LISTING, "a directory to list"),)),
    Call("newfstatat", (Check(3, _AT_EMPTY_PATH, "AT_EMPTY_PATH"),)),
    Call("socket", (Check(0, socket.AF_UNIX, "AF_UNIX"), Check(1, _DATAGRAMS, "SOCK_DGRAM"))),
    *plain("connect"),
    *ioctls((_FIONBIO, "FIONBIO")),
    Call("setsockopt", (Check(1, socket.SOL_SOCKET, "SOL_SOCKET"), Check(2, socket.SO_SNDBUF, "SO_SNDBUF"))),
)
#: More guests than anybody has on one link.
_MOST_SOCKETS = 1024

_MAC_NAME = re.compile("[0-9a-f][02468ace](:[0-9a-f]{2}){5}", re.ASCII)
_DIRECTORY = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Link(Wire):
    """Plugs the guest with ``mac`` (6 bytes, unicast) into the link ``name`` of ``user`` (None: of this process's own).

    LguestError if that cannot be, or another guest on the link has this MAC.
    """

    has_header = True
    is_suspect = True

    def __init__(self, name: str, mac: bytes, user: User | None = None) -> None:
        self._name = name
        self._place = _Place(name, mac, user)
        self._others = _Others(self._place.directory, mac)
        self._fd = self._place.socket.fileno()
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)
        #: How much shorter the driver's header is than that on the link.
        self._missing = 0

    @property
    def description(self) -> str:
        """``link lab``."""
        return f"link {self._name}"

    @property
    def files(self) -> tuple[int, ...]:
        """The guest's own socket, and the directory with the others'."""
        return (self._fd, self._place.directory)

    def needs_of_writer(self) -> Needs:
        """Finding the other guests' sockets in the link's directory, and one connected to each of them."""
        return Needs(_SENDING, directories=(self._place.directory,), more_files=_MOST_SOCKETS)

    def attach(self, features: int, header_size: int) -> None:
        """Headers on the link have 12 bytes. For a driver whose headers are shorter, the end is cut off and made up."""
        self._missing = header.LENGTH - header_size

    def read(self, views: Sequence[memoryview]) -> int:
        """The next frame. After a datagram that is none BlockingIOError, so that a flood of them cannot hold it up."""
        if not self._missing:
            return self._receive(views)
        return self._receive(_lengthened(views, bytearray(self._missing))) - self._missing

    def _receive(self, views: Sequence[memoryview]) -> int:
        length = os.readv(self._fd, views)
        if not _SHORTEST_FRAME <= length <= LONGEST_FRAME:
            raise BlockingIOError(errno.EAGAIN, "no frame but something else")
        return length

    def wait(self, status: Callable[[bool], None]) -> None:
        """Sleeps until there is something to read."""
        self._poll.poll()

    def is_up(self) -> bool:
        """It is, even when there is nobody else."""
        return True

    def write(self, views: Sequence[memoryview]) -> None:
        """Sends a frame to whom it is for. OSError: it is none, or the host cannot. Nobody says whether it arrived."""
        frame = _lengthened(views, bytes(self._missing)) if self._missing else views
        self._others.send(_destination(frame), frame)

    def close(self) -> None:
        """Leaves the link."""
        self._others.close()
        self._place.leave()


def _lengthened(views: Iterable[memoryview], end: bytes | bytearray) -> list[memoryview]:
    """``views`` of a frame with a short header, and ``end`` where that ends."""
    before: list[memoryview] = []
    after: list[memoryview] = []
    left = header.LENGTH - len(end)
    for view in views:
        before.append(view[:left])
        after.append(view[left:])
        left -= len(before[-1])
    return [view for view in (*before, memoryview(end), *after) if view]


def _destination(views: Iterable[memoryview]) -> bytes:
    """The MAC address that the frame in ``views`` is for; OSError if it ends before."""
    beginning = b""
    for view in views:
        beginning += view[: _DESTINATION.stop - len(beginning)]
        if len(beginning) == _DESTINATION.stop:
            return beginning[_DESTINATION]
    raise OSError(errno.EINVAL, "shorter than an Ethernet header")


def _name_of(mac: bytes) -> str:
    return mac.hex(":")


def _mac_of(name: str) -> bytes | None:
    """The MAC address that a name stands for; None if it is none, or a group's, which nobody can have."""
    return bytes.fromhex(name.replace(":", "")) if _MAC_NAME.fullmatch(name) else None


class _Others:
    """The other guests on the link, as the transmit worker knows them.

    It has a connected socket for each, since the kernel counts what is under way by sender's socket: what one does not
    read takes no room from the others.

    Frames to a known address need no more than that. Whether guests have come is looked up only when a frame is for all
    or for nobody known, and seen by the directory's time of change. That guests have gone shows when sending to them,
    and by nothing else: a runtime directory may be removed under guests that go on (with its user's last login).
    """

    def __init__(self, directory: int, mac: bytes) -> None:
        """``directory``: its file descriptor, the link's; ``mac``: who we are."""
        self._directory = directory
        self._mac = mac
        self._known: dict[bytes, _Peer] = {}
        #: The directory's time of change as of the last look, and when it was first seen (time.monotonic).
        self._changed = -1
        self._first_seen = 0.0
        #: Whether no change can have happened since the last look without another time of change.
        self._is_settled = False

    def send(self, destination: bytes, frame: Sequence[memoryview]) -> None:
        """Sends ``frame`` to whom it is for. OSError: it could not be, or not all of them could be found."""
        peer = self._known.get(destination)
        if peer is not None:
            if not self._offer(peer, frame):
                self._wait_for([peer], frame)
        elif destination != self._mac:
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

    def _offer(self, peer: _Peer, frame: Sequence[memoryview]) -> bool:
        """Whether no more can be done for this frame and ``peer``; False: its queue is full."""
        try:
            os.writev(peer.fd, frame)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in _OWN_ERRORS:
                raise
            # It has gone. Or it has gone and come again, and no look has told: its name was there each time.
            self._forget(peer)
            with suppress(OSError):
                successor = self._connect(peer.mac)
                if successor is not None:
                    os.writev(successor.fd, frame)
            return True
        peer.is_stuck = False
        return True

    def _wait_for(self, full: list[_Peer], frame: Sequence[memoryview]) -> None:
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
        """Sees who is there, if that may have changed.

        A look is final once it is made :data:`SETTLING` after its time of change was first seen: whatever changes
        later has another. Until then each call looks.
        """
        changed = os.stat(self._directory).st_mtime_ns
        now = time.monotonic()
        if changed != self._changed:
            self._changed = changed
            self._first_seen = now
        elif self._is_settled:
            return
        is_final = now - self._first_seen >= SETTLING
        self._is_settled = False  # and should the host be out of files in the midst of it
        os.fchdir(self._directory)
        present = {mac for name in os.listdir(".") if (mac := _mac_of(name)) is not None and mac != self._mac}
        for mac in present - self._known.keys():
            self._connect(mac)
        self._is_settled = is_final

    def _connect(self, mac: bytes) -> _Peer | None:
        """Makes the guest with that address known; None if there is none. OSError: the host is out of files."""
        try:
            line = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        except OSError:
            self._is_settled = False  # so the next look finds it
            raise
        try:
            line.setblocking(False)
            line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            # In another root directory only what is relative to an open directory can be found.
            os.fchdir(self._directory)
            line.connect(_name_of(mac))
        except OSError:
            line.close()
            return None
        peer = self._known[mac] = _Peer(mac, line)
        return peer

    def _forget(self, peer: _Peer) -> None:
        del self._known[peer.mac]
        peer.line.close()


class _Peer:
    """Another guest on the link: its MAC address, and a socket that is connected to its."""

    __slots__ = ("_since", "fd", "is_stuck", "line", "mac", "patience")

    def __init__(self, mac: bytes, line: socket.socket) -> None:
        self.mac = mac
        self.line = line
        self.fd = line.fileno()
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


class _Place:
    """A guest's place on a link, which its supervisor takes and gives up: ``socket``, bound and non-blocking, and
    ``directory``, a file descriptor with which names can be found and made, but nothing be read.

    Joining and leaving is done under a lock on the directory, so that nobody joins in a directory that is just being
    removed. The lock is on a file description of its own: the workers have a copy of ``directory`` and could undo it.
    """

    def __init__(self, link: str, mac: bytes, user: User | None) -> None:
        if not link or link.startswith(".") or "/" in link or "\0" in link:
            raise LguestError(f"--net=link:{link}: a link's name has no '/' and does not begin with '.'")
        self._link = link
        self._name = _name_of(mac)
        self._user = user
        with ExitStack() as opened:
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            opened.callback(self.socket.close)
            self.socket.setblocking(False)
            try:
                with runtime.acting_as(user):
                    links = runtime.directory(user) / "link"
                    runtime.make_private(links)
                    self._links = os.open(links, os.O_PATH | _DIRECTORY)
                    opened.callback(os.close, self._links)
                    self.directory = self._join(links / link)
            except OSError as error:
                raise LguestError(f"--net=link:{link}: cannot join: {error.strerror or error}") from error
            opened.pop_all()

    def leave(self) -> None:
        """Takes the socket's name away, and with the last name the directory. What cannot be done is left undone."""
        with suppress(OSError, LguestError), runtime.acting_as(self._user):
            self._remove_name()
        self.socket.close()
        os.close(self.directory)
        os.close(self._links)

    def _join(self, path: Path) -> int:
        """Binds the socket in the directory ``path``, and opens that."""
        deadline = time.monotonic() + TAKEOVER
        while True:
            locked = _make_and_lock(path)
            try:
                if self._name not in _sweep(locked):
                    self._bind(locked)
                    return os.open(".", os.O_PATH | _DIRECTORY, dir_fd=locked)
            finally:
                os.close(locked)
            if time.monotonic() > deadline:
                raise LguestError(
                    f"--net=link:{self._link}: another guest on this link has the MAC address {self._name}; "
                    "give one of them another with mac="
                )
            time.sleep(_RETRY)

    def _bind(self, directory: int) -> None:
        hidden = f".{self._name}"
        self.socket.bind(_short_path(directory, hidden))
        os.chmod(hidden, 0o600, dir_fd=directory)  # whatever the umask
        os.rename(hidden, self._name, src_dir_fd=directory, dst_dir_fd=directory)
        self._inode = os.stat(self._name, dir_fd=directory).st_ino

    def _remove_name(self) -> None:
        locked = os.open(".", os.O_RDONLY | _DIRECTORY, dir_fd=self.directory)
        try:
            _lock(locked, time.monotonic() + LOCKED)
            # The socket keeps its inode, so another with that number is none of ours.
            if os.stat(self._name, dir_fd=locked, follow_symlinks=False).st_ino == self._inode:
                os.unlink(self._name, dir_fd=locked)
            _sweep(locked)
            os.rmdir(self._link, dir_fd=self._links)
        finally:
            os.close(locked)


def _make_and_lock(path: Path) -> int:
    """Opens the directory ``path``, and makes it if need be. It is locked until the file descriptor is closed."""
    deadline = time.monotonic() + LOCKED
    while True:
        with suppress(FileNotFoundError), ExitStack() as opened:
            runtime.make_private(path)
            directory = os.open(path, os.O_RDONLY | _DIRECTORY)
            opened.callback(os.close, directory)
            _lock(directory, deadline)
            if os.path.samestat(os.fstat(directory), path.stat()):
                opened.pop_all()
                return directory
        # The last guest removed it in between.
        _pause(deadline)


def _lock(directory: int, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _pause(deadline)
        else:
            return


def _pause(deadline: float) -> None:
    """Lets others do their part. TimeoutError after the ``deadline`` (time.monotonic)."""
    if time.monotonic() > deadline:
        raise TimeoutError(
            errno.ETIMEDOUT, "somebody is joining or leaving all the time, or was stopped while they did"
        )
    time.sleep(_RETRY)


def _sweep(directory: int) -> set[str]:
    """Removes the names of sockets that are gone from a locked directory; those of the others.

    A hidden one was left by a launcher that was killed while it had the lock. What is no guest's stays where it is.
    """
    alive = set()
    for name in os.listdir(directory):
        if name.startswith(".") or (_mac_of(name) is not None and not _answers(directory, name)):
            with suppress(OSError):
                os.unlink(name, dir_fd=directory)
        else:
            alive.add(name)
    return alive


def _answers(directory: int, name: str) -> bool:
    """Whether somebody has the socket of that name open, as far as can be told."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_short_path(directory, name))
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
    return True


def _short_path(directory: int, name: str) -> str:
    """A path that fits in a socket's address."""
    return f"/proc/self/fd/{directory}/{name}"
