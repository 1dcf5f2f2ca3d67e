"""Every kind of kernel ends up in guest memory as its own headers say, or is refused with one line."""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path

import pytest
from boot_images import CODE, MEMORY, MIB, PACKERS, TEXT, bzimage, elf64, is_zero, one_line
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lguest_mp.boot.cache import KernelCache
from lguest_mp.boot.elf import Segment
from lguest_mp.boot.files import HostFile
from lguest_mp.boot.kernel import Kernel, read_kernel
from lguest_mp.boot.pieces import ZEROS
from lguest_mp.boot.zeropage import ZeroPage
from lguest_mp.errors import LguestError
from lguest_mp.memory import GuestMemory

DATA = bytes(range(255, 0, -1)) * 100
VMLINUX = elf64([(TEXT, CODE, len(CODE) + 4096), (TEXT + MIB, DATA, len(DATA))], entry=TEXT + 0x40)


def read(directory: Path, image: bytes, memory: int = MEMORY) -> Kernel:
    path = directory / "image"
    path.write_bytes(image)
    return read_kernel(HostFile("kernel", path), memory, KernelCache(None))


def refusal(directory: Path, image: bytes, memory: int = MEMORY) -> str:
    """What is said about an image, with the file's name left out."""
    with pytest.raises(LguestError) as caught:
        read(directory, image, memory)
    return one_line(caught.value).replace(str(directory / "image"), "X")


def check_vmlinux(kernel: Kernel) -> None:
    memory = GuestMemory(MEMORY)
    kernel.load(memory)
    assert memory.read(TEXT, len(CODE)) == CODE
    assert memory.read(TEXT + MIB, len(DATA)) == DATA
    assert is_zero(memory, 0, TEXT)
    assert is_zero(memory, TEXT + len(CODE), MIB - len(CODE))
    assert is_zero(memory, TEXT + MIB + len(DATA), MEMORY - TEXT - MIB - len(DATA))
    assert kernel.entry == TEXT + 0x40
    assert kernel.end == TEXT + MIB + len(DATA)
    assert not kernel.unpacks_itself


def test_vmlinux(tmp_path: Path) -> None:
    check_vmlinux(read(tmp_path, VMLINUX))


@pytest.mark.parametrize("packer", PACKERS)
def test_bzimage(tmp_path: Path, packer: str) -> None:
    check_vmlinux(read(tmp_path, bzimage(PACKERS[packer](VMLINUX))))


@pytest.mark.parametrize("packer", ["LZ4", "xz"])
def test_a_kernel_can_be_loaded_again(tmp_path: Path, packer: str) -> None:
    kernel = read(tmp_path, bzimage(PACKERS[packer](VMLINUX)))
    check_vmlinux(kernel)
    check_vmlinux(kernel)


@pytest.mark.parametrize("setup_sects", [1, 4, 39])
def test_the_setup_code_may_have_any_length(tmp_path: Path, setup_sects: int) -> None:
    check_vmlinux(read(tmp_path, bzimage(PACKERS["LZ4"](VMLINUX), setup_sects=setup_sects)))


def test_an_old_image_without_setup_sects_has_four(tmp_path: Path) -> None:
    check_vmlinux(read(tmp_path, bzimage(PACKERS["LZ4"](VMLINUX), setup_sects=0)))


def test_a_signature_after_the_image_is_nothing_to_it(tmp_path: Path) -> None:
    check_vmlinux(read(tmp_path, bzimage(PACKERS["LZ4"](VMLINUX)) + bytes(1500)))


def test_the_images_header_is_kept(tmp_path: Path) -> None:
    image = bzimage(PACKERS["gzip"](VMLINUX))
    assert bytes(read(tmp_path, image).header)[0x1F1:0x26C] == image[0x1F1:0x26C]


def test_runs_of_zeros_are_not_written(tmp_path: Path) -> None:
    """A kernel's file holds megabytes of them, and each page written is a page of the host's memory."""
    step = len(ZEROS)
    content = b"a" + bytes(5 * step) + b"b" * step + bytes(2 * step) + b"c"
    kernel = read(tmp_path, elf64([(TEXT, content, len(content))]))
    memory = GuestMemory(MEMORY)
    memory.write(TEXT + 2 * step, b"untouched")
    kernel.load(memory)
    assert memory.read(TEXT + 2 * step, 9) == b"untouched"
    memory.write(TEXT + 2 * step, bytes(9))
    assert memory.read(TEXT, len(content)) == content


@given(st.data())
def test_segments_are_copied_however_the_stream_is_cut(data: st.DataObject) -> None:
    """Against the plain way: the whole stream in one piece, each segment a slice of it."""
    lengths = st.sampled_from([1, 100, 4096, 65535, 65536, 65537, 150_000])
    runs = data.draw(st.lists(st.tuples(st.sampled_from([b"\0", b"x"]), lengths), min_size=1, max_size=8))
    stream = b"".join(byte * length for byte, length in runs)
    cuts = sorted({0, len(stream), *data.draw(st.lists(st.integers(0, len(stream)), max_size=5))})
    marks = sorted(data.draw(st.lists(st.integers(0, len(stream)), min_size=2, max_size=6)))
    segments = tuple(
        Segment(first, last - first, MIB + first + 3 * index, last - first)
        for index, (first, last) in enumerate(pairwise(marks))
    )
    kernel = Kernel(
        "kernel",
        ZeroPage(),
        entry=0,
        segments=segments,
        end=0,
        unpacks_itself=False,
        source=lambda: [stream[first:last] for first, last in pairwise(cuts)],
    )
    memory = GuestMemory(4 * MIB)
    kernel.load(memory)
    for segment in segments:
        assert memory.read(segment.address, segment.size) == stream[segment.offset : segment.offset + segment.size]


@pytest.mark.parametrize("payload", [b"\x89LZO" + bytes(100), b"", PACKERS["gzip"](b"no ELF file")])
def test_a_payload_that_is_not_understood_is_left_to_the_image_itself(tmp_path: Path, payload: bytes) -> None:
    image = bzimage(payload, init_size=5 * MIB)
    kernel = read(tmp_path, image)
    assert kernel.unpacks_itself
    assert kernel.entry == TEXT + 0x200
    assert kernel.end == TEXT + 5 * MIB
    memory = GuestMemory(MEMORY)
    kernel.load(memory)
    code = image[4 * 512 :]
    assert memory.read(TEXT, len(code)) == code


def test_the_images_own_code_is_aligned_as_it_asks(tmp_path: Path) -> None:
    image = bzimage(b"?", pref_address=TEXT + 1, alignment=2 * MIB)
    assert read(tmp_path, image).entry == TEXT + 2 * MIB + 0x200
    image = bzimage(b"?", pref_address=TEXT + 4096, alignment=2 * MIB, relocatable=0)
    assert read(tmp_path, image).entry == TEXT + 4096 + 0x200


def test_the_images_own_code_needs_its_init_size(tmp_path: Path) -> None:
    assert refusal(tmp_path, bzimage(b"?", init_size=20 * MIB)) == (
        "kernel X needs memory up to 0x2400000; the guest's 32 MiB end at 0x2000000: give it at least 36 MiB"
    )


@pytest.mark.parametrize("image", [b"MZ" + bytes(5000), b"#!/bin/sh\n", b"x", bytes(70_000)])
def test_something_else(tmp_path: Path, image: bytes) -> None:
    assert refusal(tmp_path, image) == "kernel X is no kernel: neither an ELF vmlinux nor a bzImage"


def test_a_32_bit_bzimage(tmp_path: Path) -> None:
    assert refusal(tmp_path, bzimage(b"", xloadflags=0)) == (
        "kernel X is a 32-bit kernel (no 64-bit entry); give a 64-bit x86 (x86-64) kernel"
    )


def test_an_old_bzimage(tmp_path: Path) -> None:
    assert refusal(tmp_path, bzimage(b"", version=0x020A)) == (
        "kernel X speaks boot protocol 2.10; lguest needs 2.12, a 64-bit Linux 3.8 or later"
    )


def test_another_machines_kernel_in_a_bzimage(tmp_path: Path) -> None:
    image = bzimage(PACKERS["gzip"](elf64(machine=183)))
    assert refusal(tmp_path, image) == (
        "kernel X (unpacked) is for another machine (EM_AARCH64); give a 64-bit x86 (x86-64) kernel"
    )


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_truncated_bzimage(tmp_path: Path, keep: float) -> None:
    image = bzimage(PACKERS["LZ4"](VMLINUX))
    length = int(len(image) * keep)
    assert refusal(tmp_path, image[:length]) == (
        f"kernel X is truncated: its header tells of {len(image)} bytes, there are {length}"
    )


def test_a_truncated_vmlinux(tmp_path: Path) -> None:
    assert refusal(tmp_path, VMLINUX[:-100]).startswith("kernel X is truncated: a segment ends at byte")


def test_a_header_without_code(tmp_path: Path) -> None:
    image = bytearray(bzimage(b""))
    struct.pack_into("<I", image, 0x1F4, 0)
    assert refusal(tmp_path, bytes(image)).startswith("kernel X is truncated: its header tells of 2048 bytes")


@pytest.mark.parametrize("field", [0x248, 0x24C])
def test_a_payload_outside_the_image(tmp_path: Path, field: int) -> None:
    image = bytearray(bzimage(PACKERS["LZ4"](VMLINUX)))
    struct.pack_into("<I", image, field, 0xFFFF_FFFF)
    assert refusal(tmp_path, bytes(image)).startswith("kernel X is damaged: its payload ends at byte 4294")


@pytest.mark.parametrize("packer", PACKERS)
def test_a_damaged_payload_is_found_before_anything_is_loaded(tmp_path: Path, packer: str) -> None:
    packed = PACKERS[packer](VMLINUX + bytes(100_000))
    packed = packed[: len(packed) // 2] + packed[-4:]
    assert "payload is damaged or truncated (" in refusal(tmp_path, bzimage(packed))


@pytest.mark.parametrize("packer", PACKERS)
def test_a_payload_that_does_not_fit_the_guest_is_not_even_unpacked(tmp_path: Path, packer: str) -> None:
    packed = PACKERS[packer](VMLINUX)[:-4] + struct.pack("<I", 100 * MIB)
    assert refusal(tmp_path, bzimage(packed)) == (
        f"kernel X unpacks to {100 * MIB} bytes; the guest has 32 MiB: give it at least 100 MiB"
    )


@pytest.mark.parametrize("size", [0, (1 << 30) + 1, 0xFFFF_FFFF])
def test_a_payload_of_a_size_that_no_kernel_has(tmp_path: Path, size: int) -> None:
    packed = PACKERS["Zstandard"](VMLINUX)[:-4] + struct.pack("<I", size)
    assert refusal(tmp_path, bzimage(packed), memory=2048 * MIB) == (
        f"kernel X is damaged: no kernel unpacks to {size} bytes (at most {1 << 30})"
    )


def test_a_segment_where_the_boot_tables_are(tmp_path: Path) -> None:
    image = elf64([(0x1000, CODE, len(CODE))], entry=0x1000)
    assert refusal(tmp_path, image) == "kernel X wants to be at 0x1000, where the boot tables are (below 0x100000)"


def test_a_segment_beyond_the_guests_memory(tmp_path: Path) -> None:
    image = elf64([(TEXT, CODE, 17 * MIB)])
    assert refusal(tmp_path, image) == (
        "kernel X needs memory up to 0x2100000; the guest's 32 MiB end at 0x2000000: give it at least 33 MiB"
    )


@pytest.mark.parametrize("address", [3 << 30, 1 << 32, (1 << 64) - 4096])
def test_a_segment_where_no_guest_has_low_memory(tmp_path: Path, address: int) -> None:
    image = elf64([(TEXT, CODE, len(CODE))])
    changed = bytearray(image)
    struct.pack_into("<Q", changed, 64 + 56 + 24, address)
    struct.pack_into("<Q", changed, 24, address)
    assert refusal(tmp_path, bytes(changed)).endswith("; a guest's low memory ends at 0xc0000000")


def test_a_vmlinux_that_shrinks_before_it_is_loaded(tmp_path: Path) -> None:
    kernel = read(tmp_path, VMLINUX)
    (tmp_path / "image").write_bytes(VMLINUX[:5000])
    with pytest.raises(LguestError, match="became shorter"):
        kernel.load(GuestMemory(MEMORY))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(["vmlinux", "LZ4", "gzip", "own code"]))
def test_garbled_images_are_loaded_within_memory_or_refused(tmp_path: Path, data: st.DataObject, kind: str) -> None:
    image = bytearray(VMLINUX if kind == "vmlinux" else bzimage(b"?" if kind == "own code" else PACKERS[kind](VMLINUX)))
    last = 200 if kind == "vmlinux" else 0x270
    first = 0 if kind == "vmlinux" else 0x1F1
    for _ in range(data.draw(st.integers(0, 4))):
        position = data.draw(st.integers(first, last))
        value = data.draw(st.sampled_from([b"\0", b"\xff", b"\x80", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x01"]))
        image[position : position + len(value)] = value
    length = data.draw(st.one_of(st.just(len(image)), st.integers(1, len(image))))
    try:
        kernel = read(tmp_path, bytes(image[:length]))
    except LguestError as error:
        one_line(error)
    else:
        assert kernel.end <= MEMORY
        kernel.load(GuestMemory(MEMORY))
