"""The embedded CPU with the callbacks of the compiled core: as ``engine.py``, which specifies them.

ImportError where the extension module was not built (``core.py`` knows why).
"""

from __future__ import annotations

import ctypes
from typing import Any

from lguest_mp._compiled import Cpu
from lguest_mp.codemap import CodeMap
from lguest_mp.cpu.engine import Platform
from lguest_mp.cpu.unicorn.engine import UnicornEngine
from lguest_mp.machine.compiled import CompiledLock
from lguest_mp.memory import GuestMemory


class CompiledEngine(Cpu, UnicornEngine):
    """Does the same as a UnicornEngine. ``lock`` is the board's, which ``platform`` is."""

    def __init__(self, memory: GuestMemory, platform: Platform, code_map: CodeMap, *, lock: CompiledLock) -> None:
        super().__init__(memory, platform, code_map)

    def _connect_callbacks(self) -> None:
        super()._connect_callbacks()
        internals = self._internals
        slot = internals.native.slot
        take, wrmsr = slot("python_take"), slot("python_wrmsr")
        take.value, wrmsr.value = self._connect_board(
            ctypes.addressof(internals.interrupt_request),
            ctypes.addressof(internals.exit_chain),
            ctypes.addressof(internals.jobs_wanted),
            wrmsr.value,
        )

    def _map_hole(self, start: int, size: int, read: Any, write: Any, data: int | None = None) -> None:
        specified = ctypes.cast(write, ctypes.c_void_p).value
        assert data is None and specified is not None  # noqa: PT018
        store, hole = self._connect_hole(start, specified)
        super()._map_hole(start, size, read, store, hole)
