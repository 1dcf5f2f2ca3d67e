"""Time as the guest is told it, against a host whose counter and clock are what the test says."""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lguest_mp.machine.clock import (
    SYSTEM_TIME_MSR,
    WALL_CLOCK_MSR,
    GuestClock,
    HostClock,
    HostCounter,
    Line,
    Sample,
    scale,
)
from lguest_mp.memory import GuestMemory

MIB = 1 << 20
SECOND = 10**9
PAGE = 0x5000


@dataclass
class FakeHost:
    """A host: its counter runs at ``khz``, its clock is off by ``ppm``, and readings are off by ``noise`` ns."""

    khz: float = 2_600_000
    ppm: float = 0
    noise: int = 0
    tsc: float = 12345678
    ns: float = 5_000_000_000
    waited: list[float] = field(default_factory=list)

    def pass_time(self, ns: float, *, counter: bool = True, clock: bool = True) -> None:
        if counter:
            self.tsc += ns * self.khz / 1e6
        if clock:
            self.ns += ns * (1 + self.ppm * 1e-6)

    def wait(self, seconds: float) -> None:
        self.waited.append(seconds)
        self.pass_time(seconds * SECOND)

    def sample(self) -> Sample:
        return Sample(int(self.tsc), int(self.ns) + self.noise)

    def monotonic_ns(self) -> int:
        return int(self.ns)


