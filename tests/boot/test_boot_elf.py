"""A vmlinux's headers: what is loaded where, and every way in which they can be wrong."""

from __future__ import annotations

import struct

import pytest
from boot_images import CODE, TEXT, elf64, one_line
from hypothesis import given
from hypothesis import strategies as st

from lguest_mp.boot.elf import Segment, is_elf, parse_elf
from lguest_mp.errors import LguestError

E_PHOFF, E_PHENTSIZE, E_PHNUM = 32, 54, 56
#: The second program header (the first is a note): p_offset, p_filesz, p_memsz.
P_OFFSET, P_FILESZ, P_MEMSZ = 64 + 56 + 8, 64 + 56 + 32, 64 + 56 + 40


def refusal(file: bytes) -> str:
    with pytest.raises(LguestError) as caught:
        parse_elf("vmlinux", file, len(file))
    return one_line(caught.value)


def changed(offset: int, code: str, value: int) -> bytes:
    file = bytearray(elf64())
    struct.pack_into(code, file, offset, value)
    return bytes(file)


def test_segments_are_loaded_by_their_physical_addresses() -> None:
    file = elf64([(TEXT, b"text", 0x2000), (TEXT + 0x4000, b"data!", 5)], entry=TEXT + 0x1234)
    image = parse_elf("vmlinux", file, len(file))
    assert image.entry == TEXT + 0x1234
    assert image.segments == (Segment(4096, 4, TEXT, 0x2000), Segment(4100, 5, TEXT + 0x4000, 5))
    assert image.segments[0].end == TEXT + 0x2000


def test_segments_come_in_the_order_of_the_file() -> None:
    file = bytearray(elf64([(TEXT, b"a" * 16, 16), (TEXT + 4096, b"b" * 16, 16)]))
    first, second = file[120:176], file[176:232]
    file[120:176], file[176:232] = second, first
    assert [segment.offset for segment in parse_elf("vmlinux", bytes(file), len(file)).segments] == [4096, 4112]


def test_a_segment_without_memory_is_nothing_and_one_without_bytes_may_lie_anywhere() -> None:
    file = bytearray(elf64([(TEXT, CODE, len(CODE)), (TEXT, b"", 0), (TEXT + MEBI, b"", 4096)]))
    struct.pack_into("<Q", file, 64 + 3 * 56 + 8, 1 << 40)  # p_offset of the last
    image = parse_elf("vmlinux", bytes(file), len(file))
    assert [(segment.size, segment.memory_size) for segment in image.segments] == [(len(CODE), len(CODE)), (0, 4096)]


MEBI = 1 << 20


def test_what_is_elf() -> None:
    assert is_elf(elf64())
    assert not is_elf(b"")
    assert not is_elf(b"MZ")


def test_a_32_bit_kernel_is_refused() -> None:
    assert refusal(elf64(class_=1)) == "vmlinux is a 32-bit little-endian ELF file; give a 64-bit x86 (x86-64) kernel"


def test_a_big_endian_kernel_is_refused() -> None:
    assert "64-bit big-endian" in refusal(elf64(order=2))


@pytest.mark.parametrize(
    ("machine", "told"), [(183, "EM_AARCH64"), (243, "EM_RISCV"), (3, "EM_386"), (0xFEED, "65261")]
)
def test_another_machine_is_refused(machine: int, told: str) -> None:
    assert refusal(elf64(machine=machine)) == (
        f"vmlinux is for another machine ({told}); give a 64-bit x86 (x86-64) kernel"
    )


@pytest.mark.parametrize("type_", [1, 3, 4, 99])
def test_a_module_or_a_library_is_refused(type_: int) -> None:
    assert "is an ELF file but not an executable" in refusal(elf64(type_=type_))


@pytest.mark.parametrize("length", [4, 6, 63])
def test_a_truncated_header(length: int) -> None:
    assert f"is truncated: an ELF header has 64 bytes, there are {length}" in refusal(elf64()[:length])


def test_truncated_program_headers() -> None:
    assert "its program headers lie at 0x40, of 0x64 bytes" in refusal(elf64()[:100])


def test_program_headers_beyond_the_file() -> None:
    assert "its program headers lie at 0xffffffffffffffff" in refusal(changed(E_PHOFF, "<Q", 2**64 - 1))


@pytest.mark.parametrize("count", [0, 129, 0xFFFF])
def test_no_or_too_many_program_headers(count: int) -> None:
    assert refusal(changed(E_PHNUM, "<H", count)).startswith(f"vmlinux has {count} program headers of 56 bytes")


def test_program_headers_of_another_size() -> None:
    assert refusal(changed(E_PHENTSIZE, "<H", 32)).startswith("vmlinux has 2 program headers of 32 bytes")


def test_nothing_to_load() -> None:
    assert "has nothing to load" in refusal(elf64([]))


def test_a_segment_that_the_file_does_not_hold() -> None:
    file = elf64()
    assert refusal(file[:-1]) == (
        f"vmlinux is truncated: a segment ends at byte {len(file)}, the file at {len(file) - 1}"
    )
    assert "is truncated: a segment ends at byte" in refusal(changed(P_OFFSET, "<Q", 2**64 - 16))


def test_a_segment_with_more_bytes_than_memory() -> None:
    assert f"a segment has {len(CODE)} bytes for 16 bytes of memory" in refusal(changed(P_MEMSZ, "<Q", 16))


def test_segments_that_overlap() -> None:
    file = elf64([(TEXT, b"text", 4097), (TEXT + 4096, b"data", 4)])
    assert f"two of its segments overlap at {TEXT + 4096:#x}" in refusal(file)


def test_an_entry_point_outside() -> None:
    assert "its entry point 0x1000 is in none of its segments" in refusal(elf64(entry=0x1000))


@given(st.data())
def test_garbled_headers_are_parsed_or_refused(data: st.DataObject) -> None:
    file = bytearray(elf64())
    for position in data.draw(st.lists(st.integers(0, 64 + 2 * 56 - 1), max_size=8)):
        file[position] = data.draw(st.integers(0, 255))
    length = data.draw(st.integers(0, len(file)))
    try:
        image = parse_elf("vmlinux", bytes(file[:length]), length)
    except LguestError as error:
        one_line(error)
    else:
        assert all(segment.offset + segment.size <= length for segment in image.segments if segment.size)
