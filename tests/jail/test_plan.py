"""What becomes of a plan on hosts that lack something."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import pytest
from prisoner import fate

from lguest_mp import prctl
from lguest_mp.jail import Jail, landlock, seccomp
from lguest_mp.jail.needs import Needs
from lguest_mp.jail.report import report


def open_a_file() -> None:
    os.open("/etc/passwd", os.O_RDONLY)


def states(jail: Jail) -> dict[str, str]:
    """Of this process, which is in no jail, what a plan says of it: what the kernel tells is found missing."""
    rows = report("worker", os.getpid(), jail.plan(Needs()).describe())
    return {row["restriction"]: row["state"] for row in rows}


def no_landlock(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def abi() -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(landlock, "abi", abi)


@pytest.mark.parametrize(
    ("number", "why"), [(errno.ENOSYS, "is not in this kernel"), (errno.EOPNOTSUPP, "is not enabled in this kernel")]
)
def test_without_landlock_the_list_of_calls_is_left(monkeypatch: pytest.MonkeyPatch, number: int, why: str) -> None:
    no_landlock(monkeypatch, number)
    jail = Jail()
    assert jail.lacks is not None
    assert why in jail.lacks
    assert fate(jail.plan(Needs()), open_a_file) == "EACCES"
    assert states(jail)["file system, TCP, signals"] == "NOT in force"


def test_an_older_landlock_is_asked_for_what_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    for abi in (1, 2, 3, 4, 5):
        monkeypatch.setattr(landlock, "abi", lambda abi=abi: abi)
        jail = Jail()
        assert jail.lacks is not None
        assert f"of ABI {abi}" in jail.lacks
        assert fate(jail.plan(Needs()), open_a_file) == "EACCES"


def test_without_a_filter_the_rest_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp, "missing", lambda: "is not in this kernel")
    jail = Jail()
    assert jail.lacks is not None
    assert "seccomp" in jail.lacks
    assert fate(jail.plan(Needs()), open_a_file) in {"EACCES", "EMFILE"}
    assert states(jail)["system calls"] == "NOT in force"


def test_the_user_can_do_without() -> None:
    jail = Jail(on=False)
    assert jail.lacks is None
    assert fate(jail.plan(Needs()), open_a_file) == "did it"
    assert states(jail) == {"jail": "NOT in force"}


def test_what_is_not_in_force_is_told() -> None:
    """A report is of what the kernel says, and not of what was planned."""
    found = states(Jail())
    assert found["no new privileges"] == "NOT in force"
    assert found["limit: open files"] == "NOT in force"


def test_a_process_with_an_impossible_name_is_reported() -> None:
    name = Path("/proc/self/comm").read_bytes().rstrip(b"\n")
    try:
        ctypes.CDLL(None).prctl(prctl.PR_SET_NAME, b"\xff\xfe\n\r", 0, 0, 0)
        assert states(Jail())["capabilities"] in {"in force", "NOT in force"}
    finally:
        ctypes.CDLL(None).prctl(prctl.PR_SET_NAME, name, 0, 0, 0)


def test_a_plan_is_made_once() -> None:
    jail = Jail()
    assert jail.plan(Needs()) is jail.plan(Needs())
