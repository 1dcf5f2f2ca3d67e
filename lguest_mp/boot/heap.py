"""The C library's heap while a kernel is unpacked: large buffers are used again, and given back at the end.

python-lz4 takes two buffers of 8 MiB for every block: it unpacks into one, copies to the other, and frees the first.
glibc's malloc maps each of them afresh, or grows the heap for it and cuts it back, so that the host's kernel clears
16 MiB of pages again and again: more work than everything else that a launch does to a kernel. Once a larger buffer has
been freed, malloc moves its thresholds up (mallopt(3), "dynamic mmap threshold") and keeps what was freed for whoever
asks next. Then it has to be told when that is over. With another C library nothing changes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

#: More than those two buffers, less than the 32 MiB up to which glibc learns.
LARGE_BUFFER = 24 << 20


@contextmanager
def large_buffers() -> Iterator[None]:
    """Inside, the heap keeps what is freed; at the end it gives it back."""
    bytes(LARGE_BUFFER)  # mapped, never touched, and freed
    try:
        yield
    finally:
        give_back()


def give_back() -> None:
    """Returns what is free in this process's heap to the host."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
