"""What the supervisor tells the machine of its own accord, without ever waiting for it.

A worker that is no longer itself can change its device's configuration space without end, and a machine that is stopped
for a while hears nothing. Neither may end the guest, nor keep the machine from its work. So of each place in a
configuration space only the newest change is kept until it is told, and changes are told :data:`PAUSE` apart; and what
the machine does not take now waits here, of which there is a bounded amount.

What a device's life is (broken, or served again) is told at once, behind all that was to be told before it.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, TypeAlias

from lguest_mp import protocol
from lguest_mp.protocol import ConfigChanged, DeviceBroken, DeviceMended

if TYPE_CHECKING:
    from lguest_mp.supervisor.loop import Loop, Timer

#: How long (seconds) a change has to wait after others, and what was not taken until it is tried again.
PAUSE = 0.02

Message: TypeAlias = ConfigChanged | DeviceBroken | DeviceMended


class News:
    """The supervisor's end of the machine's *events* (``protocol.py``)."""

    def __init__(self, channel: socket.socket, loop: Loop) -> None:
        self._channel = channel
        self._loop = loop
        #: By what they are about, in the order in which that was first said.
        self._waiting: dict[tuple[int, int | None], Message] = {}
        self._pause: Timer | None = None

    def tell(self, message: Message) -> None:
        """Has the machine hear it, soon."""
        if isinstance(message, ConfigChanged):
            self._waiting[message.device, message.offset] = message
            if self._pause is None:
                self._flush()
        else:
            # The newest word on a device's life is the last.
            self.forget(message.device)
            self._waiting[message.device, None] = message
            self._flush()

    def forget(self, device: int) -> None:
        """The device is reset: what it was until now, if that is still to be told, concerns nobody."""
        self._waiting.pop((device, None), None)

    def _flush(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
        while self._waiting:
            about = next(iter(self._waiting))
            try:
                protocol.send(self._channel, self._waiting[about], socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:  # it is gone, which its own end will tell
                self._waiting.clear()
                return
            del self._waiting[about]
        self._pause = self._loop.later(PAUSE, self._go_on)

    def _go_on(self) -> None:
        self._pause = None
        if self._waiting:
            self._flush()
