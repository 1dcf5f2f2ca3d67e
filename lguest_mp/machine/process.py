"""The machine process of a `pc` guest on the embedded CPU: its body, in the forked child.

It joins the CPU to the PC around it, and carries the workers' requests to forget translated code to the one
thread that may: the CPU's.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

from lguest_mp.codemap import CodeMap
from lguest_mp.config import GuestConfig
from lguest_mp.cpu.engine import EntryState
from lguest_mp.cpu.unicorn.engine import UnicornEngine
from lguest_mp.machine.embedded import EmbeddedPc
from lguest_mp.machine.exits import CountedPlatform
from lguest_mp.machine.stalecode import answer_workers
from lguest_mp.machine.wiring import DevicePort
from lguest_mp.memory import GuestMemory


def run_machine(  # noqa: PLR0917 -- what a machine consists of
    config: GuestConfig,
    memory: GuestMemory,
    code_map: CodeMap,
    devices: Sequence[DevicePort],
    entry: EntryState,
    requests: socket.socket,
    events: socket.socket,
) -> None:
    """Runs the guest from its first instruction to its end, and tells the supervisor how it ended."""
    pc = EmbeddedPc(memory, devices, requests, events, input_fd=0, output_fd=1)
    platform = CountedPlatform(pc, pc.count_exits()) if config.verbose else pc
    engine = UnicornEngine(memory, platform, code_map)
    answer_workers(code_map, engine, pc.add_reader)
    pc.run(engine, entry)
