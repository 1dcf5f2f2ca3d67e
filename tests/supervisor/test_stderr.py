"""Standard error: every kind of file that it is, and that nobody waits for it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import socket
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from lguest_mp.supervisor import stderr
from lguest_mp.supervisor.log import say
from lguest_mp.supervisor.stderr import StandardError

#: Whatever takes longer, in seconds, will never be.
HANGS = 60

#: A kind of file: the side that is written to, and how to read what was written.
Ends = tuple[int, Callable[[], bytes]]


@pytest.fixture
def files() -> Iterator[list[int]]:
    files: list[int] = []
    yield files
    for fd in files:
        with suppress(OSError):
            os.close(fd)


def read_all(fd: int) -> bytes:
    """What is there now."""
    data = b""
    while select.select([fd], [], [], 0)[0] and (part := os.read(fd, 65536)):
        data += part
    return data


def open_pipe(files: list[int]) -> Ends:
    reading, writing = os.pipe()
    files += [reading, writing]
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    return writing, lambda: read_all(reading)


def open_terminal(files: list[int]) -> Ends:
    person, terminal = pty.openpty()
    files += [person, terminal]
    tty.setraw(terminal)
    return terminal, lambda: read_all(person)


def open_socket(files: list[int]) -> Ends:
    ours, theirs = (each.detach() for each in socket.socketpair())
    files += [ours, theirs]
    return theirs, lambda: read_all(ours)


KINDS = pytest.mark.parametrize("kind", [open_pipe, open_terminal, open_socket])


@KINDS
def test_a_line_is_shown_at_once(kind: Callable[[list[int]], Ends], files: list[int]) -> None:
    fd, read = kind(files)
    with closing(StandardError(fd)) as output:
        output.show(5, "the guest powered off")
        assert read() == b"lguest: the guest powered off\n"


@KINDS
def test_nobody_waits_for_who_does_not_read_and_no_line_is_torn(
    kind: Callable[[list[int]], Ends], files: list[int]
) -> None:
    fd, read = kind(files)
    with closing(StandardError(fd)) as output:
        for number in range(10_000):
            output.show(5, f"{number:0100}")
        shown = read()
        # What a terminal takes reaches its other side a little later, and then there is room again.
        deadline = time.monotonic() + HANGS
        while b"were not shown" not in shown and time.monotonic() < deadline:
            if select.select([output.fd], [], [], 0.01)[0]:
                output.flush()
            shown += read()
    lines = shown.decode().splitlines()
    lost = int(lines[-1].split()[1])
    assert lines[:-1] == [f"lguest: {number:0100}" for number in range(len(lines) - 1)]
    assert lines[-1] == f"lguest: {lost} lines were not shown: standard error was stuck"
    assert lost + len(lines) - 1 == 10_000


@KINDS
def test_nobody_s_file_is_made_non_blocking(kind: Callable[[list[int]], Ends], files: list[int]) -> None:
    fd, _ = kind(files)
    with closing(StandardError(fd)) as output:
        output.show(5, "x")
        assert os.get_blocking(fd)


def test_a_stopped_terminal_gets_its_lines_when_it_goes_on(files: list[int]) -> None:
    fd, read = open_terminal(files)
    termios.tcflow(fd, termios.TCOOFF)
    with closing(StandardError(fd)) as output:
        output.show(5, "one")
        output.show(5, "two")
        assert read() == b""
        assert not select.select([output.fd], [], [], 0)[0]
        termios.tcflow(fd, termios.TCOON)
        assert select.select([output.fd], [], [], 10)[0]
        output.flush()
        assert read() == b"lguest: one\nlguest: two\n"


def test_the_end_waits_a_moment_and_not_for_ever(files: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stderr, "PATIENCE", 0.05)
    fd, read = open_terminal(files)
    termios.tcflow(fd, termios.TCOOFF)
    output = StandardError(fd)
    output.show(5, "never seen")
    output.close()
    termios.tcflow(fd, termios.TCOON)
    assert read() == b""


def test_who_may_not_open_it_again_asks_before_writing(files: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of another user's, after su; or there is no /proc."""

    def refuse(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "open", refuse)
    fd, read = open_pipe(files)
    with closing(StandardError(fd)) as output:
        for _ in range(1000):
            output.show(5, "x" * 100)
        assert read().startswith(b"lguest: xxx")
        output.flush()
        assert len(read()) == 4096


def test_a_file_is_written_where_the_others_write(tmp_path: Path, files: list[int]) -> None:
    fd = os.open(tmp_path / "report", os.O_CREAT | os.O_RDWR)
    files.append(fd)
    os.write(fd, b"before\n")
    with closing(StandardError(fd)) as output:
        output.show(5, "a line")
    os.write(fd, b"after\n")
    assert (tmp_path / "report").read_text() == "before\nlguest: a line\nafter\n"


def test_a_reader_that_is_gone_is_nobody_s_end(files: list[int]) -> None:
    fd, _ = open_pipe(files)
    os.close(files[0])
    with closing(StandardError(fd)) as output:
        output.show(5, "one")
        output.show(5, "two")
        assert not select.select([output.fd], [], [], 0)[0]


def test_a_closed_standard_error_is_silent() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    os.close(writing)
    with closing(StandardError(writing)) as output:
        output.show(5, "one")


def test_lines_for_the_journal_have_their_level(files: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    fd, read = open_socket(files)
    found = os.fstat(fd)
    monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
    with closing(StandardError(fd)) as output:
        output.show(3, "the guest died")
    assert read() == b"<3>lguest: the guest died\n"


def test_the_journal_of_somebody_else_gets_no_levels(files: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable is inherited by who has standard error somewhere else."""
    monkeypatch.setenv("JOURNAL_STREAM", "1:2")
    fd, read = open_socket(files)
    with closing(StandardError(fd)) as output:
        output.show(3, "the guest died")
    assert read() == b"lguest: the guest died\n"


def test_what_is_said_without_a_log(capfd: pytest.CaptureFixture[str]) -> None:
    say("no\tsuch kernel")
    assert capfd.readouterr().err == "lguest: no?such kernel\n"
