"""A host half of lguest whose guest is a Python function, for the machine around it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from queue import SimpleQueue

from lguest_mp.cpu.lguest_host import NOTIFY, GuestDied, LguestHost, Pending, Register
from lguest_mp.memory import GuestMemory

#: Much longer than anything takes, in seconds.
PATIENCE = 30.0

Guest = Callable[["ScriptedHost"], Iterator[Pending]]


class ScriptedHost(LguestHost):
    """Yields what the guest yields, and raises what it raises. A guest that has nothing more to do powers off."""

    def __init__(self, memory: GuestMemory, guest: Guest) -> None:
        self.memory = memory
        self.initialized: tuple[int, int, int] | None = None
        self.registers = dict.fromkeys(Register, 0) | {Register.CS: 0x61}
        self.injected: list[int] = []
        self.attached: dict[int, int] = {}
        self.closed = False
        self._interrupts: SimpleQueue[int] = SimpleQueue()
        self._steps = guest(self)

    def initialize(self, pfn_limit: int, start: int, device_limit: int) -> None:
        self.initialized = (pfn_limit, start, device_limit)

    def run(self) -> Pending:
        assert self.initialized
        try:
            return next(self._steps)
        except StopIteration:
            raise GuestDied("CRASH: Power down") from None

    def get_register(self, register: Register) -> int:
        return self.registers[register]

    def set_register(self, register: Register, value: int) -> None:
        self.registers[register] = value

    def inject(self, trap: int) -> None:
        self.injected.append(trap)

    def interrupt(self, irq: int) -> None:
        self._interrupts.put(irq)

    def attach(self, address: int, eventfd: int) -> None:
        assert address not in self.attached
        self.attached[address] = eventfd

    def close(self) -> None:
        self.closed = True

    # What a guest does

    def next_interrupt(self) -> int:
        """Sleeps until an interrupt comes."""
        return self._interrupts.get(timeout=PATIENCE)

    def notify(self, address: int) -> Iterator[Pending]:
        """The hypercall: a kick where an eventfd is attached, otherwise for the launcher."""
        if (eventfd := self.attached.get(address)) is not None:
            os.eventfd_write(eventfd, 1)
        else:
            yield Pending(NOTIFY, address=address)

    def set_status(self, descriptor: int, status: int) -> Iterator[Pending]:
        """What a driver does for the launcher to see it."""
        self.memory.write(descriptor + 4, bytes([status]))
        yield from self.notify(descriptor)
