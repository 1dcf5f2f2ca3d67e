"""Checksums and segmentation that one guest left to the device, done for a guest whose driver does not take them so.

Frames from guest to guest carry their sender's virtio_net_hdr (virtio 1.2, 5.1.6.2 to 5.1.6.4). On the host's own
devices the kernel reads it, drops what is nonsense and does what the receiver cannot; here nobody but us does.
:func:`check` looks at each header and is made to cost little. :func:`mend` computes, and gives the very bytes that
Linux gives (``skb_checksum_help``, ``tcp_gso_segment``), so the pseudo-header's sum is taken from the frame as its
sender left it, not made anew: with an IPv6 routing header only the sender knows the address that belongs there.

The sender may be malicious. Nothing it writes makes these functions raise anything but :class:`Nonsense`, and what one
frame of it costs is bounded: :data:`MOST_SEGMENTS` segments with at most :data:`LONGEST_HEADERS` bytes of headers each.
"""

from __future__ import annotations

import struct

from lguest_mp.network.header import F_NEEDS_CSUM, GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, HEADER, NetFeature

#: What :func:`check` says: give the frame to the guest as it is; with the header of :func:`cleaned`; give it what
#: :func:`mend` makes of the frame, each under a header of zeros; do not give it to the guest.
PASS, CLEAN, MEND, DROP = range(4)

#: How many segments a frame may ask for. 64 KiB at the least MSS in practice (536, RFC 9293, 3.7.1) make 123.
MOST_SEGMENTS = 1024
#: How long the headers of a frame that is to be segmented may be, all up to TCP's options, in bytes.
LONGEST_HEADERS = 512

_ETHERNET = 14
_IPV4 = 20
_IPV6 = 40
_TCP = 20
_LONGEST_TCP = 60
#: Where TCP has its checksum.
_TCP_CHECKSUM = 16

_ETHERTYPE_IPV4 = 0x0800
_ETHERTYPE_IPV6 = 0x86DD
_ETHERTYPE_VLANS = (0x8100, 0x88A8)
#: Linux looks no deeper either (VLAN_MAX_DEPTH).
_MOST_VLANS = 8

_PROTOCOL_TCP = 6
#: Hop-by-hop options, routing, destination options: what TCP may stand behind in IPv6, in a packet that is whole.
_EXTENSIONS = (0, 43, 60)
#: IPv4: more fragments, and the fragment's offset.
_FRAGMENT = 0x3FFF

_FIN_PSH = 0x09
_CWR = 0x80

#: Linux has its own meaning for this gso_size (GSO_BY_FRAGS) and refuses it from outside.
_GSO_BY_FRAGS = 0xFFFF
_LONGEST_IP = 0xFFFF
#: How many bytes are summed at a time. Python's ``%`` takes twice as long as reading the number, and one sum of chunks
#: is shorter than the number; of 128 bytes to 8 KiB this is the best for 1448 bytes and nearly so for 64 KiB.
_CHUNK = 512

#: Linux takes no checksum that starts before the end of an IPv4 header.
_LEAST_START = _ETHERNET + _IPV4

# Not NetFeature: `&` on an enumeration's members takes longer than all of check().
_GUEST_CSUM = int(NetFeature.GUEST_CSUM)
_GUEST_TSO4 = _GUEST_CSUM | NetFeature.GUEST_TSO4.value
_GUEST_TSO6 = _GUEST_CSUM | NetFeature.GUEST_TSO6.value
_GUEST_ECN = int(NetFeature.GUEST_ECN)
#: By gso_type: what the driver must have accepted to get such a frame, and the least csum_start.
_SEGMENTATIONS = {
    GSO_TCPV4: (_GUEST_TSO4, _ETHERNET + _IPV4),
    GSO_TCPV6: (_GUEST_TSO6, _ETHERNET + _IPV6),
    GSO_TCPV4 | GSO_ECN: (_GUEST_TSO4 | _GUEST_ECN, _ETHERNET + _IPV4),
    GSO_TCPV6 | GSO_ECN: (_GUEST_TSO6 | _GUEST_ECN, _ETHERNET + _IPV6),
}

