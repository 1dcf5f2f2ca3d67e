"""The host's timer, with the host's time: deadlines are in the past or far away, so nothing has to be waited for."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator

import pytest

from lguest_mp.machine.timer import HostTimer

HOUR = 3600 * 10**9


@pytest.fixture
def timer() -> Iterator[HostTimer]:
    timer = HostTimer()
    yield timer
    timer.close()


def is_readable(timer: HostTimer) -> bool:
    return bool(select.select([timer.fd], [], [], 0)[0])


def test_a_deadline_in_the_past_expires_at_once_and_once(timer: HostTimer) -> None:
    timer.arm(0)
    assert is_readable(timer)
    assert timer.take_expiry()
    assert not is_readable(timer)
    assert not timer.take_expiry()


def test_a_deadline_in_the_future_does_not(timer: HostTimer) -> None:
    timer.arm(time.monotonic_ns() + HOUR)
    assert not is_readable(timer)


@pytest.mark.parametrize("deadline", [-1, -(1 << 70), 1 << 63, 1 << 64, 1 << 80])
def test_deadlines_out_of_range_are_now_or_never(timer: HostTimer, deadline: int) -> None:
    timer.arm(deadline)
    assert is_readable(timer) == (deadline < 0)


def test_setting_it_again_forgets_the_expiry(timer: HostTimer) -> None:
    timer.arm(0)
    timer.arm(time.monotonic_ns() + HOUR)
    assert not timer.take_expiry()


def test_disarming_it_forgets_the_expiry(timer: HostTimer) -> None:
    timer.arm(0)
    timer.disarm()
    assert not timer.take_expiry()


def test_it_expires_when_its_time_has_come_and_again_with_an_interval(timer: HostTimer) -> None:
    deadline = time.monotonic_ns() + 2_000_000
    timer.arm(deadline, 2_000_000)
    for number in range(3):
        select.select([timer.fd], [], [])
        assert time.monotonic_ns() >= deadline + number * 2_000_000
        assert timer.take_expiry()
