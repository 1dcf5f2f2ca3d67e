"""The host's end of the serial port: the launcher's standard input and output.

**Output** goes out byte by byte as the guest sends it: nothing is held back that a crash could take with it, and a
byte costs less than a microsecond. The descriptor is not ours alone (it is the user's terminal, perhaps shared with
their shell), so it stays blocking, and is asked with poll(2) before each write. When it cannot take a byte, because
the terminal is stopped or a pipe is full, the port stays busy and the event loop sends the rest as it becomes
possible; the guest decides how long it waits for its serial port.

**Input** is read by the event loop, and only while it is ours: once the guest's virtio console is served, its
receiveq worker reads the same descriptor, and no byte may be taken by the wrong one. :meth:`StandardInput.release`
therefore returns only when no read is under way or will come. A terminal is read at all times, because three ^C
within a second have to be noticed also while the guest takes no input (``abort.py``); what the guest does not take
yet is kept for it. Anything else is read no sooner than the guest wants it, so that a script on standard input
reaches whichever console is used in the end.

Whoever is attached to the console (``line.py``) sees the same output and has an input of their own, another
:class:`StandardInput`, which is not a terminal.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable

from lguest_mp.abort import AbortKeys
from lguest_mp.machine.eventloop import EventLoop
from lguest_mp.screen import ScreenWriter

#: What may wait for a stuck output; more is lost, as on a wire.
_BACKLOG = 1 << 16
#: Bytes written in one go by the event loop, which then looks after the others.
_BURST = 256
#: A terminal whose foreground is somebody else's is asked again after so many seconds.
_BACKGROUND_RETRY = 1.0
#: As much as a 16550 holds.
_CHUNK = 16


class StandardOutput:
    """Where the serial port's bytes go: to the file ``fd``, when it takes them, and to the ``screen`` at once."""

    def __init__(self, fd: int, loop: EventLoop, screen: ScreenWriter | None = None) -> None:
        self._screen = screen
        # A number of its own, since the event loop may be waiting for input on the other one.
        self._fd = os.dup(fd)
        self._loop = loop
        self._writable = select.poll()
        self._writable.register(self._fd, select.POLLOUT)
        self._lock = threading.Lock()
        self._backlog = bytearray()
        self._bytes = [bytes([value]) for value in range(256)]
        #: Whether bytes are waiting: the port's transmitter is not empty.
        self.busy = False
        #: Called by the event loop when nothing waits any more.
        self.on_idle: Callable[[], None] = _nothing

    def put(self, byte: int) -> None:
        """Sends one byte, or keeps it until that is possible. Never waits."""
        if self._screen is not None:
            self._screen.append_byte(byte)
        if not self.busy and self._writable.poll(0):
            self._write(byte)
            return
        with self._lock:
            if len(self._backlog) < _BACKLOG:
                self._backlog.append(byte)
            if not self.busy:
                self.busy = True
                self._loop.add(self._fd, self._drain, select.EPOLLOUT)

    def _write(self, byte: int) -> None:
        try:
            os.write(self._fd, self._bytes[byte])
        except OSError:
            # Nobody reads it any more (EPIPE, EIO), or the disk is full: as with a wire that is not plugged in.
            return

    def _drain(self) -> None:
        with self._lock:
            for _ in range(_BURST):
                if not self._backlog:
                    break
                if not self._writable.poll(0):
                    return
                self._write(self._backlog.pop(0))
            if self._backlog:
                return
            self._loop.remove(self._fd)
            self.busy = False
        self.on_idle()

    def flush(self, seconds: float) -> None:
        """Sends what waits, for at most so long. The event loop has to be stopped."""
        deadline = time.monotonic() + seconds
        while self._backlog and self._writable.poll(max(0.0, deadline - time.monotonic()) * 1000):
            self._write(self._backlog.pop(0))

    def close(self) -> None:
        """Gives the descriptor back."""
        self._loop.remove(self._fd)
        os.close(self._fd)


class StandardInput:
    """Where what the serial port receives comes from.

    ``receive`` gets bytes, on the event loop's thread; ``wanted`` says whether the port has room for some;
    ``interrupt`` is called when the person at the terminal wants the guest's end.
    """

    def __init__(
        self,
        fd: int,
        loop: EventLoop,
        *,
        receive: Callable[[bytes], None],
        wanted: Callable[[], bool],
        interrupt: Callable[[], None],
    ) -> None:
        self._fd = fd
        self._loop = loop
        self._receive = receive
        self._wanted = wanted
        self._interrupt = interrupt
        self._terminal = os.isatty(fd)
        self._keys = AbortKeys()
        self._readable = select.poll()
        self._readable.register(fd, select.POLLIN)
        self._lock = threading.Lock()
        self._ours = False
        self._ended = False
        self._polled = False

    def take(self) -> None:
        """The input is ours from now on."""
        with self._lock:
            self._ours = True
            self._watch()

    def release(self) -> None:
        """The input is somebody else's: when this returns, not a byte more is taken."""
        with self._lock:
            self._ours = False
            self._unwatch()

    def resume(self) -> None:
        """The serial port has room for input."""
        if not self._terminal:
            with self._lock:
                self._watch()

    def _watch(self) -> None:
        if self._polled or self._ended or not self._ours or not (self._terminal or self._wanted()):
            return
        self._polled = True
        try:
            self._loop.add(self._fd, self._ready)
        except PermissionError:
            # A regular file: always ready.
            self._loop.call_later(0, self._ready)

    def _unwatch(self) -> None:
        self._polled = False
        self._loop.remove(self._fd)

    def _retry(self) -> None:
        with self._lock:
            self._watch()

    def _ready(self) -> None:
        with self._lock:
            # Things may have changed since the event loop woke up.
            if not self._polled or not self._readable.poll(0):
                return
            try:
                data = os.read(self._fd, _CHUNK)
            except BlockingIOError:
                return
            except OSError:
                # EIO: another process group has the terminal, or it was hung up.
                self._unwatch()
                self._loop.call_later(_BACKGROUND_RETRY, self._retry)
                return
            if not data:
                self._ended = True
                self._unwatch()
                return
            if not self._terminal:
                self._unwatch()
            self._receive(data)
            if not self._terminal:
                self._watch()
        if self._terminal and self._keys.typed(len(data), data[0]):
            self._interrupt()


def _nothing() -> None:
    """Nobody waits."""
