"""``lguestctl console``: the guest's console on this terminal, until the escape key is typed or the guest ends.

The supervisor gives three file descriptors and is not needed any more: ``screen``, a ring with what the guest last
showed, ``news``, an epoll of our own that says that there is more, and ``keys``, the write end of a pipe
(``line.py``). So nobody waits for us: when this terminal is stopped, we lose what the ring cannot hold, and the guest
loses nothing.

Without a terminal on standard input (a script's pipe) every byte goes to the guest, and the end of input is not the
end: what the guest shows comes until the guest ends.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from lguest_mp import terminal
from lguest_mp.control import ATTACHED_FILES, Attach, Attached, ControlError, Done, Resize
from lguest_mp.ctl.client import GuestGone
from lguest_mp.errors import LguestError
from lguest_mp.supervisor.ending import die_by
from lguest_mp.supervisor.signals import STOPPING, Signals
from lguest_mp.terminal import Terminal

if TYPE_CHECKING:
    from lguest_mp.ctl.client import Connection, Place
    from lguest_mp.screen import ScreenReader

#: Ctrl-], as of telnet and virsh.
ESCAPE = b"\x1d"
#: What is read of what is typed, and written to a pipe that is ready: less than it takes then (PIPE_BUF).
_CHUNK = 1024
#: What is kept of what is typed at a terminal while the guest takes nothing; the rest is lost, as at any terminal.
_MOST_TYPED = 65536


def parse_escape(text: str) -> bytes | None:
    """The key that detaches: ``^]`` or another control character, any single character, ``none``. LguestError."""
    if text == "none":
        return None
    if len(text) == 2 and text[0] == "^" and "@" <= (key := text[1].upper()) <= "_":
        return bytes([ord(key) - ord("@")])
    if len(text) == 1 and text.isascii():
        return text.encode()
    raise LguestError(f"--escape={text}: give a control character like ^], another single character, or none")


def shown_escape(escape: bytes) -> str:
    """The key in a person's words."""
    code = escape[0]
    return f"Ctrl-{chr(code + 64)}" if code < 32 else repr(chr(code))


def attach(place: Place, name: str, escape: bytes | None) -> str:
    """Attaches this terminal to a guest's console until the end; how it ended, in words. LguestError."""
    try:
        # In this order: a signal that comes last of all has its effect after the terminal is the user's again.
        with Signals() as signals, ExitStack() as restoring:
            raw = Terminal()
            restoring.callback(raw.restore)
            ending = _attach_to_all_lives(place, name, _Viewer(signals, raw, escape if os.isatty(0) else None))
    except GuestGone as gone:
        return str(gone)
    if ending is not None:
        die_by(ending)
    return f"detached from {name}"


def _attach_to_all_lives(place: Place, name: str, viewer: _Viewer) -> int | None:
    """GuestGone: there is no next one."""
    reach: Callable[[str], Connection] = place.connect
    while True:
        try:
            with reach(name) as connection:
                return viewer.view(connection)
        except GuestGone as gone:
            if not gone.reboots:
                raise
        reach = place.reconnect