@dataclass
class Guest:
    """A guest that has registered its clock, and reads it as Linux does (arch/x86/kernel/pvclock.c)."""

    host: FakeHost

    def __post_init__(self) -> None:
        self.memory = GuestMemory(MIB)
        self.host_clock = HostClock(self.host, self.host.wait)
        self.host.pass_time(SECOND // 2)
        self.clock = GuestClock(self.memory, self.host_clock, lambda: 1_700_000_000 * SECOND, self.host.monotonic_ns)
        self.clock.write_system_time(PAGE | 1)

    def info(self) -> tuple[int, int, int, int, int, int, int]:
        version, pad, tsc, ns, multiplier, shift, flags, _ = struct.unpack("<IIQQIbBH", self.memory.read(PAGE, 32))
        return version, pad, tsc, ns, multiplier, shift, flags

    def now(self) -> int:
        _, _, tsc, ns, multiplier, shift, _ = self.info()
        delta = int(self.host.tsc) - tsc
        delta = delta << shift if shift >= 0 else delta >> -shift
        return ns + (delta * multiplier >> 32)


@given(st.floats(1e-3, 100))
def test_scale_is_right_to_a_part_in_two_billion(rate: float) -> None:
    multiplier, shift = scale(rate)
    assert 1 << 31 <= multiplier < 1 << 32
    assert multiplier / (1 << 32) * 2.0**shift == pytest.approx(rate, rel=1e-9)


@given(st.floats(0.05, 4), st.integers(0, 1 << 62), st.integers(0, 1 << 45))
def test_a_line_is_computed_as_the_guest_computes_it(rate: float, start: int, counts: int) -> None:
    multiplier, shift = scale(rate)
    line = Line(start, 1000, multiplier, shift)
    assert line.at(start + counts) == pytest.approx(1000 + counts * rate, rel=1e-8, abs=3)


@pytest.mark.parametrize("khz", [800_000, 2_596_144, 5_100_000])
def test_the_frequency_is_measured(khz: float) -> None:
    host = FakeHost(khz=khz)
    clock = HostClock(host, host.wait)
    host.pass_time(SECOND / 3)
    assert clock.tsc_khz == pytest.approx(khz, rel=1e-6)
    assert host.waited == []


def test_asked_at_once_it_waits_a_few_milliseconds() -> None:
    host = FakeHost()
    clock = HostClock(host, host.wait)
    assert clock.tsc_khz == pytest.approx(host.khz, rel=1e-4)
    assert sum(host.waited) == pytest.approx(0.005)


def test_a_deadline_is_converted_by_the_same_line() -> None:
    host = FakeHost()
    clock = HostClock(host, host.wait)
    host.pass_time(SECOND)
    later = int(host.tsc + 10 * host.khz)
    assert clock.monotonic_ns(later) == pytest.approx(host.ns + 10_000_000, abs=200)


def test_the_guests_clock_begins_at_zero_and_is_marked_stable() -> None:
    guest = Guest(FakeHost())
    version, pad, tsc, ns, _, _, flags = guest.info()
    assert version % 2 == 0
    assert version > 0
    assert (pad, ns, flags) == (0, 0, 1)
    assert tsc == int(guest.host.tsc)


def test_every_publication_has_an_even_version_of_its_own() -> None:
    guest = Guest(FakeHost())
    versions = []
    for _ in range(3):
        guest.host.pass_time(SECOND)
        guest.clock.publish()
        versions.append(guest.info()[0])
    assert versions == [4, 6, 8]


def test_the_wall_clock_is_the_time_of_day_at_the_guests_zero() -> None:
    guest = Guest(FakeHost())
    guest.host.pass_time(3 * SECOND)
    guest.clock.write_wall_clock(0x6000)
    version, seconds, ns = struct.unpack("<III", guest.memory.read(0x6000, 12))
    assert version % 2 == 0
    assert seconds + ns / SECOND == pytest.approx(1_700_000_000 - 3)


def test_the_registers_read_as_they_were_written() -> None:
    guest = Guest(FakeHost())
    guest.clock.write_wall_clock(0x6000)
    assert guest.clock.read_msr(SYSTEM_TIME_MSR) == PAGE | 1
    assert guest.clock.read_msr(WALL_CLOCK_MSR) == 0x6000


@pytest.mark.parametrize("address", [MIB - 16, MIB, 1 << 40, (1 << 64) - 32])
def test_an_address_that_the_guest_does_not_have_is_ignored(address: int) -> None:
    guest = Guest(FakeHost())
    guest.clock.write_system_time(address | 1)
    guest.clock.write_wall_clock(address)
    guest.clock.publish()


def test_a_guest_that_switches_its_clock_off_is_not_written_to() -> None:
    guest = Guest(FakeHost())
    guest.clock.write_system_time(0)
    before = guest.memory.read(PAGE, 32)
    guest.host.pass_time(SECOND)
    guest.clock.publish()
    assert guest.memory.read(PAGE, 32) == before


def test_publishing_becomes_due_ever_less_often_and_each_time_once() -> None:
    guest = Guest(FakeHost())
    seconds = []
    for second in range(200):
        guest.host.pass_time(SECOND)
        if guest.clock.is_due():
            assert not guest.clock.is_due()
            guest.clock.publish()
            seconds.append(second)
    assert len(seconds) < 15
    assert seconds[-1] - seconds[-2] == 32


def test_it_is_due_also_for_a_guest_that_has_no_such_clock() -> None:
    host = FakeHost()
    clock = GuestClock(GuestMemory(MIB), HostClock(host, host.wait), monotonic_ns=host.monotonic_ns)
    host.pass_time(2 * SECOND)
    assert clock.is_due()


@given(
    st.lists(
        st.tuples(st.floats(1e6, 100 * SECOND), st.floats(-400, 400), st.integers(-300, 300)), min_size=1, max_size=40
    )
)
def test_guest_time_follows_the_host_and_never_steps_back(steps: list[tuple[float, float, int]]) -> None:
    """The host's clock is bent by NTP, at up to 400 ppm one way or the other, and readings are up to 300 ns off."""
    host = FakeHost()
    guest = Guest(host)
    origin = host.ns
    for ns, ppm, noise in steps:
        host.ppm, host.noise = ppm, noise
        host.pass_time(ns)
        before = guest.now()
        if guest.clock.is_due():
            guest.clock.publish()
        assert guest.now() >= before
        # A change of 800 ppm is noticed after at most 64 s, by when it has made 50 ms.
        assert abs(guest.now() - (host.ns - origin)) < 0.3 * SECOND


def test_over_hours_it_stays_within_microseconds() -> None:
    host = FakeHost(ppm=37)
    guest = Guest(host)
    origin = host.ns
    for _ in range(4000):
        host.pass_time(SECOND * 1.7)
        if guest.clock.is_due():
            guest.clock.publish()
    assert abs(guest.now() - (host.ns - origin)) < 5_000


def test_a_guest_that_lags_far_behind_is_set_right_at_once() -> None:
    """The host was suspended, and its counter stood still longer than its clock."""
    host = FakeHost()
    guest = Guest(host)
    origin = host.ns
    host.pass_time(60 * SECOND, counter=False)
    host.pass_time(SECOND)
    guest.clock.publish()
    assert guest.now() == pytest.approx(host.ns - origin, abs=2_000_000)


def test_a_guest_that_is_far_ahead_goes_on_from_there() -> None:
    """The host was suspended, and its counter went on."""
    host = FakeHost()
    guest = Guest(host)
    host.pass_time(60 * SECOND, clock=False)
    before = guest.now()
    host.pass_time(SECOND)
    guest.clock.publish()
    assert before + 0.9 * SECOND < guest.now() < before + 1.1 * SECOND
    host.pass_time(30 * SECOND)
    guest.clock.publish()
    assert before + 30.9 * SECOND < guest.now() < before + 31.1 * SECOND


def test_a_counter_that_was_set_back_does_not_take_the_guest_back() -> None:
    host = FakeHost()
    guest = Guest(host)
    host.pass_time(100 * SECOND)
    guest.clock.publish()
    published = guest.now()
    host.tsc = 1000
    host.pass_time(SECOND)
    guest.clock.publish()
    assert published <= guest.now() < published + 2 * SECOND
    assert guest.host_clock.tsc_khz == pytest.approx(host.khz, rel=1e-3)


def test_the_hosts_own_counter_and_clock_agree_with_each_other() -> None:
    clock = HostClock(HostCounter())
    clock.refine()
    before = time.monotonic_ns()
    sample = clock.refine()
    after = time.monotonic_ns()
    assert before <= sample.ns <= after
    assert clock.monotonic_ns(sample.tsc) == sample.ns
    assert 100_000 < clock.tsc_khz < 10_000_000
