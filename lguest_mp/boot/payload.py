"""A bzImage's payload: the compressed vmlinux inside, unpacked here and not by the guest.

The guest would take seconds for what the host does in some hundredths of one. The payload is a stream of one of the
kernel's compressions, told by its first bytes, and the last four bytes after it (for gzip: its own last four) are the
size of what comes out. That size is the bound: it is looked at before anything is unpacked, not a byte more than it is
unpacked, and less is an error.

What comes out is given in chunks of some megabytes instead of one piece. Whoever forgets each before asking for the
next has them all in the same memory: to touch 50 MiB of fresh memory takes longer than to unpack them from LZ4.

Source: the kernel's lib/decompress.c (magic numbers), scripts/Makefile.lib (size_append), lib/decompress_unlz4.c.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

from lguest_mp.boot.heap import large_buffers
from lguest_mp.errors import LguestError
from lguest_mp.record import Value

#: What a decompressor is asked for at a time; also the most that one block of LZ4's legacy framing holds.
CHUNK_SIZE = 8 << 20
SIZE_BYTES = 4
#: A stream of LZMA or XZ may ask for this much of the host's memory for its dictionary.
LZMA_MEMORY_LIMIT = 512 << 20
#: The largest window of Zstandard that its own command line accepts without being asked (and the kernel's -22 uses).
ZSTD_MAX_WINDOW = 128 << 20
LZ4_LEGACY_MAGIC = 0x184C_2102


class DamagedPayloadError(LguestError):
    """The payload does not unpack to what its trailer says."""


class _Decompressor(Protocol):
    """The shape of bz2.BZ2Decompressor and lzma.LZMADecompressor."""

    @property
    def eof(self) -> bool: ...

    def decompress(self, data: memoryview | bytes, max_length: int) -> bytes: ...


class _Inflate:
    """zlib's decompressor in that shape: it keeps the input that it has not used yet."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        self._rest: memoryview | bytes = b""

    @property
    def eof(self) -> bool:
        return self._inflate.eof

    def decompress(self, data: memoryview | bytes, max_length: int) -> bytes:
        data = data or self._rest
        output = self._inflate.decompress(data, max_length)
        self._rest = self._inflate.unconsumed_tail
        return output


def _stream(decompressor: _Decompressor, data: memoryview, size: int) -> Iterator[bytes]:
    """Unpacks through an object that takes a bound; the last call lets it verify its checksum."""
    rest: memoryview | bytes = data
    while size:
        chunk = decompressor.decompress(rest, min(CHUNK_SIZE, size))
        rest = b""
        if not chunk:
            raise DamagedPayloadError("it ends too early")
        size -= len(chunk)
        yield chunk
    if not decompressor.eof and decompressor.decompress(b"", 1):
        raise DamagedPayloadError("it is longer than it says")
    if not decompressor.eof:
        raise DamagedPayloadError("its end is missing")


def _gzip(data: memoryview, size: int) -> Iterator[bytes]:
    try:
        yield from _stream(_Inflate(), data, size)
    except zlib.error as error:
        raise DamagedPayloadError(str(error)) from error


def _bzip2(data: memoryview, size: int) -> Iterator[bytes]:
    import bz2  # noqa: PLC0415 (only the launch of such a kernel pays for it; so below)

    try:
        yield from _stream(bz2.BZ2Decompressor(), data, size)
    except (OSError, EOFError) as error:
        raise DamagedPayloadError(str(error)) from error


def _lzma(data: memoryview, size: int) -> Iterator[bytes]:
    import lzma  # noqa: PLC0415

    try:
        yield from _stream(lzma.LZMADecompressor(lzma.FORMAT_ALONE, LZMA_MEMORY_LIMIT), data, size)
    except (lzma.LZMAError, EOFError) as error:
        raise DamagedPayloadError(str(error)) from error


