"""What the machine's parts are connected to in tests: time that stands still until told, a CPU that only listens."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from lguest_mp.machine.eventloop import EventLoop
from lguest_mp.machine.ioapic import IoApic
from lguest_mp.machine.lapic import LocalApic, Timer, TscClock
from lguest_mp.machine.lock import BoardLock

#: The local APIC's registers, by the SDM's names (3A, table 11-1).
ID, VERSION, TPR, PPR, EOI, LDR, DFR, SVR = 0x20, 0x30, 0x80, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR, ESR = 0x100, 0x180, 0x200, 0x280
ICR_LOW, ICR_HIGH, LVT_TIMER, LVT_ERROR = 0x300, 0x310, 0x320, 0x370
INITIAL, CURRENT, DIVIDE = 0x380, 0x390, 0x3E0
ENABLED = 0x1FF
MASKED = 1 << 16


@dataclass
class FakeTime:
    """A monotonic clock in nanoseconds, and a time stamp counter that counts twice as fast."""

    ns: int = 1_000_000_000

    def __call__(self) -> int:
        return self.ns

    def monotonic_ns(self, tsc: int) -> int:
        return tsc // 2

    @property
    def tsc(self) -> int:
        return self.ns * 2


@dataclass
class FakeTimer:
    """A timer that remembers what it was armed for."""

    deadline: int | None = None
    interval: int = 0
    expired: bool = False

    def arm(self, deadline: int, interval: int = 0) -> None:
        self.deadline, self.interval, self.expired = deadline, interval, False

    def disarm(self) -> None:
        self.deadline, self.interval, self.expired = None, 0, False

    def take_expiry(self) -> bool:
        expired, self.expired = self.expired, False
        return expired


def make_lock(core_kind: str) -> BoardLock:
    """A core's lock."""
    if core_kind == "python":
        return BoardLock()
    from lguest_mp.machine.compiled import CompiledLock  # noqa: PLC0415 -- it may not have been built

    return CompiledLock()


def make_loop(core_kind: str, lock: BoardLock | None = None) -> EventLoop:
    """A core's event loop; ``lock`` is of the same core."""
    if core_kind == "python":
        return EventLoop()
    from lguest_mp.machine.compiled import CompiledLock, CompiledLoop  # noqa: PLC0415

    lock = lock or CompiledLock()
    assert isinstance(lock, CompiledLock)
    return CompiledLoop(lock)


class Wiring:
    """A local APIC and an I/O APIC, wired up. ``core_kind``: whose. How often the CPU was kicked is counted."""

    def __init__(
        self, core_kind: str, timer: Timer, clock: TscClock, monotonic_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self.kicks = 0
        self.lock = make_lock(core_kind)
        self.lock.kick = self._kick
        kind = LocalApic
        if core_kind != "python":
            from lguest_mp.machine.compiled import CompiledApic  # noqa: PLC0415

            kind = CompiledApic
        self.apic = kind(self.lock, timer, clock, monotonic_ns)
        self.io_apic = IoApic(self.lock, self.apic)
        self.apic.connect(self.io_apic.end_of_interrupt)

    def _kick(self) -> None:
        assert not self.lock.locked()
        self.kicks += 1

    def line(self, pin: int, asserted: bool) -> None:
        with self.lock:
            self.io_apic.set_line(pin, asserted)

    def redirect(self, pin: int, entry: int) -> None:
        """Writes a redirection entry, the high half first as kernels do."""
        for half, word in ((1, entry >> 32), (0, entry & 0xFFFF_FFFF)):
            self.io_apic.write(0x00, 4, 0x10 + pin * 2 + half)
            self.io_apic.write(0x10, 4, word)


class Board(Wiring):
    """The same with time of the test's own, and with the software enable bit set."""

    def __init__(self, core_kind: str) -> None:
        self.time = FakeTime()
        self.timer = FakeTimer()
        super().__init__(core_kind, self.timer, self.time, self.time)
        self.write(SVR, ENABLED)

    def read(self, register: int) -> int:
        return self.apic.read(register, 4)

    def write(self, register: int, value: int) -> None:
        self.apic.write(register, 4, value)

    def message(self, vector: int, *, level: bool = False, mode: int = 0, destination: int = 0) -> bool:
        data = vector | mode << 8 | (0xC000 if level else 0)
        with self.lock:
            return self.apic.message(0xFEE0_0000 | destination << 12, data)

    def redirection(self, pin: int) -> int:
        entry = 0
        for half in (0, 1):
            self.io_apic.write(0x00, 4, 0x10 + pin * 2 + half)
            entry |= self.io_apic.read(0x10, 4) << 32 * half
        return entry

    def pass_time(self, ns: int) -> None:
        """Lets time pass; the timer expires if its time has come, as often as its interval says (that counts once)."""
        self.time.ns += ns
        timer = self.timer
        if timer.deadline is not None and timer.deadline <= self.time.ns:
            timer.expired = True
            if timer.interval:
                timer.deadline += ((self.time.ns - timer.deadline) // timer.interval + 1) * timer.interval
            else:
                timer.deadline = None
            self.apic.timer_expired()

    def in_register(self, register: int) -> set[int]:
        """The vectors whose bits are set in one of the 256-bit registers."""
        words = [self.read(register + 16 * index) for index in range(8)]
        return {32 * index + bit for index, word in enumerate(words) for bit in range(32) if word >> bit & 1}

    def serve(self, handle: Callable[[int], None] = lambda _vector: None) -> list[int]:
        """What a guest does: takes every interrupt that comes, handles it, ends it."""
        served = []
        while (vector := self.apic.take()) is not None:
            served.append(vector)
            handle(vector)
            self.write(EOI, 0)
        return served
