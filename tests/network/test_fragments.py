"""What is put together from fragments, and what is lost: no fragment ever gets on."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinyguest import checksum

from lguest_mp.network.fragments import LONGEST, LOOKED_AT, Fragments, is_fragment

ETHERNET = bytes.fromhex("52550a000202 52540a0b0c0d 0800")
MORE, DONT, RESERVED = 0x2000, 0x4000, 0x8000


def packet(
    data: bytes, offset: int = 0, flags: int = 0, *, identification: int = 7, options: bytes = b"", source: int = 15
) -> bytes:
    """A frame with an IPv4 packet, or with what ``offset`` and ``flags`` make of it."""
    words, length = (20 + len(options)) // 4, 20 + len(options) + len(data)
    before = struct.pack("!BBHHHBB", 0x40 | words, 0, length, identification, flags | offset // 8, 64, 17)
    addresses = bytes([10, 0, 2, source, 10, 0, 2, 2])
    return ETHERNET + before + checksum(before + bytes(2) + addresses + options) + addresses + options + data


def cut(data: bytes, size: int, *, identification: int = 7, source: int = 15) -> Iterator[bytes]:
    """The fragments of a packet with ``data``, each with ``size`` bytes of it."""
    for offset in range(0, len(data), size):
        is_last = offset + size >= len(data)
        flags = 0 if is_last else MORE
        yield packet(data[offset : offset + size], offset, flags, identification=identification, source=source)


DATA = bytes(range(256)) * 12


@given(
    data=st.binary(min_size=9, max_size=2000),
    size=st.integers(1, 100).map(lambda words: 8 * words),
    tail=st.binary(max_size=20),
)
def test_fragments_in_order_are_the_packet(data: bytes, size: int, tail: bytes) -> None:
    """Whatever follows a packet in its frame (Ethernet's shortest has 60 bytes)."""
    fragments = Fragments()
    *first, last = cut(data, size)
    if first:
        assert [fragments.add(each + tail) for each in first] == [None] * len(first)
        assert fragments.add(last + tail) == packet(data)


def test_which_frames_are_fragments() -> None:
    assert not is_fragment(packet(DATA)[:LOOKED_AT])
    assert not is_fragment(packet(DATA, 0, DONT)[:LOOKED_AT])
    for offset, flags in ((0, MORE), (8, 0), (8, MORE), (8, DONT), (0, DONT | MORE), (65528, 0), (0, RESERVED)):
        assert is_fragment(packet(DATA, offset, flags)[:LOOKED_AT])


@pytest.mark.parametrize("length", range(LOOKED_AT))
def test_what_is_too_short_is_none(length: int) -> None:
    assert not is_fragment(packet(DATA, 8)[:length])


@pytest.mark.parametrize("kind", ["0806", "86dd", "8100"])
def test_what_is_not_ipv4_is_none(kind: str) -> None:
    assert not is_fragment(ETHERNET[:12] + bytes.fromhex(kind) + packet(DATA, 8)[14:LOOKED_AT])


def test_options_of_the_first_stay() -> None:
    """Those of the others are copies of some of them (RFC 791, 3.1)."""
    fragments = Fragments()
    options = bytes([1] * 40)
    assert fragments.add(packet(DATA[:800], 0, MORE, options=options)) is None
    assert fragments.add(packet(DATA[800:], 800, options=options[:4])) == packet(DATA, options=options)


def test_packets_of_several_processors_at_a_time() -> None:
    fragments = Fragments()
    trains = [list(cut(DATA, 1480, identification=number)) for number in range(4)]
    *before, last = zip(*trains, strict=True)
    assert {fragments.add(each) for turn in before for each in turn} == {None}
    assert [fragments.add(each) for each in last] == [packet(DATA, identification=number) for number in range(4)]


def test_one_more_makes_the_oldest_be_forgotten() -> None:
    fragments = Fragments()
    trains = [list(cut(DATA[:2000], 1480, source=number)) for number in range(5)]
    for first, _ in trains:
        assert fragments.add(first) is None
    lost(fragments, trains[0][1])
    assert [fragments.add(last) for _, last in trains[1:]] == [packet(DATA[:2000], source=n) for n in range(1, 5)]


def lost(fragments: Fragments, frame: bytes, number: int = errno.EINVAL) -> None:
    with pytest.raises(OSError, match="fragment") as caught:
        fragments.add(frame)
    assert caught.value.errno == number
    assert not any(character.isdigit() for character in caught.value.strerror or ""), "it is said once, whichever it is"


FIRST, MIDDLE, LAST = cut(DATA[:3000], 1480)


@pytest.mark.parametrize(
    "frames",
    [
        pytest.param([LAST], id="the last alone"),
        pytest.param([MIDDLE], id="one in the middle alone"),
        pytest.param([FIRST, LAST], id="a gap"),
        pytest.param([FIRST, LAST, MIDDLE], id="out of order"),
        pytest.param([FIRST, LAST, MIDDLE, LAST], id="after a gap"),
        pytest.param([FIRST, MIDDLE, MIDDLE, LAST], id="one twice"),
        pytest.param([FIRST, packet(DATA[1000:2000], 1000)], id="an overlap"),
        pytest.param([FIRST, packet(DATA[1480:], 1480, identification=8)], id="another packet's"),
        pytest.param([FIRST, packet(DATA[1480:], 1480, source=16)], id="another source's"),
        pytest.param([packet(DATA[:1479], 0, MORE), packet(DATA[1479:], 1480)], id="no multiple of 8"),
        pytest.param([packet(DATA, 0, RESERVED)], id="a reserved bit"),
        pytest.param([packet(DATA, 0, RESERVED | MORE)], id="a reserved bit in the first"),
        pytest.param([FIRST, packet(DATA[1480:], 1480, RESERVED)], id="a reserved bit in the last"),
    ],
)
def test_what_is_out_of_order_is_lost(frames: list[bytes]) -> None:
    fragments = Fragments()
    for frame in frames:
        try:
            assert fragments.add(frame) is None
        except OSError as error:
            assert error.strerror == "a fragment of an IP packet is out of order"  # noqa: PT017 -- the first may be good
            break
    else:
        pytest.fail("nothing was lost")


def test_a_first_one_begins_anew() -> None:
    fragments = Fragments()
    for frame in (FIRST, MIDDLE, FIRST, MIDDLE):
        assert fragments.add(frame) is None
    assert fragments.add(LAST) == packet(DATA[:3000])
    lost(fragments, LAST)


@pytest.mark.parametrize(
    "frame",
    [
        FIRST[:LOOKED_AT],
        FIRST[:33],
        FIRST[:14] + b"\x44" + FIRST[15:],  # a header of 16 bytes
        FIRST[:16] + b"\0\x14" + FIRST[18:],  # nothing but a header
        FIRST[:-1],
    ],
)
def test_a_packet_that_is_cut_off_is_lost(frame: bytes) -> None:
    lost(Fragments(), frame)


def test_the_longest_packet() -> None:
    """No fragment may make it longer than what can be read at once."""
    most = LONGEST - 34
    fragments = Fragments()
    data = bytes(most + 8)
    *first, last = cut(data[:most], 1480)
    for each in first:
        assert fragments.add(each) is None
    assert fragments.add(last) == packet(data[:most])
    for each in first:
        assert fragments.add(each) is None
    lost(fragments, packet(bytes(most - len(first) * 1480 + 1), len(first) * 1480), errno.EMSGSIZE)
