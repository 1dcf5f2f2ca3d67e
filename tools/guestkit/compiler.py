"""Programs of ours in C (``c/``), for guests and to measure with, compiled on the host when they are needed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from guestkit.progress import SetupError

_SOURCES = Path(__file__).parent / "c"


def compile_library(name: str, library: Path) -> None:
    """Makes a shared ``library`` of ``c/<name>.c``, for this host; or SetupError."""
    _compile(name, ["-shared", "-fPIC", "-o", str(library)])


def compile_static(name: str, program: Path) -> None:
    """Makes ``program`` of ``c/<name>.c``, linked with nothing that a guest would have to have; or SetupError."""
    _compile(name, ["-static", "-o", str(program)])


def _compile(name: str, options: list[str]) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        raise SetupError("there is no C compiler here: apt-get install gcc libc6-dev")
    command = [compiler, "-O2", "-Wall", "-Wextra", "-Werror", *options, str(_SOURCES / f"{name}.c")]
    if subprocess.run(command, check=False).returncode != 0:
        raise SetupError(f"{name}.c cannot be compiled: see the compiler's messages above")
