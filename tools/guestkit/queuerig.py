"""``python -m guestkit.queuerig LIBRARY IMAGE ROUNDS [REQUESTS]``: a virtqueue alone, with a driver in C.

The driver keeps a disk's requestq busy, each side is a process of its own, and they share memory and two eventfds, as a
guest and a worker do. The device is a worker of ours with one core or the other (``compiled``, ``python``), or the loop
of lguest's launcher (``C``). Both are in LIBRARY (``c/queue-rig.c``). Printed is JSON: for each load, round by round,
how many requests each device has served in a second, and how much processor time (in microseconds) each took it. The
driver checks every answer.

It takes the package itself, so it runs in its environment.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from lguest_mp import core
from lguest_mp.memory import GuestMemory
from lguest_mp.prctl import die_with_parent
from lguest_mp.virtio.block import SECTOR, Block, BlockFeature
from lguest_mp.virtio.device import Feature, QueueLayout

MIB = 1 << 20
#: How long a driver may take for its requests, in seconds, before it is taken to have lost a wake-up.
PATIENCE = 60
_SIZE = 256
_LAYOUT = QueueLayout(_SIZE, 0x1000, 0x3000, 0x4000)
_BUFFERS = 0x10000
_MEMORY = 16 * MIB
_EVENT_IDX = Feature.RING_EVENT_IDX | Feature.RING_INDIRECT_DESC | Feature.VERSION_1 | BlockFeature.FLUSH


@dataclass(frozen=True)
class Load:
    """Requests of ``length`` bytes in as many ``segments``, of which ``depth`` are under way until all are served."""

    name: str
    is_write: bool
    length: int
    depth: int
    requests: int
    segments: int = 1
    is_indirect: bool = False


LOADS = [
    Load("4 KiB reads, depth 1", is_write=False, length=4096, depth=1, requests=20_000),
    Load("4 KiB reads, depth 32", is_write=False, length=4096, depth=32, requests=60_000),
    Load("4 KiB writes, depth 1", is_write=True, length=4096, depth=1, requests=20_000),
    Load("4 KiB writes, depth 32", is_write=True, length=4096, depth=32, requests=60_000),
    Load("64 KiB reads, depth 1", is_write=False, length=65536, depth=1, requests=8_000),
    Load("64 KiB reads, depth 32", is_write=False, length=65536, depth=32, requests=15_000),
    Load("64 KiB writes, depth 1", is_write=True, length=65536, depth=1, requests=8_000),
    Load("64 KiB writes, depth 32", is_write=True, length=65536, depth=32, requests=15_000),
    Load("64 KiB in 16, depth 1", False, 65536, 1, 8_000, segments=16, is_indirect=True),
    Load("64 KiB in 16, depth 32", False, 65536, 32, 15_000, segments=16, is_indirect=True),
]


class _Queue(ctypes.Structure):
    _fields_ = (
        ("memory", ctypes.c_uint64),
        ("size", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("table", "available", "used")),
        *((name, ctypes.c_int32) for name in ("kick", "call")),
    )


class _Load(ctypes.Structure):
    _fields_ = (
        ("buffers", ctypes.c_uint64),
        *(
            (name, ctypes.c_uint32)
            for name in ("is_write", "length", "segments", "is_indirect", "depth", "uses_event_idx")
        ),
        *((name, ctypes.c_uint64) for name in ("requests", "sectors")),
    )


class Context:
    """A WorkerContext; nothing is to be said."""

    def log(self, text: str) -> None:
        raise AssertionError(text)

    def interrupt_guest(self) -> None:
        raise AssertionError

    def config_changed(self, offset: int, data: bytes) -> None:
        raise AssertionError


class Rig:
    """A guest's memory with one queue, and a disk."""

    def __init__(self, library: Path, image: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.drive.restype = ctypes.c_uint64
        self._disk = Block("block0", image)

    def close(self) -> None:
        self._disk.close()

    def serve(self, load: Load, device: str) -> tuple[float, float]:
        """How many requests ``device`` serves in a second, and how much processor time (us) it takes for one."""
        memory = GuestMemory(_MEMORY)
        kick, call = os.eventfd(0, os.EFD_CLOEXEC), os.eventfd(0, os.EFD_CLOEXEC)
        queue = _Queue(
            memory.address, _SIZE, _LAYOUT.descriptor_table, _LAYOUT.available_ring, _LAYOUT.used_ring, kick, call
        )
        sectors = self._disk.capacity
        work = _Load(
            _BUFFERS,
            load.is_write,
            load.length,
            load.segments,
            load.is_indirect,
            load.depth,
            device != "C",
            load.requests,
            sectors,
        )

        def serve() -> None:
            if device == "C":
                os.eventfd_write(call, 1)
                self._library.serve(ctypes.byref(queue), self._disk.files[0], ctypes.c_uint64(sectors * SECTOR))
            ours = core.queue(device)(memory, _LAYOUT, _EVENT_IDX, kick, call)
            os.eventfd_write(call, 1)
            self._disk.serve(0, ours, Context())

        worker = _forked(serve)
        try:
            signal.alarm(PATIENCE)
            os.eventfd_read(call)  # it is ready
            nanoseconds: int = self._library.drive(ctypes.byref(queue), ctypes.byref(work))
            signal.alarm(0)
        finally:
            os.kill(worker, signal.SIGKILL)
            used = os.wait4(worker, 0)[2]
            os.close(kick)
            os.close(call)
        return load.requests / nanoseconds * 1e9, (used.ru_utime + used.ru_stime) / load.requests * 1e6


def _forked(job: Callable[[], object]) -> int:
    parent = os.getpid()
    child = os.fork()
    if not child:
        try:
            die_with_parent(parent)
            job()
        finally:
            os._exit(1)
    return child


def make_image(path: Path) -> None:
    """A disk in each of whose 4 KiB the first sector's number stands at the beginning."""
    with path.open("wb") as file:
        for sector in range(0, 64 * MIB // SECTOR, 8):
            file.write(sector.to_bytes(8, "little") + bytes(4088))


def main(library: Path, image: Path, rounds: int, requests: int | None = None) -> None:
    """``requests``: so many of each load, and no more than usual."""
    devices = ["C", "python"] + (["compiled"] if core.is_compiled() else [])
    for choice in devices[1:]:
        core.queue(choice)  # imports it, once for all
    gc.collect()
    gc.freeze()
    make_image(image)
    rounds_of: dict[str, list[dict[str, tuple[float, float]]]] = {}
    with closing(Rig(library, image)) as rig:
        for usual in LOADS:
            load = usual if requests is None else replace(usual, requests=min(usual.requests, requests))
            for turn in range(rounds):
                order = reversed(devices) if turn % 2 else devices
                rounds_of.setdefault(load.name, []).append({device: rig.serve(load, device) for device in order})
    print(json.dumps(rounds_of))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
