"""The zero page: the one page of facts that a boot loader hands to an x86 Linux.

The kernel calls it ``struct boot_params``. Its middle, the setup header, is at the same offset in the page as in a
bzImage, where the kernel's build has filled it in; a boot loader copies it and writes the rest. So one table of fields
serves both for reading an image and for writing the page. For a bare vmlinux, which carries no header, the few fields
that the kernel itself looks at after its entry are made up here.

Source: the kernel's Documentation/arch/x86/boot.rst ("The Real-Mode Kernel Header", "64-bit Boot Protocol") and
zero-page.rst, arch/x86/include/uapi/asm/bootparam.h. All fields are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import IntEnum

from lguest_mp.record import Value

ZERO_PAGE_SIZE = 4096

#: Where the setup header begins, in an image and in the zero page, and where it ends at the latest: in the page, the
#: next field (edd_mbr_sig_buffer) is there.
SETUP_HEADER = 0x1F1
SETUP_HEADER_LIMIT = 0x290
#: "HdrS", the signature of boot protocol 2.00 and later.
HEADER_SIGNATURE = 0x5372_6448


class Field(Value):
    """A field of the zero page: its offset and its width as a code of the struct module."""

    offset: int
    code: str


ACPI_RSDP_ADDR = Field(0x070, "Q")
EXT_RAMDISK_IMAGE = Field(0x0C0, "I")
EXT_RAMDISK_SIZE = Field(0x0C4, "I")
EXT_CMD_LINE_PTR = Field(0x0C8, "I")
E820_ENTRIES = Field(0x1E8, "B")

SETUP_SECTS = Field(0x1F1, "B")
SYSSIZE = Field(0x1F4, "I")
VID_MODE = Field(0x1FA, "H")
BOOT_FLAG = Field(0x1FE, "H")
HEADER = Field(0x202, "I")
VERSION = Field(0x206, "H")
TYPE_OF_LOADER = Field(0x210, "B")
LOADFLAGS = Field(0x211, "B")
CODE32_START = Field(0x214, "I")
RAMDISK_IMAGE = Field(0x218, "I")
RAMDISK_SIZE = Field(0x21C, "I")
CMD_LINE_PTR = Field(0x228, "I")
INITRD_ADDR_MAX = Field(0x22C, "I")
KERNEL_ALIGNMENT = Field(0x230, "I")
RELOCATABLE_KERNEL = Field(0x234, "B")
XLOADFLAGS = Field(0x236, "H")
CMDLINE_SIZE = Field(0x238, "I")
HARDWARE_SUBARCH = Field(0x23C, "I")
PAYLOAD_OFFSET = Field(0x248, "I")
PAYLOAD_LENGTH = Field(0x24C, "I")
PREF_ADDRESS = Field(0x258, "Q")
INIT_SIZE = Field(0x260, "I")

E820_TABLE = 0x2D0
E820_TABLE_ENTRIES = 128

BOOT_FLAG_MAGIC = 0xAA55
#: A boot loader without an assigned number.
LOADER_UNDEFINED = 0xFF
VID_MODE_NORMAL = 0xFFFF

#: LOADFLAGS: the protected-mode code is at 1 MiB or above; the kernel may randomize where it puts its memory maps; the
#: segment registers are to be left as they are.
LOADED_HIGH = 0x01
KASLR_FLAG = 0x02
KEEP_SEGMENTS = 0x40
#: XLOADFLAGS: the image has the 64-bit entry point, 0x200 after its protected-mode code's start.
XLF_KERNEL_64 = 0x0001

#: COMMAND_LINE_SIZE of x86 less the terminating zero, and the limit for an initrd in the header of any current kernel.
DEFAULT_CMDLINE_SIZE = 2047
DEFAULT_INITRD_ADDR_MAX = 0x7FFF_FFFF


class E820Type(IntEnum):
    """What a range of the memory map is (ACPI 6.4, table 15.4)."""

    RAM = 1
    RESERVED = 2
    ACPI = 3


class E820Entry(Value):
    """``size`` bytes of guest-physical memory at ``base``."""

    base: int
    size: int
    type: E820Type


class ZeroPage:
    """A ``struct boot_params`` in the making, 4096 bytes."""

    def __init__(self) -> None:
        self._page = bytearray(ZERO_PAGE_SIZE)

    def __getitem__(self, field: Field) -> int:
        value: int = struct.unpack_from(f"<{field.code}", self._page, field.offset)[0]
        return value

    def __setitem__(self, field: Field, value: int) -> None:
        struct.pack_into(f"<{field.code}", self._page, field.offset, value)

    def __bytes__(self) -> bytes:
        return bytes(self._page)

    @classmethod
    def of_image(cls, image: bytes) -> ZeroPage:
        """The setup header of a bzImage, all else zero; ``image`` holds its first 0x290 bytes at least.

        The header says itself how long it is: up to where its first instruction, a short jump, leads
        (boot.rst, "64-bit Boot Protocol": 0x202 + the byte at 0x201).
        """
        page = cls()
        end = min(0x202 + image[0x201], SETUP_HEADER_LIMIT)
        page._page[SETUP_HEADER:end] = image[SETUP_HEADER:end]
        return page

    @classmethod
    def of_vmlinux(cls) -> ZeroPage:
        """A setup header for a kernel that comes without one: boot protocol 2.12, 64-bit, with the usual limits."""
        page = cls()
        page[BOOT_FLAG] = BOOT_FLAG_MAGIC
        page[HEADER] = HEADER_SIGNATURE
        page[VERSION] = 0x020C
        page[LOADFLAGS] = LOADED_HIGH
        page[XLOADFLAGS] = XLF_KERNEL_64
        page[KERNEL_ALIGNMENT] = 0x20_0000
        page[INITRD_ADDR_MAX] = DEFAULT_INITRD_ADDR_MAX
        page[CMDLINE_SIZE] = DEFAULT_CMDLINE_SIZE
        return page

    def copy(self) -> ZeroPage:
        """Another one that can be changed alone."""
        page = ZeroPage()
        page._page[:] = self._page
        return page

    def set_loader(self) -> None:
        """What every boot loader has to say of itself."""
        self[TYPE_OF_LOADER] = LOADER_UNDEFINED
        self[VID_MODE] = VID_MODE_NORMAL
        self[LOADFLAGS] |= LOADED_HIGH

    def set_command_line(self, address: int) -> None:
        """The guest-physical address of the zero-terminated command line."""
        self[CMD_LINE_PTR] = address & 0xFFFF_FFFF
        self[EXT_CMD_LINE_PTR] = address >> 32

    def set_initrd(self, address: int, size: int) -> None:
        """Where the initial RAM disk is, guest-physical, and its bytes."""
        self[RAMDISK_IMAGE] = address & 0xFFFF_FFFF
        self[RAMDISK_SIZE] = size & 0xFFFF_FFFF
        self[EXT_RAMDISK_IMAGE] = address >> 32
        self[EXT_RAMDISK_SIZE] = size >> 32

    def set_memory_map(self, entries: Iterable[E820Entry]) -> None:
        """The memory map, at most 128 entries (more is a bug of the caller's)."""
        table = list(entries)
        if len(table) > E820_TABLE_ENTRIES:
            raise ValueError(f"{len(table)} e820 entries, the zero page has room for {E820_TABLE_ENTRIES}")
        self[E820_ENTRIES] = len(table)
        for index, entry in enumerate(table):
            struct.pack_into("<QQI", self._page, E820_TABLE + 20 * index, entry.base, entry.size, entry.type)
