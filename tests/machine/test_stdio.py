"""The serial port's two ends on the host: terminals, pipes and files as people connect them."""

from __future__ import annotations

import fcntl
import os
import pty
import tempfile
import termios
import tty
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field

import pytest

from lguest_mp.line import Line
from lguest_mp.machine.eventloop import EventLoop
from lguest_mp.machine.stdio import StandardInput, StandardOutput
from lguest_mp.screen import ScreenReader, Track

CONTROL_C = b"\x03"


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    loop = EventLoop()
    yield loop
    loop.close()


@dataclass
class Pipe:
    reader: int
    writer: int
    closed: set[int] = field(default_factory=set)

    def close(self, *ends: int) -> None:
        for end in ends:
            if end not in self.closed:
                self.closed.add(end)
                os.close(end)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe(*os.pipe())
    yield pipe
    pipe.close(pipe.reader, pipe.writer)


@pytest.fixture
def terminal() -> Iterator[Pipe]:
    """A raw terminal: ``reader`` is the guest's side, ``writer`` the person's."""
    person, guest = pty.openpty()
    tty.setraw(guest)
    pair = Pipe(guest, person)
    yield pair
    pair.close(guest, person)


# Output


def test_a_byte_is_out_when_put_returns(loop: EventLoop, pipe: Pipe) -> None:
    output = StandardOutput(pipe.writer, loop)
    for byte in b"hello":
        output.put(byte)
    assert not output.busy
    assert os.read(pipe.reader, 100) == b"hello"
    output.close()


def fill(fd: int) -> int:
    """Fills a pipe to the brim; the number of bytes."""
    os.set_blocking(fd, False)
    total = 0
    try:
        while True:
            total += os.write(fd, bytes(4096))
    except BlockingIOError:
        os.set_blocking(fd, True)
        return total


def drain(fd: int, length: int) -> bytes:
    data = b""
    while len(data) < length:
        data += os.read(fd, length - len(data))
    return data


def test_output_that_is_stuck_is_kept_and_sent_in_order_when_it_goes_on(loop: EventLoop, pipe: Pipe) -> None:
    fcntl.fcntl(pipe.writer, fcntl.F_SETPIPE_SZ, 4096)
    idle: list[bool] = []
    output = StandardOutput(pipe.writer, loop)
    output.on_idle = lambda: idle.append(output.busy)
    full = fill(pipe.writer)
    text = bytes(index % 251 for index in range(6000))
    for byte in text:
        output.put(byte)
    assert output.busy
    drain(pipe.reader, full)
    received = b""
    while len(received) < len(text):
        loop.step()
        received += os.read(pipe.reader, 4096)
    assert received == text
    assert not output.busy
    assert idle == [False]
    output.put(0x21)
    assert os.read(pipe.reader, 10) == b"!"
    output.close()


def test_what_is_stuck_at_the_end_is_flushed_if_it_can_be(loop: EventLoop, pipe: Pipe) -> None:
    output = StandardOutput(pipe.writer, loop)
    full = fill(pipe.writer)
    output.put(0x41)
    output.put(0x42)
    output.flush(0)
    drain(pipe.reader, full)
    output.flush(1)
    assert os.read(pipe.reader, 10) == b"AB"
    output.close()


def test_a_stopped_terminal_is_not_waited_for(loop: EventLoop, terminal: Pipe) -> None:
    output = StandardOutput(terminal.reader, loop)
    termios.tcflow(terminal.reader, termios.TCOOFF)
    for byte in b"stopped":
        output.put(byte)
    assert output.busy
    termios.tcflow(terminal.reader, termios.TCOON)
    while output.busy:
        loop.step(None)
    assert drain(terminal.writer, 7) == b"stopped"
    output.close()


def test_output_that_nobody_reads_any_more_is_dropped(loop: EventLoop, pipe: Pipe) -> None:
    output = StandardOutput(pipe.writer, loop)
    pipe.close(pipe.reader)
    output.put(0x41)
    assert not output.busy
    output.close()


def test_a_backlog_has_an_end(loop: EventLoop, pipe: Pipe) -> None:
    output = StandardOutput(pipe.writer, loop)
    full = fill(pipe.writer)
    for _ in range(1 << 17):
        output.put(0x41)
    drain(pipe.reader, full)
    total = 0
    os.set_blocking(pipe.reader, False)
    try:
        while True:
            output.flush(0)
            total += len(os.read(pipe.reader, 1 << 20))
    except BlockingIOError:
        output.close()
    assert total == 1 << 16


# Those who are attached


@pytest.fixture
def line() -> Iterator[Line]:
    with closing(Line()) as line:
        yield line


def shown(line: Line) -> bytes:
    return ScreenReader(line.attach().screen).read_new()


def test_output_is_on_the_screen_whether_or_not_the_terminal_takes_it(loop: EventLoop, pipe: Pipe, line: Line) -> None:
    output = StandardOutput(pipe.writer, loop, line.writer(Track.SERIAL))
    fill(pipe.writer)
    for byte in b"stuck":
        output.put(byte)
    assert output.busy
    assert shown(line) == b"stuck"
    pipe.close(pipe.reader)
    while output.busy:
        loop.step(None)
    for byte in b", gone":
        output.put(byte)
    assert shown(line) == b"stuck, gone", "and each byte once"
    output.close()


