"""The console (virtio 1.2, 5.3): the terminal in which the launcher was started becomes the guest's.

Others may be attached to it as well, over a line (``line.py``): they see what is printed, and type, too.

One port, two queues, two workers. ``receiveq`` carries what is typed to the guest, and ``transmitq`` what the guest
prints to the terminal. Neither knows of the other, so a terminal that is not read from (or stopped with ^S) holds up
the guest's output only.

The host's side of a console is less reliable than a disk's. Each of these is met in practice, and none is the end of
the guest:

- *End of input* (a closed terminal, ``< /dev/null``): the worker says so and waits for those who are attached to the
  console only; if there is no way to attach it sleeps for ever. It does not end, since a worker that ends is a failure.
- *A terminal that is not ours at the moment*: a launcher in the shell's background must not read from its terminal.
  The kernel would stop the whole process group with SIGTTIN, workers and guest, at the first key. The receiveq's
  worker ignores that signal, so that reading is an error (EIO) instead; then it waits until the launcher is in the
  foreground and reads again. The guest runs on meanwhile.
- *A non-blocking file*: other programs share our terminal's file description and may have switched it, so EAGAIN is
  answered by waiting in poll(2) on both sides.
- *Output that goes nowhere* (a closed pipe, a full disk, a terminal that is gone): it is dropped, with one line for
  each reason, and every next buffer is tried again.
"""

from __future__ import annotations

import os
import select
import signal
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lguest_mp.abort import AbortKeys
from lguest_mp.errors import DeviceProtocolError
from lguest_mp.jail.calls import JOB_CONTROL, MAPPING, plain
from lguest_mp.jail.needs import Needs
from lguest_mp.screen import Track
from lguest_mp.virtio import serving, vectors
from lguest_mp.virtio.device import Device, DeviceId
from lguest_mp.virtio.serving import Losses
from lguest_mp.virtio.usual import Output

if TYPE_CHECKING:
    from lguest_mp.line import Line
    from lguest_mp.virtio.queue import Queue
    from lguest_mp.worker import WorkerContext

#: Feature bit (5.3.3): the configuration's cols and rows are valid.
VIRTIO_CONSOLE_F_SIZE = 1 << 0
RECEIVEQ = 0
TRANSMITQ = 1

#: How much is read at once at the most, bytes.
LONGEST_READ = 64 << 10
#: How often, in seconds, a launcher in the background looks whether it came to the foreground.
FOREGROUND_CHECK = 0.5


class Console(Device):
    """A console of one port on two file descriptors; ``columns`` and ``rows`` are the terminal's size.

    The files stay their owner's: ``close()`` leaves them open, and whoever wants a raw terminal makes it so. The
    ``line``, over which others are attached, is the console's own.
    """

    device_id = DeviceId.CONSOLE
    queue_names = ("receiveq", "transmitq")

    def __init__(  # noqa: PLR0917 -- what a terminal is
        self,
        name: str = "console",
        input_fd: int = 0,
        output_fd: int = 1,
        columns: int = 80,
        rows: int = 25,
        line: Line | None = None,
    ) -> None:
        super().__init__(name, _size(columns, rows))
        self.line = line
        self._input = input_fd
        self._output = output_fd

    @property
    def features(self) -> int:
        """VIRTIO_CONSOLE_F_SIZE."""
        return VIRTIO_CONSOLE_F_SIZE

    @property
    def files(self) -> tuple[int, ...]:
        """Input and output, and those of the line."""
        return (self._input, self._output, *self.machine_files)

    @property
    def machine_files(self) -> tuple[int, ...]:
        """Those of the line: the serial port is the same terminal."""
        return () if self.line is None else self.line.files

    def hand_on(self) -> None:
        """The line does."""
        if self.line is not None:
            self.line.hand_on()

    def close(self) -> None:
        """Closes the line."""
        if self.line is not None:
            self.line.close()

    def files_of(self, queue_index: int) -> tuple[int, ...]:
        """Input and the line's keys, or output and the line's screen."""
        if queue_index == RECEIVEQ:
            return (self._input,) if self.line is None else (self._input, self.line.keys)
        return (self._output,) if self.line is None else (self._output, *self.line.writer_files)

    def needs(self, queue_index: int) -> Needs:
        """Reading, and whether the terminal is ours; or writing, perhaps to a file.

        Whoever has a terminal open could type into it (TIOCSTI), for the shell that comes after us: no other ioctl.
        """
        if queue_index == RECEIVEQ:
            return Needs((*plain("readv"), *JOB_CONTROL))
        return Needs((*plain("writev"), *MAPPING), more_files=1, longest_file=None)

    def resize(self, columns: int, rows: int) -> None:
        """The terminal has a new size; the configuration space (four bytes, 5.3.4) says so from now on."""
        self.apply_config(0, _size(columns, rows))

    def serve(self, queue_index: int, queue: Queue, context: WorkerContext) -> None:
        """Serves ``receiveq`` or ``transmitq``."""
        if queue_index == RECEIVEQ:
            self._receive(queue, context)
        else:
            self._transmit(queue, context)

    def _receive(self, queue: Queue, context: WorkerContext) -> None:
        signal.signal(signal.SIGTTIN, signal.SIG_IGN)
        keyboard = Keyboard(
            self._input,
            None if self.line is None else self.line.keys,
            on_end=lambda: context.log(f"{self.name}: end of input"),
        )
        keys = AbortKeys()
        length, _ = queue.taken
        while True:
            chain = queue.wait()
            if chain.readable_ranges:
                raise DeviceProtocolError("5.3.6.1", "a device-readable buffer in receiveq")
            views = _beginning(chain.writable)
            if views and not length:
                # This may take hours.
                queue.is_waiting(True)
                length = queue.take(keyboard.read, views)
                queue.is_waiting(False)
                if not length:
                    serving.sleep_for_ever(queue)
                if keyboard.is_at_terminal and keys.typed(length, views[0][0]):
                    context.interrupt_guest()
            queue.push(chain, length)
            length = 0
            queue.flush()

    def _transmit(self, queue: Queue, context: WorkerContext) -> None:
        losses = Losses(self.name, context.log)
        screen = None if self.line is None else self.line.writer(Track.CONSOLE)

        def lost(error: int) -> None:
            losses.note(error, f"output is lost: {os.strerror(error)}")

        wait = queue.waiter(Output(self._output, screen, lost))
        while True:
            chain = wait()
            if chain.writable_ranges:
                raise DeviceProtocolError("5.3.6.1", "a device-writable buffer in transmitq")
            views = chain.readable
            if screen is not None:
                screen.append(*views)
            queue.is_waiting(True)
            error = _write(self._output, views)
            queue.is_waiting(False)
            if error:
                lost(error)
            queue.push(chain, 0, vectors.total(views))
            # Linux polls for the completion of every buffer; the next write may take long.
            queue.flush()


