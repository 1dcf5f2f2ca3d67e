"""The screen: what was shown of late, from two writers to readers whom nobody waits for."""

from __future__ import annotations

import mmap
import os
import signal
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lguest_mp import screen
from lguest_mp.errors import LguestError
from lguest_mp.line import Line
from lguest_mp.screen import KEPT, PIECE, RING, SIZE, ScreenReader, ScreenWriter, Track


@pytest.fixture
def line() -> Iterator[Line]:
    with closing(Line()) as line:
        yield line


def reader(line: Line) -> ScreenReader:
    return ScreenReader(line.attach().screen)


class TestReading:
    """What a reader finds."""

    def test_first_what_was_kept_then_what_is_new(self, line: Line) -> None:
        writer = line.writer(Track.CONSOLE)
        writer.append(b"before ", b"us")
        found = reader(line)
        assert found.read_new() == b"before us"
        assert found.read_new() == b""
        writer.append(b" and after")
        assert found.read_new() == b" and after"
        assert reader(line).read_new() == b"before us and after"

    def test_bytes_one_by_one_are_the_same_also_where_the_ring_begins_anew(self, line: Line) -> None:
        serial, console = line.writer(Track.SERIAL), line.writer(Track.CONSOLE)
        found = reader(line)
        serial.append(b"x" * (RING - 2))
        found.read_new()
        console.append(b"other ")
        for byte in b"bytes":
            serial.append_byte(byte)
        console.append(b" other")
        assert found.read_new() == b"other bytes other"

    def test_only_the_last_is_kept(self, line: Line) -> None:
        writer = line.writer(Track.CONSOLE)
        text = os.urandom(3 * RING)
        writer.append(text)
        assert reader(line).read_new() == text[-KEPT:]

    def test_one_who_is_overtaken_loses_the_oldest(self, line: Line) -> None:
        writer = line.writer(Track.CONSOLE)
        slow = reader(line)
        writer.append(b"x" * 100)
        slow.read_new()
        text = os.urandom(2 * RING)
        writer.append(text)
        assert slow.read_new() == text[-KEPT:]

    @settings(max_examples=50)
    @given(
        st.lists(st.tuples(st.sampled_from(Track), st.integers(1, 3000), st.booleans()), max_size=60),
    )
    def test_two_writers_in_the_order_in_which_they_wrote(self, turns: list[tuple[Track, int, bool]]) -> None:
        """As long as there is room for all of their marks, however often one looks meanwhile."""
        with closing(Line()) as line:
            writers = {track: line.writer(track) for track in Track}
            found = reader(line)
            written, read = b"", b""
            for number, (track, length, look) in enumerate(turns):
                piece = number.to_bytes(2, "little") * length
                writers[track].append(piece)
                written += piece
                if look:
                    read += found.read_new()
            assert read + found.read_new() == written
            if len(written) <= KEPT:
                assert reader(line).read_new() == written

    def test_a_writers_successor_goes_on_where_it_stopped(self, line: Line) -> None:
        line.writer(Track.CONSOLE).append(b"one ")
        line.writer(Track.CONSOLE).append(b"two")
        assert reader(line).read_new() == b"one two"

    def test_while_it_is_written(self, line: Line) -> None:
        """By a process that is killed at some moment: whatever is found is in order, and up to where it was written."""
        found = reader(line)
        pid = os.fork()
        if not pid:
            writer, number = line.writer(Track.CONSOLE), 0
            while True:
                writer.append(number.to_bytes(4, "big") * 500)
                number += 1
        read = bytearray()
        try:
            while len(read) < 40 * RING:
                read += found.read_new()
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        read += found.read_new()
        numbers = [int.from_bytes(read[start : start + 4], "big") for start in range(0, len(read) - 3, 4)]
        assert numbers == sorted(numbers)
        assert len(read) % 4 == 0


class TestNews:
    """Who waits for something new."""

    def test_every_addition_is_an_event_for_everybody(self, line: Line) -> None:
        writer = line.writer(Track.SERIAL)
        with line.attach().news as one, line.attach().news as other:
            for each in (one, other):
                assert each.poll(0) == []
            for _ in range(3):
                writer.append(b"x")
                assert [len(each.poll(0)) for each in (one, other)] == [1, 1]
                assert [len(each.poll(0)) for each in (one, other)] == [0, 0]

    def test_a_counter_that_is_used_up_holds_nobody_up(self, line: Line) -> None:
        os.eventfd_write(line.writer_files[1], (1 << 64) - 2)
        line.writer(Track.CONSOLE).append(b"still")
        line.writer(Track.SERIAL).append_byte(ord("!"))
        assert reader(line).read_new() == b"still!"


class TestLiars:
    """A worker that is not itself any more, and other files."""

    @given(st.lists(st.tuples(st.integers(0, SIZE // 8 - 1), st.integers(0, (1 << 64) - 1)), max_size=30), st.data())
    def test_whatever_is_written_there_a_reader_returns(
        self, words: list[tuple[int, int]], data: st.DataObject
    ) -> None:
        with closing(Line()) as line:
            line.writer(Track.CONSOLE).append(b"x" * 5000)
            found = reader(line)
            found.read_new()
            memory = mmap.mmap(line.files[0], SIZE)
            fields = memoryview(memory).cast("Q")
            for index, value in words:
                fields[index] = value
            for field in (0, 1, 8, 9):  # positions and numbers of marks
                fields[field] = data.draw(st.integers(0, (1 << 64) - 1))
            for _ in range(2):
                assert len(found.read_new()) <= 2 * RING
            assert len(reader(line).read_new()) <= 2 * RING
            successor = line.writer(Track.CONSOLE)
            successor.append(b"y" * (PIECE + 1))

    def test_nobody_can_make_it_shorter(self, line: Line) -> None:
        with pytest.raises(PermissionError):
            os.ftruncate(line.files[0], 0)

    def test_a_reader_cannot_write(self, line: Line) -> None:
        with pytest.raises(PermissionError):
            mmap.mmap(line.attach().screen, SIZE)

    def test_what_is_no_screen(self) -> None:
        reading, writing = os.pipe()
        try:
            with pytest.raises(LguestError, match="no console's screen"):
                ScreenReader(reading)
        finally:
            os.close(reading)
            os.close(writing)

    def test_a_file_of_this_size_is_taken_for_one(self) -> None:
        fd = screen.create()
        try:
            assert ScreenReader(fd).read_new() == b""
            assert isinstance(ScreenWriter(fd, fd, Track.SERIAL), ScreenWriter)
        finally:
            os.close(fd)
