"""Guest memory: where addresses are, and where they are not."""

from __future__ import annotations

import errno
import faulthandler
import mmap
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hugepages import mapped_huge, needs_huge_pages, whole_blocks
from hypothesis import given
from hypothesis import strategies as st

from lguest_mp import memory as memory_module
from lguest_mp.errors import GuestAddressError, LguestError
from lguest_mp.memory import BLOCK_SIZE, GIB, HIGH_RAM_BASE, LOW_RAM_LIMIT, PAGE_SIZE, GuestMemory, RamRegion

MIB = 1 << 20
#: Sparse: none of its pages is ever touched but a few.
LARGE = 4 * GIB


@pytest.fixture(scope="module")
def memory() -> GuestMemory:
    """16 MiB."""
    return GuestMemory(16 * MIB)


@pytest.fixture(scope="module")
def large() -> GuestMemory:
    """4 GiB, one of them above 4 GiB."""
    return GuestMemory(LARGE)


def test_ram_continues_above_4_gib(large: GuestMemory) -> None:
    assert large.regions == (
        RamRegion(0, LOW_RAM_LIMIT, 0),
        RamRegion(HIGH_RAM_BASE, LARGE - LOW_RAM_LIMIT, LOW_RAM_LIMIT),
    )
    assert large.offset(HIGH_RAM_BASE, 1) == LOW_RAM_LIMIT
    large.write(HIGH_RAM_BASE, b"high")
    assert bytes(large.view[LOW_RAM_LIMIT : LOW_RAM_LIMIT + 4]) == b"high"


@pytest.mark.parametrize(
    ("gpa", "length"),
    [
        (LOW_RAM_LIMIT - 1, 2),
        (LOW_RAM_LIMIT, 1),
        (HIGH_RAM_BASE - 1, 1),
        (HIGH_RAM_BASE - 1, 2),
        (0, LARGE),
        (HIGH_RAM_BASE + LARGE - LOW_RAM_LIMIT, 1),
        (HIGH_RAM_BASE + LARGE - LOW_RAM_LIMIT - 1, 2),
        ((1 << 64) - 1, 2),
        ((1 << 64) - PAGE_SIZE, PAGE_SIZE),
        (1 << 64, 1),
        (-1, 2),
        (0, -1),
        (0, 1 << 64),
    ],
)
def test_there_is_no_memory_outside_ram(large: GuestMemory, gpa: int, length: int) -> None:
    for access in (large.offset, large.slice, large.read, large.make_huge):
        with pytest.raises(GuestAddressError, match="no guest memory at"):
            access(gpa, length)


@given(gpa=st.integers(0, 1 << 65), length=st.integers(0, 1 << 65))
def test_an_access_is_in_one_region_or_none(large: GuestMemory, gpa: int, length: int) -> None:
    inside = any(region.base <= gpa and gpa + length <= region.base + region.size for region in large.regions)
    try:
        offset = large.offset(gpa, length)
    except GuestAddressError:
        assert not inside
    else:
        assert inside
        assert 0 <= offset <= offset + length <= large.size


def test_what_is_written_is_read(memory: GuestMemory) -> None:
    memory.write(0x1234, b"guest")
    assert memory.read(0x1234, 5) == b"guest"
    assert bytes(memory.slice(0x1234, 5)) == b"guest"
    assert bytes(memory.view[0x1234:0x1239]) == b"guest"
    memory.slice(0x1234, 1)[0] = ord("G")
    assert memory.read(0x1234, 5) == b"Guest"


def test_a_write_that_does_not_fit_writes_nothing(memory: GuestMemory) -> None:
    with pytest.raises(GuestAddressError):
        memory.write(16 * MIB - 2, b"abc")
    assert memory.read(16 * MIB - 2, 2) == b"\0\0"


def test_a_child_shares_it(memory: GuestMemory) -> None:
    assert _in_child(lambda: memory.write(0x100, b"from the child")) == 0
    assert memory.read(0x100, 14) == b"from the child"


def test_cleared_memory_is_zeros_for_everybody(memory: GuestMemory) -> None:
    memory.write(0, b"x")
    memory.write(16 * MIB - 1, b"x")
    assert _in_child(memory.clear) == 0
    assert memory.read(0, 1) == b"\0"
    assert memory.read(16 * MIB - 1, 1) == b"\0"


