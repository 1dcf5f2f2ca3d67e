"""The host half of lguest, as its launcher sees it: the verbs of ``/dev/lguest``.

The original launcher is half of a hypervisor. The other half, in the host's kernel, runs the guest, keeps its page
tables and segments, and delivers traps and interrupts; the launcher tells it what to do, and does itself what it hands
back. Whoever implements :class:`LguestHost` is such a host: the kernel's own (``dev_lguest.py``) or ours
(``softhost/``).

All addresses are guest-physical. One thread, the machine process's main one, calls everything but
:meth:`LguestHost.interrupt`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import IntEnum

from lguest_mp.record import Value

#: What run() gives as ``Pending.trap`` when the guest asks for something by hypercall.
NOTIFY = 0x1F
#: The traps that the launcher emulates: general protection, page fault.
GENERAL_PROTECTION = 13
PAGE_FAULT = 14


class Register(IntEnum):
    """The guest's registers, by their byte offset in the host's ``struct user_regs_struct`` (i386)."""

    EBX = 0
    ECX = 4
    EDX = 8
    ESI = 12
    EDI = 16
    EBP = 20
    EAX = 24
    DS = 28
    ES = 32
    FS = 36
    GS = 40
    ORIG_EAX = 44
    EIP = 48
    CS = 52
    EFLAGS = 56
    ESP = 60
    SS = 64


class Pending(Value):
    """Why the guest stopped (``struct lguest_pending``).

    ``trap`` is NOTIFY, of ``address``, or the trap that the launcher has to emulate: GENERAL_PROTECTION, or PAGE_FAULT
    of an access to ``address``. Then ``instruction`` holds the 7 bytes at EIP (as far as they can be read).
    """

    trap: int
    instruction: bytes = bytes(7)
    address: int = 0


class GuestDied(Exception):
    """The guest is dead; the text says why, in the host's words."""


class GuestRestarts(Exception):
    """The guest asked to be started afresh."""


class LguestHost(ABC):
    """One guest with one CPU."""

    @abstractmethod
    def initialize(self, pfn_limit: int, start: int, device_limit: int) -> None:
        """Makes the guest, whose first instruction is at ``start``. LguestError.

        Its memory, which is RAM and the device pages that are in use, ends at page ``pfn_limit``. From there up to page
        ``device_limit`` there is nothing that could be mapped: an access is a PAGE_FAULT for the launcher.
        """

    @abstractmethod
    def run(self) -> Pending:
        """Runs the guest until the launcher is needed. GuestDied, GuestRestarts; any other exception is a bug."""

    @abstractmethod
    def get_register(self, register: Register) -> int:
        """A register of the stopped guest (32 bits)."""

    @abstractmethod
    def set_register(self, register: Register, value: int) -> None:
        """Changes a register of the stopped guest."""

    @abstractmethod
    def inject(self, trap: int) -> None:
        """Has the guest take a trap before its next instruction, as if it came from there."""

    @abstractmethod
    def interrupt(self, irq: int) -> None:
        """Raises an interrupt of the guest's, also while it sleeps. From any thread."""

    @abstractmethod
    def attach(self, address: int, eventfd: int) -> None:
        """From now on a NOTIFY of ``address`` adds 1 to ``eventfd``, and the guest runs on."""

    @abstractmethod
    def close(self) -> None:
        """Ends the guest."""
