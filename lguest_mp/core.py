"""Which core serves the virtqueues, and stands behind the embedded CPU: the compiled one, or the one in Python.

Both do the same, byte for byte; Python's is the specification (``virtio/queue.py``, ``machine/embedded.py``), the
compiled one is faster (``_compiled.pyx``, ``_board.pxi``). ``pip install`` compiles it where there is a C compiler, and
leaves it out where there is none.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lguest_mp.errors import LguestError

if TYPE_CHECKING:
    from lguest_mp.virtio.queue import Queue

#: What ``--core`` takes; ``auto`` is the compiled one if there is one.
CHOICES = ("auto", "compiled", "python")
_SOURCES = ("_compiled.pyx", "_board.pxi")


def missing() -> str | None:
    """Why there is no compiled core, to follow "the compiled one"; None: there is one."""
    try:
        import lguest_mp._compiled as _compiled  # noqa: PLC0415, PLR0402 -- there may be none, and that is told apart
    except ModuleNotFoundError:
        return "was not built: pip found no C compiler, or no headers of Python (Debian's gcc and python3-dev)"
    except ImportError as error:
        return f"cannot be loaded: {error}"
    for source in _SOURCES:
        if _is_newer(os.path.join(os.path.dirname(__file__), source), _compiled.__file__):
            return f"is older than its source {source}: run pip install again"
    return None


def is_compiled(choice: str = "auto") -> bool:
    """Whether the core that was chosen is the compiled one. LguestError: that is not there."""
    if choice == "python":
        return False
    lacks = missing()
    if lacks is not None and choice == "compiled":
        raise LguestError(f"--core=compiled: the compiled core {lacks}; --core=python does without")
    return lacks is None


def queue(choice: str = "auto") -> type[Queue]:
    """The class of the queues of the core that was chosen. LguestError: that is not there."""
    if is_compiled(choice):
        from lguest_mp.virtio.compiled import CompiledQueue  # noqa: PLC0415

        return CompiledQueue
    from lguest_mp.virtio.queue import Queue  # noqa: PLC0415

    return Queue


def describe(choice: str = "auto") -> str:
    """Which core that is, and why it is not the compiled one, for a person. LguestError: that is not there."""
    if is_compiled(choice):
        return "compiled"
    return "Python" if choice == "python" else f"Python; the compiled one {missing()}"


def _is_newer(source: str, built: str) -> bool:
    """Whether a source that lies beside what was built of it has changed since."""
    try:
        return os.stat(source).st_mtime_ns > os.stat(built).st_mtime_ns
    except OSError:
        return False
