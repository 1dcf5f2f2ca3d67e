"""How often the guest needed the machine, and for what: the table that ``lguest --verbose`` shows at its end.

An *exit* is whatever leaves the guest's code for the machine: a port, memory that is none, CPUID, a model-specific
register, an interrupt that is taken, HLT. In Python each costs a microsecond or so. To count them costs a fraction of
that, and is done only when it is asked for: :class:`CountedHardware` stands between the engine and the machine then.
The compiled core counts its own, and they are added at the end. (What KVM does by itself is no exit here.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from lguest_mp.cpu.engine import CpuidResult, Hardware, Platform

PAGE_SHIFT = 12
#: So many causes are told apart, lest a guest that touches everything fills the memory.
MOST_CAUSES = 4096
#: So many lines are shown.
MOST_LINES = 40

PORT_READ, PORT_WRITE = "port read", "port write"
LOAD, STORE = "load", "store"
CPUID, RDMSR, WRMSR = "CPUID", "RDMSR", "WRMSR"
INTERRUPT, HALT = "interrupt", "HLT"


class Cause(NamedTuple):
    """What kind of exit, and where: a port, the page of an address, a leaf, a register's or a vector's number."""

    kind: str
    where: int


_OTHERS = Cause("others", 0)


class ExitCount:
    """The counts. All of them are made on the CPU's thread, or, where there are several, under the machine's lock."""

    def __init__(self) -> None:
        self._counts: dict[Cause, int] = {}

    def add(self, kind: str, where: int = 0, count: int = 1) -> None:
        """So many more."""
        cause = Cause(kind, where)
        counts = self._counts
        if cause not in counts and len(counts) >= MOST_CAUSES:
            cause = _OTHERS
        counts[cause] = counts.get(cause, 0) + count

    def table(self, name: Callable[[Cause], str]) -> list[str]:
        """Lines for a person, the most frequent first; causes of one name are one."""
        named: Counter[str] = Counter()
        for cause, count in self._counts.items():
            named[cause.kind if cause == _OTHERS else name(cause)] += count
        shown = named.most_common(MOST_LINES)
        rest = named.total() - sum(count for _, count in shown)
        lines = [f"{count:>9}  {text}" for text, count in shown]
        if rest:
            lines.append(f"{rest:>9}  of {len(named) - len(shown)} other kinds")
        return [f"{named.total()} exits of the guest:", *lines]


class CountedHardware:
    """A machine whose accesses are counted; a :class:`lguest_mp.cpu.engine.Hardware`."""

    def __init__(self, hardware: Hardware, exits: ExitCount) -> None:
        self._hardware = hardware
        self._exits = exits

    def port_read(self, port: int, size: int) -> int:
        """IN."""
        self._exits.add(PORT_READ, port)
        return self._hardware.port_read(port, size)

    def port_write(self, port: int, size: int, value: int) -> None:
        """OUT."""
        self._exits.add(PORT_WRITE, port)
        self._hardware.port_write(port, size, value)

    def mmio_read(self, address: int, size: int) -> int:
        """A load from where there is no RAM."""
        self._exits.add(LOAD, address >> PAGE_SHIFT)
        return self._hardware.mmio_read(address, size)

    def mmio_write(self, address: int, size: int, value: int) -> None:
        """A store to where there is no RAM."""
        self._exits.add(STORE, address >> PAGE_SHIFT)
        self._hardware.mmio_write(address, size, value)


class CountedPlatform(CountedHardware):
    """The same of a machine with all that belongs to a processor; a :class:`lguest_mp.cpu.engine.Platform`."""

    def __init__(self, platform: Platform, exits: ExitCount) -> None:
        super().__init__(platform, exits)
        self._platform = platform

    def cpuid(self, leaf: int, subleaf: int, native: CpuidResult) -> CpuidResult:
        """CPUID."""
        self._exits.add(CPUID, leaf)
        return self._platform.cpuid(leaf, subleaf, native)

    def msr_read(self, index: int) -> int | None:
        """RDMSR."""
        self._exits.add(RDMSR, index)
        return self._platform.msr_read(index)

    def msr_write(self, index: int, value: int) -> bool:
        """WRMSR."""
        self._exits.add(WRMSR, index)
        return self._platform.msr_write(index, value)

    def interrupt_pending(self) -> bool:
        """Whether take_interrupt() would give a vector now."""
        return self._platform.interrupt_pending()

    def take_interrupt(self) -> int | None:
        """Acknowledges the highest pending interrupt."""
        vector = self._platform.take_interrupt()
        if vector is not None:
            self._exits.add(INTERRUPT, vector)
        return vector

    def idle(self, wake: int) -> None:
        """The CPU sleeps."""
        self._exits.add(HALT)
        self._platform.idle(wake)
