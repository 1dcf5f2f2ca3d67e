"""What the guest is told about time, and how the machine tells it.

The guest's time stamp counter is the host's: the embedded CPU executes RDTSC as it is. Everything that the guest's
clock needs beyond that is a straight line from counter to nanoseconds, and Linux takes it from KVM's paravirtual
clock (the kernel's Documentation/virt/kvm/x86/msr.rst): two structures in guest memory, whose addresses the guest
writes to MSRs. It then neither calibrates the counter against hardware that we would have to emulate nor suspects
it.

**Finding the line.** An unprivileged process is not told the counter's frequency, so it is measured: pairs of
(counter, CLOCK_MONOTONIC), each read as close together as Python can, about 200 ns. The first pair is taken when
the machine is made. When the guest asks, making the CPU and booting that far have usually taken a tenth of a
second, and the frequency is right to a few parts per million. Were it asked for at once, we would wait until a few
milliseconds have passed.

**Staying on it.** The host's NTP bends CLOCK_MONOTONIC against the counter all the time, so the line is drawn anew:
after a second, and then in intervals that double up to half a minute, and only when the guest's timer has just
expired, because a guest that sleeps reads no clock. Each new line begins where the old one is at that moment, by
the very arithmetic that the guest uses, so that guest time never jumps and never goes back; what the old line was
wrong by is made up along the next interval, at a rate of at most 1 in 1000. Only when the guest lags by more than
half a second is it set right in one step, forwards.

**What is not mended.** While the host is suspended, CLOCK_MONOTONIC stands still. Guests do the same, more or less:
a counter that went on meanwhile carries the guest's clock with it (which is then simply ahead of CLOCK_MONOTONIC
from there on), one that stood still does not. A counter that starts from zero when the host resumes makes the
guest's clock wrong until the next line is drawn, which begins at the last time that was published. A kernel without
support for KVM's clock has nothing here to calibrate its own against, and does not come up.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import time
from collections.abc import Callable
from typing import Protocol

from lguest_mp.errors import GuestAddressError, LguestError
from lguest_mp.memory import PAGE_SIZE, GuestMemory
from lguest_mp.record import Value

_NS = 1_000_000_000

#: KVM's MSRs (uapi/asm/kvm_para.h): MSR_KVM_WALL_CLOCK_NEW and MSR_KVM_SYSTEM_TIME_NEW.
WALL_CLOCK_MSR = 0x4B56_4D00
SYSTEM_TIME_MSR = 0x4B56_4D01

#: struct pvclock_wall_clock: version, seconds, nanoseconds.
_WALL_CLOCK = struct.Struct("<III")
#: struct pvclock_vcpu_time_info: version, padding, TSC, system time, multiplier, shift, flags.
_TIME_INFO = struct.Struct("<IIQQIbBH")
_TSC_STABLE = 1
_ENABLED = 1

#: The time between the two pairs of which a rate is made, nanoseconds: wanted, and the least while there is no better.
_BASELINE = 1 * _NS
_SHORTEST_BASELINE = 5_000_000
#: Publishing: the first interval, the longest one, and how far off is no longer slewed, nanoseconds.
_FIRST_INTERVAL = 1 * _NS
_LONGEST_INTERVAL = 32 * _NS
_TOO_FAR = _NS // 2
_FASTEST_SLEW = 1e-3
#: A frequency that changed by more than this did not: the counter was set, or the host was suspended.
_IMPLAUSIBLE = 1e-2
_NEVER = 1 << 63

#: rdtsc; shl $32, %rdx; or %rdx, %rax; ret
_RDTSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")


class TscReader:
    """RDTSC as a function: a few bytes of machine code in a page of their own, written, then made executable."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._page.write(_RDTSC)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        if libc.mprotect(address, PAGE_SIZE, mmap.PROT_READ | mmap.PROT_EXEC):
            raise LguestError(f"cannot make a page of memory executable: {os.strerror(ctypes.get_errno())}")
        self.read: Callable[[], int] = ctypes.PYFUNCTYPE(ctypes.c_uint64)(address)


