"""The smallest guest that has a network: it makes frames (Ethernet, IPv4) byte by byte and takes those that come apart.

RFC 826 (ARP), 791 (IP), 792 (ICMP), 768 (UDP), 9293 (TCP), 2131 and 2132 (DHCP).
"""

from __future__ import annotations

import select
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lguest_mp.network.wire import Wire

MAC = bytes.fromhex("52540a0b0c0d")
BROADCAST = bytes([255] * 6)
PATIENCE = 10.0

_ARP, _IPV4 = 0x0806, 0x0800
_ICMP, _TCP, _UDP = 1, 6, 17
SYN, RST, PSH, ACK = 2, 4, 8, 16


@dataclass(frozen=True)
class Packet:
    """An IPv4 packet: ``source`` and ``target`` are addresses as text."""

    protocol: int
    source: str
    target: str
    payload: bytes


@dataclass(frozen=True)
class Segment:
    """A TCP segment."""

    source_port: int
    target_port: int
    sequence: int
    acknowledged: int
    flags: int
    data: bytes


class Silence(AssertionError):
    """No frame came that was wanted."""


class TinyGuest:
    """A guest with :data:`MAC` on ``wire``; it has the address 10.0.2.15 whether it asks for one or not."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._buffer = memoryview(bytearray(70000))
        self.address = "10.0.2.15"
        self._router = BROADCAST

    # ---- Frames ----

    def receive(self, seconds: float = PATIENCE) -> tuple[int, bytes]:
        """The next frame that is no ARP request: EtherType and what follows. ARP requests for us are answered."""
        while True:
            if not select.select(self._wire.files, [], [], seconds)[0]:
                raise Silence
            length = self._wire.read([self._buffer])
            kind, payload = int.from_bytes(self._buffer[12:14]), bytes(self._buffer[14:length])
            if kind != _ARP or payload[6:8] != b"\0\1":
                return kind, payload
            if socket.inet_ntoa(payload[24:28]) == self.address:
                answer = payload[:6] + b"\0\2" + MAC + payload[24:28] + payload[8:18]
                self._send(_ARP, answer, bytes(self._buffer[6:12]))

    def _send(self, kind: int, payload: bytes, target: bytes) -> None:
        self._wire.write([memoryview(target + MAC), memoryview(kind.to_bytes(2)), memoryview(payload)])

    def find_router(self, address: str = "10.0.2.2") -> bytes:
        """Asks who has ``address`` (ARP); its MAC, which is where packets go from now on."""
        request = struct.pack("!HHBBH", 1, _IPV4, 6, 4, 1) + MAC + socket.inet_aton(self.address) + bytes(6)
        self._send(_ARP, request + socket.inet_aton(address), BROADCAST)
        kind, payload = self.receive()
        assert kind == _ARP
        assert payload[14:18] == socket.inet_aton(address)
        self._router = payload[8:14]
        return self._router

    # ---- IPv4 ----

    def send(self, protocol: int, target: str, payload: bytes, source: str | None = None) -> None:
        """Sends an IPv4 packet to the router."""
        addresses = socket.inet_aton(source or self.address) + socket.inet_aton(target)
        header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0x4000, 64, protocol, 0) + addresses
        header = header[:10] + checksum(header) + header[12:]
        self._send(_IPV4, header + payload, self._router)

    def receive_packet(self) -> Packet:
        """The next IPv4 packet."""
        while True:
            kind, data = self.receive()
            if kind == _IPV4:
                start, end = (data[0] & 15) * 4, int.from_bytes(data[2:4])
                assert checksum(data[:start]) == bytes(2)
                return Packet(data[9], socket.inet_ntoa(data[12:16]), socket.inet_ntoa(data[16:20]), data[start:end])

    def ping(self, target: str) -> bytes:
        """Sends an echo request; the data that the reply brings back."""
        body = struct.pack("!HH", 7, 1) + b"echo this"
        self.send(_ICMP, target, b"\x08\0" + checksum(b"\x08\0\0\0" + body) + body)
        answer = self.receive_packet()
        assert (answer.protocol, answer.source, answer.payload[:1]) == (_ICMP, target, b"\0")
        return answer.payload[8:]

    def send_datagram(self, target: str, source_port: int, port: int, data: bytes, source: str | None = None) -> None:
        """Sends a UDP datagram, without a checksum."""
        self.send(_UDP, target, struct.pack("!HHHH", source_port, port, 8 + len(data), 0) + data, source)

    def receive_datagram(self) -> tuple[int, int, bytes]:
        """The next packet, a UDP datagram: source port, port, data."""
        packet = self.receive_packet()
        assert packet.protocol == _UDP
        return (*struct.unpack("!HH", packet.payload[:4]), packet.payload[8:])

    def ask_for_address(self) -> tuple[str, dict[int, bytes]]:
        """DHCPDISCOVER: the address in the offer, and the offer's options."""
        fixed = struct.pack("!BBBBIHH", 1, 1, 6, 0, 0x4C475354, 0, 0) + bytes(16) + MAC.ljust(16, b"\0") + bytes(192)
        message = fixed + bytes.fromhex("63825363 350101 ff")
        self.send_datagram("255.255.255.255", 68, 67, message, source="0.0.0.0")
        source_port, port, answer = self.receive_datagram()
        assert (source_port, port) == (67, 68)
        options, at = {}, 240
        while answer[at] != 255:
            options[answer[at]] = answer[at + 2 : at + 2 + answer[at + 1]]
            at += 2 + answer[at + 1]
        return socket.inet_ntoa(answer[16:20]), options

    # ---- TCP ----

    def send_segment(self, target: str, segment: Segment, longest: int = 0) -> None:
        """Sends a TCP segment; ``longest``, if given, is the maximum segment size that it announces."""
        options = struct.pack("!BBH", 2, 4, longest) if longest else b""
        ports_and_numbers = struct.pack(
            "!HHII", segment.source_port, segment.target_port, segment.sequence, segment.acknowledged
        )
        size = (20 + len(options)) // 4 << 4
        rest = options + segment.data
        before = ports_and_numbers + struct.pack("!BBH", size, segment.flags, 65535)
        length = len(before) + 4 + len(rest)
        pseudo = socket.inet_aton(self.address) + socket.inet_aton(target) + struct.pack("!HH", _TCP, length)
        total = checksum(pseudo + before + bytes(4) + rest)
        self.send(_TCP, target, before + total + bytes(2) + rest)

    def receive_segment(self) -> Segment:
        """The next packet, a TCP segment whose checksum is right."""
        packet = self.receive_packet()
        assert packet.protocol == _TCP
        data = packet.payload
        pseudo = socket.inet_aton(packet.source) + socket.inet_aton(packet.target)
        assert checksum(pseudo + struct.pack("!HH", _TCP, len(data)) + data) == bytes(2)
        source_port, target_port, sequence, acknowledged, size, flags = struct.unpack("!HHIIBB", data[:14])
        return Segment(source_port, target_port, sequence, acknowledged, flags, data[size >> 4 << 2 :])


def checksum(data: bytes) -> bytes:
    """The internet checksum (RFC 1071), two bytes; of data with its own checksum in it: zeros."""
    words = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while words >> 16:
        words = (words & 0xFFFF) + (words >> 16)
    return struct.pack("!H", words ^ 0xFFFF)
