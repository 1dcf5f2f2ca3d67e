"""A guest's memory and CPU before its first instruction, and everything that keeps it from getting there."""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path

import pytest
from boot_images import CODE, MEMORY, MIB, PACKERS, TEXT, bzimage, elf64, guest, one_line
from hugepages import needs_huge_pages, whole_blocks

from lguest_mp.boot import zeropage
from lguest_mp.boot.acpi import acpi_tables
from lguest_mp.boot.linux import prepare
from lguest_mp.cpu.engine import EntryState
from lguest_mp.errors import LguestError
from lguest_mp.memory import GuestMemory

GIB = 1 << 30
RAM, RESERVED, ACPI = 1, 2, 3
END = TEXT + len(CODE) + 8192


@pytest.fixture
def vmlinux(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinux"
    path.write_bytes(elf64())
    return path


@pytest.fixture
def bzimage_file(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimage(PACKERS["LZ4"](elf64())))
    return path


@pytest.fixture
def initrd(tmp_path: Path) -> Path:
    path = tmp_path / "initrd.img"
    path.write_bytes(b"initrd" * 1000)
    return path


class Booted:
    """A guest that has been loaded, seen with its own eyes."""

    def __init__(self, kernel: Path, memory: int = MEMORY, initrd: Path | None = None, *arguments: str) -> None:
        self.memory = GuestMemory(memory)
        prepared = prepare(guest(kernel, memory=memory, initrd=initrd, arguments=arguments))
        self.state: EntryState = prepared.load(self.memory)
        self.page = self.memory.read(self.state.rsi, 4096)

    def field(self, field: zeropage.Field) -> int:
        value: int = struct.unpack_from("<" + field.code, self.page, field.offset)[0]
        return value

    @property
    def command_line(self) -> str:
        address = self.field(zeropage.CMD_LINE_PTR)
        return self.memory.read(address, 65536).split(b"\0")[0].decode()

    @property
    def memory_map(self) -> list[tuple[int, int, int]]:
        return [struct.unpack_from("<QQI", self.page, 0x2D0 + 20 * index) for index in range(self.page[0x1E8])]


def refusal(kernel: Path, memory: int = MEMORY, initrd: Path | None = None, *arguments: str) -> str:
    with pytest.raises(LguestError) as caught:
        prepare(guest(kernel, memory=memory, initrd=initrd, arguments=arguments))
    return one_line(caught.value)


def test_the_first_instruction_is_the_kernels(vmlinux: Path) -> None:
    booted = Booted(vmlinux)
    assert booted.state.rip == TEXT
    assert booted.memory.read(TEXT, len(CODE)) == CODE


def test_the_cpus_segments_are_flat_and_64_bit(vmlinux: Path) -> None:
    """boot.rst, "64-bit Boot Protocol": CS is __BOOT_CS (0x10), DS, ES and SS are __BOOT_DS (0x18)."""
    state = (booted := Booted(vmlinux)).state
    assert (state.code_selector, state.data_selector) == (0x10, 0x18)
    gdt = struct.unpack("<4Q", booted.memory.read(state.gdt_base, state.gdt_limit + 1))
    # Base 0, limit 0xfffff pages; present, ring 0, accessed; code: execute/read, L; data: read/write.
    assert gdt == (0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)


def test_every_address_below_4_gib_is_mapped_to_itself(vmlinux: Path) -> None:
    booted = Booted(vmlinux)

    def entries(address: int) -> tuple[int, ...]:
        return struct.unpack("<512Q", booted.memory.read(address, 4096))

    pml4 = entries(booted.state.cr3)
    assert not any(pml4[1:])
    pointers = entries(pml4[0] & ~0xFFF)
    assert not any(pointers[4:])
    for gib, pointer in enumerate(pointers[:4]):
        assert pointer & 0xFFF == 3
        for index, entry in enumerate(entries(pointer & ~0xFFF)):
            assert entry == gib * GIB + index * 2 * MIB | 0x83, "present, writable, 2 MiB"


def test_a_large_guests_memory_map(vmlinux: Path) -> None:
    assert Booted(vmlinux, 5 * GIB).memory_map == [
        (0, 0x9FC00, RAM),
        (0x9FC00, 0x400, RESERVED),
        (0xE0000, 0x10000, ACPI),
        (0xF0000, 0x10000, RESERVED),
        (MIB, 3 * GIB - MIB, RAM),
        (4 * GIB, 2 * GIB, RAM),
    ]


@pytest.mark.parametrize("memory", [17 * MIB + 4096, MEMORY, 3 * GIB, 3 * GIB + 4096])
def test_the_memory_map_is_the_memory(vmlinux: Path, memory: int) -> None:
    booted = Booted(vmlinux, memory)
    for (base, size, _), (following, _, _) in pairwise(booted.memory_map):
        assert base + size <= following
    for base, size, _ in booted.memory_map:
        booted.memory.slice(base, size)
    ram = [(base, size) for base, size, type_ in booted.memory_map if type_ == RAM]
    assert sum(size for _, size in ram) == memory - MIB + 0x9FC00


def test_all_that_the_loader_made_is_in_ram_and_nothing_overlaps(vmlinux: Path, initrd: Path) -> None:
    booted = Booted(vmlinux, MEMORY, initrd, "quiet")
    parts = sorted(
        [
            (booted.state.gdt_base, booted.state.gdt_limit + 1),
            (booted.state.cr3, 6 * 4096),
            (booted.state.rsi, 4096),
            (booted.field(zeropage.CMD_LINE_PTR), 65536),
            (TEXT, END - TEXT),
            (booted.field(zeropage.RAMDISK_IMAGE), booted.field(zeropage.RAMDISK_SIZE)),
        ]
    )
    for (start, size), (following, _) in pairwise(parts):
        assert start + size <= following
    for start, size in parts:
        assert any(
            base <= start and start + size <= base + length for base, length, type_ in booted.memory_map if type_ == RAM
        )


def test_the_zero_page_of_a_bzimage(bzimage_file: Path, initrd: Path) -> None:
    booted = Booted(bzimage_file, MEMORY, initrd)
    image = bzimage_file.read_bytes()
    assert booted.field(zeropage.TYPE_OF_LOADER) == 0xFF
    assert booted.field(zeropage.VID_MODE) == 0xFFFF
    assert booted.field(zeropage.ACPI_RSDP_ADDR) == 0xE0000
    assert booted.page[0x1EF] == 0, "the sentinel: this page was made by a loader that clears it"
    for field in (zeropage.VERSION, zeropage.KERNEL_ALIGNMENT, zeropage.INIT_SIZE, zeropage.PREF_ADDRESS):
        assert booted.field(field) == struct.unpack_from("<" + field.code, image, field.offset)[0]


def test_the_firmware_tables_are_where_the_zero_page_says(vmlinux: Path) -> None:
    booted = Booted(vmlinux)
    address = booted.field(zeropage.ACPI_RSDP_ADDR)
    expected = acpi_tables(address)
    assert booted.memory.read(address, len(expected)) == expected


def test_a_jump_to_the_bioss_reset_vector_resets_the_machine(vmlinux: Path) -> None:
    # mov ax, 1; mov dx, 0x602; out dx, al; jmp .  -- in the 16 bytes before 1 MiB
    assert Booted(vmlinux).memory.read(0xFFFF0, 16) == bytes.fromhex("b80100 ba0206 ee ebfe").ljust(16, b"\0")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "console=ttyS0"),
        (("root=/dev/vda", "ro"), "console=ttyS0 root=/dev/vda ro"),
        (("console=hvc0", "quiet"), "console=hvc0 quiet"),
        (("quiet console=tty0",), "quiet console=tty0"),
        (("console=",), "console="),
        (("noconsole=1", "netconsole=x"), "console=ttyS0 noconsole=1 netconsole=x"),
        (("ro", "--", "console=x"), "console=ttyS0 ro -- console=x"),
        (('dyndbg="file a b"',), 'console=ttyS0 dyndbg="file a b"'),
        (("name=ö",), "console=ttyS0 name=ö"),
    ],
)
def test_the_command_line(vmlinux: Path, arguments: tuple[str, ...], line: str) -> None:
    assert Booted(vmlinux, MEMORY, None, *arguments).command_line == line


