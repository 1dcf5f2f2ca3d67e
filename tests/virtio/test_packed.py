"""The packed virtqueue, where it is not as the split one: what a driver gets, and what a bad one is told (2.8).

All else is tested for both, with what the devices do on them (``of`` in conftest.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import mockdriver
import pytest
from mockdriver import ALL, INDIRECT, NEXT, WRITE, Descriptor
from packeddriver import AVAIL, DESC, DISABLE, ENABLE, USED, PackedDriver

from lguest_mp.errors import DeviceProtocolError
from lguest_mp.memory import GuestMemory
from lguest_mp.virtio.device import Feature, QueueLayout
from lguest_mp.virtio.packed import PackedQueue
from lguest_mp.virtio.queue import Chain, Queue

MIB = 1 << 20


def popped(queue: Queue) -> Chain:
    chain = queue.pop()
    assert chain is not None
    return chain


@pytest.fixture
def new_driver() -> Iterator[Callable[..., PackedDriver]]:
    drivers: list[PackedDriver] = []

    def new(*arguments: int, **keywords: int) -> PackedDriver:
        drivers.append(PackedDriver(*arguments, **keywords))  # type: ignore[arg-type]
        return drivers[-1]

    yield new
    for driver in drivers:
        driver.close()


@pytest.fixture
def driver(new_driver: Callable[..., PackedDriver]) -> PackedDriver:
    return new_driver()


def words(driver: PackedDriver, place: int) -> tuple[int, int, int]:
    """Of a descriptor in the ring: length, ID, flags."""
    length_low, length_high, identifier, flags = driver.words[8 * place + 4 : 8 * place + 8]
    return length_low | length_high << 16, identifier, flags


class TestRing:
    """One ring for both sides."""

    @pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 16, 100])
    def test_turn_after_turn(self, new_driver: Callable[..., PackedDriver], size: int) -> None:
        """2.8.1; and 2.8.10.1: a size is any number. Lists of any length begin at any place."""
        driver = new_driver(size)
        queue = driver.queue()
        for number in range(6 * size):
            count = number % min(size, 4) + 1
            buffer = driver.add([bytes([each]) for each in range(count)])
            chain = popped(queue)
            assert [bytes(view) for view in chain.readable] == [bytes([each]) for each in range(count)]
            assert queue.pop() is None
            queue.push(chain, 0)
            queue.flush()
            assert driver.used() == [(buffer.head, 0)]
            driver.forget_buffers()

    @pytest.mark.parametrize("size", [5, 16])
    def test_a_full_ring_at_any_place(self, new_driver: Callable[..., PackedDriver], size: int) -> None:
        driver = new_driver(size)
        queue = driver.queue()
        for lap in range(4 * size):
            heads = [driver.add([], [4]).head for _ in range(size)]
            for _ in heads:
                queue.push(popped(queue), 4)
            assert queue.pop() is None
            queue.flush()
            assert driver.used() == [(head, 4) for head in heads], lap
            driver.add([], [4])
            queue.push(popped(queue), 4)
            queue.flush()
            driver.used()
            driver.forget_buffers()

    def test_any_buffer_id(self, driver: PackedDriver) -> None:
        """2.8.13 does not say that it is below the queue's size."""
        for place, identifier in enumerate((0xFFFF, 0, 0x8000)):
            driver.set_descriptor(place, Descriptor(0, 4, identifier, WRITE | AVAIL))
        queue = driver.queue()
        for _ in range(3):
            queue.push(popped(queue), 4)
        queue.flush()
        assert [words(driver, place)[1] for place in range(3)] == [0xFFFF, 0, 0x8000]

    def test_the_id_of_a_list_is_in_its_last_descriptor(self, driver: PackedDriver) -> None:
        """2.8.6: and the used descriptor overwrites the first, no other."""
        driver.set_descriptor(1, Descriptor(0, 4, 2, NEXT | WRITE | AVAIL))
        driver.set_descriptor(2, Descriptor(0, 5, 3, WRITE | AVAIL))
        driver.set_descriptor(0, Descriptor(0, 3, 1, NEXT | AVAIL))
        queue = driver.queue()
        chain = popped(queue)
        assert (chain.head, chain.descriptors) == (3, 3)
        queue.push(chain, 9)
        queue.flush()
        assert [words(driver, place) for place in range(3)] == [
            (9, 3, AVAIL | USED | WRITE),
            (4, 2, NEXT | WRITE | AVAIL),
            (5, 3, WRITE | AVAIL),
        ]

    def test_the_write_flag_of_a_used_descriptor_says_whether_something_was_written(self, driver: PackedDriver) -> None:
        """2.8.3."""
        driver.add([], [8])
        driver.add([], [8])
        queue = driver.queue()
        queue.push(popped(queue), 0)
        queue.push(popped(queue), 1)
        queue.flush()
        assert [words(driver, place)[2] for place in range(2)] == [AVAIL | USED, AVAIL | USED | WRITE]

    def test_other_flags_mean_nothing(self, driver: PackedDriver) -> None:
        every_other = 0xFFFF & ~(NEXT | WRITE | INDIRECT | AVAIL | USED)
        driver.set_descriptor(0, Descriptor(0, 4, 0, every_other | AVAIL))
        assert popped(driver.queue()).readable_ranges == [(0, 4)]

    def test_a_table_is_read_from_its_beginning_to_its_end(self, driver: PackedDriver) -> None:
        """2.8.7: no flag but WRITE means anything in it, and no ID."""
        table = b"".join(
            Descriptor(number, 1, 77, flags).pack() for number, flags in enumerate((0, NEXT | INDIRECT, WRITE | AVAIL))
        )
        driver.make_available(driver.chain([Descriptor(driver.allocate(48, table), 48, INDIRECT)]))
        chain = popped(driver.queue())
        assert (chain.readable_ranges, chain.writable_ranges) == ([(0, 1), (1, 1)], [(2, 1)])
        assert (chain.head, chain.descriptors) == (0, 1)

    @pytest.mark.parametrize("flags", [0, AVAIL | USED, USED])
    def test_what_is_not_available_in_this_turn_is_not_looked_at(self, driver: PackedDriver, flags: int) -> None:
        driver.set_descriptor(0, Descriptor(1 << 63, 4, 0, flags))
        assert driver.queue().pop() is None

    def test_what_is_flagged_by_a_driver_that_has_no_more_room_is_an_error(
        self, new_driver: Callable[..., PackedDriver]
    ) -> None:
        """A second list over the places of one that is not used yet."""
        driver = new_driver(2)
        driver.add([b"a"])
        driver.add([b"b"])
        queue = driver.queue()
        popped(queue)
        popped(queue)
        driver.words[7] = USED  # as if it had been used
        with pytest.raises(DeviceProtocolError, match=r"virtio 1\.2, 2\.8\.17"):
            queue.pop()


