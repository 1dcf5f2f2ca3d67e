"""The machine process of an `lguest` guest: its body, in the forked child."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, Protocol

from lguest_mp.config import GuestConfig
from lguest_mp.cpu.engine import EntryState
from lguest_mp.cpu.lguest_host import LguestHost
from lguest_mp.machine.lguest import LguestMachine
from lguest_mp.machine.wiring import DevicePort, console_line
from lguest_mp.memory import GuestMemory


class HostMaker(Protocol):
    """Makes the host half of a guest."""

    def __call__(self, memory: GuestMemory, watches: Any, machine: LguestMachine) -> LguestHost:
        """``watches``: what the parts' make_watches made, for the workers of this guest."""


def run_machine(  # noqa: PLR0917 -- what a machine consists of
    make_host: HostMaker,
    config: GuestConfig,
    memory: GuestMemory,
    watches: Any,
    devices: Sequence[DevicePort],
    begin: Callable[[], EntryState],
    requests: socket.socket,
    events: socket.socket,
) -> None:
    """Runs the guest from its first instruction to its end, and tells the supervisor how it ended. LguestError."""
    machine = LguestMachine(
        memory,
        config.memory,
        devices,
        requests,
        events,
        input_fd=0,
        output_fd=1,
        line=console_line(devices),
        verbose=config.verbose,
    )
    with closing(make_host(memory, watches, machine)) as host:
        machine.run(host, begin())
