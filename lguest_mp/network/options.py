"""What ``--net`` and ``--tunnet`` say.

::

    --net=tap[,ip=A.B.C.D[/prefix]][,bridge=NAME][,interface=NAME][,mac=M][,mtu=N][,offload=on|off]
    --net=user[,forward=tcp|udp:[hostaddr:]hostport:guestport]...[,loopback=on|off][,mac=M][,mtu=N]
    --net=link:NAME[,mac=M][,mtu=N][,offload=on|off]

    --tunnet=<ip>[:<mac>]            the same as --net=tap,ip=<ip>[,mac=<mac>]
    --tunnet=bridge:<name>[:<mac>]   the same as --net=tap,bridge=<name>[,mac=<mac>]

``--net=link,name=NAME`` is another way to write ``--net=link:NAME``. ``--tunnet`` is the original launcher's. What it
read is read the same way here; what it misread (``300.1.2.3``, ``1.2.3.4.5``, half a MAC) is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from lguest_mp.config import Forward, LinkConfig, NetConfig, TapConfig, UserConfig, WireConfig
from lguest_mp.errors import LguestError
from lguest_mp.network import mac

#: The name of an interface has at most 15 bytes (IFNAMSIZ, include/uapi/linux/if.h, counts a zero byte).
INTERFACE_LENGTH = 15
LINK_LENGTH = 64
#: The shortest MTU is IPv4's and the least that the standard lets a device advise (virtio 1.2, 5.1.4.1); the longest is
#: what a tap takes, where an Ethernet frame with its header has 65,535 bytes (drivers/net/tun.c).
MTU_RANGE = range(68, 65521 + 1)
#: Where a forwarded port is open unless its user says otherwise: to this host only.
FORWARD_FROM = "127.0.0.1"

_PORTS = range(1, 65536)
_PREFIXES = range(1, 33)
#: More digits than any number here has.
_DIGITS = 5

_NUMBER = "(?:0|[1-9][0-9]{0,2})"
_ADDRESS = re.compile(rf"{_NUMBER}(?:\.{_NUMBER}){{3}}")
_MAC = re.compile(r"[0-9a-fA-F]{1,2}(?::[0-9a-fA-F]{1,2}){5}")
_LINK = re.compile(rf"[A-Za-z0-9_-][A-Za-z0-9._-]{{0,{LINK_LENGTH - 1}}}")

_T = TypeVar("_T")

_COMMON = ("mac", "mtu")
_KEYS = {
    "tap": ("ip", "bridge", "interface", *_COMMON, "offload"),
    "user": ("forward", "loopback", *_COMMON),
    "link": ("name", *_COMMON, "offload"),
}
_KINDS = "tap, user and link:NAME"


class _Bad(Exception):
    """The value is none; the text says what is wrong with it and what to do."""


class _Settings:
    """The ``key=value`` parts behind the first comma. All of them are known, and none but ``forward`` comes twice."""

    def __init__(self, kind: str, parts: Sequence[str]) -> None:
        self.forwards: list[str] = []
        self._values: dict[str, str] = {}
        for part in parts:
            key, equals, value = part.partition("=")
            if key not in _KEYS[kind]:
                raise _Bad(f"{key!r} is unknown to --net={kind}; there is {', '.join(_KEYS[kind])}")
            if not equals:
                raise _Bad(f"{key} says nothing; write {key}=...")
            if key == "forward":
                self.forwards.append(value)
            elif key in self._values:
                raise _Bad(f"{key} is given twice; give it once")
            else:
                self._values[key] = value

    def get(self, key: str, read: Callable[[str], _T]) -> _T | None:
        """The value of ``key`` as ``read`` understands it, None if it is not given."""
        return read(self._values[key]) if key in self._values else None


def parse_net(value: str) -> NetConfig:
    """The device that ``--net=value`` describes; LguestError if it describes none."""
    return _parse("--net", value, _net)


def parse_tunnet(value: str) -> NetConfig:
    """The device that ``--tunnet=value`` describes; LguestError if it describes none."""
    return _parse("--tunnet", value, _tunnet)


def _parse(option: str, value: str, read: Callable[[str], NetConfig]) -> NetConfig:
    try:
        return read(value)
    except _Bad as bad:
        raise LguestError(f"{option}={value}: {bad}") from None


def _tunnet(value: str) -> NetConfig:
    first, colon, rest = value.partition(":")
    if first == "bridge":
        name, colon, rest = rest.partition(":")
        wire = TapConfig(bridge=_interface(name))
    else:
        wire = TapConfig(address=_tap_address(first))
    return NetConfig(wire, _mac(rest) if colon else None)


def _net(value: str) -> NetConfig:
    first, *parts = value.split(",")
    kind, colon, link = first.partition(":")
    if kind not in _KEYS:
        raise _Bad(f"there is no network {kind!r}; there is {_KINDS}")
    if colon and kind != "link":
        raise _Bad(f"{kind} has no name; write --net={kind},...")
    settings = _Settings(kind, parts)
    wire: WireConfig
    match kind:
        case "tap":
            wire = _tap(settings)
        case "user":
            wire = UserConfig(_forwards(settings.forwards), bool(settings.get("loopback", _switch)))
        case _:
            wire = LinkConfig(_link(link if colon else None, settings))
    return NetConfig(
        wire=wire,
        mac=settings.get("mac", _mac),
        mtu=settings.get("mtu", _mtu),
        offload=settings.get("offload", _switch) is not False,
    )


def _tap(settings: _Settings) -> TapConfig:
    address, prefix = settings.get("ip", _network) or (None, None)
    bridge = settings.get("bridge", _interface)
    if bridge is not None and address is not None:
        raise _Bad("a port of a bridge has no address of its own; leave out ip or bridge")
    return TapConfig(address, prefix, bridge, settings.get("interface", _interface))


def _network(text: str) -> tuple[str | None, int | None]:
    """``192.168.19.1/24``: the address and the prefix."""
    address, slash, prefix = text.partition("/")
    if not slash:
        return _tap_address(address), None
    if _tap_address(address) is None:
        raise _Bad(f"{text} is no address; leave ip out for an interface without one")
    return address, _number(prefix, "prefix", _PREFIXES)


def _tap_address(text: str) -> str | None:
    """An interface with the address 0.0.0.0 is one that has none (to SIOCSIFADDR, and so to the original)."""
    address = _address(text)
    return None if address == "0.0.0.0" else address


def _address(text: str) -> str:
    if not _ADDRESS.fullmatch(text) or max(map(int, text.split("."))) > 255:
        raise _Bad(f"{text!r} is no IP address; give four numbers up to 255, for example 192.168.19.1")
    return text


def _mac(text: str) -> bytes:
    if not _MAC.fullmatch(text):
        raise _Bad(f"{text!r} is no MAC address; give six hexadecimal bytes, for example 02:00:00:00:00:01")
    address = bytes(int(byte, 16) for byte in text.split(":"))
    if not mac.is_unicast(address):
        raise _Bad(f"{text} cannot be an interface's MAC address; give one with an even first byte, and not zero")
    return address


def _mtu(text: str) -> int:
    return _number(text, "mtu", MTU_RANGE)


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise _Bad(f"{text!r} is neither on nor off")
    return text == "on"


def _interface(text: str) -> str:
    """A name that an interface can have (the kernel's dev_valid_name); ``%`` would make it a pattern for names."""
    if (
        not 0 < len(text.encode(errors="replace")) <= INTERFACE_LENGTH
        or text in (".", "..")
        or not text.isprintable()
        or any(character.isspace() or character in "/:%" for character in text)
    ):
        raise _Bad(
            f"{text!r} is no name for an interface; give one of 1 to {INTERFACE_LENGTH} characters without '/', ':',"
            " '%' and space"
        )
    return text


def _link(name: str | None, settings: _Settings) -> str:
    also = settings.get("name", str)
    if name is not None and also is not None:
        raise _Bad("the link is named twice; write --net=link:NAME")
    text = (also if name is None else name) or ""
    if not _LINK.fullmatch(text):
        raise _Bad(
            f"{text!r} is no name for a link; write --net=link:NAME with 1 to {LINK_LENGTH} letters, digits, '.', '_'"
            " or '-', not beginning with '.'"
        )
    return text


def _forwards(texts: Sequence[str]) -> tuple[Forward, ...]:
    forwards = tuple(map(_forward, texts))
    taken: set[tuple[str, str, int]] = set()
    for text, forward in zip(texts, forwards, strict=True):
        port = (forward.protocol, forward.host_address, forward.host_port)
        if port in taken:
            raise _Bad(f"forward={text}: the host's port {forward.host_port} is forwarded already; give another one")
        taken.add(port)
    return forwards


def _forward(text: str) -> Forward:
    """``tcp:2222:22``, ``udp:0.0.0.0:5353:53``."""
    protocol, *middle, host_port, guest_port = text.split(":") if text.count(":") >= 2 else ("", "", "")
    if protocol not in ("tcp", "udp") or len(middle) > 1:
        raise _Bad(f"forward={text}: write tcp or udp, [hostaddr:]hostport:guestport, for example forward=tcp:2222:22")
    return Forward(
        protocol,
        _address(middle[0]) if middle else FORWARD_FROM,
        _number(host_port, "port", _PORTS),
        _number(guest_port, "port", _PORTS),
    )


def _number(text: str, what: str, allowed: range) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > _DIGITS or int(text) not in allowed:
        raise _Bad(f"{text!r} is no {what}; give a number from {allowed[0]} to {allowed[-1]}")
    return int(text)
