"""What of a guest's memory is in huge pages, and whether this host has any."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from lguest_mp.memory import BLOCK_SIZE, PAGE_SIZE, GuestMemory

_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


def obstacle() -> str | None:
    """Why there are no huge pages for shared memory on this host; None: there are."""
    release = Path("/proc/sys/kernel/osrelease").read_text()
    if tuple(map(int, re.findall(r"\d+", release)[:2])) < (6, 1):
        return f"Linux {release.strip()} does not put shared memory into huge pages when it is asked; 6.1 does"
    try:
        if "[deny]" in (_SETTINGS / "shmem_enabled").read_text():
            return f"{_SETTINGS}/shmem_enabled denies them"
    except FileNotFoundError:
        return "the kernel has no transparent huge pages"
    return None


needs_huge_pages = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))


def mapped_huge(address: int, process: int | str = "self", what: str = "ShmemPmdMapped") -> int:
    """How many bytes of the mapping at this address a process has mapped by huge pages (proc(5), smaps).

    Or, as ``what`` says, something else that is known of the mapping.
    """
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{process}/smaps").read_text()):
        if mapping.startswith(f"{address:x}-"):
            found = re.search(rf"^{what}: +(\d+) kB$", mapping, re.MULTILINE)
            assert found is not None
            return int(found[1]) << 10
    raise AssertionError(f"process {process} has nothing mapped at {address:#x}")


def whole_blocks(memory: GuestMemory) -> list[int]:
    """The numbers of the blocks that the host has given every page of (mincore(2))."""
    pages = (ctypes.c_ubyte * (memory.size // PAGE_SIZE))()
    assert _libc.mincore(memory.address, memory.size, pages) == 0
    per_block = BLOCK_SIZE // PAGE_SIZE
    there = bytes(page & 1 for page in pages)
    return [
        number
        for number in range(memory.size // BLOCK_SIZE)
        if all(there[number * per_block : (number + 1) * per_block])
    ]


def guest_memory_of(process: int) -> int:
    """The address at which a process has its guest's memory: its largest mapping of memory that is shared."""
    lines = [line for line in Path(f"/proc/{process}/maps").read_text().splitlines() if "/dev/zero" in line]
    mappings = [[int(word, 16) for word in line.split()[0].split("-")] for line in lines]
    return max(mappings, key=lambda mapping: mapping[1] - mapping[0])[0]
