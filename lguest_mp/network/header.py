"""What precedes each frame of a virtio network device: struct virtio_net_hdr (virtio 1.2, 5.1.6), little-endian.

u8 flags, u8 gso_type, le16 hdr_len, le16 gso_size, le16 csum_start, le16 csum_offset, le16 num_buffers; the last one is
missing with a legacy driver that did not accept MRG_RXBUF.
"""

from __future__ import annotations

import struct
from enum import IntFlag

#: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset.
HEADER = struct.Struct("<BBHHHH")
#: Where num_buffers is, and how long a header with it is.
NUM_BUFFERS = 10
LENGTH = 12

#: flags
F_NEEDS_CSUM = 1
F_DATA_VALID = 2
#: gso_type
GSO_NONE = 0
GSO_TCPV4 = 1
GSO_TCPV6 = 4
GSO_ECN = 0x80


class NetFeature(IntFlag):
    """Feature bits (5.1.3), those that are known here."""

    CSUM = 1 << 0
    GUEST_CSUM = 1 << 1
    MTU = 1 << 3
    MAC = 1 << 5
    GUEST_TSO4 = 1 << 7
    GUEST_TSO6 = 1 << 8
    GUEST_ECN = 1 << 9
    HOST_TSO4 = 1 << 11
    HOST_TSO6 = 1 << 12
    HOST_ECN = 1 << 13
    MRG_RXBUF = 1 << 15
    STATUS = 1 << 16
