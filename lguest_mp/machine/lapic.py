"""The local APIC: what stands between the interrupts of a machine and its CPU (Intel SDM 3A, chapter 11).

Interrupts arrive as messages (a device's MSI, the I/O APIC, the CPU's own, the timer) on whichever thread caused them;
the CPU takes them, one at a time and by priority, and says when each is done. Three 256-bit registers say where a
vector is on that way, here as integers, whose highest bit is found by ``bit_length``:

- IRR, requested: accepted and not yet taken by the CPU;
- ISR, in service: taken and not yet ended by EOI;
- TMR, trigger mode: its EOI has to be told to the I/O APIC (level) or not (edge).

The class of a vector is its upper four bits. The CPU gets the highest vector of IRR if its class is above the class of
what is in service and above the task priority; :attr:`LocalApic.pending` is that answer, kept up to date with every
change, so that asking for it costs nothing and takes no lock.

Everything here changes under the board's lock (``lock.py``). Methods that say so expect it to be held; all others take
it.

There is one CPU, so messages for others go nowhere, and INIT, start-up, SMI and NMI messages, which would need a CPU
that can do something with them, are ignored. LINT0 and LINT1 have no wires.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import IntEnum
from typing import Protocol

from lguest_mp.machine.layout import LOCAL_APIC_BASE
from lguest_mp.machine.lock import BoardLock

#: How often the timer's counter counts before it is divided, per second (one per nanosecond).
BUS_HZ = 1_000_000_000
#: A periodic timer is not run faster than this, nanoseconds: it would leave the host no time for the guest.
MIN_PERIOD = 100_000

APIC_BASE_MSR = 0x1B
TSC_DEADLINE_MSR = 0x6E0


class Reg:
    """The registers' offsets in their page (SDM 3A, table 11-1)."""

    ID = 0x020
    VERSION = 0x030
    TPR = 0x080
    PPR = 0x0A0
    EOI = 0x0B0
    LDR = 0x0D0
    DFR = 0x0E0
    SVR = 0x0F0
    ISR = 0x100
    TMR = 0x180
    IRR = 0x200
    ESR = 0x280
    LVT_CMCI = 0x2F0
    ICR_LOW = 0x300
    ICR_HIGH = 0x310
    LVT_TIMER = 0x320
    LVT_THERMAL = 0x330
    LVT_PERFORMANCE = 0x340
    LVT_LINT0 = 0x350
    LVT_LINT1 = 0x360
    LVT_ERROR = 0x370
    TIMER_INITIAL = 0x380
    TIMER_CURRENT = 0x390
    TIMER_DIVIDE = 0x3E0


#: Registers that read as zero and ignore writes on this CPU, without being an error (arbitration, remote read).
_SILENT = frozenset({0x090, 0x0C0})

#: Version 0x14 (an integrated APIC), and the number of the last entry of the local vector table (seven of them).
_VERSION_VALUE = 0x0006_0014

MASKED = 1 << 16
#: What software may set in each entry of the local vector table (SDM 3A, figure 11-8).
_LVT_WRITABLE = {
    Reg.LVT_CMCI: 0x1_07FF,
    Reg.LVT_TIMER: 0x7_00FF,
    Reg.LVT_THERMAL: 0x1_07FF,
    Reg.LVT_PERFORMANCE: 0x1_07FF,
    Reg.LVT_LINT0: 0x1_A7FF,
    Reg.LVT_LINT1: 0x1_A7FF,
    Reg.LVT_ERROR: 0x1_00FF,
}

SVR_ENABLED = 1 << 8
_ERROR_SEND_ILLEGAL = 1 << 5
_ERROR_RECEIVE_ILLEGAL = 1 << 6
_ERROR_REGISTER = 1 << 7

_BASE_ENABLED = 1 << 11
_BASE_BSP = 1 << 8
_BASE_ADDRESS = 0xF_FFFF_F000

#: A message's data: trigger mode, and whether a level begins or ends (SDM 3A, 11.11.2).
MSI_LEVEL = 1 << 15
MSI_ASSERT = 1 << 14

#: Fixed and lowest priority: the delivery modes that carry a vector to this CPU (table 11-18).
_VECTORED_MODES = frozenset({0, 1})


class TimerMode(IntEnum):
    """Bits 17-18 of the timer's entry (SDM 3A, 11.5.4)."""

    ONE_SHOT = 0
    PERIODIC = 1
    TSC_DEADLINE = 2
    RESERVED = 3


