"""The zero page's fields are where the kernel's boot.rst and zero-page.rst say."""

from __future__ import annotations

import struct

import pytest
from boot_images import bzimage

from lguest_mp.boot import zeropage
from lguest_mp.boot.zeropage import E820Entry, E820Type, Field, ZeroPage

#: Offset and size of each field: Documentation/arch/x86/boot.rst ("The Real-Mode Kernel Header") and zero-page.rst.
BOOT_RST = {
    "ACPI_RSDP_ADDR": (0x070, 8),
    "EXT_RAMDISK_IMAGE": (0x0C0, 4),
    "EXT_RAMDISK_SIZE": (0x0C4, 4),
    "EXT_CMD_LINE_PTR": (0x0C8, 4),
    "E820_ENTRIES": (0x1E8, 1),
    "SETUP_SECTS": (0x1F1, 1),
    "SYSSIZE": (0x1F4, 4),
    "VID_MODE": (0x1FA, 2),
    "BOOT_FLAG": (0x1FE, 2),
    "HEADER": (0x202, 4),
    "VERSION": (0x206, 2),
    "TYPE_OF_LOADER": (0x210, 1),
    "LOADFLAGS": (0x211, 1),
    "CODE32_START": (0x214, 4),
    "RAMDISK_IMAGE": (0x218, 4),
    "RAMDISK_SIZE": (0x21C, 4),
    "CMD_LINE_PTR": (0x228, 4),
    "INITRD_ADDR_MAX": (0x22C, 4),
    "KERNEL_ALIGNMENT": (0x230, 4),
    "RELOCATABLE_KERNEL": (0x234, 1),
    "XLOADFLAGS": (0x236, 2),
    "CMDLINE_SIZE": (0x238, 4),
    "HARDWARE_SUBARCH": (0x23C, 4),
    "PAYLOAD_OFFSET": (0x248, 4),
    "PAYLOAD_LENGTH": (0x24C, 4),
    "PREF_ADDRESS": (0x258, 8),
    "INIT_SIZE": (0x260, 4),
}


def test_every_field_is_checked_here() -> None:
    fields = {name for name, value in vars(zeropage).items() if isinstance(value, Field)}
    assert fields == set(BOOT_RST)


@pytest.mark.parametrize("name", BOOT_RST)
def test_field_is_where_the_boot_protocol_has_it(name: str) -> None:
    offset, size = BOOT_RST[name]
    page = ZeroPage()
    value = int.from_bytes(bytes(range(1, size + 1)), "little")
    page[getattr(zeropage, name)] = value
    assert bytes(page) == bytes(offset) + bytes(range(1, size + 1)) + bytes(4096 - offset - size)
    assert page[getattr(zeropage, name)] == value


def test_the_header_of_an_image_is_copied_and_nothing_around_it() -> None:
    image = bytearray(bzimage(b""))
    image[:0x1F1] = b"\xaa" * 0x1F1
    image[0x26C:] = b"\xbb" * (len(image) - 0x26C)
    page = bytes(ZeroPage.of_image(bytes(image)))
    assert page[0x1F1:0x26C] == image[0x1F1:0x26C]
    assert not any(page[:0x1F1])
    assert not any(page[0x26C:])


def test_a_header_that_claims_to_be_longer_does_not_reach_the_next_field() -> None:
    image = bytearray(bzimage(b""))
    image[0x201] = 0xFF
    image[0x290:0x400] = b"\xbb" * 0x170
    assert not any(bytes(ZeroPage.of_image(bytes(image)))[0x290:])


def test_a_kernel_without_a_header_gets_one() -> None:
    page = ZeroPage.of_vmlinux()
    assert bytes(page)[0x1FE:0x200] == b"\x55\xaa"
    assert bytes(page)[0x202:0x206] == b"HdrS"
    assert page[zeropage.XLOADFLAGS] & 1
    assert page[zeropage.CMDLINE_SIZE] == 2047
    assert page[zeropage.INITRD_ADDR_MAX] == 0x7FFF_FFFF


def test_what_a_boot_loader_has_to_write() -> None:
    page = ZeroPage()
    page.set_loader()
    page.set_command_line(0x1_2345_6000)
    page.set_initrd(0x2_0000_1000, 0x3_0000_0005)
    data = bytes(page)
    assert data[0x210] == 0xFF
    assert data[0x211] & 1
    assert struct.unpack_from("<H", data, 0x1FA) == (0xFFFF,)
    assert struct.unpack_from("<I", data, 0x228) + struct.unpack_from("<I", data, 0xC8) == (0x2345_6000, 1)
    assert struct.unpack_from("<II", data, 0x218) == (0x1000, 5)
    assert struct.unpack_from("<II", data, 0xC0) == (2, 3)


def test_the_memory_map_is_a_count_and_entries_of_20_bytes() -> None:
    page = ZeroPage()
    page.set_memory_map([E820Entry(0, 0x9FC00, E820Type.RAM), E820Entry(0xE0000, 0x10000, E820Type.ACPI)])
    data = bytes(page)
    assert data[0x1E8] == 2
    assert struct.unpack_from("<QQI", data, 0x2D0) == (0, 0x9FC00, 1)
    assert struct.unpack_from("<QQI", data, 0x2D0 + 20) == (0xE0000, 0x10000, 3)


def test_the_memory_map_has_room_for_128_entries() -> None:
    entry = E820Entry(0, 1, E820Type.RESERVED)
    page = ZeroPage()
    page.set_memory_map([entry] * 128)
    assert bytes(page)[0x2D0 + 128 * 20 :] == bytes(4096 - 0x2D0 - 128 * 20)
    with pytest.raises(ValueError, match="129 e820 entries"):
        page.set_memory_map([entry] * 129)


def test_a_copy_is_changed_alone() -> None:
    page = ZeroPage.of_vmlinux()
    copy = page.copy()
    copy[zeropage.VERSION] = 0
    assert page[zeropage.VERSION] == 0x020C
