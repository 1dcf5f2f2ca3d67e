"""Software checksums and segmentation (virtio 1.2, 5.1.6.2 to 5.1.6.4), also against what the kernel makes of a frame.

A frame is made from a description (:class:`Packet`). Its segments are descriptions, too: the same with part of the
data and other numbers. So what is expected is built by the plain code that built the frame, from nothing it computed.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from namespaces import Namespace

from lguest_mp.network.header import HEADER, NetFeature
from lguest_mp.network.offload import (
    CLEAN,
    DROP,
    LONGEST_HEADERS,
    MEND,
    MOST_SEGMENTS,
    PASS,
    Nonsense,
    check,
    cleaned,
    mend,
)
from lguest_mp.network.wire import LONGEST_FRAME

NEEDS_CSUM = 1
TCPV4 = 1
UDP = 3
TCPV6 = 4
UDP_L4 = 5
ECN = 0x80

FIN, SYN, PSH, ACK, ECE, CWR = 0x01, 0x02, 0x08, 0x10, 0x40, 0x80

GUEST_CSUM = int(NetFeature.GUEST_CSUM)
GUEST_TSO4 = GUEST_CSUM | int(NetFeature.GUEST_TSO4)
GUEST_TSO6 = GUEST_CSUM | int(NetFeature.GUEST_TSO6)
GUEST_ECN = int(NetFeature.GUEST_ECN)
ALL = GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN

#: The longest frame, without its header.
LONGEST = LONGEST_FRAME - 12

#: A test's frames among the kernel's own.
SOURCE = b"\x02\0\0\0\0\x01"


def internet_checksum(data: bytes) -> int:
    """RFC 1071, as it is written there: 16-bit words, the carry added to the end, inverted."""
    total = 0
    for high, low in zip(data[::2], data[1::2] + b"\0", strict=False):
        total += high << 8 | low
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


@dataclass(frozen=True)
class Packet:
    """A TCP segment in an IP packet in an Ethernet frame. ``size`` is the gso_size that it is sent with."""

    version: int = 4
    vlans: tuple[tuple[int, int], ...] = ()
    identification: int = 0x1234
    ip_options: bytes = b""
    #: With IPv6 and a routing header, the pseudo-header has another destination than the packet.
    destination: bytes = b"\x0a\0\0\x02"
    sequence: int = 1000
    acknowledgment: int = 77
    flags: int = ACK
    window: int = 500
    urgent: int = 0
    tcp_options: bytes = b""
    data: bytes = b""
    size: int = 1448

    @property
    def ethernet(self) -> bytes:
        """The Ethernet header."""
        tags = b"".join(struct.pack(">HH", ethertype, tag) for ethertype, tag in self.vlans)
        return b"\x02\0\0\0\0\x02" + SOURCE + tags + (b"\x08\x00" if self.version == 4 else b"\x86\xdd")

    @property
    def ip(self) -> bytes:
        """The IP header."""
        length = 20 + len(self.tcp_options) + len(self.data)
        if self.version == 6:
            # No option headers here, or one of destination options.
            following = 60 if self.ip_options else 6
            addresses = b"\xfc" + bytes(14) + b"\x01" + b"\xfc" + bytes(14) + b"\x02"
            return (
                struct.pack(">IHBB", 6 << 28 | 0xABCDE, len(self.ip_options) + length, following, 64)
                + addresses
                + self.ip_options
            )
        header_length = 20 + len(self.ip_options)
        header = struct.pack(
            ">BBHHHBBH4s4s",
            0x40 | header_length // 4,
            0x02,
            header_length + length,
            self.identification,
            0x4000,
            64,
            6,
            0,
            b"\x0a\0\0\x01",
            b"\x0a\0\0\x02",
        )
        header += self.ip_options
        return header[:10] + struct.pack(">H", internet_checksum(header)) + header[12:]

    @property
    def pseudo_header(self) -> bytes:
        """What TCP's checksum covers besides TCP (RFC 9293, 3.1; RFC 8200, 8.1)."""
        source = b"\x0a\0\0\x01" if self.version == 4 else b"\xfc" + bytes(14) + b"\x01"
        destination = self.destination if self.version == 4 else b"\xfc" + bytes(14) + b"\x02"
        length = 20 + len(self.tcp_options) + len(self.data)
        return source + destination + struct.pack(">HH", 6, length)

    def tcp(self, checksum: int) -> bytes:
        """TCP's header, with this checksum."""
        header = struct.pack(
            ">HHIIBBHHH",
            40000,
            5201,
            self.sequence & 0xFFFFFFFF,
            self.acknowledgment,
            (20 + len(self.tcp_options)) // 4 << 4,
            self.flags,
            self.window,
            checksum,
            self.urgent,
        )
        return header + self.tcp_options

    @property
    def complete(self) -> bytes:
        """The frame, with a checksum."""
        checksum = internet_checksum(self.pseudo_header + self.tcp(0) + self.data)
        return self.ethernet + self.ip + self.tcp(checksum) + self.data

    @property
    def partial(self) -> bytes:
        """The frame, with the pseudo-header's sum where the checksum is to be (5.1.6.2)."""
        return self.ethernet + self.ip + self.tcp(internet_checksum(self.pseudo_header) ^ 0xFFFF) + self.data

    @property
    def start(self) -> int:
        """csum_start."""
        return len(self.ethernet) + len(self.ip)

    @property
    def gso_header(self) -> bytes:
        """The virtio_net_hdr that asks for segmentation."""
        gso_type = (TCPV4 if self.version == 4 else TCPV6) | (ECN if self.flags & CWR else 0)
        headers = self.start + 20 + len(self.tcp_options)
        return header(NEEDS_CSUM, gso_type, headers, self.size, self.start, 16)

    @property
    def checksum_header(self) -> bytes:
        """The virtio_net_hdr that asks for a checksum only."""
        return header(NEEDS_CSUM, 0, 0, 0, self.start, 16)

    def segments(self) -> list[bytes]:
        """What is to come of it, each a whole frame."""
        starts = range(0, len(self.data), self.size)
        return [
            replace(
                self,
                data=self.data[at : at + self.size],
                identification=(self.identification + number) & 0xFFFF,
                sequence=self.sequence + at,
                flags=self.flags & ~(CWR if number else 0) & ~(FIN | PSH if number < len(starts) - 1 else 0),
            ).complete
            for number, at in enumerate(starts)
        ]


