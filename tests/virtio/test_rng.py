"""The entropy device (virtio 1.2, 5.4)."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mockdriver import DriverFactory, MockDriver

from lguest_mp.errors import DeviceProtocolError
from lguest_mp.memory import GuestMemory
from lguest_mp.virtio.device import DeviceId
from lguest_mp.virtio.rng import CHUNK, Rng


def test_what_it_is() -> None:
    """5.4.1 to 5.4.4: entropy, one queue, no features, no configuration."""
    rng = Rng("rng0")
    assert (rng.device_id, rng.queue_names, rng.features) == (DeviceId.ENTROPY, ("requestq",), 0)
    assert rng.config_space() == b""
    assert rng.files == ()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(0, 300), min_size=1, max_size=10), indirect=st.booleans())
def test_it_fills_the_buffer_whatever_its_layout(
    new_driver: DriverFactory, monkeypatch: pytest.MonkeyPatch, lengths: list[int], indirect: bool
) -> None:
    """5.4.6: "It will be completely filled by random data"; 2.7.4.1: whatever the arrangement of descriptors."""
    source = os.urandom(4096)
    taken = 0

    def getrandom(length: int) -> bytes:
        nonlocal taken
        taken += length
        return source[taken - length : taken]

    driver = new_driver()
    buffer = driver.add([], lengths, indirect=indirect)
    with monkeypatch.context() as patch:
        patch.setattr("os.getrandom", getrandom)
        driver.serve(Rng("rng0"))
    assert driver.content(buffer) == source[: sum(lengths)]
    assert driver.used() == [(buffer.head, sum(lengths))]


def test_a_short_answer_of_the_host_is_continued(driver: MockDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """getrandom(2): a signal may cut short what is longer than 256 bytes."""
    monkeypatch.setattr("os.getrandom", lambda length: b"r" * min(length, 7))
    buffer = driver.add([], [100])
    driver.serve(Rng("rng0"))
    assert driver.content(buffer) == b"r" * 100


def test_a_large_buffer_costs_the_host_little_memory(
    new_driver: DriverFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def getrandom(length: int) -> bytes:
        asked.append(length)
        return bytes(length)

    monkeypatch.setattr("os.getrandom", getrandom)
    driver = new_driver(memory=GuestMemory(16 << 20))
    driver.add([], [8 << 20])
    driver.serve(Rng("rng0"))
    assert max(asked) == CHUNK
    assert driver.used() == [(0, 8 << 20)]


def test_who_is_done_does_not_wait_for_a_large_buffer(
    new_driver: DriverFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    driver = new_driver(memory=GuestMemory(2 << 20))
    small = driver.add([], [16])
    driver.add([], [1 << 20])

    def getrandom(length: int) -> bytes:
        seen.append(driver.used_index)
        return bytes(length)

    monkeypatch.setattr("os.getrandom", getrandom)
    driver.serve(Rng("rng0"))
    assert seen[:2] == [0, 1]
    assert driver.used()[0] == (small.head, 16)


def test_it_is_random(driver: MockDriver) -> None:
    buffers = [driver.add([], [32]) for _ in range(2)]
    driver.serve(Rng("rng0"))
    first, second = map(driver.content, buffers)
    assert len({bytes(32), first, second}) == 3


@pytest.mark.parametrize("writable", [[], [16]])
def test_readable_buffers_are_against_the_rules(driver: MockDriver, writable: list[int]) -> None:
    """5.4.6.1."""
    driver.add([b"x"], writable)
    with pytest.raises(DeviceProtocolError, match=r"5\.4\.6\.1"):
        driver.serve(Rng("rng0"))
