"""sd_notify(3): telling the service manager that started us how we are, by datagrams to the socket it names.

The protocol is a few lines of ``NAME=value`` in each datagram, promised to stay as it is (sd_notify(3), "Notes"). The
socket is connected once, at the start, before the launcher goes where it can find no socket any more (``--chroot``) or
may not use it (``--username``). Linux tells the manager with each datagram who sent it, so it is a datagram of the main
process whoever that has become.

A manager may be slow, or gone. Nobody waits for it, and nothing fails because of it: what it has no room for is kept,
each name with its newest value, until there is room; and when it is gone, so are the notifications.

The variables stay in the environment, for the launcher's next life (``reboot.py``). A program that the launcher runs
must not get them, since it would speak for the launcher (:func:`environment_of_others`).
"""

from __future__ import annotations

import os
import socket

_SOCKET = "NOTIFY_SOCKET"
_WATCHDOG, _WATCHDOG_PID = "WATCHDOG_USEC", "WATCHDOG_PID"
#: More digits than a time in microseconds has that anybody waits for: 31 years.
_DIGITS = 15


class Notifier:
    """The connection to the service manager; without one, everything is said to nobody.

    ``watchdog`` is how long, in seconds, it lets pass between two ``WATCHDOG=1`` before it thinks the worst; None: for
    ever.
    """

    def __init__(self) -> None:
        self._socket = _connect(os.environ.get(_SOCKET, ""))
        self._unsent: dict[str, str] = {}
        self.watchdog = None if self._socket is None else _watchdog()

    def tell(self, **values: str) -> bool:
        """Sends these, and what could not be sent before; a value is one line. False: there was no room."""
        if self._socket is None:
            return True
        self._unsent |= values
        if not self._unsent:
            return True
        lines = "".join(f"{name}={value}\n" for name, value in self._unsent.items())
        try:
            self._socket.send(lines.encode(errors="replace"))
        except BlockingIOError:
            return False
        except OSError:  # whoever comes to have that name is not who started us
            self.close()
        self._unsent.clear()
        return True

    def close(self) -> None:
        """Ends the connection."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def environment_of_others() -> dict[str, str]:
    """Our environment without what makes its owner a service."""
    return {name: value for name, value in os.environ.items() if name not in {_SOCKET, _WATCHDOG, _WATCHDOG_PID}}


def _connect(address: str) -> socket.socket | None:
    """To ``/path`` or ``@name``, which is in the abstract namespace (unix(7)); None if it is neither, or not there."""
    if not address.startswith(("/", "@")):
        return None
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    channel.setblocking(False)
    try:
        channel.connect(f"\0{address[1:]}" if address.startswith("@") else address)
    except OSError:
        channel.close()
        return None
    return channel


def _watchdog() -> float | None:
    """As sd_watchdog_enabled(3): in seconds, and only if it is meant for this process."""
    text, pid = os.environ.get(_WATCHDOG, ""), os.environ.get(_WATCHDOG_PID)
    if pid not in {None, str(os.getpid())}:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= _DIGITS):
        return None
    return int(text) / 1_000_000 or None
