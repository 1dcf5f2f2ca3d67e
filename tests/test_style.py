"""The code is as it should be before anybody reads it: linted, formatted, typed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent


#: The modules that pytest calls conftest, of which a run of mypy knows only one.
CONFTESTS = [f"mypy {path.relative_to(CHECKOUT)}" for path in sorted((CHECKOUT / "tests").rglob("conftest.py"))]


@pytest.mark.parametrize("command", ["ruff check", "ruff format --check", "mypy", *CONFTESTS])
def test_style(command: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", *command.split()], check=False, cwd=CHECKOUT, text=True, capture_output=True
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
