"""What a CPU engine has to do, and what it may expect of the machine around it.

One thread, the *CPU's*, is inside :meth:`Engine.run`; it is the main thread of the machine process. Every method of
:class:`Platform` is called on it. Any other thread may only call :meth:`Engine.kick` and :meth:`Engine.call`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class EntryState:
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


class Platform(Protocol):
    """What the guest's CPU is connected to: ports, registers in memory, and an interrupt controller.

    Sizes are 1, 2, 4 (ports, MMIO) or 8 (MMIO) bytes, values are unsigned. Nothing answers at an address: a read
    gives all ones, a write does nothing. A method may raise: run() ends with that exception.
    """

    def port_read(self, port: int, size: int) -> int: ...

    def port_write(self, port: int, size: int, value: int) -> None: ...

    def mmio_read(self, address: int, size: int) -> int: ...

    def mmio_write(self, address: int, size: int, value: int) -> None: ...

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


class GuestHalted(Exception):
    """The CPU executed HLT with interrupts off: nothing can wake it, ever."""


class GuestFault(Exception):
    """The CPU cannot go on (triple fault, an access the engine cannot do); the text says why, in one line."""


class Engine(ABC):
    """One virtual CPU."""

    @abstractmethod
    def enter(self, state: EntryState) -> None:
        """Sets the registers for the first instruction."""

    @abstractmethod
    def run(self) -> None:
        """Runs the guest until a callback or a job raises; that exception comes out. GuestHalted, GuestFault."""

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

    @abstractmethod
    def forget_code(self, first_page: int, last_page: int) -> None:
        """Pages of guest memory (offset / 4096) were written behind the CPU's back: drop what was translated.

        On the CPU's thread only (see :meth:`call`).
        """
