"""The compiled board does what the one in Python does: whatever a guest does, whatever happens around it.

Each example is done to both, step by step. Equal afterwards, and after every step, are all registers, what the CPU was
given, what it was kicked for, for when the timer is set, and whom the devices have heard.
"""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fakemachine import (
    DFR,
    DIVIDE,
    ENABLED,
    EOI,
    ESR,
    ICR_LOW,
    INITIAL,
    LDR,
    LVT_ERROR,
    LVT_TIMER,
    SVR,
    TPR,
    Wiring,
    make_loop,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from lguest_mp import core
from lguest_mp.machine.clock import HostClock, Sample
from lguest_mp.machine.lapic import LocalApic
from lguest_mp.machine.timer import HostTimer

pytestmark = pytest.mark.skipif(core.missing() is not None, reason=f"the compiled core {core.missing()}")

SECOND = 1_000_000_000
#: The counter counts so many times in a nanosecond; it was 0 when the machine was made.
RATE = 3
#: Deadlines lie so far away that it makes no difference how long a test takes, and so do their differences.
FAR = 1000 * SECOND


class FakeCounter:
    """A counter whose relation to CLOCK_MONOTONIC is known."""

    def __init__(self, origin: int) -> None:
        self._origin = origin
        self._count = 0

    def sample(self) -> Sample:
        # Two pairs, ten seconds apart, are all that anybody takes.
        self._count += 1
        ns = 10 * SECOND * (self._count - 1)
        return Sample(RATE * ns, self._origin + ns)


def timer_setting(fd: int) -> int:
    """When a timer expires, in units of half FAR from now; 0: it is off, or will be soon."""
    text = Path(f"/proc/self/fdinfo/{fd}").read_text()
    (value,) = (line for line in text.splitlines() if line.startswith("it_value: "))
    seconds, _ = value.removeprefix("it_value: ").strip("()").split(",")
    return round(2 * int(seconds) * SECOND / FAR)


class RealTimeBoard(Wiring):
    """The APICs with a timer of the host's; the counter was 0 at ``origin``."""

    def __init__(self, core_kind: str, origin: int) -> None:
        self.taken: list[int | None] = []
        self.timer = HostTimer()
        self.clock = HostClock(FakeCounter(origin))
        super().__init__(core_kind, self.timer, self.clock)
        if core_kind != "python":
            from lguest_mp.machine.compiled import CompiledApic  # noqa: PLC0415 -- it may not have been built

            assert isinstance(self.apic, CompiledApic)
            self.apic.use_timer(self.timer.fd)
            self.clock.line_drawn = self.apic.line_drawn
        self.loop = make_loop(core_kind, self.lock)
        self.loop.add_shared(self.timer.fd, self.apic.timer_expired)

    def close(self) -> None:
        self.loop.close()
        self.timer.close()

    def state(self) -> object:
        apic = self.apic
        registers = [apic.read(16 * register, 4) for register in range(0x40) if 16 * register != 0x390]
        return (
            registers,
            apic.pending,
            apic.page,
            apic.read_base(),
            apic.read_deadline(),
            apic._counting,
            apic._errors,
            timer_setting(self.timer.fd),
            self.kicks,
            self.taken,
        )

    # What happens to it

    def message(self, address: int, data: int) -> object:
        with self.lock:
            return self.apic.message(address, data)

    def take(self) -> None:
        self.taken.append(self.apic.take())

    def deadline(self, ns: int) -> None:
        """Counted from when the machine was made."""
        self.apic.write_deadline(max(ns, 0) * RATE)

    def expire(self) -> None:
        """The timer expires, if it counts (and does not wait for a deadline)."""
        self.apic.write(DIVIDE, 4, 0xB)
        self.apic.write(INITIAL, 4, 1)
        if self.apic._counting:
            poll = select.poll()
            poll.register(self.timer.fd, select.POLLIN)
            poll.poll()
        self.loop.step()

    def write(self, offset: int, size: int, value: int) -> None:
        self.apic.write(offset, size, value)


Step = Callable[[RealTimeBoard], object]

# Few different vectors, so that they meet; 5 is none.
vectors = st.one_of(st.sampled_from([5, 0x40, 0x41, 0x51, 0x61, 0xEC]), st.integers(0, 255))


def write(offset: int, value: int, size: int = 4) -> Step:
    return lambda board: board.write(offset, size, value & (1 << 8 * size) - 1)


def message(  # noqa: PLR0917 -- the fields of a message
    high: int, destination: int, logical: int, mode: int, flags: int, vector: int
) -> Step:
    address = high << 20 | destination << 12 | logical << 2
    return lambda board: board.message(address, vector | mode << 8 | flags << 14)


def entry(vector: int, mode: int, masked: int) -> Step:
    return write(LVT_TIMER, vector | mode << 17 | masked << 16)


USE_DEADLINES: list[Step] = [entry(0xEC, 2, 0), lambda board: board.clock.refine() and None]
deadlines: st.SearchStrategy[Step] = st.one_of(
    # None, past ones, and so many times FAR.
    st.integers(-3, 10).map(lambda number: lambda board: board.deadline(number * FAR if number > 0 else number + 3)),
    st.sampled_from([1 << 63, (1 << 64) - 1]).map(lambda tsc: lambda board: board.apic.write_deadline(tsc)),
    st.builds(entry, vectors, st.integers(0, 3), st.integers(0, 1)),
    st.just(USE_DEADLINES[1]),
    st.just(lambda board: board.expire()),
)
handling: st.SearchStrategy[Step] = st.one_of(
    st.just(lambda board: board.take()),
    st.just(write(EOI, 0)),
    st.integers(0, 255).map(lambda priority: write(TPR, priority)),
)
# Flags: 2 is the trigger mode, 1 that a level begins.
simple_messages = st.builds(message, st.just(0xFEE), st.just(0), st.just(0), st.just(0), st.integers(0, 3), vectors)
messages = st.builds(
    message,
    st.sampled_from([0xFEE, 0xFEE, 0xFEE, 0xFED, 0xFEE << 12]),
    st.sampled_from([0, 0xFF, 1, 0x10, 0x11, 0x21, 0xF1, 0xF2]),
    st.integers(0, 1),
    st.sampled_from([0, 0, 1, 2, 7]),
    st.integers(0, 3),
    vectors,
)
destinations: st.SearchStrategy[Step] = st.one_of(
    st.sampled_from([0x01, 0x11, 0x21, 0xFF]).map(lambda mine: write(LDR, mine << 24)),
    st.sampled_from([0xFFFF_FFFF, 0x0FFF_FFFF]).map(lambda model: write(DFR, model)),
)
anything: st.SearchStrategy[Step] = st.one_of(
    st.builds(
        write,
        st.one_of(st.sampled_from([EOI, SVR, ESR, ICR_LOW, LVT_ERROR]), st.integers(0, 0x37).map(lambda n: 16 * n)),
        st.one_of(st.integers(0, (1 << 64) - 1), st.sampled_from([0, ENABLED, 0xFF, 0x4_0041])),
        st.sampled_from([4, 4, 4, 1, 2, 8]),
    ),
    st.sampled_from([0xFEE0_0900, 0xFEE0_0100, 0xFEE1_0900]).map(
        lambda base: lambda board: board.apic.write_base(base)
    ),
    st.builds(
        lambda pin, vector, level: lambda board: board.redirect(pin, vector | level << 15),
        st.integers(0, 3),
        vectors,
        st.booleans(),
    ),
    st.builds(lambda pin, asserted: lambda board: board.line(pin, asserted), st.integers(0, 3), st.booleans()),
)
scenes = st.one_of(
    st.lists(st.one_of(simple_messages, handling), min_size=30, max_size=60),
    st.lists(st.one_of(messages, destinations, handling), min_size=30, max_size=60),
    st.lists(st.one_of(deadlines, handling), min_size=20, max_size=40).map(lambda steps: USE_DEADLINES + steps),
    st.lists(st.one_of(messages, destinations, handling, deadlines, anything), max_size=60),
)


@contextlib.contextmanager
def boards() -> Iterator[tuple[RealTimeBoard, RealTimeBoard]]:
    origin = time.monotonic_ns() - 100 * SECOND
    both = RealTimeBoard("python", origin), RealTimeBoard("compiled", origin)
    try:
        for board in both:
            board.write(SVR, 4, ENABLED)
        yield both
    finally:
        for board in both:
            board.close()


@given(scenes)
@settings(max_examples=300)
def test_whatever_happens_both_boards_are_in_the_same_state(steps: list[Step]) -> None:
    with boards() as (specified, compiled):
        for step in steps:
            assert step(specified) == step(compiled)
            assert specified.state() == compiled.state()


def test_what_is_usual_does_without_the_specification(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt, its end, a deadline and its interrupt: not a line of the local APIC's own code."""
    from lguest_mp._compiled import Lock  # noqa: PLC0415 -- it may not have been built

    with boards() as (_, compiled):
        compiled.write(LVT_TIMER, 4, 2 << 17 | 0xEC)
        compiled.clock.refine()
        for name in ("message", "take", "write", "write_deadline", "timer_expired", "_accept", "_update"):
            monkeypatch.delattr(LocalApic, name)
        assert compiled.message(0xFEE0_0000, 0x41)
        compiled.take()
        compiled.write(EOI, 4, 0)
        compiled.deadline(10 * FAR)
        assert timer_setting(compiled.timer.fd) == 20
        compiled.deadline(1)
        compiled.take()
        compiled.write(EOI, 4, 0)
        assert compiled.taken == [0x41, 0xEC]
        assert isinstance(compiled.lock, Lock)
        assert compiled.lock.counts() == ({0x41: 1, 0xEC: 1}, 2, 2, {})


@pytest.mark.parametrize("vector", [5, 15, 16])
def test_a_timer_whose_vector_is_none_is_an_error(vector: int) -> None:
    """Received illegal vector (SDM 3A, 11.5.3); by the count and by the deadline."""
    for mode, ring in ((0, RealTimeBoard.expire), (2, lambda board: board.deadline(1))):
        with boards() as both:
            for board in both:
                board.write(LVT_TIMER, 4, mode << 17 | vector)
                board.clock.refine()
                ring(board)
                board.write(ESR, 4, 0)
                assert board.apic.read(ESR, 4) == (0 if vector >= 16 else 1 << 6)
                assert board.apic.pending == (vector >= 16)