class Timer(Protocol):
    """What expires for the APIC; see :class:`lguest_mp.machine.timer.HostTimer`."""

    def arm(self, deadline: int, interval: int = 0) -> None: ...

    def disarm(self) -> None: ...

    def take_expiry(self) -> bool: ...


class TscClock(Protocol):
    """What knows when the time stamp counter will have which value."""

    def monotonic_ns(self, tsc: int) -> int:
        """CLOCK_MONOTONIC, in nanoseconds, at that value of the counter."""


class LocalApic:
    """The local APIC of the one CPU, whose APIC ID is 0."""

    def __init__(
        self, lock: BoardLock, timer: Timer, clock: TscClock, monotonic_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._lock = lock
        self._timer = timer
        self._clock = clock
        self._now = monotonic_ns
        self._broadcast_eoi: Callable[[int], None] = _nobody_listens
        #: Whether the CPU would be given a vector now. May be read without the lock.
        self.pending = False
        #: The page number of the registers, or -1 while the APIC is switched off.
        self.page = LOCAL_APIC_BASE >> 12
        self._base = LOCAL_APIC_BASE | _BASE_ENABLED | _BASE_BSP
        self._reset()

    def _reset(self) -> None:
        """The state after power-up (SDM 3A, 11.4.7.1)."""
        self._irr = self._isr = self._tmr = 0
        self._tpr = 0
        self._ldr = 0
        self._dfr = 0xFFFF_FFFF
        self._svr = 0xFF
        self._esr = self._errors = 0
        self._icr_low = self._icr_high = 0
        self._lvt = dict.fromkeys(_LVT_WRITABLE, MASKED)
        self._divide_register = 0
        self._divisor = 2
        self._initial = 0
        self._started = 0
        self._counting = False
        self._deadline = 0
        self._mode = TimerMode.ONE_SHOT
        self._timer.disarm()
        self.pending = False

    def connect(self, broadcast_eoi: Callable[[int], None]) -> None:
        """Who is told, with the lock held, that a level-triggered vector has ended."""
        self._broadcast_eoi = broadcast_eoi

    # What arrives

    def message(self, address: int, data: int) -> bool:
        """A message-signalled interrupt (SDM 3A, 11.11); whether this CPU accepted it. The lock is held.

        ``address`` and ``data`` are as a device writes them. An address outside of 0xfeexxxxx would be a write to
        memory; it is dropped, and so is the message that a level has ended.
        """
        if address >> 20 != 0xFEE or data & (MSI_LEVEL | MSI_ASSERT) == MSI_LEVEL:
            return False
        return self._receive(
            destination=address >> 12 & 0xFF,
            logical=bool(address & 4),
            mode=data >> 8 & 7,
            vector=data & 0xFF,
            level=bool(data & MSI_LEVEL),
        )

    def deliver(self, *, pin: int, destination: int, logical: bool, mode: int, vector: int, level: bool) -> bool:
        """What an input of the I/O APIC sends; whether this CPU accepted it. The lock is held."""
        return self._receive(destination=destination, logical=logical, mode=mode, vector=vector, level=level)

    def _receive(self, *, destination: int, logical: bool, mode: int, vector: int, level: bool) -> bool:
        if mode in _VECTORED_MODES and self._is_for_me(destination, logical):
            return self._accept(vector, level)
        return False

    def _is_for_me(self, destination: int, logical: bool) -> bool:
        if not logical:
            return destination in {0, 0xFF}
        mine = self._ldr >> 24
        if self._dfr >> 28 == 0xF:
            return destination & mine != 0
        cluster = destination >> 4
        return cluster in {0xF, mine >> 4} and destination & mine & 0xF != 0

    def _accept(self, vector: int, level: bool) -> bool:
        if not self._svr & SVR_ENABLED or self.page < 0:
            return False
        if vector < 16:
            self._error(_ERROR_RECEIVE_ILLEGAL)
            return False
        bit = 1 << vector
        self._irr |= bit
        if level:
            self._tmr |= bit
        else:
            self._tmr &= ~bit
        self._update()
        return True

    def _error(self, error: int) -> None:
        if not self._errors & error:
            self._errors |= error
            self._local(self._lvt[Reg.LVT_ERROR])

    def _local(self, entry: int) -> None:
        if not entry & MASKED:
            self._accept(entry & 0xFF, level=False)

    def _priority(self) -> int:
        """The processor priority register (SDM 3A, 11.8.3.1)."""
        in_service = self._isr.bit_length() - 1 if self._isr else 0
        return self._tpr if self._tpr >> 4 >= in_service >> 4 else in_service & 0xF0

    def _update(self) -> None:
        was_pending = self.pending
        self.pending = self._irr != 0 and (self._irr.bit_length() - 1) >> 4 > self._priority() >> 4
        if self.pending and not was_pending:
            # Once is enough: the CPU looks until it has taken it.
            self._lock.kick_wanted = True

    # What the CPU does

    def take(self) -> int | None:
        """The vector that the CPU handles from now on, or None."""
        with self._lock:
            if not self.pending:
                return None
            vector = self._irr.bit_length() - 1
            self._irr ^= 1 << vector
            self._isr |= 1 << vector
            # What else is requested is of no higher class than what is in service now.
            self.pending = False
            return vector

    def _end_of_interrupt(self) -> None:
        if self._isr:
            vector = self._isr.bit_length() - 1
            self._isr ^= 1 << vector
            if self._tmr >> vector & 1:
                self._broadcast_eoi(vector)
            self._update()

    def read(self, offset: int, size: int) -> int:
        """A read of the registers' page. They are 32 bits wide, 16 bytes apart (SDM 3A, 11.4.1)."""
        if size != 4 or offset & 0xF:
            return 0
        with self._lock:
            return self._read(offset)

    def _read(self, offset: int) -> int:  # noqa: PLR0911, PLR0912 -- a table of registers
        match offset:
            case Reg.ID:
                return 0
            case Reg.VERSION:
                return _VERSION_VALUE
            case Reg.TPR:
                return self._tpr
            case Reg.PPR:
                return self._priority()
            case Reg.LDR:
                return self._ldr
            case Reg.DFR:
                return self._dfr
            case Reg.SVR:
                return self._svr
            case Reg.ESR:
                return self._esr
            case Reg.ICR_LOW:
                return self._icr_low
            case Reg.ICR_HIGH:
                return self._icr_high
            case Reg.TIMER_INITIAL:
                return self._initial
            case Reg.TIMER_CURRENT:
                return self._remaining()
            case Reg.TIMER_DIVIDE:
                return self._divide_register
            case _ if Reg.ISR <= offset < Reg.TMR:
                return self._isr >> (offset - Reg.ISR) * 2 & 0xFFFF_FFFF
            case _ if Reg.TMR <= offset < Reg.IRR:
                return self._tmr >> (offset - Reg.TMR) * 2 & 0xFFFF_FFFF
            case _ if Reg.IRR <= offset < Reg.ESR:
                return self._irr >> (offset - Reg.IRR) * 2 & 0xFFFF_FFFF
            case _ if offset in self._lvt:
                return self._lvt[offset]
            case _ if offset not in _SILENT:
                self._error(_ERROR_REGISTER)
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """A write to the registers' page."""
        if size != 4 or offset & 0xF:
            return
        with self._lock:
            if offset == Reg.EOI:
                self._end_of_interrupt()
            else:
                self._write(offset, value)

    def _write(self, offset: int, value: int) -> None:  # noqa: PLR0912 -- a table of registers
        match offset:
            case Reg.TPR:
                self._tpr = value & 0xFF
                self._update()
            case Reg.LDR:
                self._ldr = value & 0xFF00_0000
            case Reg.DFR:
                self._dfr = value | 0x0FFF_FFFF
            case Reg.SVR:
                self._svr = value & 0x1FF
                if not self._svr & SVR_ENABLED:
                    # Switched off by software, every local interrupt is masked (11.4.7.2).
                    for entry in self._lvt:
                        self._lvt[entry] |= MASKED
            case Reg.ESR:
                # A write shows what went wrong since the last one (11.5.3).
                self._esr, self._errors = self._errors, 0
            case Reg.ICR_LOW:
                self._send(value)
            case Reg.ICR_HIGH:
                self._icr_high = value & 0xFF00_0000
            case Reg.TIMER_INITIAL:
                self._start(value)
            case Reg.TIMER_DIVIDE:
                self._set_divisor(value)
            case _ if offset in self._lvt:
                self._write_lvt(offset, value)
            case _ if offset not in _SILENT:
                self._error(_ERROR_REGISTER)

    def _write_lvt(self, offset: int, value: int) -> None:
        value &= _LVT_WRITABLE[offset]
        if not self._svr & SVR_ENABLED:
            value |= MASKED
        self._lvt[offset] = value
        if offset == Reg.LVT_TIMER:
            self._set_mode(TimerMode(value >> 17 & 3))

    def _send(self, command: int) -> None:
        """The interrupt command register: interprocessor interrupts, on a machine with one (11.6.1)."""
        self._icr_low = command & 0xC_CFFF
        mode, vector = command >> 8 & 7, command & 0xFF
        if mode not in _VECTORED_MODES:
            return
        if vector < 16:
            self._error(_ERROR_SEND_ILLEGAL)
        shorthand = command >> 18 & 3
        to_me = self._is_for_me(self._icr_high >> 24, bool(command & 0x800)) if shorthand == 0 else shorthand in {1, 2}
        if to_me:
            self._accept(vector, level=False)

    # The timer

    def _start(self, count: int) -> None:
        if self._mode in {TimerMode.ONE_SHOT, TimerMode.PERIODIC}:
            self._initial = count
            self._started = self._now()
            self._counting = count != 0
            self._set_timer()

    def _set_timer(self) -> None:
        if not self._counting:
            self._timer.disarm()
            return
        period = self._initial * self._divisor
        if self._mode is TimerMode.PERIODIC:
            period = max(period, MIN_PERIOD)
            elapsed = (self._now() - self._started) // period
            self._timer.arm(self._started + (elapsed + 1) * period, period)
        else:
            self._timer.arm(self._started + period)

    def _remaining(self) -> int:
        if not self._counting:
            return 0
        counted = (self._now() - self._started) // self._divisor
        if self._mode is TimerMode.PERIODIC:
            return self._initial - counted % self._initial
        return max(0, self._initial - counted)

    def _set_divisor(self, value: int) -> None:
        remaining = self._remaining()
        self._divide_register = value & 0xB
        exponent = (value & 3 | value >> 1 & 4) + 1 & 7
        self._divisor = 1 << exponent
        self._go_on(remaining)

    def _set_mode(self, mode: TimerMode) -> None:
        if mode is self._mode:
            return
        remaining = self._remaining()
        to_or_from_deadline = TimerMode.TSC_DEADLINE in {mode, self._mode} or mode is TimerMode.RESERVED
        self._mode = mode
        if to_or_from_deadline:
            # Disarmed either way (11.5.4.1).
            self._counting = False
            self._initial = self._deadline = 0
            self._timer.disarm()
        else:
            self._go_on(remaining)

    def _go_on(self, remaining: int) -> None:
        """Counts on from ``remaining`` with the divisor and mode of now."""
        if self._counting:
            self._started = self._now() - (self._initial - remaining) * self._divisor
            self._set_timer()

    def timer_expired(self) -> None:
        """The timer's descriptor is readable (it may be an old expiry)."""
        with self._lock:
            if not self._timer.take_expiry():
                return
            self._deadline = 0
            if self._mode is not TimerMode.PERIODIC:
                self._counting = False
            self._local(self._lvt[Reg.LVT_TIMER])

    # Model-specific registers

    def read_deadline(self) -> int:
        """IA32_TSC_DEADLINE: zero when the timer is not armed or not in that mode."""
        return self._deadline

    def write_deadline(self, tsc: int) -> None:
        """Has the timer interrupt the CPU when its time stamp counter reaches ``tsc``; zero disarms it."""
        with self._lock:
            if self._mode is not TimerMode.TSC_DEADLINE:
                return
            self._deadline = tsc
            if not tsc:
                self._timer.disarm()
                return
            deadline = self._clock.monotonic_ns(tsc)
            if deadline > self._now():
                self._timer.arm(deadline)
            else:
                self._timer.disarm()
                self._deadline = 0
                self._local(self._lvt[Reg.LVT_TIMER])

    def read_base(self) -> int:
        """IA32_APIC_BASE."""
        return self._base

    def write_base(self, value: int) -> None:
        """Moves the registers, or switches the APIC off (which forgets everything) and on (SDM 3A, 11.4.3-4)."""
        with self._lock:
            self._base = value & (_BASE_ADDRESS | _BASE_ENABLED) | _BASE_BSP
            if value & _BASE_ENABLED:
                self.page = (value & _BASE_ADDRESS) >> 12
            else:
                self.page = -1
                self._reset()


def _nobody_listens(_vector: int) -> None:
    """Before the I/O APIC is connected."""
