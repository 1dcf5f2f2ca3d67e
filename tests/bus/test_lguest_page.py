"""lguest's bus as a driver finds it: what the page says, what a notification does, and what a liar gets."""

from __future__ import annotations

import struct
from contextlib import suppress
from threading import Lock
from typing import NoReturn

import pytest
from fakebus import FakeControl
from hypothesis import given
from hypothesis import strategies as st

from lguest_mp.bus.lguest_page import (
    BUS_FEATURES,
    DEVICE_PAGES,
    DeviceState,
    LguestBus,
    LguestDevice,
    plan,
)
from lguest_mp.errors import GuestError, LguestError
from lguest_mp.memory import PAGE_SIZE, GuestMemory
from lguest_mp.virtio.device import Device, DeviceId, QueueLayout
from lguest_mp.virtio.queue import Queue
from lguest_mp.worker import WorkerContext

RAM = 1 << 20
PAGE = RAM
ACKNOWLEDGE, DRIVER, DRIVER_OK, NEEDS_RESET, FAILED = 1, 2, 4, 64, 128
OWN = 1 << 9
KICKS = ((100, 101), (102,))


class FakeDevice(Device):
    """A device with so many queues, and one feature."""

    def __init__(self, name: str, device_id: DeviceId, queues: int, config: bytes = b"") -> None:
        super().__init__(name, config)
        self.device_id = device_id
        self.queue_names = tuple(f"queue{index}" for index in range(queues))

    @property
    def features(self) -> int:
        return OWN

    def serve(self, queue_index: int, queue: Queue, context: WorkerContext) -> NoReturn:
        raise NotImplementedError


class Driver:
    """Walks the descriptor page as Linux's driver does, and notifies."""

    def __init__(self, memory: GuestMemory, bus: LguestBus) -> None:
        self.memory = memory
        self.bus = bus
        self.descriptors = []
        at = PAGE
        while at < PAGE + PAGE_SIZE and memory.read(at, 1)[0]:
            self.descriptors.append(at)
            _, queues, features, config, _ = memory.read(at, 5)
            at += 5 + 8 * queues + 2 * features + config

    def queues(self, device: int) -> list[tuple[int, int, int]]:
        """(size, interrupt, page) of each."""
        at = self.descriptors[device]
        count = self.memory.read(at + 1, 1)[0]
        return list(struct.iter_unpack("<HHI", self.memory.read(at + 5, 8 * count)))

    def offered(self, device: int) -> int:
        return int.from_bytes(self.memory.read(self._features(device), 4), "little")

    def accepted(self, device: int) -> int:
        return int.from_bytes(self.memory.read(self._features(device) + 4, 4), "little")

    def accept(self, device: int, features: int) -> None:
        self.memory.write(self._features(device) + 4, features.to_bytes(4, "little"))

    def config(self, device: int) -> bytes:
        length = self.memory.read(self.descriptors[device] + 3, 1)[0]
        return self.memory.read(self._features(device) + 8, length)

    def _features(self, device: int) -> int:
        return self.descriptors[device] + 5 + 8 * len(self.queues(device))

    def status(self, device: int) -> int:
        return self.memory.read(self.descriptors[device] + 4, 1)[0]

    def set_status(self, device: int, status: int) -> None:
        self.memory.write(self.descriptors[device] + 4, bytes([status]))

    def notify(self, device: int) -> None:
        self.bus.notify(self.descriptors[device])

    def finalize(self, device: int, features: int = 0) -> None:
        """What a driver's probe does first."""
        self.set_status(device, 0)
        self.notify(device)
        self.set_status(device, ACKNOWLEDGE | DRIVER)
        self.accept(device, features)
        self.notify(device)


