"""Plugs a network device into what its configuration names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lguest_mp.config import LinkConfig, TapConfig, UserConfig

if TYPE_CHECKING:
    from lguest_mp.config import NetConfig
    from lguest_mp.jail import User
    from lguest_mp.network.wire import Wire


def open_wire(net: NetConfig, guest: str, name: str, mac: bytes, user: User | None) -> tuple[Wire, int | None]:
    """The wire of a guest's device ``name``, whose MAC is ``mac``, and the MTU that the guest is told. LguestError.

    ``user``: who the workers will be; None: who we are.

    What a kind of wire needs is imported with it: a guest has one kind at most, usually.
    """
    match net.wire:
        case TapConfig() as tap:
            from lguest_mp.network.tap import Tap  # noqa: PLC0415

            return Tap(tap, net.mtu), net.mtu
        case LinkConfig(link):
            from lguest_mp.network.link import Link  # noqa: PLC0415

            return Link(link, mac, user), net.mtu
        case UserConfig() as own:
            from lguest_mp.network.user import UserNetwork  # noqa: PLC0415

            wire = UserNetwork(own, net.mtu, guest, name, user)
            return wire, wire.mtu
