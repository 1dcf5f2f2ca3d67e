"""A service manager's ear: the socket that a service notifies (sd_notify(3)), and what is heard there."""

from __future__ import annotations

import os
import socket
import struct
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

#: How long anything may take that should be quick, in seconds.
_PATIENCE = 120.0
#: struct ucred (unix(7)): PID, UID, GID.
_UCRED = struct.Struct("3i")
_LONGEST = 4096


@dataclass(frozen=True)
class Heard:
    """One datagram: what it assigns, and whose it is, as Linux says."""

    values: dict[str, str]
    pid: int
    uid: int


class Manager:
    """Listens at ``address``, as in ``$NOTIFY_SOCKET``: a path, or ``@name``. ``heard`` is all that came so far."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.heard: list[Heard] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Vanishes."""
        self._socket.close()
        if self.address.startswith("/") and os.path.exists(self.address):
            os.unlink(self.address)

    def wait_for(self, name: str, value: str) -> Heard:
        """Waits until this is heard, after all that was heard before."""
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            if self._hear(deadline - time.monotonic()) and self.heard[-1].values.get(name) == value:
                return self.heard[-1]
        raise AssertionError(f"{name}={value} is not said; but {[each.values for each in self.heard]}")

    def drain(self) -> None:
        """Hears all that has come."""
        while self._hear(0):
            pass

    def said(self, name: str) -> list[str]:
        """Every value of ``name``, in order."""
        return [each.values[name] for each in self.heard if name in each.values]

    def stuff(self) -> None:
        """Fills the socket with what is none of the service's, until there is room for nothing."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.setblocking(False)
            other.connect(self._socket.getsockname())
            try:
                while True:
                    other.send(b"X_NOISE=1\n")
            except BlockingIOError:
                return

    def _hear(self, seconds: float) -> bool:
        """Takes the next datagram; False if there is none within so many seconds."""
        self._socket.settimeout(max(0.0, seconds))
        try:
            data, ancillary, _, _ = self._socket.recvmsg(_LONGEST, socket.CMSG_SPACE(_UCRED.size))
        except (TimeoutError, BlockingIOError):
            return False
        pid, uid, _ = _UCRED.unpack(ancillary[0][2])
        pairs = (line.partition("=") for line in data.decode().splitlines())
        self.heard.append(Heard({name: value for name, _, value in pairs}, pid, uid))
        return True
