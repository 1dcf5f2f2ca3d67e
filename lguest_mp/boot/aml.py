"""As much of ACPI's machine language as it takes to tell a small machine: named objects, devices, resources.

Each function gives the bytes of one thing, so a table is written as it would be in ASL, from the inside out. There is
no code in it (no methods), and so nothing that a guest's interpreter has to run.

Source: ACPI 6.4, 20.2 (AML grammar) and 6.4 (resource data types). Little-endian throughout.
"""

from __future__ import annotations

import struct

_END_TAG = b"\x79\x00"
#: General flags of an address space descriptor: the first and the last address are fixed, the bridge produces it.
_FIXED_WINDOW = 0x0C


def _name(path: str) -> bytes:
    r"""A NameString, as ``"_CRS"``, ``"\_S5"``, ``"\_SB.PCI0"`` (20.2.2)."""
    root, path = (b"\\", path[1:]) if path.startswith("\\") else (b"", path)
    segments = [segment.ljust(4, "_").encode("ascii") for segment in path.split(".")]
    if len(segments) == 1:
        return root + segments[0]
    return root + (b"\x2e" if len(segments) == 2 else bytes((0x2F, len(segments)))) + b"".join(segments)


def _package_length(body: bytes) -> bytes:
    """PkgLength, which counts itself (20.2.4): up to 63 in one byte, else 4 bits and one to three bytes more."""
    if len(body) + 1 < 1 << 6:
        return bytes((len(body) + 1,))
    for more in (1, 2, 3):
        length = len(body) + 1 + more
        if length < 1 << (4 + 8 * more):
            return bytes((more << 6 | length & 0xF,)) + (length >> 4).to_bytes(more, "little")
    raise ValueError(f"{len(body)} bytes in one AML object")


def integer(value: int) -> bytes:
    """An integer in its shortest form (20.2.3)."""
    if value in {0, 1}:
        return bytes((value,))
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if value < 1 << 8 * size:
            return bytes((prefix,)) + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} does not fit 64 bits")


def string(text: str) -> bytes:
    """A string of ASCII characters."""
    return b"\x0d" + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """``EISAID ("PNP0A03")``: three letters of 5 bits and four hexadecimal digits, big-endian (19.3.4)."""
    letters = 0
    for letter in text[:3]:
        letters = letters << 5 | ord(letter) - 0x40
    return b"\x0c" + struct.pack(">HH", letters, int(text[3:], 16))


def name(path: str, value: bytes) -> bytes:
    """``Name (path, value)``."""
    return b"\x08" + _name(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    """``Scope (path) { terms }``."""
    body = _name(path) + b"".join(terms)
    return b"\x10" + _package_length(body) + body


def device(path: str, *terms: bytes) -> bytes:
    """``Device (path) { terms }``."""
    body = _name(path) + b"".join(terms)
    return b"\x5b\x82" + _package_length(body) + body


def package(*elements: bytes) -> bytes:
    """``Package () { elements }``, at most 255."""
    body = bytes((len(elements),)) + b"".join(elements)
    return b"\x12" + _package_length(body) + body


def resources(*descriptors: bytes) -> bytes:
    """``ResourceTemplate () { descriptors }``: a buffer that ends with an end tag (6.4.2.9)."""
    data = b"".join(descriptors) + _END_TAG
    body = integer(len(data)) + data
    return b"\x11" + _package_length(body) + body


def io_ports(first: int, length: int) -> bytes:
    """``IO (Decode16, first, first, 1, length)`` (6.4.2.5)."""
    return struct.pack("<BBHHBB", 0x47, 1, first, first, 1, length)


def interrupt_edge(gsi: int) -> bytes:
    """``Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) { gsi }`` (6.4.3.6)."""
    return struct.pack("<BHBBI", 0x89, 6, 0b0011, 1, gsi)


def bus_numbers(first: int, last: int) -> bytes:
    """``WordBusNumber (ResourceProducer, …)``: the buses behind a bridge (6.4.3.5.3)."""
    return struct.pack("<BHBBBHHHHH", 0x88, 13, 2, _FIXED_WINDOW, 0, 0, first, last, 0, last - first + 1)


def io_window(first: int, last: int) -> bytes:
    """``WordIO (ResourceProducer, …, EntireRange)``: ports that a bridge passes on."""
    return struct.pack("<BHBBBHHHHH", 0x88, 13, 1, _FIXED_WINDOW, 3, 0, first, last, 0, last - first + 1)


def memory_window(first: int, last: int) -> bytes:
    """``DWordMemory (ResourceProducer, …, NonCacheable, ReadWrite)``: addresses that a bridge passes on (6.4.3.5.2)."""
    return struct.pack("<BHBBBIIIII", 0x87, 23, 0, _FIXED_WINDOW, 1, 0, first, last, 0, last - first + 1)