_unpack = HEADER.unpack_from
_U16 = struct.Struct(">H")
_U16_PAIR = struct.Struct(">HH")
_U32 = struct.Struct(">I")


class Nonsense(Exception):
    """A frame asks for what cannot be done to it; its text says what."""


def check(header: bytes | bytearray | memoryview, length: int, features: int) -> int:
    """What to do with a frame of ``length`` bytes, not counting its ``header`` (10 bytes or more), for this driver.

    ``features`` is what the driver accepted, a plain int (an enumeration's member makes this take four times as long).
    PASS, CLEAN, MEND or DROP. The frame itself is not looked at: what passes may still be nonsense inside, as any
    frame may that one guest sends to another.
    """
    flags, gso_type, hdr_len, gso_size, start, offset = _unpack(header)
    needed = 0
    if gso_type:
        known = _SEGMENTATIONS.get(gso_type)
        if known is None or not flags & F_NEEDS_CSUM or offset != _TCP_CHECKSUM:
            return DROP
        needed, least = known
        if (
            not least <= start <= LONGEST_HEADERS - _LONGEST_TCP
            or start + _TCP > length
            or length > gso_size * MOST_SEGMENTS
            or gso_size == _GSO_BY_FRAGS
        ):
            return DROP
    elif flags & F_NEEDS_CSUM:
        if start < _LEAST_START or start + offset + 2 > length:
            return DROP
        needed = _GUEST_CSUM
    elif length < _ETHERNET:
        return DROP
    if needed & ~features:
        return MEND
    return CLEAN if flags > F_NEEDS_CSUM or hdr_len > length else PASS


def cleaned(header: bytes | bytearray | memoryview, length: int) -> bytes:
    """The first 10 bytes of ``header`` without what another guest cannot know, for a frame that is CLEAN.

    No flag is left but NEEDS_CSUM; that a checksum is valid (DATA_VALID) is for the receiver to find out. hdr_len
    is at most ``length``, the frame's without its header.
    """
    flags, gso_type, hdr_len, gso_size, start, offset = _unpack(header)
    return HEADER.pack(flags & F_NEEDS_CSUM, gso_type, min(hdr_len, length), gso_size, start, offset)


def mend(header: bytes | bytearray | memoryview, frame: bytes) -> list[bytes]:
    """The frames that ``frame`` stands for, for a driver that accepted no offload: complete, each to follow zeros.

    ``header`` and ``frame`` must be copies that no guest can change meanwhile. Raises :class:`Nonsense`.
    """
    # 0: to no driver's liking, so that whatever is not nonsense is MEND, or PASS if nothing was asked for.
    if check(header, len(frame), 0) == DROP:
        raise Nonsense("its header contradicts itself or the frame's length")
    flags, gso_type, _, gso_size, start, offset = _unpack(header)
    if not flags & F_NEEDS_CSUM:
        return [frame]
    if gso_type != GSO_NONE:
        end = start + (frame[start + 12] >> 4) * 4
        if end < start + _TCP or end > len(frame):
            raise Nonsense("its TCP header has no such length")
        # Linux leaves what fits into one segment as it is, except for the checksum.
        if len(frame) - end > gso_size:
            return _segments(frame, gso_type & ~GSO_ECN, gso_size, start, end)
    return [_completed(frame, start, offset)]


def _completed(frame: bytes, start: int, offset: int) -> bytes:
    """``frame`` with the checksum from ``start`` stored ``offset`` behind it, where so far the pseudo-header's sum is.

    The result is never 0, which in UDP would mean that there is none: 0xFFFF is the same number.
    """
    at = start + offset
    return b"%b%b%b" % (frame[:at], _U16.pack(0xFFFF - _sum(frame, start)), frame[at + 2 :])


