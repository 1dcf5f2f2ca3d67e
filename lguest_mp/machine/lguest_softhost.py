"""The host half in software, joined to the machine: its timers, its sleep, and the code that it translates."""

from __future__ import annotations

from lguest_mp.codemap import CodeMap
from lguest_mp.cpu.softhost import SoftHost
from lguest_mp.machine.lguest import LguestMachine
from lguest_mp.machine.stalecode import answer_workers
from lguest_mp.memory import GuestMemory


def make_softhost(memory: GuestMemory, watches: CodeMap, machine: LguestMachine) -> SoftHost:
    """A host that sleeps in the machine's event loop, and whose translations the workers can have dropped."""
    host = SoftHost(memory, watches, machine.loop)
    answer_workers(watches, host, machine.loop.add)
    return host
