"""The split virtqueue: what a good driver gets, and what a bad one is told (virtio 1.2, 2.7)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import pytest
from mockdriver import INDIRECT, NEXT, WRITE, Descriptor, DriverFactory, Idle, MockDriver, layout_error

from lguest_mp import core
from lguest_mp.errors import DeviceProtocolError
from lguest_mp.memory import GuestMemory
from lguest_mp.virtio.device import Feature, QueueLayout
from lguest_mp.virtio.queue import BATCH, Chain, Queue

MIB = 1 << 20


def popped(queue: Queue) -> Chain:
    chain = queue.pop()
    assert chain is not None
    return chain


class TestServing:
    """What a driver that keeps the rules may rely on."""

    def test_an_empty_ring_has_nothing(self, driver: MockDriver) -> None:
        assert driver.queue().pop() is None

    @pytest.mark.parametrize(
        "layout",
        [{}, {"indirect": True}, {"indirect": True, "backwards": True}, {"indirect": True, "direct": 2}],
        ids=["direct", "indirect", "indirect, backwards", "direct, then indirect"],
    )
    def test_a_chain_comes_out_as_it_went_in(self, driver: MockDriver, layout: dict[str, int]) -> None:
        """2.7.5.3.2: also normal descriptors followed by an indirect one."""
        buffer = driver.add([b"head", b"", b"er"], [3, 0, 500], **layout)  # type: ignore[arg-type]
        chain = popped(driver.queue())
        assert [bytes(view) for view in chain.readable] == [b"head", b"", b"er"]
        assert chain.writable_ranges == list(buffer.writable)
        assert chain.head == buffer.head

    def test_what_is_written_is_guest_memory(self, driver: MockDriver) -> None:
        buffer = driver.add([], [2, 3])
        for view, data in zip(popped(driver.queue()).writable, (b"ab", b"cde"), strict=True):
            view[:] = data
        assert driver.content(buffer) == b"abcde"

    def test_the_indirect_descriptors_own_write_flag_is_ignored(self, driver: MockDriver) -> None:
        """2.7.5.3.2."""
        table = driver.table([Descriptor(driver.allocate(4, b"data"), 4)])
        driver.make_available(driver.chain([Descriptor(driver.allocate(16, table), 16, INDIRECT | WRITE)]))
        assert bytes(popped(driver.queue()).readable[0]) == b"data"

    @pytest.mark.split
    def test_unknown_descriptor_flags_mean_nothing(self, driver: MockDriver) -> None:
        driver.make_available(driver.chain([Descriptor(driver.allocate(4, b"data"), 4, 0xFFF8)]))
        assert bytes(popped(driver.queue()).readable[0]) == b"data"

    def test_a_chain_as_long_as_the_queue_is_allowed(self, driver: MockDriver) -> None:
        """2.7.5.3.1: no longer than the queue size, be it in an indirect table or not."""
        driver.add([b"x"] * 16)
        queue = driver.queue()
        assert len(popped(queue).readable) == 16
        queue.push(Chain(driver.memory.view, 0, [], []), 0)
        queue.flush()
        driver.used()
        driver.add([b"x"] * 16, indirect=True)
        assert len(popped(queue).readable) == 16

    @pytest.mark.split
    def test_a_table_may_be_chained_in_any_order(self, driver: MockDriver) -> None:
        """2.7.5.3: by next, also where the flags alone look like one descriptor after the other."""
        order = {0: (b"a", 2), 1: (b"c", 3), 2: (b"b", 1), 3: (b"d", 0)}
        table = b"".join(
            Descriptor(driver.allocate(1, text), 1, NEXT if following else 0, following).pack()
            for text, following in order.values()
        )
        driver.make_available(driver.chain([Descriptor(driver.allocate(64, table), 64, INDIRECT)]))
        assert b"".join(popped(driver.queue()).readable) == b"abcd"

    @pytest.mark.split
    def test_an_indirect_table_may_be_larger_than_the_queue(self, driver: MockDriver) -> None:
        """2.7.5.3: the chain is what is limited, and it may use any part of the table."""
        parts = [Descriptor(driver.allocate(2, b"ab"), 2, NEXT, 99)] + [Descriptor(0, 0)] * 98
        parts.append(Descriptor(driver.allocate(2, b"cd"), 2))
        table = b"".join(part.pack() for part in parts)
        driver.make_available(driver.chain([Descriptor(driver.allocate(len(table), table), len(table), INDIRECT)]))
        assert b"".join(popped(driver.queue()).readable) == b"abcd"

    def test_ram_above_4_gib_is_reached(self, new_driver: DriverFactory) -> None:
        memory = GuestMemory((3 << 30) + MIB)
        driver = new_driver(memory=memory)
        memory.write((4 << 30) + 100, b"high")
        high = Descriptor((4 << 30) + 100, 4)
        table = driver.table([high, high])
        driver.make_available(driver.chain([high]))
        driver.make_available(driver.chain([Descriptor(driver.allocate(32, table), 32, INDIRECT)]))
        queue = driver.queue()
        assert b"".join(popped(queue).readable) == b"high"
        assert b"".join(popped(queue).readable) == b"highhigh"

    def test_indices_wrap_at_65536(self, driver: MockDriver) -> None:
        """2.7.13.3."""
        queue = driver.queue()
        for number in range(65536 + 20):
            driver.add([struct.pack("<I", number)])
            chain = popped(queue)
            assert bytes(chain.readable[0]) == struct.pack("<I", number)
            queue.push(chain, 0)
            queue.flush()
            assert driver.used() == [(chain.head, 0)]
            driver.forget_buffers()

    def test_the_largest_queue(self, new_driver: DriverFactory) -> None:
        """2.7: 32768 descriptors."""
        driver = new_driver(32768, memory=GuestMemory(4 * MIB))
        queue = driver.queue()
        heads = [driver.add([b"x"]).head for _ in range(32768)]
        for _ in heads:
            queue.push(popped(queue), 0)
        queue.flush()
        assert [head for head, _ in driver.used()] == heads

    def test_a_queue_of_one(self, new_driver: DriverFactory) -> None:
        driver = new_driver(1)
        queue = driver.queue()
        for _ in range(3):
            driver.add([], [4])
            queue.push(popped(queue), 4)
            queue.flush()
            assert driver.used() == [(0, 4)]


class TestPublishing:
    """2.7.8, and when the driver is interrupted: 2.7.7."""

    def test_completions_are_seen_at_the_flush_and_not_before(self, driver: MockDriver) -> None:
        queue = driver.queue()
        heads = [driver.add([], [8]).head for _ in range(3)]
        for written in (8, 0, 5):
            queue.push(popped(queue), written)
        assert driver.used() == []
        assert queue.unpublished == 3
        queue.flush()
        assert driver.used() == list(zip(heads, (8, 0, 5), strict=True))
        assert queue.unpublished == 0

    def test_waiting_publishes(self, driver: MockDriver) -> None:
        queue = driver.queue()
        driver.add([], [8])
        queue.push(queue.wait(), 8)
        with pytest.raises(Idle):
            queue.wait()
        assert driver.used() == [(0, 8)]

    def test_a_full_batch_is_published(self, new_driver: DriverFactory) -> None:
        driver = new_driver(64)
        queue = driver.queue()
        for _ in range(BATCH):
            driver.add([b"x"])
            assert driver.used() == []
            queue.push(popped(queue), 0)
        assert len(driver.used()) == BATCH

    def test_flushing_nothing_does_nothing(self, driver: MockDriver) -> None:
        queue = driver.queue()
        queue.flush()
        assert (driver.used_index, driver.interrupts()) == (0, 0)

    def test_one_interrupt_for_a_batch(self, driver: MockDriver) -> None:
        queue = driver.queue()
        for _ in range(5):
            driver.add([b"x"])
            queue.push(popped(queue), 0)
        queue.flush()
        assert driver.interrupts() == 1

    def test_without_event_idx_the_flag_decides(self, new_driver: DriverFactory) -> None:
        """2.7.7.2: flags 0 MUST, flags 1 SHOULD NOT; used_event MUST be ignored."""
        driver = new_driver(features=0)
        queue = driver.queue()
        driver.set_used_event(1000)
        for flags, interrupts in ((0, 1), (1, 0), (0, 1)):
            driver.set_available_flags(flags)
            driver.add([b"x"])
            queue.push(popped(queue), 0)
            queue.flush()
            assert driver.interrupts() == interrupts

    def test_with_event_idx_the_event_decides(self, driver: MockDriver) -> None:
        """2.7.7.2: an interrupt when the entry of that index is written; the lower bit of flags MUST be ignored."""
        queue = driver.queue()
        driver.set_available_flags(1)
        driver.set_used_event(2)
        interrupts = []
        for _ in range(4):
            driver.add([b"x"])
            queue.push(popped(queue), 0)
            queue.flush()
            interrupts.append(driver.interrupts())
        assert interrupts == [0, 0, 1, 0]

    def test_a_batch_that_jumps_over_the_event_interrupts(self, driver: MockDriver) -> None:
        queue = driver.queue()
        for event, interrupts in ((3, 1), (3, 0), (12, 0), (14, 1)):
            driver.set_used_event(event)
            for _ in range(4):
                driver.add([b"x"])
                queue.push(popped(queue), 0)
            queue.flush()
            driver.used()
            assert driver.interrupts() == interrupts

    def test_a_wish_that_comes_during_the_fence_is_heard(self, driver: MockDriver) -> None:
        """2.7.14: the driver enables interrupts, and looks at the used index before it can see the new one."""
        queue = driver.queue()
        driver.set_used_event(100)
        driver.add([b"x"])
        queue.push(popped(queue), 0)
        with driver.on_fence(queue, lambda: driver.set_used_event(0)):
            queue.flush()
        assert driver.interrupts() == 1

    def test_the_length_has_32_bits(self, driver: MockDriver) -> None:
        """2.7.8: a chain may have 2**32 bytes, its length may not say so; an underestimate is permitted (2.7.8.2)."""
        queue = driver.queue()
        driver.add([], [8])
        queue.push(popped(queue), 1 << 32)
        queue.flush()
        assert driver.used() == [(0, 0xFFFFFFFF)]


class Recorder:
    """A WriteWatch that remembers what it was told, and what the driver could see then."""

    def __init__(self, driver: MockDriver, events: list[object]) -> None:
        self._driver = driver
        self._events = events

    def written(self, ranges: Sequence[tuple[int, int]]) -> None:
        filled = [(offset, length) for offset, length in ranges if length]
        self._events.append(("written", filled, self._driver.used_index))


class TestWriteWatch:
    """An engine that keeps translations of code hears of every write before the driver can."""

    def test_before_the_used_index(self, driver: MockDriver) -> None:
        events: list[object] = []
        queue = driver.queue(watch=Recorder(driver, events))
        first = driver.add([b"x"], [10, 0, 20])
        second = driver.add([b"x"], [7])
        queue.push(popped(queue), 13)
        queue.push(popped(queue), 7)
        queue.flush()
        (one, _, three), (four,) = first.writable, second.writable
        assert events == [("written", [one, (three[0], 3), four], 0)]
        assert driver.used_index == 2

    def test_nothing_written_nothing_to_watch(self, driver: MockDriver) -> None:
        events: list[object] = []
        queue = driver.queue(watch=Recorder(driver, events))
        driver.add([b"x"])
        queue.push(popped(queue), 0)
        queue.flush()
        assert events == []


class TestNotifications:
    """When the driver has to notify us: 2.7.10."""

    def test_they_are_wanted_only_while_we_sleep(self, new_driver: DriverFactory) -> None:
        """Without EVENT_IDX: flags 1 while we work, 0 while we sleep (2.7.10.2)."""
        driver = new_driver(features=0)
        seen = []

        queue = driver.sleeping_queue()
        assert driver.used_flags == 1
        driver.kick()
        driver.add([b"x"])
        queue.push(queue.wait(), 0)

        def look() -> None:
            seen.append(driver.used_flags)
            driver.add([b"y"])

        driver.kick()
        with driver.on_fence(queue, look):
            queue.wait()
        assert 0 in seen
        assert driver.used_flags == 1

    @pytest.mark.split
    def test_with_event_idx_we_name_the_entry_that_wakes_us(self, driver: MockDriver) -> None:
        """2.7.10.2: flags 0 always, avail_event the next entry."""
        queue = driver.sleeping_queue()
        for _ in range(3):
            driver.add([b"x"])
            queue.push(queue.wait(), 0)
        with driver.on_fence(queue, lambda: driver.add([b"y"])):
            queue.wait()
        assert (driver.avail_event, driver.used_flags) == (3, 0)

    @pytest.mark.parametrize("features", [0, Feature.RING_EVENT_IDX])
    def test_what_comes_between_the_wish_and_the_sleep_is_found(self, new_driver: DriverFactory, features: int) -> None:
        """2.7.10: the driver did not notify, since it looked before it could see the wish."""
        driver = new_driver(features=features)
        queue = driver.sleeping_queue()
        with driver.on_fence(queue, lambda: driver.add([b"late"])):
            assert bytes(queue.wait().readable[0]) == b"late"

    def test_spurious_notifications_are_handled(self, driver: MockDriver) -> None:
        """2.7.10.2: MUST."""
        reads = []
        queue = driver.sleeping_queue(on_kick=lambda: reads.append(driver.add([b"x"])))
        driver.kick()
        assert bytes(queue.wait().readable[0]) == b"x"
        assert reads


class TestResuming:
    """A Queue on rings that another has served before: that is all it takes to replace a killed worker."""

    @pytest.mark.split
    def test_what_was_taken_and_not_completed_comes_again_in_order(self, driver: MockDriver) -> None:
        first = driver.queue()
        for number in range(5):
            driver.add([bytes([number])])
        for _ in range(2):
            first.push(popped(first), 0)
        first.flush()
        first.push(popped(first), 0)  # done, never published
        popped(first)  # taken, never done
        second = driver.queue()
        assert [bytes(popped(second).readable[0])[0] for _ in range(3)] == [2, 3, 4]
        assert second.pop() is None

    @pytest.mark.split
    def test_completions_go_on_where_they_ended(self, driver: MockDriver) -> None:
        first = driver.queue()
        heads = [driver.add([b"x"]).head for _ in range(2)]
        first.push(popped(first), 0)
        first.flush()
        second = driver.queue()
        second.push(popped(second), 0)
        second.flush()
        assert [head for head, _ in driver.used()] == heads

    @pytest.mark.split
    def test_the_used_index_in_memory_is_not_trusted_while_we_run(self, driver: MockDriver) -> None:
        queue = driver.queue()
        driver.add([b"x"])
        driver.used_index = 1234
        queue.push(popped(queue), 0)
        queue.flush()
        assert driver.used_index == 1


@pytest.mark.split
class TestLayout:
    """Where the driver may put the three parts (2.7, 2.7.1)."""

    @pytest.mark.parametrize("size", [0, 3, 24, 65536, 1 << 40, -16])
    def test_the_size_is_a_power_of_two(self, of: str, size: int) -> None:
        assert layout_error(core.queue(of), QueueLayout(size, 0x1000, 0x2000, 0x3000)) == "2.7"

    @pytest.mark.parametrize("layout", [(0x1008, 0x2000, 0x3000), (0x1000, 0x2001, 0x3000), (0x1000, 0x2000, 0x3002)])
    def test_parts_are_aligned(self, of: str, layout: tuple[int, int, int]) -> None:
        assert layout_error(core.queue(of), QueueLayout(16, *layout)) == "2.7.1"

    @pytest.mark.parametrize("alignment_is_enough", [(0x1010, 0x2002, 0x3004)])
    def test_and_no_more_than_that(self, of: str, alignment_is_enough: tuple[int, int, int]) -> None:
        assert layout_error(core.queue(of), QueueLayout(16, *alignment_is_enough)) is None

    @pytest.mark.parametrize("part", [0, 1, 2])
    @pytest.mark.parametrize("address", [MIB, MIB - 16, (1 << 64) - 16, 3 << 30, 1 << 63])
    def test_parts_lie_in_memory(self, of: str, part: int, address: int) -> None:
        places = [0x1000, 0x2000, 0x3000]
        places[part] = address
        assert layout_error(core.queue(of), QueueLayout(16, *places)) == "2.7"

    def test_up_to_the_last_byte(self, of: str) -> None:
        assert layout_error(core.queue(of), QueueLayout(16, MIB - 256, 0x2000, 0x3000)) is None
        assert layout_error(core.queue(of), QueueLayout(16, 0x1000, MIB - 38, 0x3000)) is None
        assert layout_error(core.queue(of), QueueLayout(16, 0x1000, 0x2000, MIB - 136)) is None
        assert layout_error(core.queue(of), QueueLayout(16, MIB - 240, 0x2000, 0x3000)) == "2.7"
        assert layout_error(core.queue(of), QueueLayout(16, 0x1000, MIB - 36, 0x3000)) == "2.7"
        assert layout_error(core.queue(of), QueueLayout(16, 0x1000, 0x2000, MIB - 132)) == "2.7"


def _readable(driver: MockDriver) -> Descriptor:
    return Descriptor(driver.allocate(16), 16)


def _indirect(driver: MockDriver, table: bytes, length: int | None = None, flags: int = INDIRECT) -> Descriptor:
    return Descriptor(driver.allocate(len(table), table), len(table) if length is None else length, flags)


Break = Callable[[MockDriver], None]


def head_out_of_range(driver: MockDriver) -> None:
    driver.make_available(16)


def head_far_out_of_range(driver: MockDriver) -> None:
    driver.make_available(0xFFFF)


def index_jumps_by_more_than_the_queue_size(driver: MockDriver) -> None:
    driver.set_available_index(17)


def index_is_decremented(driver: MockDriver) -> None:
    driver.set_available_index(-1)


def next_out_of_range(driver: MockDriver) -> None:
    driver.set_descriptor(0, Descriptor(0, 16, NEXT, 16))
    driver.make_available(0)


def next_out_of_the_indirect_table(driver: MockDriver) -> None:
    table = Descriptor(0, 16, NEXT, 1).pack()
    driver.make_available(driver.chain([_indirect(driver, table)]))


def chain_that_is_a_loop(driver: MockDriver) -> None:
    driver.set_descriptor(0, Descriptor(0, 16, NEXT, 1))
    driver.set_descriptor(1, Descriptor(0, 16, NEXT, 0))
    driver.make_available(0)


def chain_that_is_its_own_next(driver: MockDriver) -> None:
    driver.set_descriptor(3, Descriptor(0, 0, NEXT | WRITE, 3))
    driver.make_available(3)


def indirect_chain_that_is_a_loop(driver: MockDriver) -> None:
    table = Descriptor(0, 16, NEXT, 1).pack() + Descriptor(0, 16, NEXT, 0).pack()
    driver.make_available(driver.chain([_indirect(driver, table)]))


def indirect_chain_longer_than_the_queue(driver: MockDriver) -> None:
    driver.make_available(driver.chain([_indirect(driver, driver.table([_readable(driver)] * 17))]))


def direct_and_indirect_chain_longer_than_the_queue(driver: MockDriver) -> None:
    table = driver.table([_readable(driver)] * 16)
    driver.make_available(driver.chain([_readable(driver), _indirect(driver, table)]))


def writable_before_readable(driver: MockDriver) -> None:
    driver.make_available(driver.chain([Descriptor(0, 4, WRITE), Descriptor(0, 4)]))


def writable_before_readable_in_a_table(driver: MockDriver) -> None:
    table = driver.table([Descriptor(0, 4, WRITE), Descriptor(0, 4)])
    driver.make_available(driver.chain([_indirect(driver, table)]))


def writable_before_a_readable_table(driver: MockDriver) -> None:
    driver.make_available(driver.chain([Descriptor(0, 4, WRITE), _indirect(driver, driver.table([Descriptor(0, 4)]))]))


def indirect_in_an_indirect_table(driver: MockDriver) -> None:
    inner = _indirect(driver, driver.table([_readable(driver)]))
    driver.make_available(driver.chain([_indirect(driver, driver.table([inner]))]))


def indirect_table_that_is_the_descriptor_table(driver: MockDriver) -> None:
    driver.make_available(driver.chain([Descriptor(driver.layout.descriptor_table, 256, INDIRECT)]))


def indirect_and_next(driver: MockDriver) -> None:
    driver.make_available(driver.chain([_indirect(driver, driver.table([_readable(driver)])), _readable(driver)]))


def indirect_table_of_no_bytes(driver: MockDriver) -> None:
    driver.make_available(driver.chain([_indirect(driver, b"", 0)]))


def indirect_table_of_half_a_descriptor(driver: MockDriver) -> None:
    driver.make_available(driver.chain([_indirect(driver, bytes(24))]))


def indirect_table_outside_memory(driver: MockDriver) -> None:
    driver.make_available(driver.chain([Descriptor(MIB - 16, 32, INDIRECT)]))


def indirect_table_that_wraps(driver: MockDriver) -> None:
    driver.make_available(driver.chain([Descriptor((1 << 64) - 16, 32, INDIRECT)]))


def buffer_past_the_end_of_memory(driver: MockDriver) -> None:
    driver.make_available(driver.chain([Descriptor(MIB - 15, 16)]))


def buffer_that_wraps(driver: MockDriver) -> None:
    driver.make_available(driver.chain([Descriptor((1 << 64) - 8, 16, WRITE)]))


def empty_buffer_outside_memory(driver: MockDriver) -> None:
    driver.make_available(driver.chain([Descriptor(MIB + 1, 0)]))


def buffer_outside_memory_in_a_table(driver: MockDriver) -> None:
    table = driver.table([_readable(driver), Descriptor(MIB - 1, 2, WRITE)])
    driver.make_available(driver.chain([_indirect(driver, table)]))


BROKEN: list[tuple[Break, str]] = [
    (head_out_of_range, "2.7.6"),
    (head_far_out_of_range, "2.7.6"),
    (index_jumps_by_more_than_the_queue_size, "2.7.6.1"),
    (index_is_decremented, "2.7.6.1"),
    (next_out_of_range, "2.7.5"),
    (next_out_of_the_indirect_table, "2.7.5"),
    (chain_that_is_a_loop, "2.7.5.3.1"),
    (chain_that_is_its_own_next, "2.7.5.3.1"),
    (indirect_chain_that_is_a_loop, "2.7.5.3.1"),
    (indirect_chain_longer_than_the_queue, "2.7.5.3.1"),
    (direct_and_indirect_chain_longer_than_the_queue, "2.7.5.3.1"),
    (writable_before_readable, "2.7.4.2"),
    (writable_before_readable_in_a_table, "2.7.4.2"),
    (writable_before_a_readable_table, "2.7.4.2"),
    (indirect_in_an_indirect_table, "2.7.5.3.1"),
    (indirect_table_that_is_the_descriptor_table, "2.7.5.3.1"),
    (indirect_and_next, "2.7.5.3.1"),
    (indirect_table_of_no_bytes, "2.7.5.3"),
    (indirect_table_of_half_a_descriptor, "2.7.5.3"),
    (indirect_table_outside_memory, "2.7.5"),
    (indirect_table_that_wraps, "2.7.5"),
    (buffer_past_the_end_of_memory, "2.7.5"),
    (buffer_that_wraps, "2.7.5"),
    (empty_buffer_outside_memory, "2.7.5"),
    (buffer_outside_memory_in_a_table, "2.7.5"),
]


@pytest.mark.split
class TestBrokenRules:
    """Each rule that a driver can break, and the section that it is told."""

    @pytest.mark.parametrize(
        ("break_rule", "section"), BROKEN, ids=[rule.__name__.replace("_", " ") for rule, _ in BROKEN]
    )
    def test_it_is_a_protocol_error(self, driver: MockDriver, break_rule: Break, section: str) -> None:
        break_rule(driver)
        with pytest.raises(DeviceProtocolError) as error:
            driver.queue().pop()
        assert error.value.section == section
        assert f"(virtio 1.2, {section})" in str(error.value)

    def test_indirect_without_the_feature(self, new_driver: DriverFactory) -> None:
        driver = new_driver(features=Feature.RING_EVENT_IDX)
        driver.add([b"x"], indirect=True)
        with pytest.raises(DeviceProtocolError) as error:
            driver.queue().pop()
        assert error.value.section == "2.7.5.3.1"

    def test_a_chain_of_more_than_4_gib(self, new_driver: DriverFactory) -> None:
        """2.7.5.2: possible with little memory too, as the same bytes may be named again and again."""
        driver = new_driver(memory=GuestMemory(1 << 30))
        for indirect in (False, True):
            parts = [Descriptor(0, 1 << 30, WRITE)] * 4
            queue = driver.queue()
            _available(driver, parts, indirect)
            assert len(popped(queue).writable) == 4
            _available(driver, [*parts, Descriptor(0, 1, WRITE)], indirect)
            with pytest.raises(DeviceProtocolError) as error:
                queue.pop()
            assert error.value.section == "2.7.5.2"
            driver = new_driver(memory=GuestMemory(1 << 30))


def _available(driver: MockDriver, parts: Sequence[Descriptor], indirect: bool) -> None:
    if indirect:
        table = driver.table(parts)
        parts = [Descriptor(driver.allocate(len(table), table), len(table), INDIRECT)]
    driver.make_available(driver.chain(parts))
