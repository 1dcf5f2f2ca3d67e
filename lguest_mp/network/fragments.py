"""IPv4 packets put together from their fragments (RFC 791, 3.2), for a program that must never see a fragment.

That is libslirp (4.7.0 at least), which one frame crashes: the last fragment of a packet of which it has no other. To
let only those through that continue another one is not enough. libslirp drops for reasons of its own what we took for
the beginning (a wrong checksum, no time to live), or forgets it (the reserved bit is set in another packet of that
identification, half a minute has passed): each is at a guest's choice. So a packet that comes in fragments goes on as
one, or not at all.

Who sends fragments sends a packet's in order, which Linux does, or loses it. Nothing else about a packet is checked:
its header is the first fragment's, with another length and checksum, as any guest could have sent it.
"""

from __future__ import annotations

import errno
import struct

_ETHERNET = 14
_IPV4 = b"\x08\x00"
_TYPE = slice(12, 14)
#: In a frame: the header's length in words (4 bits), the packet's length, its identification, flags and the offset in
#: units of 8 bytes, protocol, both addresses; and how long the shortest header is.
_WORDS = 14
_LENGTH = slice(16, 18)
_IDENTIFICATION = slice(18, 20)
_FRAGMENT = slice(20, 22)
_PROTOCOL = slice(23, 24)
_CHECKSUM = slice(24, 26)
_ADDRESSES = slice(26, 34)
_SHORTEST = 20
_RESERVED, _MORE, _OFFSET = 0x8000, 0x2000, 0x1FFF
#: All but DF, which says nothing of this packet's own fragments.
_ANY = _RESERVED | _MORE | _OFFSET

#: How much of a frame :func:`is_fragment` looks at.
LOOKED_AT = _FRAGMENT.stop
#: What slirp4netns reads at once.
LONGEST = 65536
#: How many packets may be incomplete at a time: processors of one guest take turns.
_MOST = 4


def is_fragment(beginning: bytes) -> bool:
    """Whether the frame that begins so, with :data:`LOOKED_AT` bytes or all it has, is to be put together.

    A VLAN's is not: libslirp knows no tags, and drops it.
    """
    return (
        beginning[_TYPE] == _IPV4
        and len(beginning) >= LOOKED_AT
        and bool(int.from_bytes(beginning[_FRAGMENT], "big") & _ANY)
    )


class Fragments:
    """The packets of which the beginning has come."""

    def __init__(self) -> None:
        #: By identification, protocol and addresses; the one that has waited longest is first.
        self._incomplete: dict[bytes, _Packet] = {}

    def add(self, frame: bytes) -> bytes | None:
        """The frame with the whole packet of which ``frame`` is the last fragment; None if more have to come.

        OSError if it is nobody's fragment, or out of order; then its packet is lost.
        """
        size = (frame[_WORDS] & 15) * 4
        length = int.from_bytes(frame[_LENGTH], "big")
        if not _SHORTEST <= size < length <= len(frame) - _ETHERNET:
            raise OSError(errno.EINVAL, "a fragment of an IP packet is none")
        field = int.from_bytes(frame[_FRAGMENT], "big")
        data = frame[_ETHERNET + size : _ETHERNET + length]
        key = frame[_IDENTIFICATION] + frame[_PROTOCOL] + frame[_ADDRESSES]
        packet = self._incomplete.pop(key, None)
        if not field & _OFFSET:
            packet = _Packet(frame[: _ETHERNET + size])
        if packet is None or len(packet.data) != (field & _OFFSET) * 8 or field & _RESERVED:
            raise OSError(errno.EINVAL, "a fragment of an IP packet is out of order")
        packet.data += data
        if len(packet.header) + len(packet.data) > LONGEST:
            raise OSError(errno.EMSGSIZE, "an IP packet in fragments is too long")
        if not field & _MORE:
            return packet.whole()
        if len(self._incomplete) == _MOST:
            del self._incomplete[next(iter(self._incomplete))]
        self._incomplete[key] = packet
        return None


class _Packet:
    """An incomplete packet: the first fragment's headers, and the data that there is so far."""

    __slots__ = ("data", "header")

    def __init__(self, header: bytes) -> None:
        self.header = header
        self.data = bytearray()

    def whole(self) -> bytes:
        """The frame with the packet, complete."""
        frame = bytearray(self.header)
        frame[_LENGTH] = (len(frame) - _ETHERNET + len(self.data)).to_bytes(2, "big")
        frame[_FRAGMENT] = frame[_CHECKSUM] = bytes(2)
        words = sum(struct.unpack_from(f"!{(len(frame) - _ETHERNET) // 2}H", frame, _ETHERNET))
        # As 2**16 is 1 modulo 0xFFFF. No header's words are all zero.
        frame[_CHECKSUM] = (-words % 0xFFFF).to_bytes(2, "big")
        return bytes(frame + self.data)