def test_arguments_that_are_not_text_are_passed_on_as_they_are(vmlinux: Path) -> None:
    booted = Booted(vmlinux, MEMORY, None, b"x=\xff".decode(errors="surrogateescape"))
    assert booted.memory.read(booted.field(zeropage.CMD_LINE_PTR), 18) == b"console=ttyS0 x=\xff\0"


def test_the_longest_command_line(vmlinux: Path) -> None:
    longest = "console=" + "x" * (2047 - 8)
    assert Booted(vmlinux, MEMORY, None, longest).command_line == longest
    assert refusal(vmlinux, MEMORY, None, longest + "x") == (
        f"the kernel's command line has 2048 bytes, kernel {vmlinux} takes at most 2047; shorten it"
    )


def test_an_image_says_itself_how_long_its_command_line_may_be(tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimage(PACKERS["LZ4"](elf64()), cmdline_size=20))
    assert Booted(path, MEMORY, None, "x" * 6).command_line == "console=ttyS0 xxxxxx"
    assert "has 21 bytes" in refusal(path, MEMORY, None, "x" * 7)
    path.write_bytes(bzimage(PACKERS["LZ4"](elf64()), cmdline_size=0xFFFF_FFFF))
    assert "takes at most 65535" in refusal(path, MEMORY, None, "x" * 70_000)


