"""What is in a bzImage is unpacked, whatever packed it, and to exactly as many bytes as it says."""

from __future__ import annotations

import random
import struct

import pytest
from boot_images import PACKERS, one_line
from hypothesis import given
from hypothesis import strategies as st

from lguest_mp.boot.payload import (
    CHUNK_SIZE,
    COMPRESSIONS,
    DamagedPayloadError,
    Payload,
    find_compression,
)
from lguest_mp.errors import LguestError

#: Half of it can be compressed, and it does not end where a block does.
DATA = random.Random(1).randbytes(100_000) + bytes(100_000) + b"the end"

ALL = pytest.mark.parametrize("packer", PACKERS)


def payload(packed: bytes) -> Payload:
    view = memoryview(packed)
    compression = find_compression(view)
    assert compression
    return Payload("vmlinuz", view, compression)


def unpack(packed: bytes) -> bytes:
    return b"".join(payload(packed).chunks())


def refusal(packed: bytes) -> str:
    with pytest.raises(DamagedPayloadError) as caught:
        unpack(packed)
    return one_line(caught.value)


def with_size(packed: bytes, size: int) -> bytes:
    return packed[:-4] + struct.pack("<I", size)


@ALL
def test_what_was_packed_comes_out(packer: str) -> None:
    packed = payload(PACKERS[packer](DATA))
    assert packed.size == len(DATA)
    assert packed.compression.name == packer.split(maxsplit=1)[0]
    assert b"".join(packed.chunks()) == DATA
    assert b"".join(packed.chunks()) == DATA, "it can be unpacked again"


def test_every_compression_is_tested() -> None:
    assert {compression.name for compression in COMPRESSIONS} == {name.split()[0] for name in PACKERS}


@pytest.mark.parametrize("packer", ["gzip", "bzip2", "LZMA", "xz", "LZ4"])
def test_a_large_kernel_comes_in_chunks(packer: str) -> None:
    data = (b"lguest" * 1000).ljust(2 * CHUNK_SIZE + 5, b"\0")
    chunks = list(payload(PACKERS[packer](data)).chunks())
    assert len(chunks) >= 3
    assert max(map(len, chunks)) <= CHUNK_SIZE
    assert b"".join(chunks) == data


def test_lz4_streams_in_a_row_are_one() -> None:
    first, second = PACKERS["LZ4"](DATA[:5000]), PACKERS["LZ4"](DATA[5000:])
    assert unpack(with_size(first[:-4] + second, len(DATA))) == DATA


@ALL
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_stream(packer: str, keep: float) -> None:
    packed = PACKERS[packer](DATA)
    short = packed[: max(8, int(keep * (len(packed) - 4)))] + packed[-4:]
    name = payload(packed).compression.name
    text = refusal(short)
    assert text.startswith(f"vmlinuz: the {name} payload is damaged or truncated (")
    assert text.endswith(f"{len(DATA)} bytes expected)")


@ALL
@pytest.mark.parametrize("more", [-1, 1, 1 << 20])
def test_a_stream_that_holds_more_or_less_than_it_says(packer: str, more: int) -> None:
    refusal(with_size(PACKERS[packer](DATA), len(DATA) + more))


@ALL
def test_a_bomb_is_unpacked_no_further_than_it_says(packer: str) -> None:
    bomb = with_size(PACKERS[packer](bytes(16 << 20)), 1000)
    try:
        chunks = list(payload(bomb).chunks())
    except DamagedPayloadError:
        return
    pytest.fail(f"{sum(map(len, chunks))} bytes came out")


@pytest.mark.parametrize("packer", ["gzip", "bzip2", "xz"])
def test_a_flipped_bit_is_noticed_by_the_checksum(packer: str) -> None:
    packed = bytearray(PACKERS[packer](DATA))
    packed[len(packed) // 2] ^= 1
    refusal(bytes(packed))


@pytest.mark.parametrize("head", [b"\x89LZO\x00\r\n\x1a", b"\x7fELF\x02\x01\x01\x00", b"", bytes(8)])
def test_an_unknown_compression(head: bytes) -> None:
    assert find_compression(memoryview(head)) is None


def test_an_lz4_block_of_more_than_8_mib_is_refused() -> None:
    block = PACKERS["LZ4"](DATA)[8:-4]
    stream = b"\x02\x21\x4c\x18" + struct.pack("<I", len(block) + 1) + block
    refusal(stream + struct.pack("<I", len(DATA)))


@ALL
@given(data=st.data())
def test_garbled_streams_are_unpacked_or_refused(packer: str, data: st.DataObject) -> None:
    original = DATA[95_000:105_000]
    packed = bytearray(PACKERS[packer](original))
    for position in data.draw(st.lists(st.integers(8, len(packed) - 5), min_size=1, max_size=4)):
        packed[position] = data.draw(st.integers(0, 255))
    garbled = payload(bytes(packed[: data.draw(st.integers(8, len(packed)))]))
    if garbled.size > 1 << 24:
        return  # whoever unpacks has to refuse that first (test_boot_kernel.py)
    try:
        result = b"".join(garbled.chunks())
    except LguestError as error:
        one_line(error)
    else:
        assert len(result) == garbled.size