def header(*fields: int) -> bytes:
    """A virtio_net_hdr: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, as far as they are not 0."""
    return HEADER.pack(*fields, *[0] * (6 - len(fields))) + b"\x01\0"


vlan_tags = st.lists(st.tuples(st.sampled_from([0x8100, 0x88A8]), st.integers(1, 4094)), max_size=2).map(tuple)
options = st.integers(0, 10).map(lambda words: b"\x01" * (4 * words))
#: Numbers near the wrap as often as others.
sequences = st.one_of(st.integers(0, 0xFFFFFFFF), st.integers(0xFFFFF000, 0xFFFFFFFF))
identifications = st.one_of(st.integers(0, 0xFFFF), st.integers(0xFFF0, 0xFFFF))
flag_sets = st.lists(st.sampled_from([FIN, PSH, ECE, CWR, 0x20]), unique=True).map(lambda chosen: ACK | sum(chosen))
contents = st.one_of(
    st.binary(min_size=1, max_size=2000),
    st.builds(lambda piece, times: piece * times, st.binary(min_size=1, max_size=4), st.integers(1, 2000)),
)


@st.composite
def packets(draw: st.DrawFn, vlans: st.SearchStrategy[tuple[tuple[int, int], ...]] = vlan_tags) -> Packet:
    """Any packet that an honest guest may leave to be segmented, into at least two."""
    version = draw(st.sampled_from([4, 6]))
    ip_options = draw(options) if version == 4 else draw(st.sampled_from([b"", b"\x06\0\x01\x04" + bytes(4)]))
    data = draw(contents.filter(lambda data: len(data) >= 2))
    packet = Packet(
        version,
        draw(vlans),
        identification=draw(identifications),
        ip_options=ip_options,
        sequence=draw(sequences),
        acknowledgment=draw(sequences),
        flags=draw(flag_sets),
        window=draw(st.integers(0, 0xFFFF)),
        urgent=draw(st.sampled_from([0, 1, 0xFFFF])),
        tcp_options=draw(options),
        data=data,
    )
    least = len(packet.partial) // MOST_SEGMENTS + 1
    assume(least < len(data))
    return replace(packet, size=draw(st.integers(least, len(data) - 1)))


