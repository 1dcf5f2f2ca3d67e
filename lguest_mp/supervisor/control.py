"""How the supervisor answers ``lguestctl``: what is asked for (``control.py``), to whoever may ask, and never waiting.

The supervisor has one thread and a guest to look after. So whoever connects must not be able to hold it up, to fill its
memory or to use up its files, not even by a mistake of its own:

- Nobody but the guest's owner and root is heard (SO_PEERCRED), and :data:`MAX_CLIENTS` of them at a time. When there
  are more, one that has had what it wanted, or does not read what it wanted, has to go (:data:`IDLE`).
- Nothing is sent that would have to wait: an answer is made as far as its receiver takes it, message by message, and
  nothing more is read from that receiver meanwhile. Nobody gets more than :data:`BURST` messages in a row.
- What happens while somebody follows the log has to be kept for them, :data:`MAX_NEWS` lines at most. Who has not read
  so many is cut off.
- Whatever is no request cuts its sender off. File descriptors that somebody sends are the kernel's to close, as nobody
  here receives any.
- When files run out, whoever connects is sent away with the one that is kept for that.

The sockets are watched by an epoll of their own, and the supervisor's loop watches that: to the loop they are one.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from lguest_mp import control
from lguest_mp.control import (
    Attach,
    Attached,
    Describe,
    Done,
    Goodbye,
    ListJail,
    LogLine,
    ReadLog,
    Reboot,
    Refused,
    Reset,
    Resize,
    Restart,
    Stop,
    Welcome,
)
from lguest_mp.errors import LguestError
from lguest_mp.record import Value
from lguest_mp.supervisor import ending

if TYPE_CHECKING:
    from lguest_mp.control import Answer, GuestFacts, ProcessFacts, ProcessJail, Request
    from lguest_mp.supervisor.ending import Ending
    from lguest_mp.supervisor.loop import Loop

MAX_CLIENTS = 16
#: How long (seconds) a connection may have been of no use before it has to go when there are too many.
IDLE = 5.0
#: How many messages go to one receiver before the others, and the guest, are looked after again.
BURST = 64
#: How many lines of the log are kept for somebody who follows it.
MAX_NEWS = 1000

#: struct ucred: pid, uid, gid (include/linux/socket.h).
_CREDENTIALS = struct.Struct("=iII")


class Attachment(Protocol):
    """The console, for one who looks at it: file descriptors of which copies are sent. ``news`` is theirs alone."""

    @property
    def screen(self) -> int: ...
    @property
    def news(self) -> select.epoll: ...
    @property
    def keys(self) -> int: ...


class Entry(Protocol):
    """A line of the log (``supervisor/log.py``)."""

    @property
    def time(self) -> float: ...
    @property
    def level(self) -> int: ...
    @property
    def source(self) -> str: ...
    @property
    def text(self) -> str: ...


class Subject(Protocol):
    """The guest, as far as somebody outside may see it and meddle with it.

    Whatever is not possible (now) raises LguestError; :meth:`stop` and :meth:`reboot` always are.
    """

    def guest(self) -> GuestFacts: ...
    def processes(self) -> Iterable[ProcessFacts]: ...
    def jail(self) -> Iterable[ProcessJail]:
        """How its processes were to be jailed."""

    def stop(self) -> None:
        """The guest is to end in order."""

    def reboot(self) -> None:
        """The guest is to start afresh."""

    def restart(self, device: str) -> None:
        """Workers are to be replaced: those of a device, or one of them, ``net0/receiveq``."""

    def reset(self, device: str) -> None:
        """A device is to fail, and its driver to reset it."""

    def attach(self) -> Attachment:
        """The console."""

    def resize(self, columns: int, rows: int) -> None:
        """The terminal of somebody attached has this size; 0: nobody is attached any more."""

    def entries(self, source: str | None, last: int) -> Sequence[Entry]:
        """The last lines of the log, of one source or all."""

    def subscribe(self, callback: Callable[[Entry], None]) -> Callable[[], None]:
        """Has ``callback`` called with each line from now on; what is returned ends that."""


class _Outgoing(Value):
    """A message to be sent; ``files`` go with it; ``then`` is done when it is on its way (or cannot be any more)."""

    message: Answer
    files: tuple[int, ...] = ()
    then: Callable[[], None] = lambda: None


class _Client:
    """Somebody connected. ``answer`` is what they still have to get, ``stuck`` what they did not take."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.answer: Iterator[_Outgoing] = iter([_Outgoing(Welcome(control.PROTOCOL))])
        self.stuck: _Outgoing | None = None
        #: Lines for one who follows the log of this source, and how to stop that.
        self.news: deque[LogLine] = deque()
        self.unfollow: Callable[[], None] | None = None
        self.is_attached = False
        #: When they last said or took something, or there was something new to take (time.monotonic).
        self.active = time.monotonic()

    @property
    def is_in_use(self) -> bool:
        """Whether the connection may be silent and yet be good for something."""
        takes_all = self.stuck is None and not self.news
        return takes_all and (self.unfollow is not None or self.is_attached)