class Sample(Value):
    """A value of the time stamp counter and CLOCK_MONOTONIC, in nanoseconds, at one moment."""

    tsc: int
    ns: int


class Counter(Protocol):
    """Where samples come from."""

    def sample(self) -> Sample: ...


class HostCounter:
    """The host's time stamp counter."""

    def __init__(self) -> None:
        self._tsc = TscReader()

    def sample(self) -> Sample:
        """The tightest of a few pairs: an interrupted one does not count."""
        read = self._tsc.read
        best = 1 << 63
        tsc = ns = 0
        for _ in range(4):
            before = read()
            now = time.monotonic_ns()
            after = read()
            if after - before < best:
                best, tsc, ns = after - before, (before + after) // 2, now
        return Sample(tsc, ns)


#: Fractional bits of a rate.
RATE_BITS = 48


class HostClock:
    """Which value of the time stamp counter is what time of CLOCK_MONOTONIC. On the CPU's thread only."""

    def __init__(self, counter: Counter, wait: Callable[[float], None] = time.sleep) -> None:
        self._counter = counter
        self._wait = wait
        #: Where the next baseline begins.
        self._since = counter.sample()
        #: A point of the line, and nanoseconds per count with RATE_BITS of fraction.
        self._line: tuple[int, int, int] | None = None
        #: Whether the rate comes from a long enough baseline to be kept until there is another one.
        self._settled = False
        #: Told of each new line: a value of the counter, CLOCK_MONOTONIC then, and the rate with RATE_BITS of fraction.
        self.line_drawn: Callable[[int, int, int], None] = _nobody_asks

    @property
    def rate(self) -> float:
        """Nanoseconds per count."""
        return self._known_line()[2] / (1 << RATE_BITS)

    @property
    def tsc_khz(self) -> int:
        """The counter's frequency in kHz."""
        return round(1e6 / self.rate)

    def monotonic_ns(self, tsc: int) -> int:
        """CLOCK_MONOTONIC, in nanoseconds, at that value of the counter."""
        base, ns, rate = self._line or self._known_line()
        return ns + ((tsc - base) * rate >> RATE_BITS)

    def refine(self) -> Sample:
        """Takes a pair and draws the line through it; gives it back."""
        sample = self._counter.sample()
        baseline = sample.ns - self._since.ns
        if baseline < _SHORTEST_BASELINE and not self._settled:
            self._wait((_SHORTEST_BASELINE - baseline) / _NS)
            sample = self._counter.sample()
        if sample.tsc <= self._since.tsc or sample.ns <= self._since.ns:
            # The counter was set back: begin again from here.
            self._since = sample
            self._settled = False
            return self.refine()
        self._line = (sample.tsc, sample.ns, self._measure(sample))
        self.line_drawn(*self._line)
        return sample

    def _measure(self, sample: Sample) -> int:
        """The rate of now, as good as it is known."""
        since = self._since
        baseline = sample.ns - since.ns
        old = self._line
        if old is not None and self._settled and baseline < _BASELINE:
            return old[2]
        rate = (baseline << RATE_BITS) // (sample.tsc - since.tsc)
        if baseline >= _BASELINE:
            self._since = sample
            self._settled = True
        if old is not None and abs(rate / old[2] - 1) > _IMPLAUSIBLE:
            # The counter or the clock stood still in between: only the line's place has changed.
            return old[2]
        return rate

    def _known_line(self) -> tuple[int, int, int]:
        if self._line is None:
            self.refine()
        assert self._line is not None
        return self._line


def scale(rate: float) -> tuple[int, int]:
    """A rate of nanoseconds per count as pvclock has it: (multiplier, shift).

    ns = ((counts << shift) * multiplier) >> 32, where a negative shift goes right.
    """
    shift = 0
    while rate * (1 << 32) >= 1 << 32:
        rate /= 2
        shift += 1
    while rate * (1 << 32) < 1 << 31:
        rate *= 2
        shift -= 1
    return min(round(rate * (1 << 32)), 0xFFFF_FFFF), shift


