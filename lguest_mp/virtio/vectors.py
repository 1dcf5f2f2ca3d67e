"""Reading into, and writing from, many pieces of memory as one: what preadv and its like leave to their caller."""

from __future__ import annotations

from collections.abc import Sequence

#: The most pieces one system call takes (Linux's UIO_MAXIOV).
IOV_MAX = 1024


def advance(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """``views`` without their first ``count`` bytes."""
    for index, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[index + 1 :]]
        count -= len(view)
    return []


def total(views: Sequence[memoryview]) -> int:
    """How many bytes there are in ``views``."""
    return sum(map(len, views))