class Stores:
    """A view that notes in which order it is written."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self.places: list[int] = []

    def __getitem__(self, index: int) -> int:
        value: int = self._view[index]
        return value

    def __setitem__(self, index: int, value: int) -> None:
        self.places.append(index)
        self._view[index] = value


class TestPublishing:
    """2.8.9, 2.8.10."""

    def test_the_first_of_a_batch_is_written_last(self, driver: PackedDriver) -> None:
        for _ in range(4):
            driver.add([b"a", b"b"])
        queue = driver.queue()
        stores = Stores(queue._ring)  # type: ignore[attr-defined]
        queue._ring = stores  # type: ignore[attr-defined]
        for _ in range(4):
            queue.push(popped(queue), 0)
        assert stores.places == []
        queue.flush()
        assert stores.places == [5, 9, 13, 1], "the second half of each list's first descriptor, at once"

    @pytest.mark.parametrize(
        ("event", "features", "interrupts"),
        [
            (ENABLE << 16, ALL, 1),
            (DISABLE << 16, ALL, 0),
            (3 << 16, ALL, 1),  # reserved
            (DESC << 16 | 1 << 15 | 2, ALL, 1),
            (DESC << 16 | 1 << 15 | 1, ALL, 0),
            (DESC << 16 | 1 << 15 | 4, ALL, 0),
            (DESC << 16 | 2, ALL, 0),  # in the next turn
            (DESC << 16 | 1 << 15 | 1, 0, 1),  # 2.8.10: only valid with EVENT_IDX
            ((DISABLE | 0xFFFC) << 16, ALL, 0),
        ],
    )
    def test_when_the_driver_is_interrupted(
        self, new_driver: Callable[..., PackedDriver], event: int, features: int, interrupts: int
    ) -> None:
        """For the descriptors 2 and 3, which are used at once."""
        driver = new_driver(features=features)
        queue = driver.queue()
        for _ in range(2):
            driver.add([b"x", b"y"])
            driver.interrupts()
            driver.memory.write(driver.layout.available_ring, event.to_bytes(4, "little"))
            queue.push(popped(queue), 0)
            queue.flush()
        assert driver.interrupts() == interrupts

    def test_with_an_event_in_the_next_turn(self, new_driver: Callable[..., PackedDriver]) -> None:
        driver = new_driver(3)
        queue = driver.queue()
        seen = []
        driver.set_used_event(4)
        for _ in range(8):
            driver.add([b"x"])
            queue.push(popped(queue), 0)
            queue.flush()
            driver.used()
            seen.append(driver.interrupts())
        # Position 4 is place 1 in the second turn. (After a whole ring an event is looked for again: it comes in time.)
        assert seen == [0, 0, 0, 0, 1, 0, 0, 0]


class TestNotifications:
    """2.8.10: the device area."""

    @pytest.mark.parametrize("features", [0, ALL])
    def test_they_are_disabled_while_we_work(self, new_driver: Callable[..., PackedDriver], features: int) -> None:
        driver = new_driver(3, features)
        seen = []
        queue = driver.sleeping_queue(driver.account)
        for number in range(5):
            assert driver.used_flags == DISABLE

            def look(number: int = number) -> None:
                if driver.used_flags != DISABLE:
                    seen.append((driver.used_flags, driver.avail_event if driver.used_flags == DESC else number))
                    driver.add([b"x"])

            with driver.on_fence(queue, look):
                queue.push(queue.wait(), 0)
            queue.flush()
            driver.used()
        assert seen == [(DESC if features else ENABLE, number) for number in range(5)]


def layout_error(size: int, *places: int) -> str | None:
    return mockdriver.layout_error(PackedQueue, QueueLayout(size, *places))


class TestLayout:
    """Where the driver may put the three parts (2.8.10.1)."""

    @pytest.mark.parametrize("size", [0, 32769, 65536, -1])
    def test_sizes_that_cannot_be(self, size: int) -> None:
        assert layout_error(size, 0x1000, 0x2000, 0x3000) == "2.8"

    @pytest.mark.parametrize("size", [1, 3, 255, 32768])
    def test_sizes_that_can(self, size: int) -> None:
        assert layout_error(size, 0x1000, 0xF0000, 0xF0004) is None

    @pytest.mark.parametrize("places", [(0x1008, 0x2000, 0x3000), (0x1000, 0x2002, 0x3000), (0x1000, 0x2000, 0x3002)])
    def test_parts_are_aligned(self, places: Sequence[int]) -> None:
        assert layout_error(16, *places) == "2.8.10.1"

    @pytest.mark.parametrize("part", [0, 1, 2])
    @pytest.mark.parametrize("address", [MIB, (1 << 64) - 16, 3 << 30, 1 << 63])
    def test_parts_lie_in_memory(self, part: int, address: int) -> None:
        places = [0x1000, 0x2000, 0x3000]
        places[part] = address
        assert layout_error(16, *places) == "2.8"

    def test_up_to_the_last_byte(self) -> None:
        assert layout_error(3, MIB - 48, MIB - 4, MIB - 4) is None
        assert layout_error(3, MIB - 32, 0x2000, 0x3000) == "2.8"


def indirect(driver: PackedDriver, table: bytes, length: int | None = None, flags: int = INDIRECT) -> Descriptor:
    return Descriptor(driver.allocate(len(table), table), len(table) if length is None else length, flags)


def endless_list(driver: PackedDriver) -> list[Descriptor]:
    for place in range(driver.size):
        driver.set_descriptor(place, Descriptor(0, 1, 0, NEXT | AVAIL))
    return []


def broken_lists(driver: PackedDriver) -> dict[str, tuple[str, list[Descriptor]]]:
    """By what is wrong: the section, and a list of descriptors."""
    part = Descriptor(0, 4)
    table = driver.table([part])
    return {
        "a list without an end": ("2.8.17", endless_list(driver)),
        "writable before readable": ("2.8.17", [Descriptor(0, 4, WRITE), part]),
        "writable before readable in a table": (
            "2.8.17",
            [indirect(driver, driver.table([Descriptor(0, 4, WRITE), part]))],
        ),
        "a table longer than the queue": ("2.8.17", [indirect(driver, driver.table([part] * 17))]),
        "a table of no bytes": ("2.8.7", [indirect(driver, table, 0)]),
        "half a descriptor in a table": ("2.8.7", [indirect(driver, bytes(24))]),
        "a table in a list, first": ("2.8.19", [indirect(driver, table), part]),
        "a table in a list, last": ("2.8.19", [part, indirect(driver, table)]),
        "a table outside memory": ("2.8.4", [Descriptor(MIB - 16, 32, INDIRECT)]),
        "a table that wraps": ("2.8.4", [Descriptor((1 << 64) - 16, 32, INDIRECT)]),
        "a buffer past the end of memory": ("2.8.4", [Descriptor(MIB - 15, 16)]),
        "a buffer that wraps": ("2.8.4", [Descriptor((1 << 64) - 8, 16, WRITE)]),
        "an empty buffer outside memory": ("2.8.4", [Descriptor(MIB + 1, 0)]),
        "a list that leaves memory": ("2.8.4", [part, Descriptor(MIB - 1, 2)]),
        "a table that leaves memory": ("2.8.4", [indirect(driver, driver.table([part, Descriptor(MIB - 1, 2)]))]),
    }


with closing(PackedDriver()) as _driver:
    BROKEN = list(broken_lists(_driver))


class TestBrokenRules:
    """Each rule that a driver can break, and the section that it is told."""

    @pytest.mark.parametrize("what", BROKEN)
    def test_it_is_a_protocol_error(self, driver: PackedDriver, what: str) -> None:
        section, parts = broken_lists(driver)[what]
        if parts:
            driver.memory.write(driver.layout.descriptor_table, bytes(16 * driver.size))
            driver.make_available(driver.chain(parts))
        with pytest.raises(DeviceProtocolError) as error:
            driver.queue().pop()
        assert error.value.section == section

    def test_a_list_longer_than_what_the_driver_has_back(self, driver: PackedDriver) -> None:
        driver.add([b"x"])
        queue = driver.queue()
        popped(queue)
        for place in range(1, 16):
            driver.set_descriptor(place, Descriptor(0, 1, 0, NEXT | AVAIL))
        driver.set_descriptor(0, Descriptor(0, 1, 0, AVAIL))
        with pytest.raises(DeviceProtocolError, match="some were not used yet"):
            queue.pop()

    def test_indirect_without_the_feature(self, new_driver: Callable[..., PackedDriver]) -> None:
        driver = new_driver(features=Feature.RING_EVENT_IDX)
        driver.add([b"x"], indirect=True)
        with pytest.raises(DeviceProtocolError, match=r"2\.8\.19"):
            driver.queue().pop()

    @pytest.mark.parametrize("as_table", [False, True])
    def test_more_than_4_gib(self, as_table: bool) -> None:
        """The length of a used descriptor could not say so."""
        with closing(PackedDriver(memory=GuestMemory(1 << 30))) as driver:
            for more in ([], [Descriptor(0, 1, WRITE)]):
                parts = [Descriptor(0, 1 << 30, WRITE)] * 4 + more
                driver.make_available(driver.chain([indirect(driver, driver.table(parts))] if as_table else parts))
            queue = driver.queue()
            assert len(popped(queue).writable) == 4
            with pytest.raises(DeviceProtocolError, match=r"2\.8\.4"):
                queue.pop()
