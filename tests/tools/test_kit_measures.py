"""A row of the benchmark: whether its goal is reached, be it a most or a least."""

from __future__ import annotations

import pytest

from guestkit.measures import Row


@pytest.mark.parametrize(
    ("row", "met"),
    [
        (Row("time", "s", (1.0, 9.0, 2.0), (1.0, 3.0, 2.0), goal=1.0), True),
        (Row("time", "s", (1.1, 9.0, 2.0), (1.0, 3.0, 2.0), goal=1.0), False),
        (Row("speed", "MiB/s", (8.0, 1.0, 9.0), (10.0, 10.0, 10.0), goal=0.8, more_is_better=True), True),
        (Row("speed", "MiB/s", (7.9, 1.0, 9.0), (10.0, 10.0, 10.0), goal=0.8, more_is_better=True), False),
        (Row("size", "MiB", (2.0, 1.0), goal=1.5, absolute=True), True),
        (Row("size", "MiB", (2.0,), goal=1.5, absolute=True), False),
        (Row("size", "MiB", (2.0,)), None),
    ],
)
def test_the_median_of_the_rounds_counts(row: Row, met: bool | None) -> None:
    assert row.is_met is met