class Control:
    """Answers all who connect to ``listener`` (which stays open at the end) and are ``owner`` or root."""

    def __init__(self, listener: socket.socket, owner: int, loop: Loop, subject: Subject) -> None:
        self._listener = listener
        self._owner = owner
        self._loop = loop
        self._subject = subject
        self._clients: dict[int, _Client] = {}
        self._epoll = select.epoll()
        self._spare = _open_spare()
        self._epoll.register(listener, select.EPOLLIN)
        loop.watch(self._epoll.fileno(), self._on_events)

    def close(self, how: Ending | None) -> None:
        """Tells everybody how the guest ended (None: nobody knows), and closes all but the listener.

        Those who wait to be accepted wait on, for the guest's next life.
        """
        goodbye = Goodbye(isinstance(how, ending.Rebooting), None if how is None else ending.in_words(how))
        self._loop.forget(self._epoll.fileno())
        for client in list(self._clients.values()):
            with suppress(OSError):
                while not self._send_burst(client) and client.stuck is None:
                    pass
                if client.stuck is None:
                    _send(client.channel, _Outgoing(goodbye))
            self._drop(client)
        self._epoll.close()
        if self._spare is not None:
            os.close(self._spare)

    # ---- Connections ----

    def _on_events(self) -> None:
        for fd, events in self._epoll.poll(0):
            if fd == self._listener.fileno():
                self._accept()
            elif (client := self._clients.get(fd)) is not None:
                self._on_client(client, events)

    def _accept(self) -> None:
        try:
            channel, _ = self._listener.accept()
        except OSError as error:
            if error.errno in {errno.EMFILE, errno.ENFILE}:
                self._send_one_away()
            return
        channel.setblocking(False)
        if (reason := self._why_not(channel)) is not None:
            with suppress(OSError):
                _send(channel, _Outgoing(Refused(reason)))
            channel.close()
            return
        try:
            self._epoll.register(channel, select.EPOLLIN)
        except OSError:  # the host has no memory for one more
            channel.close()
            return
        client = self._clients[channel.fileno()] = _Client(channel)
        self._serve(client)

    def _why_not(self, channel: socket.socket) -> str | None:
        """Why somebody is not heard; None: they are."""
        credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, uid, _ = _CREDENTIALS.unpack(credentials)
        if uid not in {0, self._owner}:
            return "this guest is another user's"
        return None if self._has_room() else "too many are connected to this guest; try again later"

    def _has_room(self) -> bool:
        """Whether there may be one more; makes room if somebody has their place for nothing."""
        if len(self._clients) < MAX_CLIENTS:
            return True
        latest = time.monotonic() - IDLE
        idle = [each for each in self._clients.values() if not each.is_in_use and each.active <= latest]
        if not idle:
            return False
        self._drop(min(idle, key=lambda each: each.active))
        return True

    def _send_one_away(self) -> None:
        """Without a file to accept them there would be no end to hearing that somebody connects."""
        if self._spare is not None:
            os.close(self._spare)
            with suppress(OSError):
                self._listener.accept()[0].close()
        self._spare = _open_spare()

    def _drop(self, client: _Client) -> None:
        if self._clients.pop(client.channel.fileno(), None) is None:
            return
        self._epoll.unregister(client.channel)
        if client.unfollow is not None:
            client.unfollow()
        if client.is_attached and not any(other.is_attached for other in self._clients.values()):
            self._resize(0, 0)
        # A child that is just being forked has a copy of the socket.
        with suppress(OSError):
            client.channel.shutdown(socket.SHUT_RDWR)
        client.channel.close()

    # ---- Hearing and answering ----

    def _on_client(self, client: _Client, events: int) -> None:
        try:
            if events & select.EPOLLIN:  # also what they said before they went
                self._hear(client)
            elif events & (select.EPOLLERR | select.EPOLLHUP):
                self._drop(client)
            else:
                self._serve(client)
        except (OSError, control.ControlError):
            self._drop(client)

    def _hear(self, client: _Client) -> None:
        try:
            datagram = client.channel.recv(control.MAX_REQUEST + 1)
        except BlockingIOError:
            return
        if not datagram:
            self._drop(client)
            return
        client.active = time.monotonic()
        request = control.decode_request(datagram)
        try:
            client.answer = iter(self._answer(client, request))
        except LguestError as error:
            client.answer = iter([_Outgoing(Refused(str(error)))])
        except OSError as error:  # the host's: no file descriptors left for a console
            client.answer = iter([_Outgoing(Refused(error.strerror or str(error)))])
        except Exception:  # a bug of ours, and no reason for a guest to end
            os.write(2, traceback.format_exc().encode(errors="replace"))
            client.answer = iter([_Outgoing(Refused("its launcher has a bug, of which it says more itself"))])
        self._serve(client)

    def _serve(self, client: _Client) -> None:
        """Sends what there is for somebody, as far as they take it; then hears them again, if that was all."""
        try:
            all_sent = self._send_burst(client)
        except OSError:
            self._drop(client)
            return
        if client.channel.fileno() in self._clients:
            self._epoll.modify(client.channel, select.EPOLLIN if all_sent else select.EPOLLOUT)

    def _send_burst(self, client: _Client) -> bool:
        """Sends up to BURST messages; whether nothing is left. OSError: they are gone."""
        for _ in range(BURST):
            outgoing = client.stuck or self._next(client)
            if outgoing is None:
                return True
            client.stuck = outgoing
            try:
                _send(client.channel, outgoing)
            except BlockingIOError:
                return False
            except OSError:
                outgoing.then()
                raise
            client.stuck = None
            client.active = time.monotonic()
            outgoing.then()
        return False

    def _next(self, client: _Client) -> _Outgoing | None:
        outgoing = next(client.answer, None)
        if outgoing is None and client.news:
            return _Outgoing(client.news.popleft())
        return outgoing

    # ---- The answers ----

    def _answer(self, client: _Client, request: Request) -> Iterable[_Outgoing]:  # noqa: PLR0911 -- a table
        """The messages that answer a request, each made when it can be sent. LguestError."""
        match request:
            case Describe():
                return _listing([self._subject.guest(), *self._subject.processes()])
            case ListJail():
                return _listing(list(self._subject.jail()))
            case ReadLog(source, last, follow):
                return self._read_log(client, source, last, follow=follow)
            case Attach(columns, rows):
                return self._attach(client, columns, rows)
            case Stop():
                return [_Outgoing(Done(), then=self._subject.stop)]
            case Reboot():
                return [_Outgoing(Done(), then=self._subject.reboot)]
            case Resize() | Restart() | Reset():
                self._obey(client, request)
                return [_Outgoing(Done())]

    def _obey(self, client: _Client, request: Resize | Restart | Reset) -> None:
        """Does what takes no time before the answer. LguestError."""
        match request:
            case Resize(columns, rows):
                if not client.is_attached:
                    raise LguestError("nobody is attached here")
                self._resize(columns, rows)
            case Restart(device):
                self._subject.restart(device)
            case Reset(device):
                self._subject.reset(device)

    def _read_log(self, client: _Client, source: str | None, last: int, *, follow: bool) -> Iterable[_Outgoing]:
        lines = [_line(entry) for entry in self._subject.entries(source, last)]
        if not follow:
            return _listing(lines)
        if client.unfollow is None:
            client.unfollow = self._subject.subscribe(lambda entry: self._on_entry(client, source, entry))
        return (_Outgoing(line) for line in lines)

    def _on_entry(self, client: _Client, source: str | None, entry: Entry) -> None:
        """A line for one who follows the log. It goes out when the loop comes to it, not in the midst of whatever."""
        if source is not None and source != entry.source:
            return
        if len(client.news) >= MAX_NEWS:
            self._drop(client)
            return
        if not client.news:
            client.active = time.monotonic()
        client.news.append(_line(entry))
        self._epoll.modify(client.channel, select.EPOLLOUT)

    def _attach(self, client: _Client, columns: int, rows: int) -> Iterable[_Outgoing]:
        attached = self._subject.attach()
        client.is_attached = True
        if columns and rows:
            self._resize(columns, rows)
        files = (attached.screen, attached.news.fileno(), attached.keys)
        return [_Outgoing(Attached(), files, then=attached.news.close), _Outgoing(Done())]

    def _resize(self, columns: int, rows: int) -> None:
        self._subject.resize(min(columns, 0xFFFF), min(rows, 0xFFFF))


def _listing(messages: Iterable[Answer]) -> Iterator[_Outgoing]:
    for message in messages:
        yield _Outgoing(message)
    yield _Outgoing(Done())


def _line(entry: Entry) -> LogLine:
    return LogLine(entry.time, entry.level, entry.source, entry.text)


def _send(channel: socket.socket, outgoing: _Outgoing) -> None:
    """BlockingIOError: not now. OSError: they are gone."""
    datagram = control.encode(outgoing.message)
    if outgoing.files:
        socket.send_fds(channel, [datagram], list(outgoing.files))
    else:
        channel.send(datagram)


def _open_spare() -> int | None:
    """A file descriptor to have one when there are no more; None: there are none."""
    try:
        return os.dup(2)
    except OSError:
        return None
