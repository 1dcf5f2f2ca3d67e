"""What a guest shows of a known text, with pieces twice and without pieces."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from guestkit.soak.text import Text, line

LINES = 400
TEXT = "".join(map(line, range(LINES)))


def test_all_of_it_once() -> None:
    assert Text(LINES, TEXT).repeats() == []


#: Two pieces that follow each other more closely cannot always be told apart.
APART = 64


@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.integers(0, len(TEXT) // APART - 1), st.integers(1, 4096)), max_size=5), st.integers(1, 64)
)
@example([(0, 1), (1, 1)], 11)
def test_pieces_that_are_shown_twice_are_found(pieces: list[tuple[int, int]], first: int) -> None:
    ends = sorted({first + APART * end: min(size, first + APART * end) for end, size in pieces}.items())
    shown = ""
    shown_to = 0
    for end, size in ends:
        shown += TEXT[shown_to:end] + TEXT[end - size : end]
        shown_to = end
    shown += TEXT[shown_to:]
    assert sum(Text(LINES, shown).repeats()) == sum(size for _, size in ends)


@given(st.integers(0, len(TEXT) - 1), st.integers(1, 5000))
def test_a_piece_that_is_missing_is_found(start: int, size: int) -> None:
    with pytest.raises(AssertionError, match="was to come"):
        Text(LINES, TEXT[:start] + TEXT[start + size :]).repeats()


@given(st.integers(0, len(TEXT)), st.text(st.characters(exclude_characters=TEXT[:4096]), min_size=1, max_size=20))
def test_what_does_not_belong_there_is_found(start: int, foreign: str) -> None:
    with pytest.raises(AssertionError, match="was to come"):
        Text(LINES, TEXT[:start] + foreign + TEXT[start:]).repeats()


def test_a_piece_that_is_longer_than_a_buffer_is_no_repeat() -> None:
    with pytest.raises(AssertionError, match="was to come"):
        Text(LINES, TEXT[:9000] + TEXT[2000:]).repeats()
