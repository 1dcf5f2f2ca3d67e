"""Networks to make a mess of: a network namespace that nobody else has, and nothing of which remains.

::

    with Namespace() as ns, ns.entered():
        ...  # sockets made and processes started here belong to it

It lives as long as anything of it is open or running, so who ends these processes and closes these files leaves
nothing behind. What is done to interfaces is done by ioctls (netdevice(7)) and rtnetlink, since the host may have no
iproute2. /sys/class/net is of no use here: it goes on showing the namespace in which /sys was mounted.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Self

from guestkit.progress import SetupError

#: include/uapi/linux/sched.h
_CLONE_NEWNET = 0x40000000
#: include/uapi/linux/sockios.h
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_SIOCGIFADDR = 0x8915
_SIOCSIFADDR = 0x8916
_SIOCGIFBRDADDR = 0x8919
_SIOCGIFNETMASK = 0x891B
_SIOCSIFNETMASK = 0x891C
_SIOCGIFMTU = 0x8921
_SIOCSIFNAME = 0x8923
_SIOCBRADDBR = 0x89A0
_SIOCBRADDIF = 0x89A2
_SIOCBRDELIF = 0x89A3
_SIOCDEVPRIVATE = 0x89F0
#: include/uapi/linux/if_bridge.h, for SIOCDEVPRIVATE: the interface indices of a bridge's ports, by port number.
_BRCTL_GET_PORT_LIST = 7
_MOST_PORTS = 1024
#: include/uapi/linux/if.h
IFF_UP = 1
#: include/uapi/linux/rtnetlink.h, if_link.h
_RTM_NEWLINK = 16
_RTM_DELLINK = 17
_NLM_F_REQUEST_ACK = 5
_IFLA_NET_NS_FD = 28
#: include/uapi/linux/if_tun.h
_TUNSETIFF = 0x400454CA
_IFF_TAP = 2

_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """A network namespace with nothing in it but a loopback interface, which is up.

    Without the privilege to make one: SetupError.
    """

    def __enter__(self) -> Self:
        self._file = _new()
        self.set_up("lo")
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def fileno(self) -> int:
        """The file descriptor that setns(2) takes."""
        return self._file

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Has the calling thread, and whatever it forks, in this namespace."""
        before = _current()
        try:
            _call(_libc.setns(self._file, _CLONE_NEWNET))
            try:
                yield
            finally:
                _call(_libc.setns(before, _CLONE_NEWNET))
        finally:
            os.close(before)

    @contextlib.contextmanager
    def _control(self) -> Iterator[socket.socket]:
        """A socket of this namespace, for ioctls."""
        with self.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
            yield control

    def _ioctl(self, number: int, name: str, argument: bytes = b"") -> bytes:
        """An ioctl on the interface ``name`` (struct ifreq): the union's 24 bytes as the kernel left them."""
        with self._control() as control:
            return fcntl.ioctl(control, number, struct.pack("16s24s", name.encode(), argument))[16:]

    def _request(self, kind: int, name: str, attributes: bytes = b"") -> None:
        """Has rtnetlink(7) do ``kind`` to the interface ``name``, or raises OSError."""
        with (
            self.entered(),
            socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as route,
        ):
            body = struct.pack("BxHiII", socket.AF_UNSPEC, 0, socket.if_nametoindex(name), 0, 0) + attributes
            route.send(struct.pack("IHHII", 16 + len(body), kind, _NLM_F_REQUEST_ACK, 1, 0) + body)
            (error,) = struct.unpack_from("i", route.recv(4096), 16)
            if error:
                raise OSError(-error, f"{name}: {os.strerror(-error)}")

    def interfaces(self) -> list[str]:
        """The names of all interfaces, the loopback's too."""
        with self.entered():
            return [name for _, name in socket.if_nameindex()]

    def index(self, name: str) -> int:
        """The interface's number."""
        with self.entered():
            return socket.if_nametoindex(name)

    def flags(self, name: str) -> int:
        """The interface's IFF_ flags (the lower 16)."""
        return int(struct.unpack_from("H", self._ioctl(_SIOCGIFFLAGS, name))[0])

    def set_up(self, name: str) -> None:
        """Brings the interface up."""
        self._ioctl(_SIOCSIFFLAGS, name, struct.pack("H", self.flags(name) | IFF_UP))

    def set_down(self, name: str) -> None:
        """Takes the interface down."""
        self._ioctl(_SIOCSIFFLAGS, name, struct.pack("H", self.flags(name) & ~IFF_UP))

    def mtu(self, name: str) -> int:
        """The longest packet that the interface takes, in bytes."""
        return int(struct.unpack_from("i", self._ioctl(_SIOCGIFMTU, name))[0])

    def address(self, name: str) -> str | None:
        """The interface's IPv4 address."""
        return self._get_address(_SIOCGIFADDR, name)

    def netmask(self, name: str) -> str | None:
        """The network mask of that address."""
        return self._get_address(_SIOCGIFNETMASK, name)

    def broadcast(self, name: str) -> str | None:
        """The broadcast address of that network; ``0.0.0.0``: it has none."""
        return self._get_address(_SIOCGIFBRDADDR, name)

    def _get_address(self, number: int, name: str) -> str | None:
        try:
            answer = self._ioctl(number, name)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            return None
        return socket.inet_ntoa(answer[4:8])

    def set_address(self, name: str, address: str, netmask: str = "255.255.255.0") -> None:
        """Gives the interface an IPv4 address."""
        for number, value in ((_SIOCSIFADDR, address), (_SIOCSIFNETMASK, netmask)):
            self._ioctl(number, name, struct.pack("HH4s", socket.AF_INET, 0, socket.inet_aton(value)))

    def rename(self, name: str, to: str) -> None:
        """Gives the interface another name."""
        self._ioctl(_SIOCSIFNAME, name, to.encode())

    def delete(self, name: str) -> None:
        """Deletes the interface, as ``ip link del`` does."""
        self._request(_RTM_DELLINK, name)

    def move(self, name: str, to: Namespace) -> None:
        """Moves the interface into another namespace, as ``ip link set netns`` does."""
        self._request(_RTM_NEWLINK, name, struct.pack("HHI", 8, _IFLA_NET_NS_FD, to.fileno()))

    def make_bridge(self, name: str) -> None:
        """Makes a bridge without ports, and brings it up."""
        with self._control() as control:
            fcntl.ioctl(control, _SIOCBRADDBR, struct.pack("16s", name.encode()))
        self.set_up(name)

    def add_port(self, bridge: str, name: str) -> None:
        """Makes the interface a port of the bridge."""
        self._ioctl(_SIOCBRADDIF, bridge, struct.pack("i", self.index(name)))

    def remove_port(self, bridge: str, name: str) -> None:
        """Ends that."""
        self._ioctl(_SIOCBRDELIF, bridge, struct.pack("i", self.index(name)))

    def ports(self, bridge: str) -> list[str]:
        """The names of the interfaces that are ports of the bridge, by port number."""
        indices = (ctypes.c_int * _MOST_PORTS)()
        arguments = (ctypes.c_ulong * 4)(_BRCTL_GET_PORT_LIST, ctypes.addressof(indices), _MOST_PORTS, 0)
        with self._control() as control:
            request = struct.pack("16sQ16x", bridge.encode(), ctypes.addressof(arguments))
            fcntl.ioctl(control, _SIOCDEVPRIVATE, request)
            return [socket.if_indextoname(index) for index in indices if index]


def obstacle() -> str | None:
    """Why there can be no tap in a namespace of its own (one line), or None: there can."""
    if os.geteuid() != 0:
        return "network namespaces and taps take root"
    try:
        with Namespace() as ns, ns.entered(), open("/dev/net/tun", "rb", buffering=0) as tun:
            fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", b"", _IFF_TAP))
    except SetupError as error:
        return str(error)
    except OSError as error:
        return f"no tap can be made here: {error.strerror}"
    return None


def _new() -> int:
    """Makes a namespace: its file descriptor. In a thread of its own, so that nobody else is ever in it."""
    made: list[int] = []
    failed: list[OSError] = []

    def make() -> None:
        try:
            _call(_libc.unshare(_CLONE_NEWNET))
            made.append(_current())
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if failed:
        raise SetupError(f"no network namespace can be made here: {failed[0].strerror}")
    return made[0]


def _current() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _call(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
