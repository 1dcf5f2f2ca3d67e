"""The machine process of a `pc` guest: its body, in the forked child.

It joins the embedded CPU to the PC around it, and carries the workers' requests to forget translated code to the one
thread that may: the CPU's.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from functools import partial

from lguest_mp.codemap import MAX_DATAGRAM, CodeMap, parse_request
from lguest_mp.config import GuestConfig
from lguest_mp.cpu.engine import Engine, EntryState
from lguest_mp.cpu.unicorn.engine import UnicornEngine
from lguest_mp.machine.pc import Pc
from lguest_mp.machine.wiring import DevicePort
from lguest_mp.memory import GuestMemory
from lguest_mp.virtio import fence


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
    # The workers' fences have to reach the embedded CPU, which drops the guest's own.
    fence.register()
    pc = Pc(memory, devices, requests, events, input_fd=0, output_fd=1)
    engine = UnicornEngine(memory, pc, code_map)
    for end in code_map.machine_ends:
        pc.add_reader(end.fileno(), partial(_forget_code, end, engine, code_map.pages))
    pc.run(engine, entry)


def _forget_code(channel: socket.socket, engine: Engine, pages: int) -> None:
    """A worker wrote pages that hold translated code: drop the translations, then answer."""
    try:
        parsed = parse_request(channel.recv(MAX_DATAGRAM, socket.MSG_DONTWAIT), pages)
    except BlockingIOError:
        return
    if parsed is None:
        return
    answer, runs = parsed

    def job() -> None:
        for first, last in runs:
            engine.forget_code(first, last)
        try:
            channel.send(answer, socket.MSG_DONTWAIT)
        except OSError:
            return  # the worker that asked is gone, or asks without listening

    engine.call(job)
