"""Programs of ours in C (``c/``) for guests, compiled on the host when they are needed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from guestkit.progress import SetupError

_SOURCES = Path(__file__).parent / "c"


def compile_static(name: str, program: Path) -> None:
    """Makes ``program`` of ``c/<name>.c``, linked with nothing that a guest would have to have; or SetupError."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise SetupError("there is no C compiler here: apt-get install gcc libc6-dev")
    command = [compiler, "-O2", "-Wall", "-Wextra", "-Werror", "-static"]
    command += ["-o", str(program), str(_SOURCES / f"{name}.c")]
    if subprocess.run(command, check=False).returncode != 0:
        raise SetupError(f"{name}.c cannot be compiled: see the compiler's messages above")
