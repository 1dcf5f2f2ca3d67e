"""One of lguest's own guests before its first instruction, and everything that keeps it from getting there."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from boot_images import CODE, MIB, PACKERS, TEXT, bzimage, elf32, elf64, guest, is_zero, one_line
from hugepages import needs_huge_pages, whole_blocks
from hypothesis import given
from hypothesis import strategies as st

from lguest_mp.boot import zeropage
from lguest_mp.boot.kind import is_for_lguest
from lguest_mp.boot.lguest_kernel import MAX_MEMORY, prepare
from lguest_mp.cpu.engine import EntryState
from lguest_mp.errors import LguestError
from lguest_mp.memory import GuestMemory

MEMORY = 32 * MIB
DEVICES = 256 * 4096
PAYLOAD = b"unpacks itself" * 1000
#: ELF32: e_type, e_machine, e_phoff, e_phentsize, e_phnum; of the second program header p_offset, p_paddr, p_filesz.
E_TYPE, E_MACHINE, E_PHOFF, E_PHENTSIZE, E_PHNUM = 16, 18, 28, 42, 44
P_OFFSET, P_PADDR, P_FILESZ = 84 + 4, 84 + 12, 84 + 16


@pytest.fixture
def vmlinux(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinux"
    path.write_bytes(elf32())
    return path


def small_bzimage(**changes: int) -> bytes:
    return bzimage(PAYLOAD, **{"xloadflags": 0, "version": 0x020C, **changes})


@pytest.fixture
def bzimage_file(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinuz"
    path.write_bytes(small_bzimage())
    return path


@pytest.fixture
def initrd(tmp_path: Path) -> Path:
    path = tmp_path / "initrd.img"
    path.write_bytes(b"initrd" * 1000)
    return path


class Booted:
    """A guest that has been loaded, seen with its own eyes."""

    def __init__(self, kernel: Path, initrd: Path | None = None, *arguments: str, memory: int = MEMORY) -> None:
        self.memory = GuestMemory(memory + DEVICES)
        prepared = prepare(guest(kernel, memory=memory, initrd=initrd, arguments=arguments))
        self.state: EntryState = prepared.load(self.memory)
        self.page = self.memory.read(0, 4096)

    def field(self, field: zeropage.Field) -> int:
        value: int = struct.unpack_from("<" + field.code, self.page, field.offset)[0]
        return value

    @property
    def command_line(self) -> bytes:
        return self.memory.read(self.field(zeropage.CMD_LINE_PTR), 4096).split(b"\0")[0]


def refusal(kernel: Path, initrd: Path | None = None, *arguments: str, memory: int = MEMORY) -> str:
    with pytest.raises(LguestError) as caught:
        prepare(guest(kernel, memory=memory, initrd=initrd, arguments=arguments))
    return one_line(caught.value)


def refusal_of(tmp_path: Path, image: bytes, memory: int = MEMORY) -> str:
    path = tmp_path / "kernel"
    path.write_bytes(image)
    return refusal(path, memory=memory).replace(str(path), "")


def changed(offset: int, code: str, value: int) -> bytes:
    file = bytearray(elf32())
    struct.pack_into(code, file, offset, value)
    return bytes(file)


# The kernel


def test_a_vmlinux_lies_where_it_was_linked_and_begins_at_its_entry(tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(elf32([(TEXT, CODE, len(CODE)), (TEXT + MIB, b"data", 8192)], entry=TEXT + 0x10))
    booted = Booted(path)
    assert booted.state == EntryState(rip=TEXT + 0x10, rsi=0, cr3=0, gdt_base=0, gdt_limit=0)
    assert booted.memory.read(TEXT, len(CODE)) == CODE
    assert booted.memory.read(TEXT + MIB, 4) == b"data"
    assert is_zero(booted.memory, TEXT + MIB + 4, 8188)


def test_a_bzimage_lies_at_1_mib_and_begins_where_it_says(tmp_path: Path) -> None:
    image = small_bzimage(setup_sects=3, code32_start=0x10_0020)
    path = tmp_path / "vmlinuz"
    path.write_bytes(image)
    booted = Booted(path)
    assert booted.state.rip == 0x10_0020
    code = image[4 * 512 :]
    assert booted.memory.read(0x10_0000, len(code)) == code
    assert is_zero(booted.memory, 0x10_0000 + len(code), 4096)


def test_an_image_from_before_setup_sects_was_counted_has_four(tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(small_bzimage(setup_sects=0))
    assert PAYLOAD in Booted(path).memory.read(0x10_0000, 20_000)


def test_loading_again_gives_the_same(vmlinux: Path, initrd: Path) -> None:
    prepared = prepare(guest(vmlinux, memory=MEMORY, initrd=initrd, arguments=("a", "b")))
    memory = GuestMemory(MEMORY + DEVICES)
    state = prepared.load(memory)
    first = bytes(memory.view)
    memory.clear()
    assert prepared.load(memory) == state
    assert bytes(memory.view) == first


@needs_huge_pages
def test_what_the_kernel_and_the_initrd_fill_is_in_huge_pages(tmp_path: Path) -> None:
    """Blocks that they fill only in part are left to the guest."""
    text, initrd_size = b"text" * (3 * MIB // 4), 5 * MIB // 2
    kernel, initrd = tmp_path / "vmlinux", tmp_path / "initrd.img"
    kernel.write_bytes(elf32([(TEXT, text, 4 * MIB)]))
    initrd.write_bytes(b"initrd" + bytes(initrd_size - 6))
    memory = GuestMemory(MEMORY + DEVICES, huge_pages=True)
    prepare(guest(kernel, memory=MEMORY, initrd=initrd)).load(memory)
    assert whole_blocks(memory) == [8, 15]
    assert memory.read(TEXT, len(text)) == text
    assert memory.read(MEMORY - initrd_size, 6) == b"initrd"


def test_the_device_pages_are_left_to_the_devices(vmlinux: Path, initrd: Path) -> None:
    assert is_zero(Booted(vmlinux, initrd).memory, MEMORY, DEVICES)


def test_memory_without_device_pages_is_a_bug(vmlinux: Path) -> None:
    with pytest.raises(ValueError, match="prepared for"):
        prepare(guest(vmlinux, memory=MEMORY)).load(GuestMemory(MEMORY))


# What it is told


def test_the_zero_page_holds_what_makes_it_enter_lguest_s_code_and_nothing_else(vmlinux: Path) -> None:
    booted = Booted(vmlinux)
    expected = bytearray(4096)
    expected[0x1E8] = 1
    expected[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", expected, 0x206, 0x207)
    expected[0x210], expected[0x211] = 0xFF, 0x40
    struct.pack_into("<I", expected, 0x228, 4096)
    struct.pack_into("<I", expected, 0x230, 0x100_0000)
    struct.pack_into("<I", expected, 0x23C, 1)
    struct.pack_into("<QQI", expected, 0x2D0, 0, MEMORY, 1)
    assert booted.page == bytes(expected)


def test_a_bzimage_is_told_the_same(vmlinux: Path, bzimage_file: Path) -> None:
    assert Booted(bzimage_file).page == Booted(vmlinux).page


def test_the_command_line_is_the_arguments_and_no_more(vmlinux: Path) -> None:
    assert Booted(vmlinux, None, "root=/dev/vda", "quiet", "--", "-b").command_line == b"root=/dev/vda quiet -- -b"
    assert Booted(vmlinux).command_line == b""


def test_bytes_of_arguments_that_are_no_text_stay_as_they_are(vmlinux: Path) -> None:
    assert Booted(vmlinux, None, os.fsdecode(b"a=\xff")).command_line == b"a=\xff"


def test_a_command_line_as_long_as_it_can_be(vmlinux: Path) -> None:
    assert Booted(vmlinux, None, "x" * 2047).command_line == b"x" * 2047


def test_a_command_line_that_is_too_long(vmlinux: Path) -> None:
    assert "has 2048 bytes" in refusal(vmlinux, None, "x" * 2048)


@pytest.mark.parametrize(("version", "limit"), [(0x0205, 255), (0x0206, 500), (0x020C, 500)])
def test_a_bzimage_says_how_long_it_may_be(tmp_path: Path, version: int, limit: int) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(small_bzimage(version=version, cmdline_size=500))
    assert Booted(path, None, "x" * limit).command_line == b"x" * limit
    assert f"takes at most {limit};" in refusal(path, None, "x" * (limit + 1))


def test_no_image_may_have_more_than_a_page_of_it(tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(small_bzimage(cmdline_size=1 << 20))
    assert "takes at most 4095;" in refusal(path, None, "x" * 4096)


# The initrd


def test_the_initrd_is_at_the_top_page_aligned(vmlinux: Path, initrd: Path) -> None:
    booted = Booted(vmlinux, initrd)
    assert booted.field(zeropage.RAMDISK_IMAGE) == MEMORY - 8192
    assert booted.field(zeropage.RAMDISK_SIZE) == 6000
    assert booted.memory.read(MEMORY - 8192, 6000) == b"initrd" * 1000


def test_an_initrd_that_would_lie_on_the_kernel(vmlinux: Path, tmp_path: Path) -> None:
    path = tmp_path / "large.img"
    with path.open("wb") as file:
        file.truncate(20 * MIB)
    assert "give the guest at least 37 MiB" in refusal(vmlinux, path)
    with path.open("wb") as file:
        file.truncate(4 << 30)
    assert "make it smaller" in refusal(vmlinux, path)


# What cannot be


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (b"\x7fELF", "is truncated"),
        (b"MZ" * 1000, "is no kernel: neither an ELF vmlinux nor a bzImage"),
        (elf64(), "is a 64-bit little-endian ELF file; give a 32-bit x86 (i386) kernel"),
        (changed(E_TYPE, "<H", 3), "is an ELF file but not an executable (ET_DYN)"),
        (changed(E_MACHINE, "<H", 40), "is for another machine (EM_ARM); give a 32-bit x86 (i386) kernel"),
        (changed(E_PHENTSIZE, "<H", 56), "has 2 program headers of 56 bytes; a kernel has 1 to 2048 of 32"),
        (changed(E_PHNUM, "<H", 0), "has 0 program headers"),
        (changed(E_PHNUM, "<H", 2049), "has 2049 program headers"),
        (changed(E_PHOFF, "<I", 0xFFFF_FFFF), "its program headers lie at 0xffffffff"),
        (changed(P_OFFSET, "<I", 0xFFFF_FFFF), "is truncated: a segment ends at"),
        (changed(P_FILESZ, "<I", 0xFFFF_FFFF), "is truncated: a segment ends at"),
        (changed(P_PADDR, "<I", 0xFFFF_F000), "its entry point 0x1000000 is in none of its segments"),
        (elf32([(0xFFFF_F000, CODE, 0x10_0000)], entry=0xFFFF_F000), "needs memory up to 0x1000ff000"),
        (elf32([(0x1000, b"code", 8192)], entry=0x1000), "wants to be at 0x1000, where the boot information is"),
        (elf32([(TEXT, CODE, 100 * MIB)]), "give it at least 116 MiB"),
        (elf32([(TEXT, CODE, 10)]), "for 10 bytes of memory"),
        (elf32([]), "has nothing to load"),
        (bzimage(PAYLOAD), "is a 64-bit kernel; give a 32-bit x86 (i386) kernel, or leave --machine=lguest out"),
        (small_bzimage()[:2048], "is truncated: its code begins at byte 2048, the file has 2048"),
        (small_bzimage(code32_start=0), "its code32_start 0x0 is not in its"),
        (small_bzimage(code32_start=0xFFFF_FFFF), "its code32_start 0xffffffff is not in its"),
        (small_bzimage(init_size=17 * MIB), "needs memory up to 0x2100000; the guest's 32 MiB end at 0x2000000"),
        (small_bzimage(pref_address=MIB, init_size=17 * MIB), "needs memory up to 0x2100000"),
        (small_bzimage(pref_address=1 << 60), "needs memory up to 0x10000000"),
    ],
)
def test_a_kernel_that_is_none(tmp_path: Path, image: bytes, words: str) -> None:
    assert words in refusal_of(tmp_path, image)


def test_an_image_that_stays_where_it_is_put_needs_no_more_than_there(tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(small_bzimage(pref_address=MIB, init_size=2 * MIB, relocatable=0))
    assert Booted(path, memory=4 * MIB).state.rip == 0x10_0000


@pytest.mark.parametrize("memory", [0, MAX_MEMORY + MIB, 999_999_999 * MIB])
def test_memory_that_no_32_bit_guest_can_have(vmlinux: Path, memory: int) -> None:
    assert "memory" in refusal(vmlinux, memory=memory)


def test_the_most_memory_there_can_be(vmlinux: Path) -> None:
    assert prepare(guest(vmlinux, memory=MAX_MEMORY)).kernel.entry == TEXT
    assert MAX_MEMORY == (3 << 30) - DEVICES


def test_a_kernel_that_became_shorter_since_it_was_checked(vmlinux: Path) -> None:
    prepared = prepare(guest(vmlinux, memory=MEMORY))
    vmlinux.write_bytes(b"")
    with pytest.raises(LguestError, match="became shorter"):
        prepared.load(GuestMemory(MEMORY + DEVICES))


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 0xFFFF_FFFF)), max_size=4))
def test_damaged_headers_end_in_a_line_or_in_memory_of_the_guest(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    file = bytearray(elf32([(MIB, b"code", 8192), (2 * MIB, b"data", 8192)], entry=MIB))
    for offset, value in changes:
        struct.pack_into("<I", file, offset, value)
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(file)
    try:
        prepared = prepare(guest(path, memory=4 * MIB))
    except LguestError as error:
        one_line(error)
    else:
        prepared.load(GuestMemory(4 * MIB + DEVICES))


# Which machine a kernel is for


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (elf32(), True),
        (elf32(type_=3), True),
        (elf64(), False),
        (elf32(machine=40), False),
        (small_bzimage(), True),
        (small_bzimage(version=0x0207), True),
        (bzimage(PACKERS["gzip"](elf64())), False),
        (b"\x7fELF", False),
        (b"no kernel", False),
    ],
)
def test_the_image_says_which_machine_it_is_for(tmp_path: Path, image: bytes, expected: bool) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(image)
    assert is_for_lguest(path) is expected


def test_what_cannot_be_read_is_for_none(tmp_path: Path) -> None:
    assert not is_for_lguest(tmp_path / "nothing")
    assert not is_for_lguest(tmp_path)