def _segments(frame: bytes, gso_type: int, size: int, start: int, end: int) -> list[bytes]:
    """``frame``, TCP's header at ``start`` and its data at ``end``, cut into segments of ``size`` bytes of data."""
    network = _network_header(frame, gso_type, start)
    if len(frame) - network > _LONGEST_IP:
        raise Nonsense("its IP packet is too long")
    is_ipv4 = gso_type == GSO_TCPV4
    (identification,) = _U16.unpack_from(frame, network + 4)
    (sequence,) = _U32.unpack_from(frame, start + 4)
    flags = frame[start + 13]
    # The headers of one segment after the other: what is the same in all of them stays. The sums are those of the
    # headers without what differs, and of the pseudo-header without the length.
    headers = bytearray(frame[:end])
    headers[start + 4 : start + 8] = bytes(4)
    headers[start + 13] = 0
    tcp_sum = _sum(headers, start) - (len(frame) - start)
    if is_ipv4:
        headers[network + 2 : network + 6] = bytes(4)
        headers[network + 10 : network + 12] = bytes(2)
        network_sum = _sum(headers[:start], network)
    segments = []
    for number, at in enumerate(range(end, len(frame), size)):
        data = frame[at : at + size]
        is_last = at + size >= len(frame)
        this_sequence = (sequence + at - end) & 0xFFFFFFFF
        this_flags = flags & ~((0 if is_last else _FIN_PSH) | (_CWR if number else 0))
        length = end - network + len(data)
        if is_ipv4:
            this_identification = (identification + number) & 0xFFFF
            _U16_PAIR.pack_into(headers, network + 2, length, this_identification)
            _U16.pack_into(headers, network + 10, -(network_sum + length + this_identification) % 0xFFFF)
        else:
            _U16.pack_into(headers, network + 4, length - _IPV6)
        _U32.pack_into(headers, start + 4, this_sequence)
        headers[start + 13] = this_flags
        total = tcp_sum + (end - start + len(data)) + this_sequence + this_flags + _sum(data, 0)
        _U16.pack_into(headers, start + _TCP_CHECKSUM, -total % 0xFFFF)
        segments.append(bytes(headers) + data)
    return segments


def _network_header(frame: bytes, gso_type: int, start: int) -> int:
    """Where the IP header is that leads to TCP at ``start``."""
    # That start is behind an IP header and TCP in the frame was checked: what is read here is at most 20 bytes further.
    at = _ETHERNET
    (ethertype,) = _U16.unpack_from(frame, at - 2)
    while ethertype in _ETHERTYPE_VLANS and at < _ETHERNET + 4 * _MOST_VLANS:
        at += 4
        (ethertype,) = _U16.unpack_from(frame, at - 2)
    if gso_type == GSO_TCPV4:
        is_right = ethertype == _ETHERTYPE_IPV4 and _leads_to_tcp_ipv4(frame, at, start)
    else:
        is_right = ethertype == _ETHERTYPE_IPV6 and _leads_to_tcp_ipv6(frame, at, start)
    if not is_right:
        raise Nonsense("it is no such packet as its header says")
    return at


def _leads_to_tcp_ipv4(frame: bytes, at: int, start: int) -> bool:
    if at + _IPV4 > start or frame[at] >> 4 != 4 or at + (frame[at] & 0xF) * 4 != start:
        return False
    (fragment,) = _U16.unpack_from(frame, at + 6)
    return frame[at + 9] == _PROTOCOL_TCP and not fragment & _FRAGMENT


def _leads_to_tcp_ipv6(frame: bytes, at: int, start: int) -> bool:
    if frame[at] >> 4 != 6:
        return False
    following = frame[at + 6]
    at += _IPV6
    while at < start and following in _EXTENSIONS:
        following = frame[at]
        at += 8 + 8 * frame[at + 1]
    return at == start and following == _PROTOCOL_TCP


def _sum(data: bytes | bytearray, at: int) -> int:
    """The ones' complement sum of the big-endian 16-bit words of ``data`` from ``at`` on, from 0 to 0xFFFE.

    A byte that is left over is a word's first. 2**16 is 1 modulo 0xFFFF, so a number of any length is the sum of its
    words.
    """
    if (len(data) - at) & 1:
        data = data + b"\0"
    total = 0
    for chunk in range(at, len(data), _CHUNK):
        total += int.from_bytes(data[chunk : chunk + _CHUNK], "big")
    return total % 0xFFFF
