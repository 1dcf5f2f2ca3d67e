"""What is measured of a guest, ours beside QEMU's: each measure gives rows of numbers from interleaved rounds.

The machine is never quiet and its speed drifts, so ours and QEMU's are measured in turns, and what counts is the ratio
within each round. A measure is a function from a :class:`Bench` to its rows; a new one is added to ``MEASURES``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from guestkit.measures.bench import Bench, Row
from guestkit.measures.crash import crash
from guestkit.measures.disk import disk, exits
from guestkit.measures.footprint import density, idle, memory
from guestkit.measures.launch import boot, start
from guestkit.measures.lguest import hypercalls
from guestkit.measures.network import net
from guestkit.measures.queue import queue
from guestkit.measures.work import work

MEASURES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "start": start,
    "boot": boot,
    "work": work,
    "queue": queue,
    "disk": disk,
    "exits": exits,
    "net": net,
    "idle": idle,
    "memory": memory,
    "density": density,
    "hypercalls": hypercalls,
    "crash": crash,
}

#: Those of ours alone, for which there need be no QEMU.
ALONE = frozenset({"start", "queue", "exits", "memory", "hypercalls", "crash"})