def test_what_is_unmapped_keeps_its_contents(memory: GuestMemory) -> None:
    memory.write(0x5000, b"kernel")
    before = _resident_shared()
    memory.write(0, bytes(8 * MIB))
    assert _resident_shared() >= before + 7 * MIB
    memory.write(0x5000, b"kernel")
    memory.unmap_touched()
    assert _resident_shared() <= before + MIB
    assert memory.read(0x5000, 6) == b"kernel"


@pytest.mark.parametrize("where", [-1, 0])
def test_a_page_on_both_sides_is_inaccessible(memory: GuestMemory, where: int) -> None:
    import ctypes  # noqa: PLC0415

    address = memory.address + (where if where < 0 else memory.size)
    assert _in_child(lambda: ctypes.memset(address, 1, 1)) == -signal.SIGSEGV


@pytest.mark.parametrize("size", [PAGE_SIZE, BLOCK_SIZE - PAGE_SIZE, BLOCK_SIZE, 5 * MIB])
def test_it_begins_at_a_huge_page_whatever_its_size(size: int) -> None:
    memories = [GuestMemory(size) for _ in range(8)]
    assert [memory.address % BLOCK_SIZE for memory in memories] == [0] * 8
    for memory in memories:
        memory.write(size - 4, b"last")
    assert [memory.read(size - 4, 4) for memory in memories] == [b"last"] * 8


def test_it_lives_as_long_as_anybody_sees_it() -> None:
    memory = GuestMemory(3 * MIB)
    before, address, view = _addresses(), memory.address, memory.slice(MIB, 4)
    view[:] = b"here"
    del memory
    assert bytes(view) == b"here"
    del view
    assert before - _addresses() >= 3 * MIB
    assert f"{address:x}-" not in Path("/proc/self/maps").read_text()


def test_it_is_sparse() -> None:
    before = _resident_shared()
    memory = GuestMemory(64 * GIB)
    memory.write(HIGH_RAM_BASE, b"x")
    assert _resident_shared() <= before + MIB


@pytest.mark.parametrize("size", [0, -PAGE_SIZE, 1, PAGE_SIZE + 1])
def test_a_size_that_is_no_number_of_pages(size: int) -> None:
    with pytest.raises(LguestError, match="not a whole number of 4096-byte pages"):
        GuestMemory(size)


@pytest.mark.parametrize("size", [1 << 60, 1 << 80])
def test_more_than_the_host_has_addresses_for(size: int) -> None:
    with pytest.raises(LguestError, match=r"cannot map \d+ MiB of guest memory"):
        GuestMemory(size)


@given(st.lists(st.tuples(st.integers(0, 1 << 64), st.integers(0, 1 << 32)), min_size=1, max_size=4))
def test_many_ranges_at_once_are_checked_as_each_is(ranges: list[tuple[int, int]]) -> None:
    memory = GuestMemory(LOW_RAM_LIMIT + PAGE_SIZE)
    near = [(gpa % (HIGH_RAM_BASE + 2 * PAGE_SIZE), length % (2 * PAGE_SIZE)) for gpa, length in ranges]
    for wanted in (ranges, near):
        gpas, lengths = zip(*wanted, strict=True)
        try:
            each = [memory.offset(gpa, length) for gpa, length in wanted]
        except GuestAddressError:
            with pytest.raises(GuestAddressError):
                memory.offsets(gpas, lengths)
        else:
            assert list(memory.offsets(gpas, lengths)) == each


# --- huge pages ---


@needs_huge_pages
def test_the_blocks_that_lie_wholly_within_become_huge() -> None:
    memory = GuestMemory(12 * MIB, huge_pages=True)
    memory.write(5 * MIB, b"was there")
    memory.make_huge(MIB, 8 * MIB)  # from the middle of block 0 to the middle of block 4
    assert memory.huge_pages
    assert whole_blocks(memory) == [1, 2, 3]
    assert mapped_huge(memory.address) == 3 * BLOCK_SIZE
    assert memory.read(5 * MIB, 9) == b"was there"
    assert not any(memory.read(2 * MIB, 3 * MIB))
    assert not any(memory.read(5 * MIB + 9, 3 * MIB - 9))


@needs_huge_pages
@pytest.mark.parametrize(("offset", "length"), [(0, BLOCK_SIZE - 1), (1, BLOCK_SIZE), (4 * MIB, MIB), (0, 0), (MIB, 0)])
def test_where_no_block_lies_within_nothing_happens(offset: int, length: int) -> None:
    memory = GuestMemory(5 * MIB, huge_pages=True)
    memory.make_huge(offset, length)
    assert memory.huge_pages
    assert whole_blocks(memory) == []


@needs_huge_pages
def test_the_memory_above_4_gib_has_huge_pages_too() -> None:
    memory = GuestMemory(LARGE, huge_pages=True)
    memory.make_huge(HIGH_RAM_BASE, BLOCK_SIZE)
    assert mapped_huge(memory.address) == BLOCK_SIZE
    memory.write(HIGH_RAM_BASE + BLOCK_SIZE - 4, b"high")
    assert bytes(memory.view[LOW_RAM_LIMIT + BLOCK_SIZE - 4 : LOW_RAM_LIMIT + BLOCK_SIZE]) == b"high"


@needs_huge_pages
def test_huge_pages_are_given_back_like_others() -> None:
    memory = GuestMemory(4 * MIB, huge_pages=True)
    memory.make_huge(0, 4 * MIB)
    memory.write(3 * MIB, b"x")
    memory.unmap_touched()
    assert mapped_huge(memory.address) == 0
    assert memory.read(3 * MIB, 1) == b"x"
    memory.clear()
    assert whole_blocks(memory) == []
    assert memory.read(3 * MIB, 1) == b"\0"


@needs_huge_pages
def test_what_another_process_writes_meanwhile_stays() -> None:
    blocks, step = 8, 16 * PAGE_SIZE
    memory = GuestMemory(blocks * BLOCK_SIZE, huge_pages=True)
    orders = mmap.mmap(-1, PAGE_SIZE, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    rounds, is_over = 0, 1  # bytes of orders

    def write_and_look() -> None:
        """Counts from 1 to 255 and over, in a page out of 16; each has to hold what the last round wrote."""
        last = b"\0"
        while not orders[is_over]:
            next_ = bytes([last[0] % 255 + 1])
            for place in range(0, memory.size, step):
                assert memory.view[place] == last[0]
                memory.view[place] = next_[0]
            last = next_
            orders[rounds] = last[0]

    pid = _fork(write_and_look)
    try:
        while not orders[rounds]:
            assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        for block in range(blocks):
            for _ in range(100):  # the writer may hold a page, and then the block stays as it is
                memory.make_huge(block * BLOCK_SIZE, BLOCK_SIZE)
                if len(whole_blocks(memory)) > block:
                    break
    finally:
        orders[is_over] = 1
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0
    assert whole_blocks(memory) == list(range(blocks))
    assert {memory.view[place] for place in range(0, memory.size, step)} == {orders[rounds]}


def test_they_can_be_switched_off() -> None:
    memory = GuestMemory(4 * MIB)
    memory.make_huge(0, 4 * MIB)
    assert mapped_huge(memory.address) == 0
    assert whole_blocks(memory) == []


@pytest.mark.parametrize("refused", ["_MADV_POPULATE_WRITE", "_MADV_COLLAPSE"])
def test_a_host_that_has_none_is_asked_once(monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    """The kernel itself says no here, to advice that no version of it knows."""
    memory = GuestMemory(4 * MIB, huge_pages=True)
    memory.write(5, b"kept")
    monkeypatch.setattr(memory_module, refused, 0x7000)
    memory.make_huge(0, 4 * MIB)
    assert not memory.huge_pages
    assert memory.read(5, 4) == b"kept"
    monkeypatch.undo()
    memory.make_huge(0, 4 * MIB)
    assert mapped_huge(memory.address) == 0


@needs_huge_pages
def test_a_block_that_is_busy_is_left_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = GuestMemory(4 * MIB, huge_pages=True)

    def busy(*_: int) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    with monkeypatch.context() as patch:
        patch.setattr(memory_module, "_advise", busy)
        memory.make_huge(0, BLOCK_SIZE)
    assert memory.huge_pages
    memory.make_huge(BLOCK_SIZE, BLOCK_SIZE)
    assert whole_blocks(memory) == [1]


def _in_child(body: Callable[[], object]) -> int:
    """Runs ``body`` in a forked child; its exit status (negative: the signal)."""
    return os.waitstatus_to_exitcode(os.waitpid(_fork(body), 0)[1])


def _fork(body: Callable[[], object]) -> int:
    """Has a child run ``body``; its process ID."""
    pid = os.fork()
    if pid == 0:
        try:
            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            body()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def _addresses() -> int:
    """Bytes of addresses that this process uses (proc(5), statm)."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * PAGE_SIZE


def _resident_shared() -> int:
    """Bytes of shared memory that this process has mapped (proc(5), RssShmem)."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssShmem:"))
    return int(line.split()[1]) << 10
