"""Intensity, period and back-off."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lguest_mp.config import CrashPolicy
from lguest_mp.supervisor.restarts import FIRST_DELAY, LONGEST_DELAY, Restarts


def test_a_worker_that_works_is_replaced_at_once() -> None:
    restarts = Restarts(CrashPolicy(intensity=100))
    assert [restarts.delay(now, fruitful=True) for now in range(5)] == [0.0] * 5


def test_one_that_does_not_waits_twice_as_long_each_time() -> None:
    restarts = Restarts(CrashPolicy(intensity=1000))
    delays = [restarts.delay(0.0, fruitful=False) for _ in range(100)]
    assert delays[:4] == [0.0, FIRST_DELAY, 2 * FIRST_DELAY, 4 * FIRST_DELAY]
    assert delays[-1] == LONGEST_DELAY


def test_work_ends_a_loop() -> None:
    restarts = Restarts(CrashPolicy(intensity=1000))
    for _ in range(5):
        restarts.delay(0.0, fruitful=False)
    assert restarts.delay(0.0, fruitful=True) == 0.0
    assert restarts.delay(0.0, fruitful=False) == 0.0


def test_somebody_has_seen_to_it() -> None:
    restarts = Restarts(CrashPolicy(intensity=1))
    assert [restarts.delay(0.0, fruitful=True) for _ in range(2)] == [0.0, None]
    restarts.forget()
    assert restarts.delay(0.0, fruitful=True) == 0.0


@given(
    intensity=st.integers(0, 6),
    period=st.floats(0.5, 50),
    gaps=st.lists(st.floats(0, 30), max_size=40),
)
def test_never_more_than_the_intensity_in_a_period(intensity: int, period: float, gaps: list[float]) -> None:
    restarts = Restarts(CrashPolicy(intensity=intensity, period=period))
    now = 0.0
    replaced: list[float] = []
    for gap in gaps:
        now += gap
        recent = [when for when in replaced if when > now - period]
        if restarts.delay(now, fruitful=True) is None:
            assert len(recent) >= intensity
        else:
            assert len(recent) < intensity
            replaced.append(now)
