"""What a CPU engine has to do, and what it may expect of the machine around it.

One thread, the *CPU's*, is inside :meth:`Engine.run`; it is the main thread of the machine process. The methods of
:class:`Hardware` and :class:`Platform` are called on it, or on a thread of the engine's own for another processor, but
never on two at a time. Any other thread may only call :meth:`Engine.kick` and :meth:`Engine.call`.

Engines differ in how much of a computer they are. The embedded CPU is a processor and no more: the machine has the
local APIC, the timer and the clock for it (:class:`Platform`). KVM has all of these itself: it is connected to ports
and registers only (:class:`Hardware`), and the machine is given its local APICs to send interrupts to
(:class:`LocalApics`), with ways from guest to worker and back that do not lead through the machine's process at all
(:class:`DirectPaths`). docs/engines.md tells how to add another one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

from lguest_mp.record import Value


class EntryState(Value):
    """The registers of the CPU at the guest's first instruction: 64-bit mode, paging on, interrupts off.

    ``code_selector``, ``data_selector`` index flat segments in the GDT at ``gdt_base`` (``gdt_limit`` as LGDT
    takes it). ``rsi`` holds the zero page (the kernel's Documentation/arch/x86/boot.rst, "64-bit boot protocol").
    """

    rip: int
    rsi: int
    cr3: int
    gdt_base: int
    gdt_limit: int
    code_selector: int = 0x10
    data_selector: int = 0x18


CpuidResult = tuple[int, int, int, int]


class Hardware(Protocol):
    """What every guest's CPU is connected to: ports, and registers in memory.

    Sizes are 1, 2, 4 (ports, MMIO) or 8 (MMIO) bytes, values are unsigned. Nothing answers at an address: a read
    gives all ones, a write does nothing. A method may raise: run() ends with that exception.
    """

    def port_read(self, port: int, size: int) -> int: ...

    def port_write(self, port: int, size: int, value: int) -> None: ...

    def mmio_read(self, address: int, size: int) -> int: ...

    def mmio_write(self, address: int, size: int, value: int) -> None: ...


class Platform(Hardware, Protocol):
    """What a CPU is connected to that has no interrupt controller, no timer and no clock of its own."""

    def cpuid(self, leaf: int, subleaf: int, native: CpuidResult) -> CpuidResult:
        """What CPUID tells (eax, ebx, ecx, edx); ``native`` is what the engine's CPU would say."""

    def msr_read(self, index: int) -> int | None:
        """RDMSR of a register that the platform owns; None: the engine's own answer."""

    def msr_write(self, index: int, value: int) -> bool:
        """WRMSR; False: not the platform's, the engine does it."""

    def interrupt_pending(self) -> bool:
        """Whether take_interrupt() would give a vector now."""

    def take_interrupt(self) -> int | None:
        """Acknowledges the highest pending interrupt: its vector, in service from now on, or None."""

    def idle(self, wake: int) -> None:
        """The CPU sleeps: returns when there may be an interrupt, or when ``wake`` (an eventfd, read here) was written.

        Always called with the same ``wake``. Meanwhile the CPU's thread may do the platform's work.
        """


class LocalApics(Protocol):
    """The processors' local APICs, as the rest of the machine sees them. The machine's lock is held for all but two."""

    @property
    def page(self) -> int:
        """The number of the page for which :meth:`read` and :meth:`write` answer, or -1: there is none (now)."""

    def read(self, offset: int, size: int) -> int:
        """A register. Without the lock."""

    def write(self, offset: int, size: int, value: int) -> None:
        """A register. Without the lock."""

    def message(self, address: int, data: int) -> bool:
        """A message-signalled interrupt, as a device writes it; whether a processor accepted it."""

    def deliver(self, *, pin: int, destination: int, logical: bool, mode: int, vector: int, level: bool) -> bool:
        """What an input of the I/O APIC, ``pin``, sends; whether a processor accepted it.

        The end of a level-triggered one is told to the I/O APIC.
        """


class DirectPaths(Protocol):
    """Ways between guest and workers past the machine's process. The machine's lock is held for every method.

    ``line`` is the number of a queue, counted over all devices; a message is (address, data). What answers False cannot
    be, and nothing has changed.
    """

    def attach_interrupt(self, line: int, call: int, message: tuple[int, int]) -> bool:
        """Each write to the eventfd ``call`` is this message from now on; and at once, if there is one unread."""

    def change_interrupt(self, line: int, message: tuple[int, int]) -> bool:
        """An attached line's message is another one from now on."""

    def detach_interrupt(self, line: int, call: int) -> None:
        """Writes to ``call`` are left in it again."""

    def attach_notification(self, address: int, kick: int) -> bool:
        """A store of the guest's to ``address`` adds 1 to the eventfd ``kick`` and does nothing else."""

    def detach_notification(self, address: int, kick: int) -> None:
        """It is the machine's again."""


class GuestHalted(Exception):
    """The CPU executed HLT with interrupts off: nothing can wake it, ever."""


class GuestFault(Exception):
    """The CPU cannot go on (triple fault, an access the engine cannot do); the text says why, in one line.

    ``details``: for whoever asked for more, in any number of lines.
    """

    def __init__(self, why: str, details: str = "") -> None:
        super().__init__(why)
        self.details = details


class Engine(ABC):
    """The guest's CPU, or CPUs."""

    @abstractmethod
    def enter(self, state: EntryState) -> None:
        """Sets the registers for the first instruction, of the first processor."""

    @abstractmethod
    def run(self) -> None:
        """Runs the guest until a method of the machine's or a job raises; that comes out. GuestHalted, GuestFault."""

    @abstractmethod
    def kick(self) -> None:
        """An interrupt may be pending: have the CPU look, also when it sleeps in HLT. From any thread.

        Who kicks from another thread calls :meth:`settle` before it sleeps.
        """

    def settle(self) -> None:  # noqa: B027 -- an engine whose kicks cannot be missed has nothing to do
        """Makes sure of all kicks (and jobs) so far. From the thread that kicked."""

    @abstractmethod
    def call(self, job: Callable[[], None]) -> None:
        """Runs ``job`` on the CPU's thread between two instructions, soon; returns at once. From any thread."""