class TestCheck:
    """What is to be done with a frame, by its header and the driver's features."""

    @pytest.mark.parametrize("features", [0, GUEST_CSUM, ALL])
    def test_nothing_asked_for(self, features: int) -> None:
        """The common case of a driver without offloads. Fields that no flag makes valid say nothing."""
        assert check(header(), 60, features) == PASS
        assert check(header(0, 0, 0, 7, 5000, 5000), 60, features) == PASS

    def test_a_legacy_header(self) -> None:
        """10 bytes, without num_buffers (5.1.6.1)."""
        assert check(header()[:10], 60, 0) == PASS

    def test_a_header_in_guest_memory(self) -> None:
        assert check(memoryview(bytearray(header(NEEDS_CSUM, 0, 0, 0, 34, 16))), 60, GUEST_CSUM) == PASS

    @pytest.mark.parametrize("offset", [6, 16])
    def test_a_checksum(self, offset: int) -> None:
        """5.1.6.4.1: without GUEST_CSUM no flag may be set, and packets should be fully checksummed."""
        asks = header(NEEDS_CSUM, 0, 0, 0, 34, offset)
        assert check(asks, 60, GUEST_CSUM) == PASS
        assert check(asks, 60, ALL & ~GUEST_CSUM) == MEND

    @pytest.mark.parametrize(
        ("gso_type", "needed"),
        [
            (TCPV4, GUEST_TSO4),
            (TCPV6, GUEST_TSO6),
            (TCPV4 | ECN, GUEST_TSO4 | GUEST_ECN),
            (TCPV6 | ECN, GUEST_TSO6 | GUEST_ECN),
        ],
    )
    def test_segmentation(self, gso_type: int, needed: int) -> None:
        """5.1.6.4.1: each gso_type, and ECN, only for a driver that accepted it."""
        asks = header(NEEDS_CSUM, gso_type, 74, 1448, 54, 16)
        assert check(asks, 5000, needed) == PASS
        for bit in NetFeature:
            assert check(asks, 5000, ALL & ~bit) == (MEND if needed & bit else PASS), bit

    @pytest.mark.parametrize("flags", [2, 4, 0x80, 0xFE])
    def test_flags_that_a_guest_cannot_vouch_for(self, flags: int) -> None:
        """DATA_VALID would have the receiver take another guest's word for it that a checksum is right."""
        for asked in (0, NEEDS_CSUM):
            told = header(flags | asked, 0, 0, 0, 34, 16)
            assert check(told, 60, ALL) == CLEAN
            assert cleaned(told, 60) == header(asked, 0, 0, 0, 34, 16)[:10]

    def test_headers_longer_than_the_frame(self) -> None:
        """hdr_len is a hint (5.1.6.2), but not everybody may take it as one."""
        assert check(header(0, 0, 60), 60, 0) == PASS
        assert check(header(0, 0, 61), 60, 0) == CLEAN
        assert cleaned(header(NEEDS_CSUM, TCPV4, 61, 1, 34, 16), 60) == header(NEEDS_CSUM, TCPV4, 60, 1, 34, 16)[:10]

    @pytest.mark.parametrize(
        ("length", "fields"),
        [
            pytest.param(13, (), id="no Ethernet header"),
            pytest.param(100, (NEEDS_CSUM, 0, 0, 0, 33, 16), id="starts in an IP header"),
            pytest.param(100, (NEEDS_CSUM, 0, 0, 0, 0, 16), id="starts in an Ethernet header"),
            pytest.param(51, (NEEDS_CSUM, 0, 0, 0, 34, 16), id="half the checksum beyond the frame"),
            pytest.param(60, (NEEDS_CSUM, 0, 0, 0, 60, 0), id="starts beyond the frame"),
            pytest.param(LONGEST, (NEEDS_CSUM, 0, 0, 0, 34, 0xFFFF), id="longest offset"),
            pytest.param(LONGEST, (NEEDS_CSUM, 0, 0, 0, 0xFFFF, 0xFFFF), id="a sum that wraps in 16 bits"),
            pytest.param(5000, (0, TCPV4, 54, 1448, 34, 16), id="GSO without NEEDS_CSUM"),  # 5.1.6.2.1
            pytest.param(5000, (2, TCPV4, 54, 1448, 34, 16), id="GSO with DATA_VALID only"),
            pytest.param(5000, (NEEDS_CSUM, TCPV4, 54, 1448, 34, 6), id="not TCP's checksum"),
            pytest.param(5000, (NEEDS_CSUM, TCPV4, 54, 1448, 33, 16), id="TCP in the IPv4 header"),
            pytest.param(5000, (NEEDS_CSUM, TCPV6, 74, 1448, 53, 16), id="TCP in the IPv6 header"),
            pytest.param(5000, (NEEDS_CSUM, TCPV6, 74, 1448, LONGEST_HEADERS - 59, 16), id="too long headers"),
            pytest.param(53, (NEEDS_CSUM, TCPV4, 54, 1448, 34, 16), id="TCP's header beyond the frame"),
            pytest.param(5000, (NEEDS_CSUM, TCPV4, 54, 0, 34, 16), id="segments of nothing"),
            pytest.param(5000, (NEEDS_CSUM, TCPV4, 54, 0xFFFF, 34, 16), id="segments by fragments"),
            pytest.param(4 * MOST_SEGMENTS + 1, (NEEDS_CSUM, TCPV4, 54, 4, 34, 16), id="too many segments"),
            pytest.param(5000, (NEEDS_CSUM, ECN, 54, 1448, 34, 16), id="ECN of nothing"),
            pytest.param(5000, (NEEDS_CSUM, UDP, 54, 1448, 34, 6), id="UDP fragments"),
            pytest.param(5000, (NEEDS_CSUM, UDP_L4, 54, 1448, 34, 6), id="UDP segments"),
            pytest.param(5000, (NEEDS_CSUM, TCPV4 | TCPV6, 54, 1448, 34, 16), id="UDP segments of TCP"),
            pytest.param(5000, (NEEDS_CSUM, 0xFF, 54, 1448, 34, 16), id="all bits"),
        ],
    )
    @pytest.mark.parametrize("features", [0, GUEST_CSUM, ALL, (1 << 64) - 1])
    def test_nonsense(self, length: int, fields: tuple[int, ...], features: int) -> None:
        """Whatever the driver accepted: it was not that."""
        assert check(header(*fields), length, features) == DROP
        with pytest.raises(Nonsense):
            mend(header(*fields), Packet().partial.ljust(length, b"\0")[:length])

    @given(st.binary(min_size=10, max_size=12), st.integers(0, LONGEST_FRAME), st.integers(0, ALL))
    def test_what_a_guest_is_given(self, asks: bytes, length: int, features: int) -> None:
        """Whatever the header, the driver finds nothing in it that it did not accept, or beyond the frame."""
        verdict = check(asks, length, features)
        if verdict in {MEND, DROP}:
            return
        if verdict == CLEAN:
            asks = cleaned(asks, length)
            assert check(asks, length, features) == PASS
        flags, gso_type, hdr_len, gso_size, start, offset = HEADER.unpack_from(asks)
        assert flags == 0 or (flags == NEEDS_CSUM and features & GUEST_CSUM and start + offset + 2 <= length)
        assert hdr_len <= length
        assert gso_type & ~ECN in {0, TCPV4, TCPV6}
        if gso_type:
            assert flags == NEEDS_CSUM
            assert 0 < length / gso_size <= MOST_SEGMENTS
            assert features & (NetFeature.GUEST_TSO4 if gso_type & TCPV4 else NetFeature.GUEST_TSO6)
            assert features & GUEST_ECN or not gso_type & ECN


