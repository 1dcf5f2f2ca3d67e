"""The `pc` machine around an engine that is a processor and no more: with what belongs to each processor of a PC.

That is the local APIC with its timer, the clock that the guest is told, and what CPUID and the MSRs say of them.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence

from lguest_mp.cpu.engine import CpuidResult
from lguest_mp.machine import clock, lapic
from lguest_mp.machine.clock import GuestClock, HostClock, HostCounter
from lguest_mp.machine.cpuid import cpuid
from lguest_mp.machine.eventloop import EventLoop
from lguest_mp.machine.exits import ExitCount
from lguest_mp.machine.lapic import LocalApic
from lguest_mp.machine.lock import BoardLock
from lguest_mp.machine.pc import Pc
from lguest_mp.machine.shortcuts import MakeShortcuts
from lguest_mp.machine.timer import HostTimer
from lguest_mp.machine.wiring import DevicePort
from lguest_mp.memory import GuestMemory
from lguest_mp.record import Value


class Board(Value):
    """What is hot of a board: all that an interrupt passes on its way to the CPU.

    ``count_unseen`` adds what the guest needed it for without passing by :class:`CountedPlatform`.
    """

    lock: BoardLock
    local_apic: LocalApic
    loop: EventLoop
    make_shortcuts: MakeShortcuts | None
    count_unseen: Callable[[ExitCount], None] | None


MakeBoard = Callable[[HostTimer, HostClock], Board]


def specified_board(timer: HostTimer, clock: HostClock) -> Board:
    """In Python: how it should be."""
    lock = BoardLock()
    return Board(lock, LocalApic(lock, timer, clock), EventLoop(), None, None)


class EmbeddedPc(Pc):
    """The machine around the embedded CPU; a :class:`lguest_mp.cpu.engine.Platform`."""

    def __init__(  # noqa: PLR0917 -- what a machine is connected to
        self,
        memory: GuestMemory,
        devices: Sequence[DevicePort],
        requests: socket.socket,
        events: socket.socket,
        input_fd: int | None,
        output_fd: int,
        make_board: MakeBoard = specified_board,
    ) -> None:
        """``make_board``: makes what is hot of the board, here or in the compiled core (``compiled.py``)."""
        # First of all, because the frequency of the time stamp counter is the better known the longer ago this was.
        self._host_clock = HostClock(HostCounter())
        self._guest_clock = GuestClock(memory, self._host_clock)
        self._timer = HostTimer()
        board = make_board(self._timer, self._host_clock)
        self._local_apic = board.local_apic
        super().__init__(
            devices,
            requests,
            events,
            input_fd,
            output_fd,
            board.lock,
            board.local_apic,
            board.loop,
            board.make_shortcuts,
            board.count_unseen,
        )
        self._local_apic.connect(self._io_apic.end_of_interrupt)
        self._loop.add_shared(self._timer.fd, self._on_timer)

    def cpuid(self, leaf: int, subleaf: int, native: CpuidResult) -> CpuidResult:
        """CPUID."""
        return cpuid(leaf, subleaf, native, self._host_clock)

    def msr_read(self, index: int) -> int | None:
        """RDMSR."""
        match index:
            case lapic.TSC_DEADLINE_MSR:
                return self._local_apic.read_deadline()
            case lapic.APIC_BASE_MSR:
                return self._local_apic.read_base()
            case clock.SYSTEM_TIME_MSR | clock.WALL_CLOCK_MSR:
                return self._guest_clock.read_msr(index)
        return None

    def msr_write(self, index: int, value: int) -> bool:
        """WRMSR."""
        match index:
            case lapic.TSC_DEADLINE_MSR:
                self._local_apic.write_deadline(value)
            case lapic.APIC_BASE_MSR:
                self._local_apic.write_base(value)
            case clock.SYSTEM_TIME_MSR:
                self._guest_clock.write_system_time(value)
            case clock.WALL_CLOCK_MSR:
                self._guest_clock.write_wall_clock(value)
            case _:
                return False
        return True

    def interrupt_pending(self) -> bool:
        """Whether take_interrupt() would give a vector now."""
        return self._local_apic.pending

    def take_interrupt(self) -> int | None:
        """Acknowledges the highest pending interrupt."""
        return self._local_apic.take()

    def idle(self, wake: int) -> None:
        """The CPU sleeps in HLT: its thread waits for the guest's interrupts itself."""
        self._loop.help(wake)

    def _on_timer(self) -> None:
        self._local_apic.timer_expired()
        if self._engine is not None and self._guest_clock.is_due():
            self._engine.call(self._guest_clock.publish)

    def close(self) -> None:
        """Gives back what the machine holds of the host; it must not run any more."""
        super().close()
        self._timer.close()