@pytest.mark.parametrize("memory", [MEMORY, MEMORY + 4096, 3 * GIB, 5 * GIB])
def test_the_initrd_is_page_aligned_at_the_end_of_what_the_kernel_reaches(
    vmlinux: Path, initrd: Path, memory: int
) -> None:
    booted = Booted(vmlinux, memory, initrd)
    address = booted.field(zeropage.RAMDISK_IMAGE)
    assert address == min(memory, 2 * GIB) - 8192
    assert booted.field(zeropage.RAMDISK_SIZE) == 6000
    assert booted.field(zeropage.EXT_RAMDISK_IMAGE) == booted.field(zeropage.EXT_RAMDISK_SIZE) == 0
    assert booted.memory.read(address, 8192) == initrd.read_bytes() + bytes(2192)


def test_the_initrd_is_below_the_address_that_the_image_names(tmp_path: Path, initrd: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimage(PACKERS["LZ4"](elf64()), initrd_addr_max=TEXT + 8 * MIB - 1))
    assert Booted(path, MEMORY, initrd).field(zeropage.RAMDISK_IMAGE) == TEXT + 8 * MIB - 8192


def test_no_initrd(vmlinux: Path) -> None:
    booted = Booted(vmlinux)
    assert booted.field(zeropage.RAMDISK_IMAGE) == booted.field(zeropage.RAMDISK_SIZE) == 0


def test_an_initrd_that_just_fits(vmlinux: Path, initrd: Path) -> None:
    top = -(-END // 4096) * 4096 + 8192
    address = Booted(vmlinux, top, initrd).field(zeropage.RAMDISK_IMAGE)
    assert address >= END
    assert refusal(vmlinux, top - 4096, initrd) == (
        f"initrd {initrd} has 6000 bytes; between the kernel's end at {END:#x} and {top - 4096:#x}"
        f" are {top - 4096 - END}: give the guest at least 17 MiB"
    )


def test_an_initrd_that_no_memory_makes_fit(tmp_path: Path, initrd: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimage(PACKERS["LZ4"](elf64()), initrd_addr_max=0))
    assert refusal(path, MEMORY, initrd) == (
        f"initrd {initrd} has 6000 bytes; between the kernel's end at {END:#x} and 0x1 are 0: make it smaller"
    )


def test_an_initrd_does_not_take_what_the_image_needs_to_unpack_itself(tmp_path: Path, initrd: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimage(b"unknown", init_size=16 * MIB))
    assert f"between the kernel's end at {MEMORY:#x}" in refusal(path, MEMORY, initrd)


@pytest.mark.parametrize(
    ("image", "arguments", "asked"),
    [
        (bzimage(PACKERS["LZ4"](elf64())), (), True),
        (bzimage(PACKERS["LZ4"](elf64())), ("nokaslr",), False),
        (bzimage(PACKERS["LZ4"](elf64())), ("foo=nokaslr",), True),
        (elf64(), (), True),
        (bzimage(b"unknown"), (), False),
    ],
)
def test_a_kernel_that_does_not_unpack_itself_is_asked_to_randomize_what_it_can(
    tmp_path: Path, image: bytes, arguments: tuple[str, ...], asked: bool
) -> None:
    """boot.rst, KASLR_FLAG; a kernel that unpacks itself decides and sets it by itself."""
    path = tmp_path / "kernel"
    path.write_bytes(image)
    assert bool(Booted(path, MEMORY, None, *arguments).field(zeropage.LOADFLAGS) & 2) == asked


def test_a_guest_can_be_loaded_again_after_its_memory_was_cleared(bzimage_file: Path, initrd: Path) -> None:
    memory = GuestMemory(MEMORY)
    prepared = prepare(guest(bzimage_file, initrd=initrd))
    state = prepared.load(memory)
    first = memory.read(0, MEMORY)
    memory.write(0x5000, b"the guest was here")
    bzimage_file.unlink()
    initrd.unlink()
    memory.clear()
    assert prepared.load(memory) == state
    assert memory.read(0, MEMORY) == first


@needs_huge_pages
def test_what_the_kernel_and_the_initrd_fill_is_in_huge_pages(tmp_path: Path) -> None:
    """Blocks that they fill only in part are left to the guest."""
    text, data, initrd_size = b"text" * MIB, b"data" * (3 * MIB // 4), 5 * MIB // 2
    kernel, initrd = tmp_path / "vmlinux", tmp_path / "initrd.img"
    kernel.write_bytes(elf64([(TEXT, text, len(text)), (TEXT + 6 * MIB, data, 4 * MIB)]))
    initrd.write_bytes(b"initrd" + bytes(initrd_size - 6))
    memory = GuestMemory(MEMORY, huge_pages=True)
    prepare(guest(kernel, initrd=initrd)).load(memory)
    assert whole_blocks(memory) == [8, 9, 11, 15]
    assert memory.read(TEXT, len(text)) == text
    assert memory.read(TEXT + 6 * MIB, len(data)) == data
    assert memory.read(MEMORY - initrd_size, 6) == b"initrd"


def test_memory_of_another_size_is_a_bug(vmlinux: Path) -> None:
    with pytest.raises(ValueError, match="prepared for"):
        prepare(guest(vmlinux)).load(GuestMemory(MEMORY * 2))


@pytest.mark.parametrize(
    ("memory", "told"),
    [
        (0, "0 MiB of memory are too few for a Linux; give it at least 16"),
        (-MIB, "-1 MiB of memory are too few for a Linux; give it at least 16"),
        (15 * MIB, "15 MiB of memory are too few for a Linux; give it at least 16"),
        (1 << 50, f"{1 << 30} MiB of memory are more than a guest can have, {512 * 1024}"),
        (MEMORY + 1, f"{MEMORY + 1} bytes of memory are not a whole number of 4096-byte pages"),
    ],
)
def test_a_memory_size_that_makes_no_sense(vmlinux: Path, memory: int, told: str) -> None:
    assert refusal(vmlinux, memory) == told


def test_a_kernel_for_more_memory(vmlinux: Path) -> None:
    assert refusal(vmlinux, 16 * MIB) == (
        f"kernel {vmlinux} needs memory up to {END:#x}; the guest's 16 MiB end at 0x1000000: give it at least 17 MiB"
    )


def test_a_missing_kernel_and_a_missing_initrd(tmp_path: Path, vmlinux: Path) -> None:
    missing = tmp_path / "missing"
    assert refusal(missing) == f"cannot open kernel {missing}: No such file or directory"
    assert refusal(vmlinux, MEMORY, missing) == f"cannot open initrd {missing}: No such file or directory"
