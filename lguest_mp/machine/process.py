"""The machine process of a `pc` guest on the embedded CPU: its body, in the forked child.

It joins the CPU to the PC around it, and carries the workers' requests to forget translated code to the one
thread that may: the CPU's.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from functools import partial

from lguest_mp import core
from lguest_mp.codemap import CodeMap
from lguest_mp.config import GuestConfig
from lguest_mp.cpu.engine import EntryState, Platform
from lguest_mp.cpu.unicorn.engine import UnicornEngine
from lguest_mp.machine.embedded import EmbeddedPc, MakeBoard, specified_board
from lguest_mp.machine.exits import CountedPlatform
from lguest_mp.machine.stalecode import answer_workers
from lguest_mp.machine.wiring import DevicePort
from lguest_mp.memory import GuestMemory

MakeEngine = Callable[[GuestMemory, Platform, CodeMap], UnicornEngine]
#: Makes what makes the hot part of one machine.
MakeCore = Callable[[], tuple[MakeBoard, MakeEngine]]


def run_machine(  # noqa: PLR0917 -- what a machine consists of
    make_core: MakeCore,
    config: GuestConfig,
    memory: GuestMemory,
    code_map: CodeMap,
    devices: Sequence[DevicePort],
    begin: Callable[[], EntryState],
    requests: socket.socket,
    events: socket.socket,
) -> None:
    """Runs the guest from its first instruction to its end, and tells the supervisor how it ended.

    ``make_core``: as of :func:`of_core`.
    """
    make_board, make_engine = make_core()
    pc = EmbeddedPc(memory, devices, requests, events, 0, 1, make_board)
    platform = CountedPlatform(pc, pc.count_exits()) if config.verbose else pc
    engine = make_engine(memory, platform, code_map)
    answer_workers(code_map, engine, pc.add_reader)
    pc.run(engine, begin())


def of_core(choice: str) -> MakeCore:
    """What makes the board and the CPU, compiled or in Python (``core.CHOICES``). LguestError: that is not there.

    All of it is imported here, while there still is a file system to load it from.
    """
    if not core.is_compiled(choice):
        return lambda: (specified_board, UnicornEngine)
    from lguest_mp.cpu.unicorn.compiled import CompiledEngine  # noqa: PLC0415 -- it may not have been built
    from lguest_mp.machine.compiled import CompiledLock, compiled_board  # noqa: PLC0415

    def make() -> tuple[MakeBoard, MakeEngine]:
        lock = CompiledLock()
        return partial(compiled_board, lock), partial(CompiledEngine, lock=lock)

    return make
