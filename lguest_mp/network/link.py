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
  without a loss, but not longer than ``peers.PATIENCE``, and no more than ``peers.EARNED`` of the time. Who was waited
  for in vain is *stuck*: until it takes a frame, what does not go into its queue at once is lost. So one that reads
  nothing costs a sender 20 ms once, and a slow one, even on purpose, 2 % of its time. The others get theirs before
  anybody is waited for. The price is that a sender that is faster than its receiver loses frames: of TCP between two
  guests on a busy host 0.6 % had to be sent again, instead of 0.1 % with patience for every frame.
- *A guest that had no driver* (it booted, it reset its device) gets what waited for it meanwhile, a queue at most. That
  harms nobody: each header is checked against what the driver accepts that gets it. To throw it away when a worker
  begins would lose frames of a driver that is there, after a crash or a reset of one queue.
- *A path longer than a socket's address may be* (107 bytes): every name is used relative to its directory.

**Who may do what.** The directory is its user's alone. A guest can send what it likes to the others (their devices do
not trust it), with any address as its own and as fast as they read, as on any wire. One that has broken into a worker
of this device can do no more: the worker has its own socket, or those that are connected to the others', but neither
the directory nor a way to make sockets (``introductions.py``).
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from lguest_mp import runtime
from lguest_mp.errors import LguestError
from lguest_mp.jail.calls import plain
from lguest_mp.jail.needs import Needs
from lguest_mp.network import header
from lguest_mp.network import mac as addresses
from lguest_mp.network.introductions import MOST_KNOWN, Directory, Introducer, address_of
from lguest_mp.network.peers import Peers
from lguest_mp.network.wire import LONGEST_FRAME, Wire

if TYPE_CHECKING:
    from pathlib import Path

    from lguest_mp.jail import User
    from lguest_mp.supervisor.loop import Loop

#: How long (seconds) a guest has to go away before the next one with its MAC address is refused.
TAKEOVER = 1.0
#: How long (seconds) to wait for others who are joining or leaving; each takes a millisecond.
LOCKED = 5.0

#: Destination, source, type.
_ETHERNET_HEADER = 14
_DESTINATION = slice(header.LENGTH, header.LENGTH + 6)
_SHORTEST_FRAME = header.LENGTH + _ETHERNET_HEADER
#: How often (seconds) it is tried again to join or to lock.
_RETRY = 0.01
#: What the transmitq's worker does besides, where its supervisor introduces the others to it.
_SENDING = plain("writev", "recvmsg")

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
        self._mac = mac
        self._directory = Directory(self._place.directory, mac)
        self._introducer: Introducer | None = None
        self._peers = Peers(self._directory, mac)
        self._fd = self._place.socket.fileno()
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)
        #: How much shorter the driver's header is than that on the link.
        self._missing = 0

    @property
    def description(self) -> str:
        """``link lab``."""
        return f"link {self._name}"

    def attend(self, loop: Loop) -> None:
        """Has the other guests introduced to whoever is forked from now on."""
        if self._introducer is not None:
            self._introducer.close()
        self._introducer = Introducer(self._directory, loop)
        self._peers = Peers(self._introducer.introductions(), self._mac)

    @property
    def files(self) -> tuple[int, ...]:
        """The guest's own socket."""
        return (self._fd,)

    @property
    def files_of_writer(self) -> tuple[int, ...]:
        """Where the other guests are introduced."""
        return () if self._introducer is None else (self._introducer.fd,)

    def needs_of_writer(self) -> Needs:
        """A socket connected to each of the other guests."""
        return Needs(_SENDING, more_files=MOST_KNOWN)

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
        self._peers.send(_destination(frame), frame)

    def close(self) -> None:
        """Leaves the link."""
        self._peers.close()
        if self._introducer is not None:
            self._introducer.close()
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


class _Place:
    """A guest's place on a link, which its supervisor takes and gives up: ``socket``, bound and non-blocking, and
    ``directory``, a file descriptor by which names can be found and made, also in another root directory.

    Joining and leaving is done under a lock on the directory, so that nobody joins in a directory that is just being
    removed.
    """

    def __init__(self, link: str, mac: bytes, user: User | None) -> None:
        if not link or link.startswith(".") or "/" in link or "\0" in link:
            raise LguestError(f"--net=link:{link}: a link's name has no '/' and does not begin with '.'")
        self._link = link
        self._name = addresses.in_words(mac)
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
        if name.startswith(".") or (address_of(name) is not None and not _answers(directory, name)):
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