class Rig:
    """A device of two queues with a configuration, a device of one without, and what they are connected to."""

    def __init__(self) -> None:
        self.memory = GuestMemory(RAM + DEVICE_PAGES * PAGE_SIZE)
        self.fakes = [
            FakeDevice("net0", DeviceId.NET, 2, b"\x01\x02\x03\x04\x05\x06"),
            FakeDevice("rng0", DeviceId.ENTROPY, 1),
        ]
        self.plan = plan(self.fakes, PAGE)
        self.interrupts: list[int] = []
        self.attached: list[tuple[int, int]] = []
        self.warnings: list[str] = []
        self.printed: list[bytes] = []
        self.controls = [FakeControl(), FakeControl()]
        self.lock = Lock()
        self.devices = [
            LguestDevice(
                device,
                place,
                kicks,
                self.memory,
                lock=self.lock,
                interrupt=self.interrupts.append,
                attach=lambda address, eventfd: self.attached.append((address, eventfd)),
                control=control,
                warn=self.warnings.append,
            )
            for device, place, kicks, control in zip(self.fakes, self.plan.devices, KICKS, self.controls, strict=True)
        ]
        self.bus = LguestBus(self.devices, self.memory, self.plan.end, self.printed.append)
        self.driver = Driver(self.memory, self.bus)


@pytest.fixture
def rig() -> Rig:
    return Rig()


# What the page says


def test_devices_stand_one_after_the_other_in_their_order(rig: Rig) -> None:
    assert rig.driver.descriptors == [PAGE, PAGE + 5 + 16 + 8 + 6]
    assert [rig.memory.read(at, 5) for at in rig.driver.descriptors] == [
        bytes((DeviceId.NET, 2, 4, 6, 0)),
        bytes((DeviceId.ENTROPY, 1, 4, 0, 0)),
    ]


def test_behind_the_last_device_is_a_type_of_zero(rig: Rig) -> None:
    end = rig.plan.devices[-1].end
    assert rig.memory.read(end, PAGE + PAGE_SIZE - end) == bytes(PAGE + PAGE_SIZE - end)


def test_each_queue_has_three_pages_and_the_next_interrupt(rig: Rig) -> None:
    first = PAGE // PAGE_SIZE + 1
    assert rig.driver.queues(0) == [(256, 1, first), (256, 2, first + 3)]
    assert rig.driver.queues(1) == [(256, 3, first + 6)]
    assert rig.plan.end == (first + 9) * PAGE_SIZE


def test_the_rings_have_the_legacy_layout(rig: Rig) -> None:
    rig.driver.finalize(1)
    at = rig.driver.queues(1)[0][2] * PAGE_SIZE
    (_, _, (layout,)) = rig.controls[1].asked[-1]
    assert layout == QueueLayout(256, at, at + 4096, at + 8192)


def test_own_features_and_the_bus_s_are_offered(rig: Rig) -> None:
    assert rig.driver.offered(0) == OWN | 1 << 27 | 1 << 28 | 1 << 29
    assert rig.driver.accepted(0) == 0


def test_the_configuration_follows_the_features(rig: Rig) -> None:
    assert rig.driver.config(0) == b"\x01\x02\x03\x04\x05\x06"
    assert rig.driver.config(1) == b""


def refusal(devices: list[Device]) -> str:
    with pytest.raises(LguestError) as caught:
        plan(devices, PAGE)
    return str(caught.value)


def test_too_many_for_one_page() -> None:
    devices: list[Device] = [FakeDevice("", DeviceId.BLOCK, 1, bytes(200)) for _ in range(20)]
    assert refusal(devices) == ("too many devices: their descriptors have 4420 bytes, and a page 4096; leave some out")


def test_a_full_page_is_not_too_full() -> None:
    fill = [FakeDevice("", DeviceId.BLOCK, 1, bytes(235)) for _ in range(16)]
    assert plan(fill, PAGE).devices[-1].end == PAGE + PAGE_SIZE


def test_too_many_for_the_interrupts() -> None:
    devices: list[Device] = [FakeDevice("", DeviceId.NET, 2) for _ in range(16)]
    plan(devices[:-1], PAGE)
    assert refusal(devices) == "too many devices: they have 32 queues, and a guest 31 interrupts; leave some out"


# What a driver does


def test_zero_is_a_reset_that_nobody_is_asked_for_when_nobody_serves(rig: Rig) -> None:
    rig.driver.accept(0, 0xFF)
    rig.driver.set_status(0, 0)
    rig.driver.notify(0)
    assert rig.driver.accepted(0) == 0
    assert rig.controls[0].asked == []


def test_final_features_start_the_device(rig: Rig) -> None:
    rig.driver.finalize(0, OWN | 1 << 29)
    ((what, features, queues),) = rig.controls[0].asked
    assert (what, features, len(queues)) == ("start", OWN | 1 << 29, 2)
    assert rig.controls[1].asked == []


