"""A virtio device on PCI against virtio 1.2, chapters 2, 3 and 4.1."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import pytest
from fakebus import ALL_FEATURES, DEVICE, ISR, MSIX_TABLE, NOTIFY, OK, FakeDevice, Rig
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lguest_mp.bus.virtio_pci import Common, DeviceState
from lguest_mp.virtio.device import DeviceStatus, Feature, QueueLayout

NO_VECTOR = 0xFFFF


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


# Discovery (4.1.2, 4.1.4)


def test_it_is_a_modern_device(rig: Rig) -> None:
    assert (rig.config_read(0, 2), rig.config_read(2, 2)) == (0x1AF4, 0x1042)
    assert rig.config_read(8, 1) >= 1
    assert rig.config_read(0x2E, 2) >= 0x40


def test_its_structures_are_in_its_one_window(rig: Rig) -> None:
    structures = rig.structures()
    assert {kind: place[1:] for kind, place in structures.items()} == {
        1: (0, 0x0000, 60),
        2: (0, 0x3000, 8),
        3: (0, 0x1000, 1),
        4: (0, 0x2000, 10),
        5: (0, 0, 0),
    }
    lengths = {kind: rig.config_read(place[0] + 2, 1) for kind, place in structures.items()}
    assert lengths == {1: 16, 2: 20, 3: 16, 4: 16, 5: 20}
    assert rig.config_read(structures[2][0] + 16, 4) == 4


def test_msix_has_a_vector_for_each_queue_and_one_for_the_configuration(rig: Rig) -> None:
    assert rig.config_read(rig.msix + 2, 2) == 2
    assert rig.config_read(rig.msix + 4, 4) == 0x4000
    assert rig.config_read(rig.msix + 8, 4) == 0x5000


def test_a_device_without_configuration_has_no_structure_for_it() -> None:
    rig = Rig(FakeDevice(b""))
    assert set(rig.structures()) == {1, 2, 3, 5}
    assert rig.read(DEVICE, 4) == 0
    rig.write(DEVICE, 4, 1)
    rig.close()


# Feature negotiation (2.2, 3.1.1, 6)


def test_it_offers_its_features_and_those_of_the_bus(rig: Rig) -> None:
    assert rig.offered() == 1 << 5 | ALL_FEATURES
    rig.write(Common.DEVICE_FEATURE_SELECT, 4, 2)
    assert rig.read(Common.DEVICE_FEATURE, 4) == 0


def test_what_is_accepted_reads_back(rig: Rig) -> None:
    rig.accept(ALL_FEATURES)
    rig.write(Common.DRIVER_FEATURE_SELECT, 4, 1)
    assert rig.read(Common.DRIVER_FEATURE, 4) == ALL_FEATURES >> 32
    rig.write(Common.DRIVER_FEATURE_SELECT, 4, 7)
    rig.write(Common.DRIVER_FEATURE, 4, 0xFFFF_FFFF)
    assert rig.read(Common.DRIVER_FEATURE, 4) == 0


def test_features_that_were_offered_are_agreed_on(rig: Rig) -> None:
    rig.negotiate(Feature.VERSION_1)
    assert rig.status & DeviceStatus.FEATURES_OK
    assert rig.function.state is DeviceState.FEATURES_OK


@pytest.mark.parametrize("features", [ALL_FEATURES | 1 << 6, ALL_FEATURES | Feature.RING_PACKED, 0, 1 << 5])
def test_features_that_were_not_or_without_version_1_are_refused(rig: Rig, features: int) -> None:
    rig.negotiate(features)
    assert not rig.status & DeviceStatus.FEATURES_OK
    assert len(rig.control.logged) == 1
    # Without it there is no DRIVER_OK.
    rig.set_status(OK)
    assert not rig.status & DeviceStatus.DRIVER_OK
    assert rig.control.asked == []
    assert len(rig.control.logged) == 1
    # The driver may think again.
    rig.accept(Feature.VERSION_1)
    rig.set_status(rig.status | DeviceStatus.FEATURES_OK)
    assert rig.status & DeviceStatus.FEATURES_OK


def test_features_do_not_change_once_agreed_on(rig: Rig) -> None:
    rig.negotiate()
    rig.accept(0)
    rig.set_up_queue(0)
    rig.set_status(OK)
    assert rig.control.asked[0][1] == ALL_FEATURES


# Device status (2.1)


def test_the_driver_brings_it_up_step_by_step(rig: Rig) -> None:
    states = [rig.function.state]
    rig.set_status(DeviceStatus.ACKNOWLEDGE)
    states.append(rig.function.state)
    rig.set_status(DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER)
    states.append(rig.function.state)
    rig.accept(ALL_FEATURES)
    rig.set_status(OK & ~DeviceStatus.DRIVER_OK)
    states.append(rig.function.state)
    layout = rig.set_up_queue(1)
    rig.set_status(OK)
    states.append(rig.function.state)
    assert states == [
        DeviceState.RESET,
        DeviceState.ACKNOWLEDGED,
        DeviceState.DRIVER,
        DeviceState.FEATURES_OK,
        DeviceState.RUNNING,
    ]
    assert rig.control.asked == [("start", ALL_FEATURES, (None, layout))]
    assert rig.status == OK


@pytest.mark.parametrize("status", [4, 8, 12, 2, 6, 14, 64])
def test_steps_that_come_too_early_are_not_taken(rig: Rig, status: int) -> None:
    rig.set_status(status)
    assert rig.status == 0
    assert rig.function.state is DeviceState.RESET


def test_bits_are_cleared_by_a_reset_only(rig: Rig) -> None:
    rig.run()
    rig.set_status(DeviceStatus.ACKNOWLEDGE)
    assert rig.status == OK


def test_the_driver_may_give_up(rig: Rig) -> None:
    rig.negotiate()
    rig.set_status(rig.status | DeviceStatus.FAILED)
    assert rig.status & DeviceStatus.FAILED


def test_the_workers_are_gone_when_the_status_reads_zero(rig: Rig) -> None:
    rig.run()
    statuses: list[int] = []
    rig.control.during = lambda: statuses.append(rig.status)
    rig.set_status(0)
    assert rig.control.asked[-1] == ("reset",)
    assert statuses == [OK]
    assert rig.status == 0
    assert rig.function.state is DeviceState.RESET


def test_resetting_a_device_that_nobody_serves_asks_nobody(rig: Rig) -> None:
    rig.set_status(0)
    rig.negotiate()
    rig.set_status(0)
    assert rig.control.asked == []


def test_after_a_reset_the_registers_are_as_at_first(rig: Rig) -> None:
    first = [rig.read(offset, width) for offset, width in WIDTHS.items()]
    rig.run(vectors=(1, 2))
    rig.write(Common.CONFIG_VECTOR, 2, 0)
    rig.write(Common.QUEUE_SELECT, 2, 1)
    rig.set_status(0)
    assert [rig.read(offset, width) for offset, width in WIDTHS.items()] == first


def test_it_can_be_used_again_and_again(rig: Rig) -> None:
    for _ in range(20):
        rig.run()
        assert rig.function.state is DeviceState.RUNNING
        rig.set_status(0)
    assert [asked[0] for asked in rig.control.asked] == ["start", "reset"] * 20


# A device whose driver broke the rules (2.1.2)


def test_a_broken_device_needs_a_reset_and_says_so(rig: Rig) -> None:
    rig.run()
    assert rig.function.broken()
    assert rig.status == OK | DeviceStatus.NEEDS_RESET
    assert rig.read(ISR, 1) == 2
    rig.write(NOTIFY, 2, 0)
    assert rig.kicked() == [0, 0]
    rig.set_status(0)
    assert rig.control.asked[-1] == ("reset",)
    rig.run()
    assert rig.status == OK


def test_news_of_a_life_that_has_ended_does_not_break_the_next(rig: Rig) -> None:
    rig.run()
    rig.set_status(0)
    assert not rig.function.broken()
    assert rig.status == 0


def test_a_device_can_break_while_it_is_being_started(rig: Rig) -> None:
    rig.control.during = rig.function.broken
    rig.run()
    assert rig.function.state is DeviceState.BROKEN
    assert rig.status & DeviceStatus.NEEDS_RESET


def test_what_becomes_of_a_broken_devices_queues_is_told_and_no_more(rig: Rig) -> None:
    """Somebody may mend it, and must not serve a queue where it was."""
    rig.run()
    rig.function.broken()
    asked = len(rig.control.asked)
    rig.write(Common.QUEUE_SELECT, 2, 0)
    rig.write(Common.QUEUE_RESET, 2, 1)
    rig.write(Common.QUEUE_ENABLE, 2, 1)
    rig.set_status(OK)
    assert [what for what, *_ in rig.control.asked[asked:]] == ["reset_queue", "start_queue"]


def test_a_device_that_is_mended_goes_on_and_both_sides_look(rig: Rig) -> None:
    rig.run()
    rig.function.broken()
    rig.read(ISR, 1)
    rig.function.queue_interrupt(0)
    rig.write(NOTIFY, 2, 0)
    assert rig.function.mended()
    assert rig.status == OK
    assert rig.kicked() == [1, 1]
    assert rig.read(ISR, 1) == 1
    rig.write(NOTIFY, 2, 0)
    assert rig.kicked() == [1, 0]


def test_a_device_that_was_reset_or_never_broke_is_not_mended(rig: Rig) -> None:
    rig.run()
    assert not rig.function.mended()
    rig.function.broken()
    rig.set_status(0)
    assert not rig.function.mended()
    assert (rig.status, rig.kicked()) == (0, [0, 0])


# Queues (4.1.4.3)


def test_a_queue_beyond_the_last_has_no_size(rig: Rig) -> None:
    assert rig.read(Common.NUM_QUEUES, 2) == 2
    rig.write(Common.QUEUE_SELECT, 2, 2)
    assert rig.read(Common.QUEUE_SIZE, 2) == 0
    rig.write(Common.QUEUE_SIZE, 2, 16)
    rig.write(Common.QUEUE_ENABLE, 2, 1)
    rig.write64(Common.QUEUE_DESC, 0x1000)
    assert rig.read(Common.QUEUE_ENABLE, 2) == 0
    assert rig.read(Common.QUEUE_DESC, 4) == 0


@pytest.mark.parametrize(("size", "result"), [(128, 128), (1, 1), (256, 256), (0, 256), (100, 256), (512, 256)])
def test_a_queue_can_be_made_smaller_by_powers_of_two(rig: Rig, size: int, result: int) -> None:
    rig.write(Common.QUEUE_SIZE, 2, size)
    assert rig.read(Common.QUEUE_SIZE, 2) == result


@pytest.fixture
def packed_rig() -> Iterator[Rig]:
    """The device, with packed virtqueues offered."""
    rig = Rig(packed=True)
    yield rig
    rig.close()


def test_packed_queues_are_offered_where_they_are_wanted(rig: Rig, packed_rig: Rig) -> None:
    assert packed_rig.offered() ^ rig.offered() == Feature.RING_PACKED


def test_packed_queues_are_for_the_driver_to_accept(rig: Rig, packed_rig: Rig) -> None:
    for each in (rig, packed_rig):
        each.negotiate(ALL_FEATURES | Feature.RING_PACKED)
    assert not rig.status & DeviceStatus.FEATURES_OK
    assert packed_rig.status & DeviceStatus.FEATURES_OK
    layout = packed_rig.set_up_queue(0)
    packed_rig.set_status(OK)
    assert packed_rig.control.asked == [("start", ALL_FEATURES | Feature.RING_PACKED, (layout, None))]


@pytest.mark.parametrize(("size", "result"), [(100, 100), (1, 1), (255, 255), (0, 256), (257, 256)])
def test_a_packed_queue_can_be_made_smaller(packed_rig: Rig, size: int, result: int) -> None:
    """4.1.4.3.2, 2.8.10.1: to any size but 0."""
    packed_rig.negotiate(ALL_FEATURES | Feature.RING_PACKED)
    packed_rig.write(Common.QUEUE_SIZE, 2, size)
    assert packed_rig.read(Common.QUEUE_SIZE, 2) == result


def test_a_queue_that_was_offered_as_packed_and_refused_is_a_split_one(packed_rig: Rig) -> None:
    packed_rig.negotiate(ALL_FEATURES)
    packed_rig.write(Common.QUEUE_SIZE, 2, 100)
    assert packed_rig.read(Common.QUEUE_SIZE, 2) == 256


def test_addresses_are_64_bits_in_two_halves(rig: Rig) -> None:
    rig.write64(Common.QUEUE_DESC, 0x1122_3344_5566_7788)
    assert rig.read(Common.QUEUE_DESC, 4) == 0x5566_7788
    assert rig.read(Common.QUEUE_DESC + 4, 4) == 0x1122_3344
    rig.write(Common.QUEUE_DEVICE + 4, 4, 0xFFFF_FFFF)
    assert rig.read(Common.QUEUE_DEVICE, 8) == 0xFFFF_FFFF_0000_0000
    rig.write(Common.QUEUE_DRIVER, 8, 0x1234_5678_9ABC_DEF0)
    assert rig.read(Common.QUEUE_DRIVER, 8) == 0x1234_5678_9ABC_DEF0


def test_a_queue_in_use_cannot_be_changed(rig: Rig) -> None:
    rig.negotiate()
    layout = rig.set_up_queue(0)
    rig.write(Common.QUEUE_SIZE, 2, 16)
    rig.write64(Common.QUEUE_DESC, 0)
    rig.write64(Common.QUEUE_DRIVER, 0)
    rig.write64(Common.QUEUE_DEVICE, 0)
    rig.write(Common.QUEUE_ENABLE, 2, 0)
    rig.set_status(OK)
    assert rig.control.asked == [("start", ALL_FEATURES, (layout, None))]


def test_each_queue_has_its_own_notification(rig: Rig) -> None:
    for queue in range(2):
        rig.write(Common.QUEUE_SELECT, 2, queue)
        assert rig.read(Common.QUEUE_NOTIFY_OFF, 2) == queue
    rig.run()
    rig.write(NOTIFY + 4, 2, 1)
    assert rig.kicked() == [0, 1]
    rig.write(NOTIFY, 2, 0)
    assert rig.kicked() == [1, 0]


def test_notifications_count_only_for_enabled_queues_of_a_running_device(rig: Rig) -> None:
    rig.negotiate()
    rig.set_up_queue(0)
    rig.write(NOTIFY, 2, 0)
    assert rig.kicked() == [0, 0]
    rig.set_status(OK)
    rig.write(NOTIFY + 4, 2, 1)
    rig.write(NOTIFY + 8, 2, 2)
    rig.write(NOTIFY + 0xFFC, 2, 2)
    assert rig.kicked() == [0, 0]
    rig.write(NOTIFY, 2, 0)
    assert rig.kicked() == [1, 0]
    rig.set_status(0)
    rig.write(NOTIFY, 2, 0)
    assert rig.kicked() == [0, 0]


# Queue reset (2.6.1, 4.1.4.3.1)


def test_a_queue_is_taken_back_and_given_again(rig: Rig) -> None:
    rig.run(vectors=(1, 2))
    rig.write(Common.QUEUE_SELECT, 2, 1)
    rig.write(Common.QUEUE_RESET, 2, 1)
    assert rig.control.asked[-1] == ("reset_queue", 1)
    assert rig.read(Common.QUEUE_RESET, 2) == 0
    assert rig.read(Common.QUEUE_ENABLE, 2) == 0
    assert rig.read(Common.QUEUE_SIZE, 2) == 256
    assert rig.read(Common.QUEUE_VECTOR, 2) == NO_VECTOR
    rig.write(NOTIFY + 4, 2, 1)
    assert rig.kicked() == [0, 0]
    layout = rig.set_up_queue(1, vector=2, size=64)
    assert rig.control.asked[-1] == ("start_queue", 1, ALL_FEATURES, layout)
    rig.write(NOTIFY + 4, 2, 1)
    assert rig.kicked() == [0, 1]


def test_queue_reset_has_to_be_agreed_on(rig: Rig) -> None:
    rig.run(Feature.VERSION_1)
    rig.write(Common.QUEUE_RESET, 2, 1)
    assert rig.read(Common.QUEUE_ENABLE, 2) == 1
    assert [asked[0] for asked in rig.control.asked] == ["start"]


@pytest.mark.parametrize("value", [0, 2, 0xFFFF])
def test_queue_reset_is_asked_for_by_writing_one(rig: Rig, value: int) -> None:
    rig.run()
    rig.write(Common.QUEUE_RESET, 2, value)
    assert rig.read(Common.QUEUE_ENABLE, 2) == 1


# MSI-X (4.1.5.1)


def test_a_vector_that_does_not_exist_reads_back_as_none(rig: Rig) -> None:
    rig.write(Common.CONFIG_VECTOR, 2, 2)
    assert rig.read(Common.CONFIG_VECTOR, 2) == 2
    rig.write(Common.CONFIG_VECTOR, 2, 3)
    assert rig.read(Common.CONFIG_VECTOR, 2) == NO_VECTOR
    rig.write(Common.QUEUE_VECTOR, 2, 0x1234)
    assert rig.read(Common.QUEUE_VECTOR, 2) == NO_VECTOR


def test_each_queue_interrupts_by_its_vector(rig: Rig) -> None:
    rig.enable_msix()
    rig.fill_table()
    rig.write(Common.CONFIG_VECTOR, 2, 0)
    rig.run(vectors=(1, 2))
    rig.function.queue_interrupt(0)
    rig.function.queue_interrupt(1)
    rig.function.config_changed(0, b"\1")
    assert rig.sent() == [0x41, 0x42, 0x40]
    # ISR status is for those without MSI-X (4.1.4.5.1).
    assert rig.read(ISR, 1) == 0
    assert not rig.interrupts.asserted


def test_a_queue_without_a_vector_does_not_interrupt(rig: Rig) -> None:
    rig.enable_msix()
    rig.fill_table()
    rig.run()
    rig.function.queue_interrupt(0)
    assert rig.sent() == []
    assert rig.pending() == 0


@pytest.mark.parametrize("hold_back", ["vector", "function", "master"])
def test_an_interrupt_that_is_held_back_comes_when_nothing_does_so_any_more(rig: Rig, hold_back: str) -> None:
    def hold(held: bool) -> None:
        match hold_back:
            case "vector":
                rig.mask(1, held)
            case "function":
                rig.config_write(rig.msix + 2, 2, 0xC000 if held else 0x8000)
            case "master":
                rig.config_write(4, 2, 2 if held else 6)

    rig.enable_msix()
    rig.fill_table()
    rig.run(vectors=(1, 2))
    hold(True)
    rig.function.queue_interrupt(0)
    rig.function.queue_interrupt(0)
    assert rig.sent() == []
    assert rig.pending() == 2
    hold(False)
    assert rig.sent() == [0x41]
    assert rig.pending() == 0


def test_interrupts_count_while_the_workers_are_being_started(rig: Rig) -> None:
    rig.enable_msix()
    rig.fill_table()
    rig.control.during = lambda: rig.function.queue_interrupt(0)
    rig.run(vectors=(1, 2))
    assert rig.sent() == [0x41]


def test_no_interrupt_comes_from_a_device_that_is_reset(rig: Rig) -> None:
    rig.enable_msix()
    rig.fill_table()
    rig.run(vectors=(1, 2))
    rig.mask(1, True)
    rig.function.queue_interrupt(0)
    rig.control.during = lambda: rig.function.queue_interrupt(1)
    rig.set_status(0)
    rig.mask(1, False)
    rig.function.queue_interrupt(0)
    assert rig.sent() == []
    assert rig.pending() == 0


# INTx and ISR status (4.1.4.5, 4.1.5.1.3)


def test_without_msix_the_pin_is_asserted_until_isr_status_is_read(rig: Rig) -> None:
    rig.run()
    rig.function.queue_interrupt(0)
    assert rig.interrupts.asserted
    assert rig.config_read(6, 2) & 8
    assert rig.config_read(4, 4) >> 16 & 8
    assert rig.read(ISR, 1) == 1
    assert not rig.interrupts.asserted
    assert not rig.config_read(6, 2) & 8
    assert rig.read(ISR, 1) == 0


def test_isr_status_tells_queues_from_configuration(rig: Rig) -> None:
    rig.run()
    rig.function.config_changed(0, b"\1")
    assert rig.read(ISR, 1) == 2
    rig.function.config_changed(0, b"\1")
    rig.function.queue_interrupt(1)
    assert rig.read(ISR, 1) == 3


def test_the_command_register_disables_the_pin_and_not_the_status(rig: Rig) -> None:
    rig.run()
    rig.config_write(4, 2, 0x406)
    rig.function.queue_interrupt(0)
    assert not rig.interrupts.asserted
    assert rig.config_read(6, 2) & 8
    rig.config_write(4, 2, 6)
    assert rig.interrupts.asserted


def test_a_reset_lets_go_of_the_pin(rig: Rig) -> None:
    rig.run()
    rig.function.queue_interrupt(0)
    rig.set_status(0)
    assert not rig.interrupts.asserted


def test_an_interrupt_moves_to_msix_and_back_when_that_is_switched(rig: Rig) -> None:
    rig.fill_table()
    rig.config_write(4, 2, 6)
    rig.run(vectors=(1, 2))
    rig.function.queue_interrupt(0)
    rig.enable_msix()
    assert not rig.interrupts.asserted
    assert rig.sent() == [0x41]
    rig.mask(2, True)
    rig.function.queue_interrupt(1)
    rig.config_write(rig.msix + 2, 2, 0)
    assert rig.interrupts.asserted
    assert rig.pending() == 0
    assert rig.read(ISR, 1) == 1


# The device's own configuration (2.5, 4.1.4.6)


@pytest.mark.parametrize(
    ("offset", "size", "value"),
    [
        (0, 1, 0),
        (1, 1, 1),
        (2, 2, 0x0302),
        (4, 4, 0x0706_0504),
        (0, 8, 0x0706_0504_0302_0100),
        (8, 4, 0x0908),
        (10, 4, 0),
    ],
)
def test_configuration_is_read_in_any_width(rig: Rig, offset: int, size: int, value: int) -> None:
    assert rig.read(DEVICE + offset, size) == value


def test_what_the_guest_writes_reaches_the_device_if_it_is_inside(rig: Rig) -> None:
    rig.write(DEVICE + 8, 2, 0xBEEF)
    assert rig.read(DEVICE + 8, 2) == 0xBEEF
    rig.write(DEVICE + 8, 4, 0)
    rig.write(DEVICE + 9, 2, 0)
    rig.write(DEVICE + 0xFFF, 1, 0)
    assert rig.read(DEVICE + 8, 2) == 0xBEEF


def test_a_change_of_configuration_has_a_generation_of_its_own(rig: Rig) -> None:
    rig.run()
    generation = rig.read(Common.CONFIG_GENERATION, 1)
    rig.function.config_changed(2, b"\xaa\xbb")
    assert rig.read(DEVICE + 2, 2) == 0xBBAA
    assert rig.read(Common.CONFIG_GENERATION, 1) != generation
    assert rig.interrupts.asserted
    for _ in range(300):
        rig.function.config_changed(0, b"\0")


def test_a_change_before_there_is_a_driver_interrupts_nobody(rig: Rig) -> None:
    rig.function.config_changed(0, b"\xff")
    assert rig.read(DEVICE, 1) == 0xFF
    assert not rig.interrupts.asserted


# Access through configuration space (4.1.4.9)


def set_up_access(rig: Rig, offset: int, length: int, bar: int = 0) -> int:
    place = rig.structures()[5][0]
    rig.config_write(place + 4, 1, bar)
    rig.config_write(place + 8, 4, offset)
    rig.config_write(place + 12, 4, length)
    return place + 16


def test_the_window_is_reached_without_memory_accesses(rig: Rig) -> None:
    rig.config_write(4, 2, 0)
    data = set_up_access(rig, Common.NUM_QUEUES, 2)
    assert rig.config_read(data, 2) == 2
    data = set_up_access(rig, Common.DEVICE_STATUS, 1)
    rig.config_write(data, 1, DeviceStatus.ACKNOWLEDGE)
    assert rig.config_read(data, 1) == 1
    data = set_up_access(rig, DEVICE, 4)
    assert rig.config_read(data, 4) == 0x0302_0100
    assert rig.config_read(data + 1, 1) == 1


@pytest.mark.parametrize(
    ("offset", "length", "bar"),
    [
        (0, 0, 0),
        (0, 3, 0),
        (0, 8, 0),
        (0, 0xFFFF_FFFF, 0),
        (1, 2, 0),
        (2, 4, 0),
        (0, 4, 1),
        (0x8000, 1, 0),
        (1 << 31, 4, 0),
    ],
)
def test_an_impossible_access_is_none(rig: Rig, offset: int, length: int, bar: int) -> None:
    data = set_up_access(rig, offset, length, bar)
    rig.config_write(data, 4, 0x1234_5678)
    assert rig.config_read(data, 4) == 0x1234_5678
    assert rig.status == 0


# Widths (4.1.3.1)

WIDTHS = {
    Common.DEVICE_FEATURE_SELECT: 4,
    Common.DEVICE_FEATURE: 4,
    Common.DRIVER_FEATURE_SELECT: 4,
    Common.DRIVER_FEATURE: 4,
    Common.CONFIG_VECTOR: 2,
    Common.NUM_QUEUES: 2,
    Common.DEVICE_STATUS: 1,
    Common.CONFIG_GENERATION: 1,
    Common.QUEUE_SELECT: 2,
    Common.QUEUE_SIZE: 2,
    Common.QUEUE_VECTOR: 2,
    Common.QUEUE_ENABLE: 2,
    Common.QUEUE_NOTIFY_OFF: 2,
    Common.QUEUE_DESC: 4,
    Common.QUEUE_DRIVER: 4,
    Common.QUEUE_DEVICE: 4,
    Common.QUEUE_RESET: 2,
}


def test_the_registers_are_where_the_standard_has_them() -> None:
    """Struct virtio_pci_common_cfg, packed as in C."""
    layout = struct.Struct("<IIIIHHBBHHHHHQQQHH")
    assert layout.size == Common.LENGTH
    assert sum(WIDTHS.values()) + 3 * 4 + 2 == layout.size


@pytest.mark.parametrize("offset", WIDTHS)
def test_other_widths_than_the_registers_own_do_nothing(rig: Rig, offset: int) -> None:
    rig.negotiate()
    before = [rig.read(register, width) for register, width in WIDTHS.items()]
    for size in {1, 2, 4} - {WIDTHS[offset]}:
        rig.write(offset, size, (1 << 8 * size) - 1)
        assert rig.read(offset, size) == 0
    assert [rig.read(register, width) for register, width in WIDTHS.items()] == before


# A hostile driver


ACCESS = st.tuples(
    st.booleans(),
    st.one_of(
        st.integers(0, 0x7FFF),
        st.integers(0, 63),
        st.sampled_from(sorted(WIDTHS)),
        st.sampled_from([ISR, NOTIFY, NOTIFY + 4, MSIX_TABLE + 12, MSIX_TABLE + 28]),
    ),
    st.sampled_from([1, 2, 4, 8]),
    st.one_of(st.integers(0, (1 << 64) - 1), st.sampled_from([0, 1, 3, 8, 11, 15, 0xFFFF])),
)


@given(st.lists(ACCESS, max_size=80), st.booleans())
@settings(max_examples=200)
def test_no_access_is_an_error_of_ours(accesses: list[tuple[bool, int, int, int]], running: bool) -> None:
    rig = Rig()
    if running:
        rig.enable_msix()
        rig.run(vectors=(1, 2))
    for is_write, offset, size, value in accesses:
        if is_write:
            rig.write(offset, WIDTHS.get(offset, size), value & (1 << 8 * WIDTHS.get(offset, size)) - 1)
        else:
            assert 0 <= rig.read(offset, size) < 1 << 8 * size
        rig.function.queue_interrupt(value & 1)
        assert not rig.lock.locked()
    # What was asked of the supervisor is what it accepts: a start, then queues and a reset, in turn.
    served: set[int] | None = None
    for asked in rig.control.asked:
        match asked:
            case ("start", _, tuple(layouts)):
                assert served is None
                served = {index for index, layout in enumerate(layouts) if layout}
            case ("reset",):
                assert served is not None
                served = None
            case ("start_queue", int(queue), _, QueueLayout()):
                assert served is not None
                assert queue not in served
                served.add(queue)
            case ("reset_queue", int(queue)):
                assert served is not None
                assert queue in served
                served.remove(queue)
    rig.close()


class Interrupting(RuleBasedStateMachine):
    """A driver that masks, disables and switches what it likes: what a worker has said arrives in the end."""

    @initialize()
    def bring_up(self) -> None:
        self.rig = Rig()
        self.rig.enable_msix()
        self.rig.fill_table()
        self.rig.write(Common.CONFIG_VECTOR, 2, 0)
        self.rig.run(vectors=(1, 2))
        #: What the driver has not heard of: 0 and 1 are the queues, 2 is the configuration.
        self.owed: set[int] = set()

    def hear(self) -> None:
        """The driver's interrupt handlers."""
        for data in self.rig.sent():
            self.owed.discard({0x41: 0, 0x42: 1, 0x40: 2}[data])
        if self.rig.interrupts.asserted:
            isr = self.rig.read(ISR, 1)
            assert isr
            if isr & 1:
                self.owed -= {0, 1}
            if isr & 2:
                self.owed.discard(2)

    @rule(queue=st.integers(0, 1))
    def worker_interrupts(self, queue: int) -> None:
        self.owed.add(queue)
        self.rig.function.queue_interrupt(queue)
        self.hear()

    @rule()
    def configuration_changes(self) -> None:
        self.owed.add(2)
        self.rig.function.config_changed(0, b"\0")
        self.hear()

    @rule(vector=st.integers(0, 2), masked=st.booleans())
    def mask_vector(self, vector: int, masked: bool) -> None:
        self.rig.mask(vector, masked)
        self.hear()

    @rule(control=st.sampled_from([0, 0x4000, 0x8000, 0xC000]))
    def switch_msix(self, control: int) -> None:
        self.rig.config_write(self.rig.msix + 2, 2, control)
        self.hear()

    @rule(command=st.sampled_from([2, 6, 0x402, 0x406]))
    def write_command(self, command: int) -> None:
        self.rig.config_write(4, 2, command)
        self.hear()

    def settle(self) -> None:
        """The driver leaves nothing held back."""
        for vector in range(3):
            self.mask_vector(vector=vector, masked=False)

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "rig") and self.rig.interrupts.asserted:
            assert self.owed

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.finish()
            self.rig.close()

    def finish(self) -> None:
        finishes: list[Callable[[], None]] = [
            self.settle,
            lambda: self.switch_msix(control=0x8000),
            lambda: self.write_command(command=6),
        ]
        for finish in finishes:
            finish()
        assert self.owed == set()


TestInterrupting = Interrupting.TestCase
