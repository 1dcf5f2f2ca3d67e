"""A virtqueue alone, without a guest: what a core of ours serves, beside what the loop of lguest's launcher does."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from guestkit.compiler import compile_library
from guestkit.measures.bench import Bench, Row

#: Files that are nowhere but in memory.
_MEMORY = Path("/dev/shm")
_TOOLS = Path(__file__).resolve().parents[2]


def queue(bench: Bench) -> Iterator[Row]:
    """Requests of a disk each second, its image in memory: ours, and in QEMU's place the loop in C."""
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as scratch:
        library = Path(scratch) / "queue-rig.so"
        compile_library("queue-rig", library)
        arguments = [str(library), str(Path(scratch) / "disk.img"), str(bench.rounds)]
        command = [str(bench.python), "-m", "guestkit.queuerig", *arguments]
        environment = os.environ | {"PYTHONPATH": str(_TOOLS)}
        shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout
    for load, rounds in json.loads(shown).items():
        rates = {device: tuple(each[device][0] for each in rounds) for device in rounds[0]}
        times = {device: tuple(each[device][1] for each in rounds) for device in rounds[0]}
        if "compiled" in rates:
            yield Row(f"queue, {load}", "/s", rates["compiled"], rates["C"], goal=1.0, more_is_better=True)
            yield Row("- processor time for each", "us", times["compiled"], times["C"])
        yield Row(f"- {load}, in Python", "/s", rates["python"], rates["C"], more_is_better=True)
        yield Row("- processor time for each", "us", times["python"], times["C"])
