"""The benchmark: whether a row's goal is reached, in which order guests take their turns, and the load on a disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from guestkit.compiler import compile_library, compile_static
from guestkit.measures.bench import Row, interleaved
from lguest_mp import core

TOOLS = Path(__file__).parents[2] / "tools"


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


def test_guests_take_turns_in_which_none_is_always_the_first() -> None:
    order: list[Any] = []

    def measure(guest: Any) -> float:
        order.append(guest)
        return float(len(order))

    guests: list[Any] = ["ours", "theirs"]
    assert interleaved(guests, 3, measure) == [(1.0, 4.0, 5.0), (2.0, 3.0, 6.0)]
    assert order == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]


@pytest.fixture(scope="module")
def disk_load(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that the benchmark's guests run."""
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    program = tmp_path_factory.mktemp("programs") / "disk-load"
    compile_static("disk-load", program)
    return program


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """64 KiB that can be read past the page cache."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(range(256)) * 256)
    try:
        os.close(os.open(path, os.O_RDWR | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system knows no direct reads")
    return path


@pytest.mark.parametrize("order", ["random", "sequential"])
@pytest.mark.parametrize("verb", ["read", "write"])
def test_the_load_on_a_disk_leaves_what_is_on_it(disk_load: Path, disk: Path, verb: str, order: str) -> None:
    before = disk.read_bytes()
    subprocess.run([disk_load, disk, verb, order, "4096", "8", "100"], check=True)
    assert disk.read_bytes() == before


def test_the_load_on_a_disk_fails_where_a_request_does(disk_load: Path, disk: Path) -> None:
    disk.write_bytes(bytes(5000))  # of which the second block is no whole one
    failed = subprocess.run([disk_load, disk, "read", "sequential", "8192", "1", "1"], check=False, capture_output=True)
    assert failed.returncode == 1
    assert b"the disk's size" in failed.stderr


def test_a_driver_in_c_is_served_by_each_device(tmp_path: Path) -> None:
    """It checks each answer, and that it is woken up for each."""
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    library = tmp_path / "rig.so"
    compile_library("queue-rig", library)
    command = [sys.executable, "-m", "guestkit.queuerig", str(library), str(tmp_path / "disk.img"), "1", "300"]
    environment = os.environ | {"PYTHONPATH": str(TOOLS)}
    shown = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE).stdout
    devices = {"C", "python"} | ({"compiled"} if core.is_compiled() else set())
    for load, rounds in json.loads(shown).items():
        assert [set(each) for each in rounds] == [devices], load
        assert all(rate > 0 and time > 0 for rate, time in rounds[0].values()), load
