"""``lguestctl stop``, ``reboot``, ``restart``, ``reset``: what changes a guest."""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from typing import TYPE_CHECKING

from lguest_mp.control import Done, Reboot, Reset, Restart, Stop
from lguest_mp.ctl.client import GuestGone

if TYPE_CHECKING:
    from lguest_mp.control import Request
    from lguest_mp.ctl.client import Connection, Place


def stop(place: Place, name: str, *, wait: bool) -> None:
    """Ends a guest in order; with ``wait``, returns when nothing of it is left."""
    reach: Callable[[str], Connection] = place.connect
    while True:
        try:
            with reach(name) as connection:
                return _stop(connection, wait=wait)
        except GuestGone as gone:
            if not gone.reboots:
                return None
        reach = place.reconnect  # it rebooted in this very moment, instead


def _stop(connection: Connection, *, wait: bool) -> None:
    """GuestGone: it reboots."""
    pidfd = _pidfd(connection.pid) if wait else None
    try:
        connection.send(Stop())
        _hear_the_end(connection, wait=wait)
        if pidfd is not None:
            select.select([pidfd], [], [])
    finally:
        if pidfd is not None:
            os.close(pidfd)


def _hear_the_end(connection: Connection, *, wait: bool) -> None:
    """Until the order is taken, or (``wait``) the guest has ended, for whatever reason. GuestGone: it reboots."""
    try:
        while not isinstance(connection.receive(), Done):
            pass
        connection.channel.settimeout(None)
        while wait:
            connection.receive()
    except GuestGone as gone:
        if gone.reboots:
            raise


def _pidfd(pid: int) -> int | None:
    """The supervisor's end is the last of the guest's. None: it has gone already, or cannot be seen from here."""
    if not pid:
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def order(place: Place, name: str, request: Request) -> None:
    """Has something done that the supervisor begins at once. LguestError: it cannot be done."""
    with place.connect(name) as connection:
        connection.ask(request, Done)


def reboot(place: Place, name: str) -> None:
    """Has a guest start afresh."""
    order(place, name, Reboot())


def restart(place: Place, name: str, device: str) -> None:
    """Has workers replaced."""
    order(place, name, Restart(device))


def reset(place: Place, name: str, device: str) -> None:
    """Has a device reset by its driver."""
    order(place, name, Reset(device))