def test_features_that_were_not_offered_are_not_accepted(rig: Rig) -> None:
    rig.driver.finalize(0, 0xFFFF_FFFF)
    assert rig.controls[0].asked[0][1] == OWN | BUS_FEATURES


def test_queues_are_attached_before_anybody_serves_them_and_once(rig: Rig) -> None:
    seen: list[int] = []
    rig.controls[0].during = lambda: seen.append(len(rig.attached))
    rig.driver.finalize(0)
    rig.driver.finalize(0)
    assert rig.attached == [
        (page * PAGE_SIZE, kick) for (_, _, page), kick in zip(rig.driver.queues(0), KICKS[0], strict=True)
    ]
    assert seen == [2, 2, 2]


def test_a_reset_is_done_when_the_notification_returns(rig: Rig) -> None:
    rig.driver.finalize(0, OWN)
    at = rig.driver.queues(0)[1][2] * PAGE_SIZE
    rig.memory.write(at, b"\xff" * 3 * PAGE_SIZE)

    seen: list[bytes] = []
    rig.controls[0].during = lambda: seen.append(rig.memory.read(at, 1))
    rig.driver.set_status(0, 0)
    rig.driver.notify(0)
    assert seen == [b"\xff"], "the workers may still be looking"
    assert [what for what, *_ in rig.controls[0].asked] == ["start", "reset"]
    assert rig.memory.read(at, 10246) == bytes(10246)
    assert rig.driver.accepted(0) == 0
    rig.driver.finalize(0)
    assert rig.controls[0].asked[-1][0] == "start"


def test_a_driver_that_fails_is_told_of_and_its_device_reset(rig: Rig) -> None:
    rig.driver.set_status(0, ACKNOWLEDGE | DRIVER | FAILED)
    rig.driver.notify(0)
    assert rig.warnings == ["Device net0 configuration FAILED"]
    assert rig.controls[0].asked == []
    rig.driver.finalize(0)
    rig.driver.set_status(0, ACKNOWLEDGE | FAILED)
    rig.driver.notify(0)
    assert rig.controls[0].asked[-1] == ("reset",)
    assert len(rig.warnings) == 2


def test_final_features_twice_end_the_guest(rig: Rig) -> None:
    rig.driver.finalize(0)
    with pytest.raises(GuestError, match=r"^Device net0 features finalized twice$"):
        rig.driver.notify(0)


def test_a_kick_before_the_features_are_final_ends_the_guest(rig: Rig) -> None:
    with pytest.raises(GuestError, match=r"^Notification on rng0 before setup!$"):
        rig.bus.notify(rig.driver.queues(1)[0][2] * PAGE_SIZE)


def test_the_guest_s_own_changes_of_the_page_change_nothing(rig: Rig) -> None:
    rig.memory.write(PAGE, b"\xee" * 4)
    rig.memory.write(PAGE + 5, b"\xee" * 24)
    rig.memory.write(PAGE + 4, b"\x03")
    rig.bus.notify(PAGE)
    (_, _, queues) = rig.controls[0].asked[0]
    assert queues == tuple(queue.layout() for queue in rig.plan.devices[0].queues)


# The early console


def test_a_string_anywhere_else_is_printed(rig: Rig) -> None:
    rig.memory.write(0x5000, b"Linux version\n\0and more")
    rig.bus.notify(0x5000)
    assert rig.printed == [b"Linux version\n"]


def test_a_string_without_an_end_is_cut(rig: Rig) -> None:
    rig.memory.write(0x5000, b"x" * 10_000)
    rig.bus.notify(0x5000)
    assert rig.printed == [b"x" * 4096]


def test_a_string_ends_where_memory_ends(rig: Rig) -> None:
    rig.memory.write(rig.plan.end - 2, b"xy")
    rig.bus.notify(rig.plan.end - 2)
    assert rig.printed == [b"xy"]


@pytest.mark.parametrize("beyond", [0, 1, PAGE_SIZE, 0xFFFF_FFFF - RAM])
def test_an_address_beyond_memory_ends_the_guest(rig: Rig, beyond: int) -> None:
    address = min(rig.plan.end + beyond, 0xFFFF_FFFF)
    with pytest.raises(GuestError, match=f"^Bad NOTIFY {address:#x}$"):
        rig.bus.notify(address)


