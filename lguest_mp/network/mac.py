"""Hardware addresses: the one that a network device has when its user gives none."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

#: What tells this host from others and does not change (machine-id(5)).
_MACHINE_ID = Path("/etc/machine-id")
#: The two lowest bits of the first byte: for a group rather than for one; made by its user rather than by IEEE's rules.
_GROUP = 0x01
_LOCAL = 0x02


def default(guest: str, index: int) -> bytes:
    """The address (6 bytes, unicast, locally administered) of network device ``index`` of the guest named ``guest``.

    The same at every start, so that the guest finds its interface again and the network its guest; and in all
    likelihood another one for any other guest, user or host that may be on the same network.
    """
    digest = hashlib.blake2b(digest_size=6, person=b"lguest-mp mac")
    digest.update("\0".join((_host(), str(os.getuid()), guest, str(index))).encode())
    address = bytearray(digest.digest())
    address[0] = address[0] & ~_GROUP | _LOCAL
    return bytes(address)


def _host() -> str:
    try:
        known = _MACHINE_ID.read_text(errors="replace").strip()
    except OSError:
        known = ""
    return known or os.uname().nodename


def is_unicast(mac: bytes) -> bool:
    """Whether an interface can have this address: it is not a group's and not zero."""
    return not mac[0] & _GROUP and any(mac)


def text(mac: bytes) -> str:
    """The address as people write it: ``02:00:00:00:00:01``."""
    return mac.hex(":")


def in_words(mac: bytes) -> str:
    """As people write it: ``52:54:00:12:34:56``."""
    return mac.hex(":")
