"""How the transmitq's worker of a guest comes to know the others on its link: the supervisor introduces them.

To find a socket one has to list its directory, and to connect to it one names it. A worker may do neither (``jail/``),
since with that it could reach whatever its user can. So it asks its supervisor for whom it does not know, and gets
sockets that are connected.

A question has a number, which the answers repeat: a worker finds what its predecessor asked for and did not live to
hear. Nobody trusts anybody. The supervisor never waits for a worker, introduces :data:`MOST` at a time, and hears the
next question after a :data:`PAUSE`; a worker waits for its answers, but not for ever.
"""

from __future__ import annotations

import errno
import os
import re
import select
import socket
import struct
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from lguest_mp.network import mac as addresses
from lguest_mp.network.wire import LONGEST_FRAME
from lguest_mp.record import Value

if TYPE_CHECKING:
    from lguest_mp.supervisor.loop import Loop, Timer

#: So many are introduced at a time.
MOST = 64
#: How long (seconds) after a question the next one is heard.
PAUSE = 0.01
#: How long (seconds) a worker waits for its answers.
PATIENCE = 1.0
#: So many a worker may know: more guests than anybody has on one link.
MOST_KNOWN = 1024

#: Room in a socket for what it has sent and nobody has read: more than one of the longest frames, so that the reader
#: has one while the sender makes the next. The kernel grants net.core.wmem_max at most.
_SEND_BUFFER = 4 * LONGEST_FRAME

#: A question: its number; then the addresses of those who are known, 6 bytes each.
_NUMBER = struct.Struct("=Q")
_LONGEST_QUESTION = _NUMBER.size + 6 * MOST_KNOWN
#: An answer: the number; whether there are more, an errno or 0, the address. A socket comes with each but the last,
#: which has the address 0.
_ANSWER = struct.Struct("=Q?H6s")
_NOBODY = bytes(6)
#: As a plain number, and made here: an operation on flags makes a new flag of them, 180 KiB for a worker.
_FLAGS = int(socket.MSG_DONTWAIT) | int(socket.MSG_CMSG_CLOEXEC)
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC

_NAME = re.compile("[0-9a-f][02468ace](:[0-9a-f]{2}){5}", re.ASCII)


def address_of(name: str) -> bytes | None:
    """The MAC address that a name on a link stands for; None if it is none, or a group's, which nobody can have."""
    return bytes.fromhex(name.replace(":", "")) if _NAME.fullmatch(name) else None


class Newcomers(Value):
    """Who is on the link and was not known: by address, a socket (file descriptor, not blocking) connected to theirs.

    ``more``: there are others. ``error``: an errno that says why they could not be reached, 0 if none.
    """

    lines: dict[bytes, int]
    more: bool
    error: int


class Source(Protocol):
    """Who knows where the others are."""

    def newcomers(self, known: Collection[bytes]) -> Newcomers:
        """Those who are not ``known``. Their sockets are the caller's."""


class Directory:
    """The link's directory, of which ``fd`` is a file descriptor, as the guest with the address ``own`` sees it."""

    def __init__(self, fd: int, own: bytes) -> None:
        self._fd = fd
        self._own = own

    def newcomers(self, known: Collection[bytes]) -> Newcomers:
        """See :class:`Source`."""
        lines: dict[bytes, int] = {}
        try:
            # In another root directory only what is relative to an open directory can be found, and a socket's name
            # has room for 107 bytes.
            before = _working_directory()
            try:
                os.fchdir(self._fd)
                present = {mac for name in os.listdir(".") if (mac := address_of(name)) is not None}
                strangers = sorted(present.difference(known, [self._own]))
                for mac in strangers[:MOST]:
                    if (line := _connect(addresses.in_words(mac))) is not None:
                        lines[mac] = line
            finally:
                os.fchdir(before)
                os.close(before)
        except OSError as error:
            return Newcomers(lines, more=False, error=error.errno or errno.EIO)
        return Newcomers(lines, len(strangers) > MOST, 0)