def test_keys_are_taken_as_the_guest_wants_them_and_three_control_c_are_three_keys(loop: EventLoop, line: Line) -> None:
    receiver = Receiver(wanted=False)
    source = connect(line.keys, loop, receiver)
    source.take()
    keys = line.attach().keys
    os.write(keys, CONTROL_C)
    loop.step()
    assert receiver.data == b""
    receiver.wanted = True
    for _ in range(3):
        source.resume()
        loop.step(None)
        os.write(keys, CONTROL_C)
    assert receiver.data == CONTROL_C * 3
    assert receiver.interrupts == 0


def test_keys_are_somebody_elses_after_release(loop: EventLoop, line: Line) -> None:
    receiver = Receiver()
    source = connect(line.keys, loop, receiver)
    source.take()
    source.release()
    os.write(line.attach().keys, b"for the console")
    loop.step()
    assert receiver.data == b""
    assert os.read(line.keys, 100) == b"for the console"
    source.take()
    os.write(line.attach().keys, b"ours again")
    loop.step(None)
    assert receiver.data == b"ours again"


# Input


@dataclass
class Receiver:
    """A serial port's receiver."""

    wanted: bool = True
    data: bytearray = field(default_factory=bytearray)
    interrupts: int = 0

    def receive(self, data: bytes) -> None:
        self.data += data

    def interrupt(self) -> None:
        self.interrupts += 1


def connect(fd: int, loop: EventLoop, receiver: Receiver) -> StandardInput:
    return StandardInput(
        fd, loop, receive=receiver.receive, wanted=lambda: receiver.wanted, interrupt=receiver.interrupt
    )


def test_a_terminal_is_read_also_while_the_guest_takes_nothing(loop: EventLoop, terminal: Pipe) -> None:
    receiver = Receiver(wanted=False)
    connect(terminal.reader, loop, receiver).take()
    os.write(terminal.writer, b"abc")
    loop.step(None)
    assert receiver.data == b"abc"


def test_three_control_c_interrupt_the_guest_and_reach_it(loop: EventLoop, terminal: Pipe) -> None:
    receiver = Receiver(wanted=False)
    connect(terminal.reader, loop, receiver).take()
    for _ in range(3):
        os.write(terminal.writer, CONTROL_C)
        loop.step(None)
    assert receiver.interrupts == 1
    assert receiver.data == CONTROL_C * 3


def test_a_pipe_is_read_only_when_the_guest_wants_input(loop: EventLoop, pipe: Pipe) -> None:
    receiver = Receiver(wanted=False)
    source = connect(pipe.reader, loop, receiver)
    source.take()
    os.write(pipe.writer, bytes(range(40)))
    loop.step()
    assert receiver.data == b""
    receiver.wanted = True
    source.resume()
    loop.step()
    receiver.wanted = False
    loop.step()
    # A FIFO's worth at a time, and one more that was asked for when there was still room.
    assert 16 <= len(receiver.data) <= 32
    loop.step()
    assert len(receiver.data) <= 32
    receiver.wanted = True
    source.resume()
    while len(receiver.data) < 40:
        loop.step()
    assert receiver.data == bytes(range(40))


def test_nothing_is_taken_after_release_and_everything_again_after_take(loop: EventLoop, terminal: Pipe) -> None:
    receiver = Receiver()
    source = connect(terminal.reader, loop, receiver)
    source.take()
    source.release()
    os.write(terminal.writer, b"for somebody else")
    loop.step()
    assert receiver.data == b""
    assert os.read(terminal.reader, 100) == b"for somebody else"
    source.take()
    source.take()
    os.write(terminal.writer, b"ours")
    loop.step(None)
    assert receiver.data == b"ours"


def test_resuming_what_is_not_ours_takes_nothing(loop: EventLoop, pipe: Pipe) -> None:
    receiver = Receiver()
    source = connect(pipe.reader, loop, receiver)
    source.resume()
    os.write(pipe.writer, b"x")
    loop.step()
    assert receiver.data == b""


def test_the_end_of_input_is_the_end_of_listening(loop: EventLoop, pipe: Pipe) -> None:
    receiver = Receiver()
    source = connect(pipe.reader, loop, receiver)
    source.take()
    os.write(pipe.writer, b"last")
    pipe.close(pipe.writer)
    for _ in range(5):
        loop.step()
    assert receiver.data == b"last"
    source.resume()
    source.release()
    source.take()
    loop.step()
    assert receiver.interrupts == 0


@pytest.mark.parametrize("content", [b"", b"a script\n" * 20])
def test_a_regular_file_is_read_to_its_end(loop: EventLoop, content: bytes) -> None:
    receiver = Receiver()
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.seek(0)
        connect(file.fileno(), loop, receiver).take()
        for _ in range(30):
            loop.step()
    assert receiver.data == content


def test_no_input_at_all(loop: EventLoop) -> None:
    receiver = Receiver()
    with open("/dev/null", "rb") as null:
        connect(null.fileno(), loop, receiver).take()
        for _ in range(3):
            loop.step()
    assert receiver.data == b""


def test_a_terminal_that_cannot_be_read_now_is_tried_again_later(
    loop: EventLoop, terminal: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EIO is what reading gives while another process group has the terminal and SIGTTIN is ignored."""
    receiver = Receiver()
    later: list[float] = []
    monkeypatch.setattr(loop, "call_later", lambda seconds, _handler: later.append(seconds))
    connect(terminal.reader, loop, receiver).take()
    os.write(terminal.writer, b"x")
    with monkeypatch.context() as patch:
        patch.setattr("os.read", _io_error)
        loop.step(None)
    assert later == [1.0]
    loop.step()
    assert receiver.data == b""


def _io_error(_fd: int, _length: int) -> bytes:
    raise OSError(5, "Input/output error")
