"""Launchers for tests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from launching import Launch, Launched


@pytest.fixture
def launch() -> Iterator[Launch]:
    """Starts launchers, all of which are gone after the test. All may have the same name, as no two have one place."""
    with ExitStack() as launchers:

        def start(scenario: str, *options: str, **others: Any) -> Launched:
            if "runtime" not in others:
                others["runtime"] = launchers.enter_context(tempfile.TemporaryDirectory(prefix="lguest-run-"))
            return launchers.enter_context(Launched(scenario, *options, **others))

        yield start


@pytest.fixture
def jail() -> Iterator[Path]:
    """An empty directory into which every user may look."""
    with tempfile.TemporaryDirectory(prefix="lguest-jail-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory
