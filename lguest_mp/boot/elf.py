"""A vmlinux: which pieces of an ELF file go to which guest-physical addresses, and where to begin.

There are two kinds: those of 64-bit kernels, and those of lguest's own guests, which have 32 bits. Only the file header
and the program headers matter. pyelftools knows their structure; of it only the structures are used and not
``ELFFile``, whose module brings a DWARF reader along that takes more time to import than a kernel takes to unpack.
The kernel's ``p_paddr`` and ``e_entry`` are physical addresses, and a kernel put where it was linked for needs no
relocation.

The file is anybody's: each number is compared with the size of the file before it is used.

Source: the System V ABI, generic part, chapters 4 and 5; the kernel's arch/x86/kernel/vmlinux.lds.S.
"""

from __future__ import annotations

import io
from itertools import pairwise

from lguest_mp.errors import LguestError
from lguest_mp.record import Value

ELF_MAGIC = b"\x7fELF"
#: Where this many bytes from the start of a file are enough to hold both kinds of headers.
HEADERS_SIZE = 64 << 10

_CLASS_64 = 2
_LITTLE_ENDIAN = 1
_MACHINE = slice(18, 20)


class ElfKind(Value):
    """A kind of kernel: ``bits`` of its ELF class, its ``machine`` by number and name, sizes of headers in bytes.

    ``wanted`` is what the user has to give.
    """

    bits: int
    machine: int
    machine_name: str
    file_header_size: int
    program_header_size: int
    max_program_headers: int
    wanted: str


X86_64 = ElfKind(64, 62, "EM_X86_64", 64, 56, 128, "a 64-bit x86 (x86-64) kernel")
#: The original launcher took so many program headers: 64 KiB of them.
I386 = ElfKind(32, 3, "EM_386", 52, 32, 2048, "a 32-bit x86 (i386) kernel")


class Segment(Value):
    """``size`` bytes at ``offset`` of the file go to guest-physical ``address``; zeros follow up to ``memory_size``."""

    offset: int
    size: int
    address: int
    memory_size: int

    @property
    def end(self) -> int:
        """The first guest-physical address after it."""
        return self.address + self.memory_size


class ElfImage(Value):
    """What to load, ordered by file offset, and the guest-physical address to start at."""

    entry: int
    segments: tuple[Segment, ...]


def is_elf(head: bytes) -> bool:
    """Whether a file that begins like this says that it is ELF."""
    return head.startswith(ELF_MAGIC)


def is_elf_of(kind: ElfKind, head: bytes) -> bool:
    """Whether a file that begins like this says that it is ELF of that kind, whatever else may be wrong with it."""
    return is_elf(head) and _bits(head) == kind.bits and int.from_bytes(head[_MACHINE], "little") == kind.machine


def _bits(head: bytes) -> int:
    return 64 if head[4:5] == bytes([_CLASS_64]) else 32


def parse_elf(name: str, head: bytes, size: int, kind: ElfKind = X86_64) -> ElfImage:
    """Reads the headers of a kernel of that kind; ``head`` begins the file of ``size`` bytes.

    ``name`` is what the error calls the file. LguestError: truncated, or for another machine, or not a kernel.
    """
    from elftools.common.exceptions import ELFError  # noqa: PLC0415 (20 ms that only a launch has to spend)
    from elftools.common.utils import struct_parse  # noqa: PLC0415
    from elftools.elf.structs import ELFStructs  # noqa: PLC0415

    if len(head) < kind.file_header_size:
        raise LguestError(
            f"{name} is truncated: an ELF header has {kind.file_header_size} bytes, there are {len(head)}"
        )
    if _bits(head) != kind.bits or head[5] != _LITTLE_ENDIAN:
        order = "little" if head[5] == _LITTLE_ENDIAN else "big"
        raise LguestError(f"{name} is a {_bits(head)}-bit {order}-endian ELF file; give {kind.wanted}")
    structs = ELFStructs(little_endian=True, elfclass=kind.bits)
    structs.create_basic_structs()
    try:
        header = struct_parse(structs.Elf_Ehdr, io.BytesIO(head), stream_pos=0)
        if header["e_machine"] != kind.machine_name:
            raise LguestError(f"{name} is for another machine ({header['e_machine']}); give {kind.wanted}")
        if header["e_type"] != "ET_EXEC":
            raise LguestError(f"{name} is an ELF file but not an executable ({header['e_type']}); give a vmlinux")
        table, count = header["e_phoff"], header["e_phnum"]
        if header["e_phentsize"] != kind.program_header_size or not 0 < count <= kind.max_program_headers:
            raise LguestError(
                f"{name} has {count} program headers of {header['e_phentsize']} bytes;"
                f" a kernel has 1 to {kind.max_program_headers} of {kind.program_header_size}"
            )
        if table + count * kind.program_header_size > len(head):
            raise LguestError(
                f"{name} is truncated or damaged: its program headers lie at {table:#x}, of {size:#x} bytes"
            )
        structs.create_advanced_structs(header["e_type"], header["e_machine"], header["e_ident"]["EI_OSABI"])
        stream = io.BytesIO(head)
        segments = []
        for index in range(count):
            entry = struct_parse(structs.Elf_Phdr, stream, stream_pos=table + index * kind.program_header_size)
            if entry["p_type"] == "PT_LOAD" and entry["p_memsz"]:
                segments.append(Segment(entry["p_offset"], entry["p_filesz"], entry["p_paddr"], entry["p_memsz"]))
    except ELFError as error:
        raise LguestError(f"{name} is not a sound ELF file: {error}") from error
    image = ElfImage(header["e_entry"], tuple(sorted(segments, key=lambda segment: segment.offset)))
    _check_segments(name, image, size)
    return image


def _check_segments(name: str, image: ElfImage, size: int) -> None:
    if not image.segments:
        raise LguestError(f"{name} has nothing to load (no PT_LOAD segment); give a vmlinux")
    for segment in image.segments:
        if segment.size and segment.offset + segment.size > size:
            raise LguestError(
                f"{name} is truncated: a segment ends at byte {segment.offset + segment.size}, the file at {size}"
            )
        if segment.size > segment.memory_size:
            raise LguestError(
                f"{name} is damaged: a segment has {segment.size} bytes for {segment.memory_size} bytes of memory"
            )
    by_address = sorted(image.segments, key=lambda segment: segment.address)
    for lower, upper in pairwise(by_address):
        if lower.end > upper.address:
            raise LguestError(f"{name} is damaged: two of its segments overlap at {upper.address:#x}")
    if not any(segment.address <= image.entry < segment.end for segment in image.segments):
        raise LguestError(f"{name} is damaged: its entry point {image.entry:#x} is in none of its segments")
