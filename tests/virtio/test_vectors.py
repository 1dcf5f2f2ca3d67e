"""Many pieces of memory as one."""

from __future__ import annotations

import pytest

from lguest_mp.virtio import vectors


@pytest.mark.parametrize(
    ("count", "rest"),
    [
        (0, [b"abc", b"de"]),
        (1, [b"bc", b"de"]),
        (3, [b"de"]),
        (4, [b"e"]),
        (5, []),
    ],
)
def test_advance(count: int, rest: list[bytes]) -> None:
    views = [memoryview(piece) for piece in (b"", b"abc", b"", b"de", b"")]
    assert [bytes(view) for view in vectors.advance(views, count) if view] == rest


def test_advancing_over_nothing_ends() -> None:
    assert vectors.advance([memoryview(b"")], 0) == []


def test_total() -> None:
    assert vectors.total([memoryview(b"abc"), memoryview(b""), memoryview(b"d")]) == 4
