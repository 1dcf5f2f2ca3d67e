"""The queue of the compiled core: as ``queue.py``, which is its specification, with what is hot compiled.

ImportError where the extension module was not built (``core.py`` knows why).
"""

from __future__ import annotations

from lguest_mp._compiled import Ring
from lguest_mp.virtio.queue import Queue


class CompiledQueue(Ring, Queue):
    """Does the same as a Queue. What :class:`Ring` does not have is that class's own code, on the same state."""