def _working_directory() -> int:
    """A file descriptor to come back to. Who became another user may not be able to, nor need it: the root then."""
    try:
        return os.open(".", _DIRECTORY)
    except PermissionError:
        return os.open("/", _DIRECTORY)


def _connect(name: str) -> int | None:
    """A socket connected to that of this name; None: nobody has it open. OSError: the host has no more."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        line.setblocking(False)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        try:
            line.connect(name)
        except OSError:
            return None
        return line.detach()


class Introducer:
    """The supervisor's end: it answers from ``directory``, when ``loop`` comes to it. OSError."""

    def __init__(self, directory: Directory, loop: Loop) -> None:
        self._directory = directory
        self._loop = loop
        self._ours, self._workers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pause: Timer | None = None
        try:
            loop.watch(self._ours.fileno(), self._on_question)
        except OSError:
            self.close()
            raise

    @property
    def fd(self) -> int:
        """What a worker needs to ask."""
        return self._workers.fileno()

    def introductions(self) -> Introductions:
        """For workers, one of whom at a time is to ask."""
        return Introductions(self._workers)

    def close(self) -> None:
        """Does not answer any more. The loop may be closed by then."""
        if self._pause is not None:
            self._pause.cancel()
        self._ours.close()
        self._workers.close()

    def _on_question(self) -> None:
        self._loop.forget(self._ours.fileno())
        self._pause = self._loop.watch_later(PAUSE, self._ours.fileno(), self._on_question)
        with suppress(OSError):  # who does not take the answers has none
            question = self._ours.recv(_LONGEST_QUESTION + 1, socket.MSG_DONTWAIT)
            if _NUMBER.size <= len(question) <= _LONGEST_QUESTION and not (len(question) - _NUMBER.size) % 6:
                self._answer(question)

    def _answer(self, question: bytes) -> None:
        (number,) = _NUMBER.unpack_from(question)
        known = {question[start : start + 6] for start in range(_NUMBER.size, len(question), 6)}
        found = self._directory.newcomers(known)
        try:
            for mac, line in found.lines.items():
                answer = _ANSWER.pack(number, found.more, 0, mac)
                socket.send_fds(self._ours, [answer], [line], socket.MSG_DONTWAIT)
        finally:
            for line in found.lines.values():
                os.close(line)
        self._ours.send(_ANSWER.pack(number, found.more, found.error, _NOBODY), socket.MSG_DONTWAIT)


class Introductions:
    """A worker's end of ``channel``, an :class:`Introducer`'s."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel

    def newcomers(self, known: Collection[bytes]) -> Newcomers:
        """See :class:`Source`."""
        lines: dict[bytes, int] = {}
        number = time.monotonic_ns()
        try:
            self._channel.send(_NUMBER.pack(number) + b"".join([*known][:MOST_KNOWN]), socket.MSG_DONTWAIT)
            while True:
                about, more, error, mac, line = self._hear()
                if about != number or mac in known or mac in lines:
                    if line is not None:
                        os.close(line)
                elif mac == _NOBODY:
                    return Newcomers(lines, more, error)
                elif line is None:
                    return Newcomers(lines, more, errno.EMFILE)  # there was no room for it here
                else:
                    lines[mac] = line
        except OSError as error:
            return Newcomers(lines, more=False, error=error.errno or errno.EIO)

    def _hear(self) -> tuple[int, bool, int, bytes, int | None]:
        """The next answer. OSError: there is none."""
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        if not poll.poll(PATIENCE * 1000):
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        answer, extras, _, _ = self._channel.recvmsg(_ANSWER.size, socket.CMSG_LEN(4), _FLAGS)
        if not answer:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        line = None
        for level, kind, data in extras:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS) and len(data) == 4:
                line = int.from_bytes(data, sys.byteorder)
        about, more, error, mac = _ANSWER.unpack(answer)
        return about, more, error, mac, line
