"""Three ^C within a second end the guest."""

from __future__ import annotations

import pytest

from lguest_mp.abort import AbortKeys

C = (1, 3)


def asked(*reads: tuple[float, tuple[int, int]]) -> bool:
    """Whether the guest's end is asked for by reads of (length, first byte) at those times."""
    now = 0.0
    keys = AbortKeys(lambda: now)
    answers = []
    for now, read in reads:  # noqa: B007 -- the clock reads it
        answers.append(keys.typed(*read))
    assert not any(answers[:-1])
    return answers[-1]


@pytest.mark.parametrize("start", [0.0, 100.0])
def test_three_within_a_second(start: float) -> None:
    assert asked((start, C), (start + 0.4, C), (start + 0.9, C))


def test_two_are_the_guests_own() -> None:
    assert not asked((0, C), (0.1, C))


def test_three_that_take_longer_are_the_guests_own() -> None:
    assert not asked((0, C), (0.9, C), (1.8, C))


def test_the_last_three_count() -> None:
    assert asked((0, C), (0.9, C), (1.8, C), (1.85, C))


def test_another_key_in_between_starts_afresh() -> None:
    assert not asked((0, C), (0.1, C), (0.2, (1, ord("x"))), (0.3, C))


def test_pasting_them_does_nothing() -> None:
    """Each has to be a read of its own."""
    assert not asked((0, (3, 3)), (0.1, (2, 3)), (0.2, (3, 3)))


def test_after_a_request_it_starts_afresh() -> None:
    keys = AbortKeys(lambda: 0.0)
    assert [keys.typed(*C) for _ in range(6)] == [False, False, True, False, False, True]
