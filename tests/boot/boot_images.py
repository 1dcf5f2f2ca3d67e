"""Tiny kernels for the tests: an ELF file, a bzImage around it, and every compression a kernel may come in."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import lz4.block
import zstandard

from lguest_mp.config import GuestConfig
from lguest_mp.errors import LguestError
from lguest_mp.memory import GuestMemory

MIB = 1 << 20
#: Where the tests' kernels are linked, and the memory of the guests that they are for.
TEXT = 16 * MIB
MEMORY = 32 * MIB
CODE = bytes(range(1, 200)) * 50

Load = tuple[int, bytes, int]  # physical address, bytes in the file, bytes in memory


def elf64(
    loads: Sequence[Load] = ((TEXT, CODE, len(CODE) + 8192),),
    *,
    entry: int = TEXT,
    machine: int = 62,
    type_: int = 2,
    class_: int = 2,
    order: int = 1,
    first_offset: int = 4096,
) -> bytes:
    """An ELF64 file with a PT_NOTE and these PT_LOADs, the first one's bytes at ``first_offset``."""
    headers = [struct.pack("<IIQQQQQQ", 4, 4, 0, 0, 0, 0, 0, 4)]
    body = b""
    for address, data, memory_size in loads:
        offset = first_offset + len(body)
        headers.append(
            struct.pack("<IIQQQQQQ", 1, 7, offset, address + (0xFFFFFFFF << 32), address, len(data), memory_size, 4096)
        )
        body += data
    ident = b"\x7fELF" + bytes((class_, order, 1, 0)) + bytes(8)
    header = ident + struct.pack("<HHIQQQIHHHHHH", type_, machine, 1, entry, 64, 0, 0, 64, 56, len(headers), 64, 0, 0)
    return (header + b"".join(headers)).ljust(first_offset, b"\0") + body


def elf32(
    loads: Sequence[Load] = ((TEXT, CODE, len(CODE) + 8192),),
    *,
    entry: int = TEXT,
    machine: int = 3,
    type_: int = 2,
    first_offset: int = 4096,
) -> bytes:
    """The same of 32 bits."""
    headers = [struct.pack("<IIIIIIII", 4, 0, 0, 0, 0, 0, 0, 4)]
    body = b""
    for address, data, memory_size in loads:
        offset = first_offset + len(body)
        headers.append(
            struct.pack("<IIIIIIII", 1, offset, address | 0xC000_0000, address, len(data), memory_size, 7, 4096)
        )
        body += data
    ident = b"\x7fELF" + bytes((1, 1, 1, 0)) + bytes(8)
    header = ident + struct.pack("<HHIIIIIHHHHHH", type_, machine, 1, entry, 52, 0, 0, 52, 32, len(headers), 40, 0, 0)
    return (header + b"".join(headers)).ljust(first_offset, b"\0") + body


def bzimage(
    payload: bytes,
    *,
    version: int = 0x020F,
    xloadflags: int = 1,
    setup_sects: int = 3,
    init_size: int = 4 * MIB,
    pref_address: int = TEXT,
    alignment: int = 2 * MIB,
    relocatable: int = 1,
    cmdline_size: int = 2047,
    initrd_addr_max: int = 0x7FFF_FFFF,
    payload_offset: int = 1024,
    code32_start: int = 0x10_0000,
) -> bytes:
    """A bzImage of boot protocol 2.15: boot sector and setup, then code, then the payload; nothing of it can run."""
    setup = bytearray(((setup_sects or 4) + 1) * 512)
    code = (b"\xf4" * payload_offset + payload).ljust(-(-(payload_offset + len(payload)) // 16) * 16, b"\0")
    setup[0x1F1] = setup_sects
    struct.pack_into("<I", setup, 0x1F4, len(code) // 16)
    struct.pack_into("<H", setup, 0x1FE, 0xAA55)
    setup[0x200:0x202] = b"\xeb\x6a"
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, version)
    setup[0x211] = 1
    struct.pack_into("<I", setup, 0x214, code32_start)
    struct.pack_into("<II", setup, 0x22C, initrd_addr_max, alignment)
    setup[0x234] = relocatable
    struct.pack_into("<HI", setup, 0x236, xloadflags, cmdline_size)
    struct.pack_into("<II", setup, 0x248, payload_offset, len(payload))
    struct.pack_into("<QI", setup, 0x258, pref_address, init_size)
    return bytes(setup) + code


def _sized(packed: bytes, data: bytes) -> bytes:
    """Appends the size of what comes out, as the kernel's build does."""
    return packed + struct.pack("<I", len(data))


def _lz4_legacy(data: bytes, block: int = 8 * MIB) -> bytes:
    parts = [b"\x02\x21\x4c\x18"]
    for start in range(0, len(data), block):
        packed = lz4.block.compress(data[start : start + block], store_size=False)
        parts += [struct.pack("<I", len(packed)), packed]
    return b"".join(parts)


def _zstd(data: bytes, *, size_known: bool) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=size_known).compress(data)


_XZ_FILTERS = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 1}]

#: What the kernel's build can make of a vmlinux (scripts/Makefile.lib), each with its trailer; a name's first word is
#: the compression's.
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, 1, mtime=0),
    "bzip2": lambda data: _sized(bz2.compress(data, 1), data),
    "LZMA": lambda data: _sized(lzma.compress(data, lzma.FORMAT_ALONE, preset=1), data),
    "xz": lambda data: _sized(lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=_XZ_FILTERS), data),
    "LZ4": lambda data: _sized(_lz4_legacy(data), data),
    "LZ4 in blocks": lambda data: _sized(_lz4_legacy(data, block=5000), data),
    "Zstandard": lambda data: _sized(_zstd(data, size_known=False), data),
    "Zstandard with size": lambda data: _sized(_zstd(data, size_known=True), data),
}


def guest(
    kernel: Path,
    *,
    memory: int = MEMORY,
    initrd: Path | None = None,
    arguments: Sequence[str] = (),
) -> GuestConfig:
    """A guest's configuration."""
    return GuestConfig(name="test", memory=memory, kernel=kernel, initrd=initrd, arguments=tuple(arguments))


def one_line(error: LguestError) -> str:
    """The text of an error, which has to be a line."""
    text = str(error)
    assert text
    assert "\n" not in text
    return text


def is_zero(memory: GuestMemory, address: int, length: int) -> bool:
    """Whether this part of guest memory is all zeros."""
    return memory.read(address, length) == bytes(length)
