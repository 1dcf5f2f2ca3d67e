"""``python -m guestkit.firstword KERNEL RESULT``: a bzImage like KERNEL, but that its first instruction says ``!``.

Then it halts. So whoever launches it knows when the guest's first instruction was executed, and that reading,
unpacking and loading took what they take for the other one: it is packed in the same way, and as large.

It takes the package's own reader of kernels, so it runs in its environment.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import lz4.block

from lguest_mp.boot.bzimage import parse_bzimage
from lguest_mp.boot.elf import HEADERS_SIZE, parse_elf
from lguest_mp.boot.files import HostFile
from lguest_mp.boot.payload import CHUNK_SIZE, LZ4_LEGACY_MAGIC, SIZE_BYTES, Payload, find_compression
from lguest_mp.boot.zeropage import PAYLOAD_LENGTH

#: In 64-bit mode, a line with an exclamation mark to the serial port, and the end.
_CODE = bytes.fromhex(
    "66baf803"  # mov dx, 0x3f8
    "b021ee"  # mov al, '!'; out dx, al
    "b00aee"  # mov al, '\n'; out dx, al
    "fa"  # cli
    "f4"  # hlt
)


def with_first_word(path: Path) -> bytes:
    """The image; SystemExit where it cannot be made of that kernel."""
    file = HostFile("kernel", path)
    image = parse_bzimage(file, file.read(0, min(HEADERS_SIZE, file.size)))
    packed = memoryview(file.read(image.payload_offset, image.payload_size))
    compression = find_compression(packed)
    if compression is None or compression.name != "LZ4":
        raise SystemExit(f"{path} is not compressed with LZ4, so it cannot be changed")
    vmlinux = bytearray(b"".join(Payload(file.name, packed, compression).chunks()))
    elf = parse_elf(file.name, bytes(vmlinux[:HEADERS_SIZE]), len(vmlinux))
    first = next(segment for segment in elf.segments if segment.address <= elf.entry < segment.end)
    place = first.offset + elf.entry - first.address
    vmlinux[place : place + len(_CODE)] = _CODE
    payload = _packed(vmlinux)
    if len(payload) > image.payload_size:
        raise SystemExit(f"{path} has no room for what was changed")
    data = bytearray(file.read(0, file.size))
    data[image.payload_offset : image.payload_offset + image.payload_size] = payload.ljust(image.payload_size, b"\0")
    struct.pack_into(f"<{PAYLOAD_LENGTH.code}", data, PAYLOAD_LENGTH.offset, len(payload))
    return bytes(data)


def _packed(vmlinux: bytes | bytearray) -> bytes:
    """As the kernel's build packs it: LZ4's legacy framing, then the size of what comes out."""
    blocks = [LZ4_LEGACY_MAGIC.to_bytes(4, "little")]
    for start in range(0, len(vmlinux), CHUNK_SIZE):
        part = bytes(vmlinux[start : start + CHUNK_SIZE])
        # The build takes level 9; a little better than that, lest it be larger than the room that there is.
        block = lz4.block.compress(part, mode="high_compression", compression=12, store_size=False)
        blocks += [len(block).to_bytes(4, "little"), block]
    return b"".join([*blocks, len(vmlinux).to_bytes(SIZE_BYTES, "little")])


if __name__ == "__main__":
    Path(sys.argv[2]).write_bytes(with_first_word(Path(sys.argv[1])))
