"""When a queue's notifications and interrupts need nobody to pass them on, and where they go then."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from fakebus import ALL_FEATURES, MSIX_TABLE, NOTIFY, WINDOW, Rig

from lguest_mp.bus.virtio_pci import Common

#: What the table of Rig.fill_table() sends for vectors 1 and 2, which are the queues'.
MESSAGES = {0: (0xFEE0_0000, 0x41), 1: (0xFEE0_0000, 0x42)}
ADDRESSES = {0: WINDOW + NOTIFY, 1: WINDOW + NOTIFY + 4}


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


@pytest.fixture
def running(rig: Rig) -> Rig:
    rig.enable_msix()
    rig.fill_table()
    rig.run(vectors=(1, 2))
    return rig


def test_a_running_device_has_all_shortcuts(running: Rig) -> None:
    assert running.shortcuts.notifications == ADDRESSES
    assert running.shortcuts.interrupts == MESSAGES


def test_before_it_runs_it_has_none(rig: Rig) -> None:
    rig.enable_msix()
    rig.fill_table()
    rig.negotiate()
    rig.set_up_queue(0, 1)
    assert rig.shortcuts.notifications == {}
    assert rig.shortcuts.interrupts == {}


def test_its_workers_may_interrupt_while_they_start_and_not_be_notified(rig: Rig) -> None:
    seen = []
    rig.enable_msix()
    rig.fill_table()
    rig.negotiate()
    rig.set_up_queue(0, 1)
    rig.control.during = lambda: seen.append(dict(rig.shortcuts.notifications))
    rig.set_status(rig.status | 4)
    assert seen == [{}]


def test_a_queue_that_is_not_enabled_is_not_notified(rig: Rig) -> None:
    rig.negotiate()
    rig.set_up_queue(1)
    rig.set_status(rig.status | 4)
    assert rig.shortcuts.notifications == {1: ADDRESSES[1]}


def test_when_the_workers_are_ended_the_shortcuts_are_gone_already(running: Rig) -> None:
    seen = []
    running.control.during = lambda: seen.append((running.shortcuts.notifications, running.shortcuts.interrupts))
    running.set_status(0)
    assert seen == [({}, {})]


def test_a_device_that_was_reset_and_started_again_has_them_again(running: Rig) -> None:
    running.set_status(0)
    running.run(vectors=(1, 0xFFFF))
    assert running.shortcuts.notifications == ADDRESSES
    assert running.shortcuts.interrupts == {0: MESSAGES[0]}


def mask_vector(rig: Rig) -> None:
    rig.mask(1, masked=True)


def unmask_vector(rig: Rig) -> None:
    rig.mask(1, masked=False)


def mask_function(rig: Rig) -> None:
    rig.config_write(rig.msix + 2, 2, 0xC000)


def unmask_function(rig: Rig) -> None:
    rig.config_write(rig.msix + 2, 2, 0x8000)


def disable_msix(rig: Rig) -> None:
    rig.config_write(rig.msix + 2, 2, 0)


def stop_mastering(rig: Rig) -> None:
    rig.config_write(4, 2, 2)


def go_on_mastering(rig: Rig) -> None:
    rig.config_write(4, 2, 6)


def take_vector_away(rig: Rig) -> None:
    rig.write(Common.QUEUE_SELECT, 2, 0)
    rig.write(Common.QUEUE_VECTOR, 2, 0xFFFF)


def give_vector_back(rig: Rig) -> None:
    rig.write(Common.QUEUE_SELECT, 2, 0)
    rig.write(Common.QUEUE_VECTOR, 2, 1)


@pytest.mark.parametrize(
    ("close", "reopen", "left"),
    [
        (mask_vector, unmask_vector, {1}),
        (mask_function, unmask_function, set()),
        (disable_msix, unmask_function, set()),
        (stop_mastering, go_on_mastering, set()),
        (take_vector_away, give_vector_back, {1}),
    ],
)
def test_what_holds_an_interrupt_back_closes_its_shortcut(
    running: Rig, close: Callable[[Rig], None], reopen: Callable[[Rig], None], left: set[int]
) -> None:
    close(running)
    assert set(running.shortcuts.interrupts) == left
    assert running.shortcuts.notifications == ADDRESSES
    reopen(running)
    assert running.shortcuts.interrupts == MESSAGES


def test_what_was_pending_is_sent_when_the_shortcut_opens(running: Rig) -> None:
    running.mask(1, masked=True)
    running.function.queue_interrupt(0)
    assert running.sent() == []
    running.mask(1, masked=False)
    assert running.sent() == [0x41]
    assert running.shortcuts.interrupts == MESSAGES


def test_another_message_is_followed(running: Rig) -> None:
    running.write(MSIX_TABLE + 16 + 8, 4, 0x99)
    running.write(MSIX_TABLE + 32, 8, 0xFEE0_2000)
    assert running.shortcuts.interrupts == {0: (0xFEE0_0000, 0x99), 1: (0xFEE0_2000, 0x42)}


def test_a_window_that_moves_or_closes_is_followed(running: Rig) -> None:
    running.config_write(0x10, 4, 0xD000_0000)
    assert running.shortcuts.notifications == {0: 0xD000_3000, 1: 0xD000_3004}
    running.config_write(4, 2, 4)
    assert running.shortcuts.notifications == {}
    running.config_write(4, 2, 6)
    assert running.shortcuts.notifications == {0: 0xD000_3000, 1: 0xD000_3004}


def test_a_queue_that_is_reset_has_none_until_it_is_enabled_again(running: Rig) -> None:
    running.write(Common.QUEUE_SELECT, 2, 0)
    running.write(Common.QUEUE_RESET, 2, 1)
    assert running.shortcuts.notifications == {1: ADDRESSES[1]}
    assert running.shortcuts.interrupts == {1: MESSAGES[1]}
    running.set_up_queue(0, 1)
    assert running.shortcuts.notifications == ADDRESSES
    assert running.shortcuts.interrupts == MESSAGES


def test_a_broken_device_has_none_until_it_is_mended(running: Rig) -> None:
    running.function.broken()
    assert (running.shortcuts.notifications, running.shortcuts.interrupts) == ({}, {})
    running.function.mended()
    assert (running.shortcuts.notifications, running.shortcuts.interrupts) == (ADDRESSES, MESSAGES)


def test_the_features_do_not_matter(rig: Rig) -> None:
    rig.run(features=ALL_FEATURES & ~(1 << 29))
    assert rig.shortcuts.notifications == ADDRESSES
    assert rig.shortcuts.interrupts == {}  # no MSI-X
