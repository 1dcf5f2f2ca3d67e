"""The log: what is kept, what is shown, and that nobody talks the others down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lguest_mp.supervisor.log import (
    BURST,
    LONGEST_LINE,
    MOST_CHARACTERS,
    MOST_ENTRIES,
    RATE,
    Entry,
    Level,
    Log,
    printable,
)


@dataclass
class Shown:
    """An output that remembers."""

    fd: int = -1
    lines: list[tuple[int, str]] = field(default_factory=list)

    def show(self, level: int, text: str) -> None:
        self.lines.append((level, text))

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing is open."""


@dataclass
class Clock:
    seconds: float = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def shown() -> Shown:
    return Shown()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(shown: Shown, clock: Clock) -> Log:
    return Log(shown, clock=clock)


def texts(entries: list[Entry]) -> list[str]:
    return [entry.text for entry in entries]


def test_a_line_is_kept_with_its_time_level_and_source(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1234.5)
    log.say("a word", Level.ERROR, "cpu")
    log.say("another")
    assert log.entries() == [Entry(1234.5, 3, "cpu", "a word"), Entry(1234.5, 5, "", "another")]


def test_what_is_merely_informative_is_kept_and_not_shown(log: Log, shown: Shown) -> None:
    for level in Level:
        log.say(level.name, level)
    assert texts(log.entries()) == ["ERROR", "WARNING", "NOTICE", "INFO", "DEBUG"]
    assert shown.lines == [(3, "ERROR"), (4, "WARNING"), (5, "NOTICE")]


def test_verbose_shows_everything(shown: Shown) -> None:
    log = Log(shown, verbose=True)
    log.say("details", Level.DEBUG)
    assert shown.lines == [(7, "details")]


def test_a_process_s_own_words_are_shown_with_its_name_and_kept_without(log: Log, shown: Shown) -> None:
    log.quote("block0/requestq", "  File nowhere")
    assert shown.lines == [(4, "block0/requestq:   File nowhere")]
    assert texts(log.entries("block0/requestq")) == ["  File nowhere"]


def test_entries_of_one_source_and_of_all_in_the_order_they_were_said(log: Log) -> None:
    for number in range(6):
        log.say(str(number), source=("", "cpu", "rng0/requestq")[number % 3])
    assert texts(log.entries()) == ["0", "1", "2", "3", "4", "5"]
    assert texts(log.entries("")) == ["0", "3"]
    assert texts(log.entries("cpu")) == ["1", "4"]
    assert texts(log.entries("nobody")) == []
    assert texts(log.entries(last=2)) == ["4", "5"]
    assert texts(log.entries("cpu", last=1)) == ["4"]
    assert log.entries(last=0) == []


def test_a_flood_of_one_source_leaves_the_lines_of_the_others(log: Log) -> None:
    log.say("the supervisor's")
    log.say("the machine's", source="cpu")
    for number in range(3 * MOST_ENTRIES):
        log.say(f"line {number}", Level.DEBUG, "net0/receiveq")
    assert texts(log.entries(""))[:1] == ["the supervisor's"]
    assert texts(log.entries("cpu")) == ["the machine's"]
    kept = texts(log.entries("net0/receiveq"))
    assert kept == [f"line {number}" for number in range(3 * MOST_ENTRIES - len(kept), 3 * MOST_ENTRIES)]
    assert len(log.entries()) == MOST_ENTRIES


@given(st.lists(st.tuples(st.sampled_from(["", "a", "b", "c"]), st.integers(0, 3000)), max_size=50), st.integers(1, 80))
def test_what_is_kept_is_bounded_whoever_says_how_much(said: list[tuple[str, int]], times: int) -> None:
    log = Log(Shown())
    for _ in range(times):
        for source, length in said:
            log.say("x" * length, Level.DEBUG, source)
    kept = log.entries()
    assert len(kept) <= MOST_ENTRIES
    assert sum(len(entry.text) for entry in kept) <= MOST_CHARACTERS
    assert {entry.source for entry in kept} == {source for source, _ in said}


def test_the_newest_line_is_never_the_one_that_is_lost(log: Log) -> None:
    for number in range(2 * MOST_ENTRIES):
        log.say(f"{number}", source="" if number % 2 else "cpu", level=Level.DEBUG)
        assert log.entries(last=1)[0].text == f"{number}"


def test_who_says_too_much_too_fast_is_counted_and_not_quoted(log: Log, shown: Shown, clock: Clock) -> None:
    for number in range(BURST + 30):
        log.quote("cpu", f"line {number}")
    assert len(shown.lines) == BURST + 1
    assert shown.lines[-1] == (4, "cpu: too many lines; some are dropped")
    clock.seconds += 2 / RATE
    log.quote("cpu", "later")
    assert shown.lines[-2:] == [(4, "cpu: 30 lines were dropped"), (4, "cpu: later")]


def test_others_may_speak_meanwhile_and_the_supervisor_always(log: Log, shown: Shown) -> None:
    for _ in range(2 * BURST):
        log.quote("cpu", "flood")
    log.quote("rng0/requestq", "hello")
    for _ in range(2 * BURST):
        log.say("the supervisor's")
    assert (4, "rng0/requestq: hello") in shown.lines
    assert shown.lines.count((5, "the supervisor's")) == 2 * BURST


def test_last_words_are_heard_after_a_flood(log: Log, shown: Shown) -> None:
    for _ in range(BURST + 5):
        log.quote("cpu", "flood")
    log.forgive("cpu")
    log.quote("cpu", "why it died")
    assert shown.lines[-2:] == [(4, "cpu: 5 lines were dropped"), (4, "cpu: why it died")]


def test_subscribers_hear_every_line_until_they_do_not_want_to(log: Log) -> None:
    heard: list[str] = []
    also: list[str] = []
    stop = log.subscribe(lambda entry: heard.append(entry.text))
    log.subscribe(lambda entry: also.append(entry.text))
    log.say("one", Level.DEBUG)
    stop()
    stop()
    log.say("two")
    assert heard == ["one"]
    assert also == ["one", "two"]


def test_a_subscriber_may_leave_while_it_is_told(log: Log) -> None:
    heard: list[str] = []
    leave: list[Callable[[], None]] = []

    def once(entry: Entry) -> None:
        heard.append(entry.text)
        leave[0]()

    leave.append(log.subscribe(once))
    log.subscribe(lambda entry: heard.append(f"also {entry.text}"))
    log.say("one")
    log.say("two")
    assert heard == ["one", "also one", "also two"]


@given(st.text(max_size=2 * LONGEST_LINE))
def test_a_line_is_one_printable_line_with_an_end(text: str) -> None:
    line = printable(text)
    assert line.isprintable()
    assert len(line) <= LONGEST_LINE
    if text.isprintable() and len(text) <= LONGEST_LINE:
        assert line == text


def test_control_characters_are_not_kept_either(log: Log) -> None:
    log.say("a\33[2Jb\nc")
    assert texts(log.entries()) == ["a?[2Jb?c"]