class _Viewer:
    """The terminal in front of us, for as many lives of the guest as there are."""

    def __init__(self, signals: Signals, raw: Terminal, escape: bytes | None) -> None:
        self._signals = signals
        self._raw = raw
        self._escape = escape
        self._input_is_open = True
        #: What is typed and not given to the guest yet.
        self._typed = b""
        self._greeted = False
        self._detached = False
        self._ending: int | None = None
        #: What reads the screen that was seen last, and which file that is.
        self._reader: ScreenReader | None = None
        self._screen: tuple[int, int] | None = None

    def view(self, connection: Connection) -> int | None:
        """Shows and types until the escape key (None), or a signal that is to end us. GuestGone."""
        with ExitStack() as opened:
            screen, news, keys = self._attach(connection, opened)
            events = opened.enter_context(select.epoll.fromfd(os.dup(news)))
            reader = self._reader_of(screen)
            try:
                while not self._detached and self._ending is None:
                    _show(reader.read_new())
                    self._wait(connection, events, keys)
            finally:
                _show(reader.read_new())
            self._type_what_can_be(keys)
        return self._ending

    def _reader_of(self, screen: int) -> ScreenReader:
        """It goes on where it was when the guest has rebooted, and its screen is what it was."""
        from lguest_mp.screen import ScreenReader  # noqa: PLC0415 -- nobody else needs it

        found = os.fstat(screen)
        if self._reader is None or self._screen != (found.st_dev, found.st_ino):
            self._reader = ScreenReader(screen)
            self._screen = (found.st_dev, found.st_ino)
        return self._reader

    def _attach(self, connection: Connection, opened: ExitStack) -> list[int]:
        columns, rows = terminal.size() or (0, 0)
        connection.send(Attach(columns, rows))
        answer, files = connection.receive_with_files(ATTACHED_FILES)
        for fd in files:
            opened.callback(os.close, fd)
        if not isinstance(answer, Attached) or len(files) != ATTACHED_FILES:
            raise LguestError(f"guest {connection.name} gives no console")
        connection.channel.settimeout(None)
        self._greet(connection.name)
        self._raw.take()
        return files

    def _greet(self, name: str) -> None:
        """Says, once, how to get out of here again."""
        if self._escape is not None and not self._greeted:
            print(f"lguestctl: attached to {name}; {shown_escape(self._escape)} detaches", file=sys.stderr, flush=True)
        self._greeted = True

    def _wait(self, connection: Connection, events: select.epoll, keys: int) -> None:
        """Waits for one thing or more to happen, and does what is to be done."""
        poller = select.poll()
        poller.register(connection.channel, select.POLLIN)
        poller.register(events.fileno(), select.POLLIN)
        poller.register(self._signals.fd, select.POLLIN)
        if self._typed:
            poller.register(keys, select.POLLOUT)
        if self._input_is_open and (self._escape is not None or not self._typed):
            poller.register(0, select.POLLIN)  # the key that detaches is waited for, whatever the guest takes
        ready = {fd for fd, _ in poller.poll()}
        events.poll(0)
        if self._signals.fd in ready:
            self._on_signals(connection)
        if 0 in ready:
            self._on_input()
        if keys in ready:
            self._type(keys)
        if connection.channel.fileno() in ready:
            self._hear(connection)

    def _hear(self, connection: Connection) -> None:
        """Nothing but an end is news."""
        try:
            answer = connection.receive()
        except ControlError:
            answer = None
        if not isinstance(answer, Done):
            raise LguestError(f"guest {connection.name} says what makes no sense")

    def _on_input(self) -> None:
        try:
            data = os.read(0, _CHUNK)
        except BlockingIOError:
            return
        except OSError:  # the terminal is gone
            data = b""
        if not data:
            self._input_is_open = False
        if self._escape is not None and self._escape in data:
            data, _, _ = data.partition(self._escape)
            self._detached = True
        self._typed += data[: _MOST_TYPED - len(self._typed)]

    def _type(self, keys: int) -> None:
        try:
            self._typed = self._typed[os.write(keys, self._typed[:_CHUNK]) :]
        except BlockingIOError:
            return
        except OSError:  # nobody reads them: the guest is about to end
            self._typed = b""

    def _type_what_can_be(self, keys: int) -> None:
        """Before detaching: a guest that takes no input must not keep us."""
        poller = select.poll()
        poller.register(keys, select.POLLOUT)
        if self._typed and poller.poll(0):
            self._type(keys)

    def _on_signals(self, connection: Connection) -> None:
        for signum in self._signals.take():
            match signum:
                case signal.SIGWINCH:
                    self._resize(connection)
                case signal.SIGTSTP:
                    self._raw.restore()
                    self._signals.stop_process()
                    self._raw.take()
                    self._resize(connection)
                case signal.SIGCONT:
                    self._raw.take()
                case _ if signum in STOPPING:
                    self._ending = signum

    def _resize(self, connection: Connection) -> None:
        if (size := terminal.size()) is not None:
            connection.send(Resize(*size))


def _show(data: bytes) -> None:
    """Shows it all, however long this terminal takes. BrokenPipeError: nobody looks."""
    while data:
        try:
            data = data[os.write(1, data) :]
        except BlockingIOError:
            select.select([], [1], [])