@given(
    writes=st.lists(st.tuples(st.integers(0, 100), st.binary(max_size=8))),
    addresses=st.lists(st.integers(0, (1 << 32) - 1), max_size=10),
)
def test_no_page_and_no_notification_does_more_than_end_the_guest(
    writes: list[tuple[int, bytes]], addresses: list[int]
) -> None:
    rig = Rig()
    places = [*rig.driver.descriptors, *(page * PAGE_SIZE for _, _, page in rig.driver.queues(0))]
    for offset, data in writes:
        rig.memory.write(PAGE + offset, data)
        for address in [*places, *addresses]:
            with suppress(GuestError):
                rig.bus.notify(address)


# What happens outside


def test_a_worker_s_interrupt_is_its_queue_s(rig: Rig) -> None:
    rig.driver.finalize(0)
    rig.devices[0].queue_interrupt(1)
    assert rig.interrupts == [2]


def test_nobody_is_interrupted_by_a_device_that_is_reset(rig: Rig) -> None:
    rig.devices[0].queue_interrupt(0)
    rig.driver.finalize(0)
    rig.driver.set_status(0, 0)
    rig.driver.notify(0)
    rig.devices[0].queue_interrupt(0)
    assert rig.interrupts == []


def test_workers_interrupt_as_soon_as_they_are_there(rig: Rig) -> None:
    rig.controls[0].during = lambda: rig.devices[0].queue_interrupt(0)
    rig.driver.finalize(0)
    assert rig.interrupts == [1]


def test_a_changed_configuration_is_on_the_page(rig: Rig) -> None:
    rig.devices[0].config_changed(2, b"\xaa\xbb")
    assert rig.driver.config(0) == b"\x01\x02\xaa\xbb\x05\x06"
    assert rig.fakes[0].config_space() == rig.driver.config(0)


def test_a_change_beyond_the_configuration_is_nobody_s(rig: Rig) -> None:
    before = rig.memory.read(PAGE, PAGE_SIZE)
    with pytest.raises(ValueError, match="no configuration bytes"):
        rig.devices[0].config_changed(5, b"\xaa\xbb")
    assert rig.memory.read(PAGE, PAGE_SIZE) == before


def test_a_broken_device_says_so_until_it_is_reset(rig: Rig) -> None:
    rig.driver.finalize(0)
    rig.driver.set_status(0, ACKNOWLEDGE | DRIVER | DRIVER_OK)
    assert rig.devices[0].broken()
    assert rig.driver.status(0) == ACKNOWLEDGE | DRIVER | DRIVER_OK | NEEDS_RESET
    rig.devices[0].queue_interrupt(0)
    assert rig.interrupts == []
    rig.driver.finalize(0)
    assert rig.devices[0].state is DeviceState.RUNNING
    assert [what for what, *_ in rig.controls[0].asked] == ["start", "reset", "start"]


def test_a_device_that_is_mended_goes_on(rig: Rig) -> None:
    rig.driver.finalize(0)
    rig.driver.set_status(0, ACKNOWLEDGE | DRIVER | DRIVER_OK)
    rig.devices[0].broken()
    assert rig.devices[0].mended()
    assert rig.driver.status(0) == ACKNOWLEDGE | DRIVER | DRIVER_OK
    assert rig.interrupts == [queue.interrupt for queue in rig.devices[0].place.queues]
    assert not rig.devices[0].mended()


def test_a_device_breaks_while_it_starts(rig: Rig) -> None:
    rig.controls[0].during = rig.devices[0].broken
    rig.driver.finalize(0)
    assert rig.devices[0].state is DeviceState.BROKEN


def test_news_of_the_life_that_ends_do_not_reach_the_next(rig: Rig) -> None:
    rig.driver.finalize(0)
    told: list[bool] = []
    rig.controls[0].during = lambda: told.append(rig.devices[0].broken())
    rig.driver.set_status(0, 0)
    rig.driver.notify(0)
    assert told == [False]
    assert rig.driver.status(0) == 0


def test_a_device_that_nobody_serves_does_not_break(rig: Rig) -> None:
    assert not rig.devices[0].broken()
