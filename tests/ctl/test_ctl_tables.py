"""Columns and numbers for people."""

from __future__ import annotations

import pytest

from lguest_mp.ctl import tables


def test_columns_are_below_each_other() -> None:
    lines = tables.columns(("NAME", ">PID", "STATE"), [("a", "12345", "runs"), ("longer", "7", "")])
    assert lines == ["NAME      PID  STATE", "a       12345  runs", "longer      7"]


def test_nothing_that_is_shown_reaches_into_the_terminal() -> None:
    assert tables.columns(("X",), [("a\x1b[2J\r\n\x9bb",)])[1] == "a?[2J???b"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"),
        (0, "0"),
        (999, "999"),
        (1000, "1.0K"),
        (1536, "1.5K"),
        (10 << 10, "10K"),
        (999 << 10, "999K"),
        (1 << 20, "1.0M"),
        (5 << 40, "5.0T"),
        ((1 << 64) - 1, "16E"),
    ],
)
def test_sizes(count: float | None, text: str) -> None:
    assert tables.size(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "-"), (0, "0"), (99_999, "99999"), (100_000, "100k"), (1_234_567, "1.2M"), ((1 << 64) - 1, "18446744T")],
)
def test_numbers(count: float | None, text: str) -> None:
    assert tables.number(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (-1, "0.0s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (3599.6, "1h00m"),
        (86399, "23h59m"),
        (86400 * 400, "400d00h"),
    ],
)
def test_ages(seconds: float | None, text: str) -> None:
    assert tables.age(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (3.214, "0:03.21"), (59.999, "1:00.00"), (4500, "75:00.00")]
)
def test_cpu_time(seconds: float | None, text: str) -> None:
    assert tables.cpu_time(seconds) == text
