"""Unpacking leaves nothing of its buffers behind."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
from boot_images import MIB, PACKERS, TEXT, bzimage, elf64

import lguest_mp

#: Loads a kernel as a launch does and says how much of the heap is left, in bytes.
LAUNCH = """
import sys
from pathlib import Path
import psutil
from lguest_mp.boot.linux import prepare
from lguest_mp.config import GuestConfig
from lguest_mp.memory import GuestMemory

import elftools.common.utils, elftools.elf.structs, lz4.block

memory = GuestMemory(128 << 20)

def own():
    status = psutil.Process().memory_info()
    return status.rss - status.shared

before = own()
prepared = prepare(GuestConfig("test", memory.size, Path(sys.argv[1])))
prepared.load(memory)
del prepared
print(own() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_a_launch_returns_to_the_host_what_it_unpacked_into(tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinuz"
    content = (b"lguest" * 1000 + bytes(5000)) * ((40 * MIB) // 11000)
    kernel.write_bytes(bzimage(PACKERS["LZ4"](elf64([(TEXT, content, len(content))]))))
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, kernel],
        cwd=Path(lguest_mp.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 2 * MIB
