"""The title of a process: what ``ps`` shows as its command line.

The work is setproctitle's. But its package imports Python's logging, to be able to say that its C module is missing;
that brings threading, and both have something to do in every forked child. Measured with Python 3.11: 10 ms of the
launcher's start, and 0.5 MiB more in each worker. So the C module is loaded by itself where it is where it should be.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from types import ModuleType


class Title:
    """Names this process and, in their turn, those that it forks."""

    def __init__(self) -> None:
        self._module = _load()

    def setter(self, title: str) -> Callable[[], None]:
        """What sets the title, and the comm with it: to the title's first 15 bytes."""
        return partial(self._module.setproctitle, title)


def _load() -> ModuleType:
    package = find_spec("setproctitle")
    places = package.submodule_search_locations if package is not None else None
    spec = PathFinder.find_spec("_setproctitle", places) if places is not None else None
    if spec is None or spec.loader is None:
        return importlib.import_module("setproctitle")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
