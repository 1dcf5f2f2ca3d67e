"""Which core serves: the compiled one where there is one, or the one that the user wants."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

import lguest_mp
from lguest_mp import cli, core
from lguest_mp.errors import LguestError
from lguest_mp.supervisor import parts
from lguest_mp.virtio.queue import Queue

MODULE = "lguest_mp._compiled"
COMPILERS = ("cc", "gcc", "clang")


@pytest.fixture
def compiled() -> None:
    """There is a compiled core."""
    if lacks := core.missing():
        pytest.skip(f"the compiled core {lacks}")


class Finder:
    """Finds no compiled core, or one that cannot be loaded."""

    def __init__(self, error: ImportError | None) -> None:
        self._error = error

    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> ModuleSpec | None:
        if name == MODULE and self._error is not None:
            raise self._error
        return None


def lose(monkeypatch: pytest.MonkeyPatch, error: ImportError) -> None:
    """As if pip had not built it, or it were for another Python."""
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    monkeypatch.delattr(lguest_mp, "_compiled", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(error), *sys.meta_path])


def test_it_was_built_where_it_can_be() -> None:
    """What would be left out silently is all that is tested of it."""
    if not any(map(shutil.which, COMPILERS)) or not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("there is no C compiler, or there are no headers of Python")
    assert core.missing() is None


def test_the_compiled_one_serves_if_it_is_there(compiled: None) -> None:
    assert core.queue() is core.queue("auto") is core.queue("compiled")
    assert core.queue().__name__ == "CompiledQueue"
    assert core.describe() == "compiled"


def test_python_serves_if_it_is_told_to() -> None:
    assert core.queue("python") is Queue
    assert core.describe("python") == "Python"


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (ModuleNotFoundError(f"No module named {MODULE!r}", name=MODULE), r"was not built: pip found no C compiler"),
        (ImportError("undefined symbol: PyFoo"), "cannot be loaded: undefined symbol: PyFoo"),
    ],
)
def test_why_there_is_none(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: ImportError, why: str
) -> None:
    lose(monkeypatch, error)
    assert core.queue() is Queue
    assert core.describe().startswith(f"Python; the compiled one {why}")
    with pytest.raises(LguestError, match=rf"^--core=compiled: the compiled core {why}.*; --core=python does without$"):
        core.queue("compiled")
    assert cli.main(["--core=compiled", "--demo"]) == 1
    assert capfd.readouterr().err.count("\n") == 1


def test_one_that_is_older_than_its_source_does_not_serve(
    compiled: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The two halves of a queue are of one mind; in a checkout one of them may have been left behind."""
    source = tmp_path / "_compiled.pyx"
    source.touch()
    monkeypatch.setattr(core, "__file__", str(tmp_path / "core.py"))
    os.utime(source, (0, 0))
    assert core.missing() is None
    os.utime(source, (1 << 33, 1 << 33))
    assert core.missing() == "is older than its source _compiled.pyx: run pip install again"


@pytest.mark.parametrize("arguments", [["--demo"], ["256", "vmlinuz"]])
def test_each_machine_has_the_core_that_is_wanted(arguments: list[str]) -> None:
    for choice in ("auto", "python"):
        of = parts.of(cli.parse([f"--core={choice}", *arguments]))
        assert of.make_queue is core.queue(choice)
        assert of.core == core.describe(choice)
