"""The console (virtio 1.2, 5.3), on pipes and on terminals."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import signal
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from contextlib import closing, suppress

import pytest
from mockdriver import HANGS, Context, DriverFactory, Idle, MockDriver

from lguest_mp.errors import DeviceProtocolError
from lguest_mp.line import Line
from lguest_mp.screen import ScreenReader
from lguest_mp.virtio import console, serving
from lguest_mp.virtio.console import RECEIVEQ, TRANSMITQ, Console
from lguest_mp.virtio.device import DeviceId
from lguest_mp.virtio.queue import Queue


class Ended(Exception):
    """The worker would sleep for ever."""


@pytest.fixture(autouse=True)
def sleepless(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A worker that would sleep for ever raises Ended, and the signal that it ignores is ours again afterwards."""

    def end(_queue: Queue) -> None:
        raise Ended

    monkeypatch.setattr(serving, "sleep_for_ever", end)
    before = signal.getsignal(signal.SIGTTIN)
    yield
    signal.signal(signal.SIGTTIN, before)


@pytest.fixture
def files() -> Iterator[list[int]]:
    """File descriptors that are closed after the test."""
    files: list[int] = []
    yield files
    for fd in files:
        with suppress(OSError):
            os.close(fd)


@pytest.fixture
def pipe(files: list[int]) -> tuple[int, int]:
    """The read and the write end."""
    ends = os.pipe()
    files += ends
    return ends


def typed(driver: MockDriver, fd: int) -> Context:
    """Lets receiveq's worker read from ``fd`` until there are no more buffers, or no more input; what it said."""
    context = Context()
    with suppress(Ended, Idle):
        Console(input_fd=fd).serve(RECEIVEQ, driver.queue(), context)
    return context


class TestConfiguration:
    def test_what_it_is(self) -> None:
        """5.3.1 to 5.3.3: one port, its size, nothing else."""
        device = Console("console", 5, 6)
        assert (device.device_id, device.queue_names) == (DeviceId.CONSOLE, ("receiveq", "transmitq"))
        assert device.features == 1
        assert device.files == (5, 6)

    def test_the_size(self) -> None:
        """5.3.4: le16 cols, le16 rows."""
        device = Console(columns=0x150, rows=50)
        assert device.config_space() == b"\x50\x01\x32\x00"
        device.resize(132, 43)
        assert device.config_space() == b"\x84\x00\x2b\x00"

    def test_a_size_that_does_not_fit(self) -> None:
        assert Console(columns=1 << 20, rows=1 << 16).config_space() == b"\xff" * 4