def _size(columns: int, rows: int) -> bytes:
    """The configuration space: le16 cols, le16 rows."""
    return struct.pack("<HH", min(columns, 0xFFFF), min(rows, 0xFFFF))


def _beginning(views: Sequence[memoryview]) -> list[memoryview]:
    """As much of the beginning of ``views`` as is read at once, pieces of no bytes left out."""
    beginning: list[memoryview] = []
    left = LONGEST_READ
    for view in views:
        part = view[:left]
        if part:
            beginning.append(part)
            left -= len(part)
        if not left or len(beginning) == vectors.IOV_MAX:
            break
    return beginning


class Keyboard:
    """What is typed: at our terminal, until its end (then ``on_end`` is called), and by who is attached (``keys``)."""

    def __init__(self, terminal: int, keys: int | None, on_end: Callable[[], None]) -> None:
        self._terminal = terminal
        self._keys = keys
        self._on_end = on_end
        self._poll = select.poll()
        self._poll.register(terminal, select.POLLIN)
        if keys is not None:
            self._poll.register(keys, select.POLLIN)
        self._has_ended = False
        #: Whether what was read last is from the terminal.
        self.is_at_terminal = False

    def read(self, views: Sequence[memoryview]) -> int:
        """As soon as something is typed: how many bytes were read into ``views``, 0 when nobody will type any more."""
        while self._keys is not None or not self._has_ended:
            fd = self._next()
            self.is_at_terminal = fd == self._terminal
            try:
                length = os.readv(fd, views)
            except BlockingIOError:
                continue  # somebody else was faster
            except OSError:
                # EIO: no terminal any more, or not ours now. Whatever else it is, nothing will come from there.
                if _in_background(fd):
                    self._wait_in_background()
                    continue
                length = 0
            if length:
                return length
            self._end(fd)
        return 0

    def _next(self) -> int:
        """Waits until there is something to read, and where; if in both, in turns."""
        ready = [fd for fd, _ in self._poll.poll()]
        if len(ready) > 1 and self._keys is not None:
            return self._keys if self.is_at_terminal else self._terminal
        return ready[0]

    def _wait_in_background(self) -> None:
        """For some time, or until somebody else types."""
        poll = select.poll()
        if self._keys is not None:
            poll.register(self._keys, select.POLLIN)
        poll.poll(FOREGROUND_CHECK * 1000)

    def _end(self, fd: int) -> None:
        self._poll.unregister(fd)
        if fd == self._terminal:
            self._has_ended = True
            self._on_end()
        else:
            self._keys = None  # the supervisor has the other end, so it is gone, and we are about to be


def _write(fd: int, views: Sequence[memoryview]) -> int:
    """Writes all of ``views``: 0, or the error number for which the rest of them was dropped."""
    rest = list(views)
    while rest:
        try:
            rest = vectors.advance(rest, os.writev(fd, rest[: vectors.IOV_MAX]))
        except BlockingIOError:
            _wait(fd)
        except OSError as error:
            return error.errno or 0
    return 0


def _wait(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    poll.poll()


def _in_background(fd: int) -> bool:
    """Whether ``fd`` is our terminal and another process group has it."""
    try:
        return os.tcgetpgrp(fd) != os.getpgrp()
    except OSError:
        return False