class Line(Value):
    """What is published: guest time ``ns`` at ``tsc``, and the rate from there on."""

    tsc: int
    ns: int
    multiplier: int
    shift: int

    def at(self, tsc: int) -> int:
        """The guest's time at that count, to the very nanosecond that the guest computes (pvclock_scale_delta)."""
        delta = tsc - self.tsc
        delta = delta << self.shift if self.shift >= 0 else delta >> -self.shift
        return self.ns + (delta * self.multiplier >> 32)


class GuestClock:
    """KVM's paravirtual clock of one CPU. On the CPU's thread, but for :meth:`is_due`."""

    def __init__(
        self,
        memory: GuestMemory,
        host: HostClock,
        realtime_ns: Callable[[], int] = time.time_ns,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._memory = memory
        self._host = host
        self._realtime_ns = realtime_ns
        self._now = monotonic_ns
        self._system_time_msr = 0
        self._wall_clock_msr = 0
        self._version = 0
        #: CLOCK_MONOTONIC when the guest's clock said zero.
        self._origin: int | None = None
        self._line: Line | None = None
        self._published = 0
        self._interval = _FIRST_INTERVAL
        self._due = self._now() + _FIRST_INTERVAL

    def read_msr(self, index: int) -> int:
        """The MSR as the guest wrote it."""
        return self._system_time_msr if index == SYSTEM_TIME_MSR else self._wall_clock_msr

    def write_system_time(self, value: int) -> None:
        """MSR_KVM_SYSTEM_TIME_NEW: the time structure's address, and whether it is to be kept up to date (bit 0)."""
        self._system_time_msr = value
        if value & _ENABLED:
            self.publish()

    def write_wall_clock(self, value: int) -> None:
        """MSR_KVM_WALL_CLOCK_NEW: where the time of day at the guest's zero is to be written, once."""
        self._wall_clock_msr = value
        sample = self._host.refine()
        line = self._line or self._draw(sample)
        boot = self._realtime_ns() - line.at(sample.tsc)
        self._write(value, _WALL_CLOCK, 2, *divmod(max(boot, 0), _NS))

    def is_due(self) -> bool:
        """Whether publish() should be called; True once for each time. From the events' thread."""
        if self._now() < self._due:
            return False
        self._due = _NEVER
        return True

    def publish(self) -> None:
        """Draws the line for now, and writes it into guest memory if the guest asked for it."""
        sample = self._host.refine()
        line = self._draw(sample)
        self._due = sample.ns + self._interval
        self._interval = min(self._interval * 2, _LONGEST_INTERVAL)
        if not self._system_time_msr & _ENABLED:
            return
        # The guest's CPU stands still here, so an even version that differs from the last one is all it can see.
        self._version = self._version + 2 & 0xFFFF_FFFF
        address = self._system_time_msr & ~_ENABLED
        self._write(
            address, _TIME_INFO, self._version, 0, line.tsc, line.ns, line.multiplier, line.shift, _TSC_STABLE, 0
        )

    def _draw(self, sample: Sample) -> Line:
        """The line from ``sample`` on: it begins where the last one is, and meets the host's after the interval."""
        rate = self._host.rate
        if self._origin is None:
            self._origin = sample.ns
        if self._line is None:
            now = sample.ns - self._origin
        else:
            if sample.tsc >= self._line.tsc:
                now = self._line.at(sample.tsc)
            else:
                now = max(self._line.ns, sample.ns - self._origin)
            behind = sample.ns - self._origin - now
            if behind > _TOO_FAR:
                now += behind
            elif behind < -_TOO_FAR:
                self._origin += behind
            else:
                # Intervals are longer than planned when the guest sleeps.
                slew = behind / max(self._interval, sample.ns - self._published)
                rate *= 1 + min(max(slew, -_FASTEST_SLEW), _FASTEST_SLEW)
        self._published = sample.ns
        self._line = Line(sample.tsc, now, *scale(rate))
        return self._line

    def _write(self, address: int, layout: struct.Struct, *values: int) -> None:
        # Guests that give an address which they do not have get no clock.
        try:
            self._memory.write(address, layout.pack(*values))
        except GuestAddressError:
            return


def _nobody_asks(_tsc: int, _ns: int, _rate: int) -> None:
    """Before somebody draws the line as well."""