def _xz(data: memoryview, size: int) -> Iterator[bytes]:
    import lzma  # noqa: PLC0415

    try:
        yield from _stream(lzma.LZMADecompressor(lzma.FORMAT_XZ, LZMA_MEMORY_LIMIT), data, size)
    except (lzma.LZMAError, EOFError) as error:
        raise DamagedPayloadError(str(error)) from error


def _lz4(data: memoryview, size: int) -> Iterator[bytes]:
    """LZ4's legacy framing: after the magic number blocks of at most 8 MiB, each after its compressed size."""
    from lz4.block import LZ4BlockError, decompress  # noqa: PLC0415

    position = 4
    with large_buffers():
        while size:
            length = int.from_bytes(data[position : position + 4], "little")
            position += 4
            if length == LZ4_LEGACY_MAGIC:  # another stream follows, as `cat` makes them
                continue
            if not 0 < length <= len(data) - position:
                raise DamagedPayloadError("it ends too early")
            try:
                chunk: bytes = decompress(data[position : position + length], uncompressed_size=min(CHUNK_SIZE, size))
            except (LZ4BlockError, ValueError, OverflowError, MemoryError) as error:
                raise DamagedPayloadError(str(error)) from error
            if not chunk:
                raise DamagedPayloadError("it has an empty block")
            position += length
            size -= len(chunk)
            yield chunk
            del chunk  # the next one takes its memory


def _zstd(data: memoryview, size: int) -> Iterator[bytes]:
    """Zstandard in one go: piece by piece it would keep a window as large as the kernel beside the output."""
    import zstandard  # noqa: PLC0415

    try:
        told = zstandard.get_frame_parameters(data).content_size
        if told not in {zstandard.CONTENTSIZE_UNKNOWN, size}:
            raise DamagedPayloadError(f"its frame says {told} bytes")
        output = zstandard.ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW).decompress(data, max_output_size=size)
    except (zstandard.ZstdError, MemoryError) as error:
        raise DamagedPayloadError(str(error)) from error
    if len(output) != size:
        raise DamagedPayloadError("it ends too early")
    yield output


class Compression(Value):
    """One of the kernel's compressions: its first bytes, and how to unpack a given number of bytes.

    ``trailer`` bytes are appended by the kernel's build to say how many that are. ``cheap``: unpacking twice takes less
    time than keeping what came out.
    """

    name: str
    magic: bytes
    unpack: Callable[[memoryview, int], Iterator[bytes]]
    trailer: int = SIZE_BYTES
    cheap: bool = False


COMPRESSIONS = (
    Compression("gzip", b"\x1f\x8b", _gzip, trailer=0),
    Compression("bzip2", b"BZh", _bzip2),
    Compression("LZMA", b"\x5d\x00", _lzma),
    Compression("xz", b"\xfd7zXZ\x00", _xz),
    Compression("LZ4", LZ4_LEGACY_MAGIC.to_bytes(4, "little"), _lz4, cheap=True),
    Compression("Zstandard", b"\x28\xb5\x2f\xfd", _zstd),
)


class Payload:
    """The compressed kernel in a bzImage, not yet unpacked: ``data`` with its trailer."""

    def __init__(self, name: str, data: memoryview, compression: Compression) -> None:
        self._name = name
        self.data = data
        self.compression = compression
        #: What unpacking gives, in bytes, as the trailer says.
        self.size = int.from_bytes(data[-SIZE_BYTES:], "little")

    def chunks(self) -> Iterator[bytes]:
        """Unpacks: exactly ``size`` bytes in all, or DamagedPayloadError."""
        packed = self.data[: len(self.data) - self.compression.trailer]
        try:
            yield from self.compression.unpack(packed, self.size)
        except DamagedPayloadError as error:
            raise DamagedPayloadError(
                f"{self._name}: the {self.compression.name} payload is damaged or truncated"
                f" ({error}; {self.size} bytes expected)"
            ) from error


def find_compression(data: memoryview) -> Compression | None:
    """How this payload is compressed; None: in a way unknown here."""
    head = bytes(data[:8])
    for compression in COMPRESSIONS:
        if head.startswith(compression.magic):
            return compression
    return None