class TestReceiving:
    """What is typed goes to the guest."""

    def test_into_the_buffer_whatever_its_layout(self, driver: MockDriver, pipe: tuple[int, int]) -> None:
        """5.3.6; 2.7.4.1."""
        os.write(pipe[1], b"hello, guest")
        buffer = driver.add([], [0, 2, 0, 3, 100], indirect=True)
        typed(driver, pipe[0])
        assert driver.used() == [(buffer.head, 12)]
        assert driver.content(buffer)[:12] == b"hello, guest"

    def test_more_than_fits_waits_for_the_next_buffer(self, driver: MockDriver, pipe: tuple[int, int]) -> None:
        os.write(pipe[1], b"abcdef")
        buffers = [driver.add([], [4]) for _ in range(2)]
        typed(driver, pipe[0])
        assert driver.used() == [(buffers[0].head, 4), (buffers[1].head, 2)]
        assert [driver.content(buffer) for buffer in buffers] == [b"abcd", b"ef\0\0"]

    def test_every_read_is_published_and_interrupts(
        self, driver: MockDriver, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The next key may be hours away."""
        seen = []
        real = os.readv

        def look(fd: int, views: list[memoryview]) -> int:
            seen.append((driver.used_index, driver.interrupts()))
            return real(fd, views)

        monkeypatch.setattr("os.readv", look)
        os.write(pipe[1], b"ab")
        driver.add([], [1])
        driver.add([], [1])
        typed(driver, pipe[0])
        assert seen == [(0, 0), (1, 1)]

    def test_a_buffer_of_no_bytes_is_not_the_end_of_input(self, driver: MockDriver, pipe: tuple[int, int]) -> None:
        os.write(pipe[1], b"a")
        empty, buffer = driver.add([], [0]), driver.add([], [1])
        context = typed(driver, pipe[0])
        assert driver.used() == [(empty.head, 0), (buffer.head, 1)]
        assert context.lines == []

    def test_the_end_of_input_is_said_once_and_slept_on(self, driver: MockDriver, pipe: tuple[int, int]) -> None:
        os.close(pipe[1])
        for _ in range(3):
            driver.add([], [4])
        context = typed(driver, pipe[0])
        assert context.lines == ["console: end of input"]
        assert driver.used() == []

    @pytest.mark.parametrize("number", [errno.EIO, errno.EBADF, errno.EISDIR])
    def test_input_that_cannot_be_read_has_ended(
        self, driver: MockDriver, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        def fail(fd: int, views: list[memoryview]) -> int:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("os.readv", fail)
        driver.add([], [4])
        os.write(pipe[1], b"x")
        assert typed(driver, pipe[0]).lines == ["console: end of input"]

    def test_where_somebody_else_was_faster_it_waits_again(
        self, driver: MockDriver, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A file that does not block, as others may have made it."""
        real = os.readv
        reads = []

        def too_late_at_first(fd: int, views: list[memoryview]) -> int:
            reads.append(fd)
            if len(reads) == 1:
                raise BlockingIOError
            return real(fd, views)

        monkeypatch.setattr("os.readv", too_late_at_first)
        os.write(pipe[1], b"now")
        buffer = driver.add([], [4])
        typed(driver, pipe[0])
        assert reads == [pipe[0]] * 2
        assert driver.used() == [(buffer.head, 3)]

    def test_readable_buffers_are_against_the_rules(self, driver: MockDriver, pipe: tuple[int, int]) -> None:
        """5.3.6.1."""
        driver.add([b"x"], [4])
        with pytest.raises(DeviceProtocolError, match=r"receiveq .*5\.3\.6\.1"):
            typed(driver, pipe[0])

    def test_three_control_c_in_buffers_of_their_own_end_the_guest(
        self, driver: MockDriver, pipe: tuple[int, int]
    ) -> None:
        buffers = [driver.add([], [1]) for _ in range(3)]
        os.write(pipe[1], b"\3\3\3")
        context = typed(driver, pipe[0])
        assert context.interrupts == 1
        assert driver.used() == [(buffer.head, 1) for buffer in buffers], "the guest gets them all the same"

    def test_three_in_one_buffer_do_not(self, driver: MockDriver, pipe: tuple[int, int]) -> None:
        driver.add([], [4])
        os.write(pipe[1], b"\3\3\3")
        assert typed(driver, pipe[0]).interrupts == 0


class TestLine:
    """Who is attached sees what is shown, and types."""

    @pytest.fixture
    def line(self) -> Iterator[Line]:
        with closing(Line()) as line:
            yield line

    def test_output_is_on_the_screen_too_whatever_becomes_of_the_terminal(
        self, driver: MockDriver, line: Line, pipe: tuple[int, int]
    ) -> None:
        os.close(pipe[0])
        driver.add([b"to be ", b"seen"])
        driver.serve(Console(output_fd=pipe[1], line=line), TRANSMITQ)
        assert ScreenReader(line.attach().screen).read_new() == b"to be seen"

    def test_both_keyboards_are_read(self, driver: MockDriver, line: Line, pipe: tuple[int, int]) -> None:
        buffers = [driver.add([], [8]) for _ in range(2)]
        os.write(pipe[1], b"here")
        os.write(line.attach().keys, b"there")
        driver.serve(Console(input_fd=pipe[0], line=line), RECEIVEQ)
        typed = {
            driver.memory.read(buffer.writable[0][0], written)
            for buffer, (_, written) in zip(buffers, driver.used(), strict=True)
        }
        assert typed == {b"here", b"there"}

    def test_the_terminals_end_is_not_that_of_the_keys(
        self, driver: MockDriver, line: Line, pipe: tuple[int, int]
    ) -> None:
        os.close(pipe[1])
        buffer = driver.add([], [8])
        os.write(line.attach().keys, b"on")
        context = driver.serve(Console(input_fd=pipe[0], line=line), RECEIVEQ)
        assert driver.memory.read(buffer.writable[0][0], 2) == b"on"
        assert context.lines in ([], ["console: end of input"])  # the keys may have been read first

    def test_three_control_c_of_somebody_who_is_attached_reach_the_guest_only(
        self, driver: MockDriver, line: Line, pipe: tuple[int, int]
    ) -> None:
        context = Context()
        for _ in range(3):
            driver.add([], [1])
            os.write(line.attach().keys, b"\3")
            try:
                Console(input_fd=pipe[0], line=line).serve(RECEIVEQ, driver.queue(), context)
            except Idle:
                continue
        assert context.interrupts == 0


class TestTransmitting:
    """What the guest prints goes to the terminal."""

    def test_the_buffers_in_order(self, driver: MockDriver, pipe: tuple[int, int]) -> None:
        first = driver.add([b"Hello", b"", b", "])
        second = driver.add([b"world\n"], indirect=True)
        empty = driver.add([b""])
        driver.serve(Console(output_fd=pipe[1]), TRANSMITQ)
        assert os.read(pipe[0], 100) == b"Hello, world\n"
        assert driver.used() == [(first.head, 0), (second.head, 0), (empty.head, 0)]

    def test_each_is_published_before_the_next_is_written(
        self, driver: MockDriver, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """5.3.6, footnote: Linux polls for it."""
        seen = []

        def look(fd: int, views: list[memoryview]) -> int:
            seen.append(driver.used_index)
            return sum(map(len, views))

        monkeypatch.setattr("os.writev", look)
        for _ in range(3):
            driver.add([b"x"])
        driver.serve(Console(output_fd=pipe[1]), TRANSMITQ)
        assert seen == [0, 1, 2]

    def test_short_writes_are_continued(
        self, driver: MockDriver, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = os.writev
        monkeypatch.setattr("os.writev", lambda fd, views: real(fd, [views[0][:2]]))
        driver.add([b"Hello", b"", b", world"])
        driver.serve(Console(output_fd=pipe[1]), TRANSMITQ)
        assert os.read(pipe[0], 100) == b"Hello, world"

    def test_more_pieces_than_a_system_call_takes(self, new_driver: DriverFactory, pipe: tuple[int, int]) -> None:
        driver = new_driver(4096)
        text = bytes(range(256)) * 8
        driver.add([text[i : i + 1] for i in range(len(text))])
        driver.serve(Console(output_fd=pipe[1]), TRANSMITQ)
        assert os.read(pipe[0], 4096) == text

    def test_a_file_that_does_not_block_is_waited_for(self, driver: MockDriver, pipe: tuple[int, int]) -> None:
        """Nothing is lost where the pipe is full."""
        os.set_blocking(pipe[1], False)
        fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, 4096)
        text = os.urandom(50_000)
        received = bytearray()

        def drain() -> None:
            while len(received) < len(text):
                received.extend(os.read(pipe[0], 1000))

        driver.add([text[:20_000], b"", text[20_000:]])
        reader = threading.Thread(target=drain)
        reader.start()
        driver.serve(Console(output_fd=pipe[1]), TRANSMITQ)
        reader.join()
        assert received == text

    def test_waiting_ends_when_there_is_room(self, pipe: tuple[int, int]) -> None:
        console._wait(pipe[1])

    def test_output_that_goes_nowhere_is_dropped_and_said_once(self, driver: MockDriver, pipe: tuple[int, int]) -> None:
        os.close(pipe[0])
        buffers = [driver.add([b"lost"]) for _ in range(3)]
        context = driver.serve(Console(output_fd=pipe[1]), TRANSMITQ)
        assert context.lines == ["console: output is lost: Broken pipe"]
        assert driver.used() == [(buffer.head, 0) for buffer in buffers]

    def test_every_buffer_is_tried_again(
        self, driver: MockDriver, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A full disk need not stay full."""
        real = os.writev
        room = [False, False, True]

        def full(fd: int, views: list[memoryview]) -> int:
            if not room.pop(0):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(fd, views)

        monkeypatch.setattr("os.writev", full)
        for text in (b"one", b"two", b"three"):
            driver.add([text])
        context = driver.serve(Console(output_fd=pipe[1]), TRANSMITQ)
        assert os.read(pipe[0], 100) == b"three"
        assert context.lines == ["console: output is lost: No space left on device"]

    def test_writable_buffers_are_against_the_rules(self, driver: MockDriver, pipe: tuple[int, int]) -> None:
        """5.3.6.1."""
        driver.add([b"x"], [4])
        with pytest.raises(DeviceProtocolError, match=r"transmitq .*5\.3\.6\.1"):
            driver.serve(Console(output_fd=pipe[1]), TRANSMITQ)


def forked(job: Callable[[], None]) -> int:
    """Runs ``job`` in a child process: its PID."""
    child = os.fork()
    if not child:
        status = 1
        signal.alarm(HANGS // 2)
        try:
            job()
            status = 0
        finally:
            os._exit(status)
    return child


class TestTerminal:
    """A launcher on a terminal that is not always its own."""

    def test_raw_input_goes_through(self, driver: MockDriver, files: list[int]) -> None:
        user, terminal = pty.openpty()
        files += (user, terminal)
        tty.setraw(terminal, termios.TCSANOW)
        os.write(user, b"\3\x1a\x1bOA\r")
        buffer = driver.add([], [10])
        typed(driver, terminal)
        assert driver.content(buffer)[:6] == b"\3\x1a\x1bOA\r"

    def test_a_terminal_that_is_gone_is_the_end_of_input(self, driver: MockDriver, files: list[int]) -> None:
        user, terminal = pty.openpty()
        files.append(terminal)
        os.close(user)
        driver.add([], [10])
        assert typed(driver, terminal).lines == ["console: end of input"]

    def test_in_the_background_it_waits_to_be_brought_to_the_foreground(
        self, driver: MockDriver, files: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Reading would stop the launcher, guest and all, by SIGTTIN. A shell moves it to the background and back."""
        monkeypatch.setattr(console, "FOREGROUND_CHECK", 0.01)
        user, terminal = pty.openpty()
        files += (user, terminal)
        tty.setraw(terminal, termios.TCSANOW)
        waiting, waits = os.pipe()
        files += (waiting, waits)
        buffer = driver.add([], [10])

        def background(fd: int) -> bool:
            answer = in_background(fd)
            if answer:
                os.write(waits, b"w")
            return answer

        in_background = console._in_background
        monkeypatch.setattr(console, "_in_background", background)

        def launcher() -> None:
            os.setpgid(0, 0)
            typed(driver, terminal)

        def shell() -> None:
            os.setsid()
            fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)
            child = forked(launcher)
            os.write(user, b"key")
            os.read(waiting, 1)
            os.read(waiting, 1)
            os.tcsetpgrp(terminal, child)
            _, status = os.waitpid(child, os.WUNTRACED)
            assert status == 0, "it was neither stopped nor did it fail"

        _, status = os.waitpid(forked(shell), 0)
        assert status == 0
        assert driver.used() == [(buffer.head, 3)]
        assert driver.content(buffer)[:3] == b"key"

    def test_a_worker_that_sleeps_for_ever_can_be_ended(
        self, driver: MockDriver, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.undo()
        said, says = os.pipe()
        driver.add([], [10])
        os.close(pipe[1])

        class Loud(Context):
            def log(self, text: str) -> None:
                os.write(says, text.encode())

        def worker() -> None:
            Console(input_fd=pipe[0]).serve(RECEIVEQ, driver.sleeping_queue(), Loud())

        child = forked(worker)
        os.close(says)
        assert os.read(said, 100) == b"console: end of input"
        os.close(said)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGTERM
