"""Guest memory: where addresses are, and where they are not."""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lguest_mp.errors import GuestAddressError, LguestError
from lguest_mp.memory import GIB, HIGH_RAM_BASE, LOW_RAM_LIMIT, PAGE_SIZE, GuestMemory, RamRegion

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
    for access in (large.offset, large.slice, large.read):
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


def _in_child(body: Callable[[], object]) -> int:
    """Runs ``body`` in a forked child; its exit status (negative: the signal)."""
    pid = os.fork()
    if pid == 0:
        try:
            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            body()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _resident_shared() -> int:
    """Bytes of shared memory that this process has mapped (proc(5), RssShmem)."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssShmem:"))
    return int(line.split()[1]) << 10