class TestChecksum:
    """A checksum that its sender left out."""

    @given(packets())
    def test_tcp(self, packet: Packet) -> None:
        (frame,) = mend(packet.checksum_header, packet.partial)
        # The kernel never leaves a 0 here (below), and 0xFFFF is the same number.
        expected = packet.complete
        at = packet.start + 16
        if expected[at : at + 2] == b"\0\0":
            expected = expected[:at] + b"\xff\xff" + expected[at + 2 :]
        assert frame == expected

    def test_a_frame_that_asks_for_nothing(self) -> None:
        assert mend(header(), b"x" * 60) == [b"x" * 60]

    def test_none_is_zero(self) -> None:
        """RFC 768: in UDP, 0 says that there is no checksum."""
        frame = bytes(34) + b"\0\x35\0\x35\0\x0a\x00\x00" + b"\xff\x8b"
        assert internet_checksum(frame[34:]) == 0
        (completed,) = mend(header(NEEDS_CSUM, 0, 0, 0, 34, 6), frame)
        assert completed == frame[:40] + b"\xff\xff" + frame[42:]

    @given(st.binary(min_size=36, max_size=300), st.data())
    def test_wherever_it_is(self, frame: bytes, data: st.DataObject) -> None:
        """Any start, any even offset: the sum of it all is then 0."""
        start = data.draw(st.integers(34, len(frame) - 2))
        offset = data.draw(st.integers(0, (len(frame) - start - 2) // 2)) * 2
        # What is in the field counts: a pseudo-header's sum, here 0.
        frame = frame[: start + offset] + bytes(2) + frame[start + offset + 2 :]
        (completed,) = mend(header(NEEDS_CSUM, 0, 0, 0, start, offset), frame)
        assert internet_checksum(completed[start:]) == 0
        assert completed[: start + offset] == frame[: start + offset]
        assert completed[start + offset + 2 :] == frame[start + offset + 2 :]

    def test_the_longest_frame(self) -> None:
        frame = bytes(34) + b"\xa5" * (LONGEST - 34)
        (completed,) = mend(header(NEEDS_CSUM, 0, 0, 0, 34, 16), frame[:50] + bytes(2) + frame[52:])
        assert internet_checksum(completed[34:]) == 0


class TestSegmentation:
    """A TCP segment that is to become several."""

    @given(packets())
    @example(Packet(data=bytes(range(256)) * 250))
    @example(Packet(6, data=bytes(range(256)) * 250))
    @example(Packet(data=b"ab", size=1))
    @example(Packet(data=b"abc" * 100, size=7, flags=ACK | FIN | PSH | CWR, sequence=0xFFFFFFF0, identification=0xFFFE))
    @example(Packet(data=bytes(2000), size=1000, vlans=((0x88A8, 5), (0x8100, 7)), tcp_options=b"\x01" * 40))
    @example(Packet(6, data=bytes(2000), size=1000, ip_options=b"\x06\0\x01\x04" + bytes(4)))
    def test_segments(self, packet: Packet) -> None:
        """Each with its part of the data and a checksum; addresses, options, window as they were."""
        assert mend(packet.gso_header, packet.partial) == packet.segments()

    def test_numbers_and_flags(self) -> None:
        """RFC 3168, 6.1.2: CWR is set in one segment. FIN and PSH concern the last byte."""
        packet = Packet(data=b"abcdefg", size=3, flags=ACK | FIN | PSH | CWR | ECE, identification=0xFFFF, sequence=10)
        frames = mend(packet.gso_header, packet.partial)
        assert [struct.unpack_from(">HH", frame, 16) for frame in frames] == [(43, 0xFFFF), (43, 0), (41, 1)]
        assert [struct.unpack_from(">I", frame, 38)[0] for frame in frames] == [10, 13, 16]
        assert [frame[47] for frame in frames] == [ACK | CWR | ECE, ACK | ECE, ACK | ECE | FIN | PSH]
        assert [frame[54:] for frame in frames] == [b"abc", b"def", b"g"]

    @pytest.mark.parametrize("data", [b"", b"x", b"x" * 1448])
    def test_one_segment_is_only_completed(self, data: bytes) -> None:
        """As Linux has it: "Too small packets are not really GSO ones"."""
        packet = Packet(data=data, flags=ACK | CWR | FIN)
        assert mend(packet.gso_header, packet.partial) == [packet.complete]

    def test_the_sums_that_only_the_sender_knows(self) -> None:
        """RFC 8200, 8.1: the pseudo-header has the final destination, which may be in a routing header."""
        packet = Packet(data=b"0123456789" * 10, size=40, destination=b"\xc0\xa8\x07\x09")
        assert mend(packet.gso_header, packet.partial) == packet.segments()

    def test_a_length_that_a_sender_left_to_us(self) -> None:
        """The IP header's length is not looked at, by Linux neither: it is set for each segment anyway."""
        packet = Packet(data=b"0123456789" * 10, size=40)
        frame = packet.partial
        assert mend(packet.gso_header, frame[:16] + bytes(2) + frame[18:]) == packet.segments()

    def test_a_sum_of_zero(self) -> None:
        """Some data make a segment's checksum 0, which in TCP is a number like any other."""
        at = Packet().start + 16
        zero = next(
            packet
            for number in range(0x10000)
            if (packet := Packet(data=struct.pack(">HH", number, 1), size=2)).segments()[0][at : at + 2] == bytes(2)
        )
        assert mend(zero.gso_header, zero.partial) == zero.segments()

    def test_as_many_as_there_may_be(self) -> None:
        packet = Packet(data=bytes(64 * (MOST_SEGMENTS - 1)), size=64)
        assert len(mend(packet.gso_header, packet.partial)) == MOST_SEGMENTS - 1

    @pytest.mark.parametrize(
        ("at", "value"),
        [
            (12, b"\x86\xdd"),  # IPv6, it says
            (12, b"\x81\0"),  # a VLAN tag
            (12, b"\x81\0" * 36),  # tags to the end of the frame
            (14, b"\x65"),
            (14, b"\x46"),
            (14, b"\x44"),
            (12, b"\x81\0\0\1\x08\0\x44\0\0\x32\0\0\0\0\x40\x06"),  # an IP header of 16 bytes, ending right
            (20, b"\x20\0"),  # a fragment that more follow
            (20, b"\0\x01"),  # a fragment that others precede
            (23, b"\x11"),  # UDP
            (46, b"\x40"),  # shorter than TCP's header is
            (46, b"\xf0"),  # longer than the frame
        ],
    )
    def test_nonsense_ipv4(self, at: int, value: bytes) -> None:
        packet = Packet(data=b"0123456789" * 3, size=5)
        frame = packet.partial
        with pytest.raises(Nonsense):
            mend(packet.gso_header, frame[:at] + value + frame[at + len(value) :])

    @pytest.mark.parametrize(
        ("at", "value"),
        [
            (12, b"\x08\x00"),
            (14, b"\x45"),
            (20, b"\x06"),  # TCP at once
            (20, b"\x2c"),  # a fragment
            (54, b"\x11"),  # UDP behind the options
            (54, b"\x3c"),  # options that other options are to follow
            (54, b"\x3c\xff"),
            (55, b"\x01"),  # options that reach into TCP
            (55, b"\xff"),  # options that reach beyond the frame
        ],
    )
    def test_nonsense_ipv6(self, at: int, value: bytes) -> None:
        packet = Packet(6, data=b"0123456789", size=5, ip_options=b"\x06\0\x01\x04" + bytes(4))
        frame = packet.partial
        with pytest.raises(Nonsense):
            mend(packet.gso_header, frame[:at] + value + frame[at + len(value) :])

    def test_an_ip_packet_that_is_too_long(self) -> None:
        """Its segments' lengths might not fit into their fields."""
        packet = Packet(data=b"", size=0xFFFE)
        frame = packet.partial + bytes(LONGEST - len(packet.partial))
        with pytest.raises(Nonsense):
            mend(header(NEEDS_CSUM, TCPV4, 54, 65480, 34, 16), frame)


@st.composite
def hostile(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A header and a frame that were right before somebody wrote something else over a few fields."""
    packet = draw(packets())
    fields = list(HEADER.unpack_from(packet.gso_header))
    for index in draw(st.lists(st.integers(0, 5), max_size=2)):
        most = 0xFF if index < 2 else 0xFFFF
        near = st.integers(max(fields[index] - 2, 0), min(fields[index] + 2, most))
        fields[index] = draw(st.one_of(st.integers(0, most), near))
    frame = bytearray(packet.partial)
    for at, value in draw(st.lists(st.tuples(st.integers(12, 100), st.integers(0, 0xFF)), max_size=4)):
        if at < len(frame):
            frame[at] = value
    if draw(st.booleans()):
        del frame[draw(st.integers(0, len(frame))) :]
    return HEADER.pack(*fields), bytes(frame)


class TestHostileSenders:
    """Whatever comes, nothing but Nonsense is raised, and it does not take more than it may."""

    @settings(max_examples=500)
    @given(hostile())
    def test_spoilt_frames(self, sent: tuple[bytes, bytes]) -> None:
        self.mend_within_bounds(*sent)

    @given(st.binary(min_size=10, max_size=12), st.binary(max_size=200))
    def test_noise(self, asks: bytes, frame: bytes) -> None:
        self.mend_within_bounds(asks, frame)

    def mend_within_bounds(self, asks: bytes, frame: bytes) -> None:
        """Whether something is to be mended, and what comes of it, is for ``check`` and ``mend`` to agree on."""
        try:
            frames = mend(asks, frame)
        except Nonsense:
            return
        assert check(asks, len(frame), 0) != DROP
        assert 1 <= len(frames) <= MOST_SEGMENTS
        assert all(len(mended) <= len(frame) for mended in frames)
        assert sum(map(len, frames)) <= len(frame) + LONGEST_HEADERS * len(frames)


#: include/uapi/linux/sockios.h; and how many frames of 1000 usually wait in a tap: all segments of one, and more.
SIOCSIFTXQLEN = 0x8943
QUEUE = 2 * MOST_SEGMENTS


class Tap:
    """A tap interface of the calling thread's namespace, with a virtio_net_hdr of 12 bytes and no offloads."""

    _TUNSETIFF = 0x400454CA
    _TUNSETOFFLOAD = 0x400454D0
    _TUNSETVNETHDRSZ = 0x400454D8
    _IFF_TAP_NO_PI_VNET_HDR = 0x5002

    def __init__(self, name: str) -> None:
        self._file = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.ioctl(
                self._file, self._TUNSETIFF, struct.pack("16sH22x", name.encode(), self._IFF_TAP_NO_PI_VNET_HDR)
            )
            fcntl.ioctl(self._file, self._TUNSETVNETHDRSZ, struct.pack("i", 12))
            fcntl.ioctl(self._file, self._TUNSETOFFLOAD, 0)
        except OSError:
            os.close(self._file)
            raise

    def close(self) -> None:
        """Ends it."""
        os.close(self._file)

    def write(self, header: bytes, frame: bytes) -> None:
        """Sends a frame."""
        os.write(self._file, header + frame)

    def read(self) -> bytes:
        """The next frame of this test's, not the kernel's. Its header must be empty: nothing is left to do."""
        poll = select.poll()
        poll.register(self._file, select.POLLIN)
        while True:
            assert poll.poll(10_000), "no frame arrives"
            packet = os.read(self._file, LONGEST_FRAME)
            if packet[18:24] == SOURCE:
                assert packet[:10] == bytes(10)
                return packet[12:]


class Bridged:
    """Two taps on one bridge."""

    _END = b"\x02\0\0\0\0\x02" + SOURCE + b"\x88\xb5" + b"the end of a test".ljust(46)

    def __init__(self, one: Tap, other: Tap) -> None:
        self._one = one
        self._other = other

    def forwarded(self, header: bytes, frame: bytes) -> list[bytes] | None:
        """What the kernel makes of it on the way from one to the other; None: it refuses it at once."""
        try:
            self._one.write(header, frame)
        except OSError:
            return None
        self._one.write(bytes(12), self._END)
        return list(iter(self._other.read, self._END))


@pytest.fixture(scope="module")
def bridged() -> Iterator[Bridged]:
    """Two taps on one bridge, in a namespace of their own."""
    with Namespace() as namespace:
        taps = []
        try:
            with namespace.entered():
                taps += [Tap(name) for name in ("one", "other")]
        except OSError as error:
            pytest.skip(f"no tap can be made here: {error.strerror}")
        try:
            namespace.make_bridge("bridge")
            for name in ("one", "other"):
                namespace.add_port("bridge", name)
                with namespace.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
                    fcntl.ioctl(control, SIOCSIFTXQLEN, struct.pack("16si20x", name.encode(), QUEUE))
                namespace.set_up(name)
            yield Bridged(*taps)
        finally:
            for tap in taps:
                tap.close()


class TestAgainstTheKernel:
    """What Linux makes of the same frames between two taps: byte for byte the same."""

    @settings(max_examples=150)
    @given(packets())
    def test_segments(self, bridged: Bridged, packet: Packet) -> None:
        assert mend(packet.gso_header, packet.partial) == bridged.forwarded(packet.gso_header, packet.partial)

    @pytest.mark.parametrize(("version", "size"), list(product((4, 6), (536, 1448, 8948))))
    def test_64_kib(self, bridged: Bridged, version: int, size: int) -> None:
        packet = Packet(version, tcp_options=b"\x01" * 12, data=os.urandom(65000), size=size, flags=ACK | PSH | CWR)
        assert mend(packet.gso_header, packet.partial) == bridged.forwarded(packet.gso_header, packet.partial)

    @settings(max_examples=50)
    @given(packets())
    @example(Packet(data=b"\0\0", tcp_options=b"\x01" * 4))
    def test_checksums(self, bridged: Bridged, packet: Packet) -> None:
        packet = replace(packet, data=packet.data[:1000])
        forwarded = bridged.forwarded(packet.checksum_header, packet.partial)
        assert mend(packet.checksum_header, packet.partial) == forwarded

    def test_a_checksum_of_zero(self, bridged: Bridged) -> None:
        """Never 0, in TCP neither, but for segments (above)."""
        at = Packet().start + 16
        zero = next(
            packet
            for number in range(0x10000)
            if (packet := Packet(data=struct.pack(">H", number))).complete[at : at + 2] == bytes(2)
        )
        (frame,) = mend(zero.checksum_header, zero.partial)
        assert frame[at : at + 2] == b"\xff\xff"
        assert [frame] == bridged.forwarded(zero.checksum_header, zero.partial)
        # Nor if there is nothing to cut.
        assert [frame] == mend(replace(zero, size=2).gso_header, zero.partial)

    @settings(max_examples=300)
    @given(hostile())
    @example((HEADER.pack(1, TCPV4, 54, 8, 34, 16), Packet(data=bytes(8150)).partial))
    def test_what_linux_refuses(self, bridged: Bridged, sent: tuple[bytes, bytes]) -> None:
        """It comes from a guest to the other's kernel, which reads the header as this one does."""
        asks, frame = sent
        verdict = check(asks, len(frame), ALL)
        if verdict != DROP:
            asks = cleaned(asks, len(frame)) + bytes(2)
            assert bridged.forwarded(asks, frame) is not None
