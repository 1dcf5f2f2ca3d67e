"""AML comes out byte for byte as Intel's compiler makes it."""

from __future__ import annotations

import pytest

from lguest_mp.boot import aml


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a 02"),
        (0xFF, "0a ff"),
        (0x100, "0b 00 01"),
        (0xFFFF, "0b ff ff"),
        (0x1FFFF, "0c ff ff 01 00"),
        (0x1_0000_0000, "0e 00 00 00 00 01 00 00 00"),
    ],
)
def test_an_integer_is_as_short_as_it_can_be(value: int, encoded: str) -> None:
    assert aml.integer(value) == bytes.fromhex(encoded)


def test_an_integer_has_64_bits() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        aml.integer(1 << 64)


@pytest.mark.parametrize(("text", "encoded"), [("PNP0A03", "0c 41 d0 0a 03"), ("PNP0501", "0c 41 d0 05 01")])
def test_an_eisa_id_is_packed_into_four_bytes(text: str, encoded: str) -> None:
    assert aml.eisa_id(text) == bytes.fromhex(encoded)


@pytest.mark.parametrize(
    ("path", "encoded"),
    [
        ("_CRS", b"_CRS"),
        ("\\_SB", b"\\_SB_"),
        ("\\_SB.PCI0", b"\\\x2e_SB_PCI0"),
        ("\\_SB.PCI0.S00", b"\\\x2f\x03_SB_PCI0S00_"),
    ],
)
def test_a_name_has_segments_of_four_characters(path: str, encoded: bytes) -> None:
    assert aml.name(path, aml.integer(0)) == b"\x08" + encoded + b"\0"


def test_a_string_ends_with_a_zero() -> None:
    assert aml.string("QEMU0001") == b"\x0dQEMU0001\0"


@pytest.mark.parametrize(
    ("size", "length"),
    [
        (62, "3f"),  # with itself: 63
        (63, "41 04"),  # 65
        (4093, "4f ff"),  # 4095
        (4094, "81 00 01"),  # 4097
        (0xFFFFC, "8f ff ff"),  # 0xFFFFF
        (0xFFFFD, "c1 00 00 01"),  # 0x100001
    ],
)
def test_a_package_length_counts_itself(size: int, length: str) -> None:
    body = bytes(size - 5)
    assert aml.scope("\\_SB", body) == b"\x10" + bytes.fromhex(length) + b"\\_SB_" + body


def test_a_device_and_a_package() -> None:
    assert aml.device("COM1", aml.name("_UID", aml.integer(1))) == b"\x5b\x82\x0bCOM1\x08_UID\x01"
    assert aml.package(aml.integer(5), aml.integer(0)) == b"\x12\x05\x02\x0a\x05\x00"


def test_resources_are_a_buffer_with_an_end_tag() -> None:
    port = bytes.fromhex("47 01 f8 03 f8 03 01 08")
    assert aml.io_ports(0x3F8, 8) == port
    assert aml.resources(port) == bytes.fromhex("11 0d 0a 0a") + port + b"\x79\0"


@pytest.mark.parametrize(
    ("descriptor", "encoded"),
    [
        (aml.interrupt_edge(4), "89 06 00 03 01 04 00 00 00"),
        (aml.bus_numbers(0, 255), "88 0d 00 02 0c 00 00 00 00 00 ff 00 00 00 00 01"),
        (aml.io_window(0xD00, 0xFFFF), "88 0d 00 01 0c 03 00 00 00 0d ff ff 00 00 00 f3"),
        (
            aml.memory_window(0xC000_0000, 0xFEBF_FFFF),
            "87 17 00 00 0c 01 00 00 00 00 00 00 00 c0 ff ff bf fe 00 00 00 00 00 00 c0 3e",
        ),
    ],
)
def test_resource_descriptors(descriptor: bytes, encoded: str) -> None:
    assert descriptor == bytes.fromhex(encoded)
