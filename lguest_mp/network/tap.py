"""A tap: an interface of the host whose cable leads to us (the kernel's Documentation/networking/tuntap.rst).

What the host sends through the interface is read from a file, and what is written to the file the host receives. The
frames have a virtio_net_hdr in front, so checksums and segmentation that one side leaves to the other pass through
without anybody looking at them.

**It ends with its last file.** The interface exists while a process has the file open, the supervisor or a worker.
However the last one ends, the kernel deletes the interface. We never make one that persists. One that an administrator
made (``ip tuntap add``) can be used without privileges by the user that it was made for, and keeps what was done to it.

**What the kernel does** (drivers/net/tun.c; tried with Linux 6.18 and stated here because the documentation does not):

- *Down*: a write fails with EIO and POLLOUT is not given; nothing new comes to read, but what was queued before stays,
  and can be read. Reading never fails for it, and poll(2) does not tell, so rtnetlink has to (``rtnetlink.py``).
- *Deleted* (``ip link del``): read, write and every ioctl fail with EBADFD, poll(2) gives POLLERR at once and for ever.
  A sleeping poll(POLLIN) is woken, a sleeping poll(POLLOUT) is not.
- *Moved* to another network namespace: it goes down, rtnetlink says that it was deleted, but the file stays connected,
  and frames pass again when somebody there brings it up. From here nobody can see whether it is up. It counts as up.
- *Renamed*: nothing. That is why the number of the interface is what is kept.
- A read with less room than the frame needs gives what fits, and the rest is lost. Without room for the header it is
  an error (EINVAL) and the frame is lost; with no room at all it gives 0 and the frame stays.
- num_buffers, behind the 10 bytes of header that a tap knows, is not written by older kernels.
- Frames wait in a queue (txqueuelen) as the host's side made them when they were sent. So after a reset one may come
  that asks for what the new driver did not accept. Such a driver's headers are suspect, see :meth:`Tap.attach`.
- Both sides' workers share one open file description, and with it O_NONBLOCK. Header size and offloads belong to the
  interface, so both may set them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

from lguest_mp.errors import LguestError
from lguest_mp.jail.calls import ioctls, plain
from lguest_mp.jail.needs import Needs
from lguest_mp.network import header
from lguest_mp.network.header import NetFeature
from lguest_mp.network.rtnetlink import LinkWatch
from lguest_mp.network.wire import T, Wire, WireGone

if TYPE_CHECKING:
    from lguest_mp.config import TapConfig

DEVICE = "/dev/net/tun"

#: ioctls of that file, include/uapi/linux/if_tun.h.
TUNSETIFF = 0x400454CA  # _IOW('T', 202, int), but takes a struct ifreq
TUNSETOFFLOAD = 0x400454D0  # _IOW('T', 208, unsigned int), the flags themselves
TUNGETIFF = 0x800454D2  # _IOR('T', 210, unsigned int), but gives a struct ifreq
TUNSETVNETHDRSZ = 0x400454D8  # _IOW('T', 216, int)
TUNSETVNETLE = 0x400454DC  # _IOW('T', 220, int)
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
TUN_F_CSUM = 0x01
TUN_F_TSO4 = 0x02
TUN_F_TSO6 = 0x04
TUN_F_TSO_ECN = 0x08

#: What a worker does with that file besides, when it attaches itself and when it looks whether the interface is there.
_ATTACHING = ioctls(
    (TUNSETVNETHDRSZ, "TUNSETVNETHDRSZ"), (TUNSETVNETLE, "TUNSETVNETLE"), (TUNSETOFFLOAD, "TUNSETOFFLOAD")
)
_LOOKING = ioctls((TUNGETIFF, "TUNGETIFF"))

#: ioctls of any socket, include/uapi/linux/sockios.h.
SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
SIOCSIFADDR = 0x8916
SIOCSIFNETMASK = 0x891C
SIOCSIFMTU = 0x8922
SIOCGIFINDEX = 0x8933
SIOCBRADDIF = 0x89A2
IFF_UP = 0x0001

#: struct ifreq, include/uapi/linux/if.h: a name and a union of 24 bytes, of which one of these is used.
_IFREQ = struct.Struct("=16s24s")
_FLAGS = struct.Struct("=H")
_INT = struct.Struct("=i")
_SOCKADDR = struct.Struct("=HH4s")  # struct sockaddr_in: family, port, address

#: How the kernel is told to find a free name.
_ANY_NAME = "tap%d"
#: How long, in seconds, a frame waits for the host to take it, unless the last one did in vain.
WRITE_PATIENCE = 1.0
#: How long, in seconds, until the kernel is asked again about a link that it said nothing of.
ASK_AGAIN = 1.0

# What a driver can accept of what a header says (virtio 1.2, 5.1.3); numbers, since workers touch no enumeration.
_CSUM = NetFeature.GUEST_CSUM.value
_TSO4 = NetFeature.GUEST_TSO4.value
_TSO6 = NetFeature.GUEST_TSO6.value
_ECN = NetFeature.GUEST_ECN.value
_ALL = _CSUM | _TSO4 | _TSO6 | _ECN


class Tap(Wire):
    """The interface that ``config`` describes, up, with ``mtu`` if that is given. LguestError if there is none to have.

    After an error nothing is left of it.
    """

    has_header = True

    def __init__(self, config: TapConfig, mtu: int | None = None) -> None:
        with contextlib.ExitStack() as undo:
            self._file = self.file = _open()
            undo.callback(os.close, self._file)
            #: The interface's name. It may have got another one since.
            self.name = _connect(self._file, config.interface)
            # Until a driver says what it takes.
            self.attach(0, header.LENGTH)
            with (
                _attempt(f"set up {self.name}", "use --net=user"),
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control,
            ):
                (index,) = _INT.unpack_from(_request(control, SIOCGIFINDEX, self.name))
                self._watch = LinkWatch(index)
                undo.callback(self._watch.close)
                _configure(control, self.name, index, config, mtu)
            undo.pop_all()
        self._description = f"tap {self.name}"
        if config.bridge is not None:
            self._description += f" on bridge {config.bridge}"
        elif config.address is not None:
            self._description += f", {config.address}"
        #: What was last told of the link; None: nothing yet. And whether the kernel said so when it was last asked.
        self._up: bool | None = None
        self._is_known = True
        self._poller = select.poll()
        self._poller.register(self._file, select.POLLIN)
        self._poller.register(self._watch, select.POLLIN)

    @property
    def description(self) -> str:
        """With its name, and its address or its bridge."""
        return self._description

    @property
    def files(self) -> tuple[int, ...]:
        """The frames' file, and what tells of the link."""
        return (self._file, self._watch.fileno())

    def needs_of_reader(self) -> Needs:
        """Reading; and sending and receiving at its rtnetlink socket, which every process may."""
        return Needs((*plain("readv"), *_ATTACHING, *_LOOKING))

    def needs_of_writer(self) -> Needs:
        """Writing."""
        return Needs((*plain("writev"), *_ATTACHING))

    def attach(self, features: int, header_size: int) -> None:
        """Has the kernel give the driver only what it accepted.

        If that is not everything, frames may be waiting that were sent when more was accepted: headers are suspect.
        """
        self.is_suspect = features & _ALL != _ALL
        try:
            fcntl.ioctl(self._file, TUNSETVNETHDRSZ, _INT.pack(header_size))
            fcntl.ioctl(self._file, TUNSETVNETLE, _INT.pack(1))
            fcntl.ioctl(self._file, TUNSETOFFLOAD, _offloads(features))
        except OSError as error:
            if error.errno != errno.EBADFD:  # deleted: who reads or writes next finds out
                raise

    def read(self, views: Sequence[memoryview]) -> int:
        """See :meth:`Wire.read`; at most IOV_MAX views. WireGone comes after :meth:`wait` has told that it is down."""
        return self.read_by(lambda: os.readv(self._file, views))

    def read_by(self, receive: Callable[[], T]) -> T:
        """See :meth:`Wire.read_by`."""
        try:
            return receive()
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno == errno.EBADFD and self._up is not False:
                raise BlockingIOError(errno.EAGAIN, "the link went down") from error
            self._fail(error)

    def wait(self, status: Callable[[bool], None]) -> None:
        """See :meth:`Wire.wait`. WireGone, after ``status(False)``, when the interface was deleted."""
        while True:
            ready = dict(self._poller.poll(None if self._is_known else ASK_AGAIN * 1000))
            frames = ready.get(self._file, 0)
            if frames & ~select.POLLIN or self._watch.fileno() in ready or not self._is_known:
                before, now = self._up, self.is_up()
                if now != before:
                    status(now)
                if not now and not self._is_connected():
                    raise self._gone()
            if frames & select.POLLIN:
                return

    def is_up(self) -> bool:
        """Whether the interface is up and has a carrier; one that cannot be seen from here counts as up.

        When the kernel does not say (it is out of memory) what it said before is true, and :meth:`wait` asks again.
        """
        try:
            self._up = self._is_connected() and self._watch.is_up() is not False
        except OSError:
            self._is_known = False
            return self._up is not False
        self._is_known = True
        return self._up

    def write(self, views: Sequence[memoryview]) -> None:
        """See :meth:`Wire.write`. Waits up to WRITE_PATIENCE while the host has no room for more, once."""
        deadline = None
        while True:
            try:
                os.writev(self._file, views)
            except BlockingIOError as error:
                now = time.monotonic()
                deadline = deadline or now + WRITE_PATIENCE
                poller = select.poll()
                poller.register(self._file, select.POLLOUT)
                if self.is_stuck or now >= deadline or not poller.poll((deadline - now) * 1000):
                    self.is_stuck = True
                    raise TimeoutError(errno.ETIMEDOUT, "the host does not take them") from error
            except OSError as error:
                self._fail(error)
            else:
                self.is_stuck = False
                return

    def close(self) -> None:
        """Closes its files; the interface is deleted if nobody else has them."""
        self._watch.close()
        os.close(self._file)

    def _is_connected(self) -> bool:
        try:
            fcntl.ioctl(self._file, TUNGETIFF, bytes(_IFREQ.size))
        except OSError as error:
            return error.errno != errno.EBADFD
        return True

    def _fail(self, error: OSError) -> NoReturn:
        """Says what ``error`` of the kernel's means to who reads or writes."""
        match error.errno:
            case errno.EBADFD:
                raise self._gone() from error
            case errno.EIO:
                raise OSError(errno.ENETDOWN, f"{self.name} is down") from error
        raise error

    def _gone(self) -> WireGone:
        return WireGone(f"{self.name} was deleted; the guest has no network there until lguest is started again")


def _offloads(features: int) -> int:
    """TUN_F_* for what the driver takes. The kernel refuses what builds on something missing (so does the standard)."""
    if not features & _CSUM:
        return 0
    segmentation = (TUN_F_TSO4 if features & _TSO4 else 0) | (TUN_F_TSO6 if features & _TSO6 else 0)
    if segmentation and features & _ECN:
        segmentation |= TUN_F_TSO_ECN
    return TUN_F_CSUM | segmentation


def _open() -> int:
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError as error:
        raise LguestError(f"no permission to open {DEVICE}; {_without_root('NAME')}") from error
    except OSError as error:
        raise LguestError(
            f"cannot open {DEVICE}: {error.strerror}; load the kernel's module (modprobe tun), or use --net=user"
        ) from error


def _connect(file: int, wanted: str | None) -> str:
    """Makes ``file`` the end of an interface, new or existing: its name."""
    flags = _FLAGS.pack(IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
    name = wanted or _ANY_NAME
    try:
        return fcntl.ioctl(file, TUNSETIFF, _IFREQ.pack(name.encode(), flags))[:16].rstrip(b"\0").decode()
    except OSError as error:
        match error.errno:
            case errno.EPERM if wanted is not None and _exists(wanted):
                raise LguestError(f"the interface {wanted} is not this user's; {_without_root(wanted)}") from error
            case errno.EPERM:
                raise LguestError(f"no permission to make a tap; {_without_root(name)}") from error
            case errno.EBUSY:
                raise LguestError(f"the interface {name} is in use; give another one, or none") from error
            case errno.EINVAL if wanted is not None and _exists(wanted):
                raise LguestError(
                    f"the interface {name} is no tap (or one with several queues); give another one, or none"
                ) from error
        raise LguestError(f"cannot make the tap {name}: {error.strerror}; give another name, or none") from error


def _exists(interface: str) -> bool:
    try:
        socket.if_nametoindex(interface)
    except OSError:
        return False
    return True


def _without_root(interface: str) -> str:
    name = "NAME" if interface == _ANY_NAME else interface
    return (
        "start lguest as root, or have an administrator make a tap for you"
        f" (ip tuntap add dev {name} mode tap user {os.geteuid()} && ip link set {name} up)"
        f" and use --net=tap,interface={name}, or use --net=user"
    )


def _request(control: socket.socket, number: int, name: str, argument: bytes = b"") -> bytes:
    """An ioctl on the interface ``name``: the union of struct ifreq as the kernel left it."""
    return fcntl.ioctl(control, number, _IFREQ.pack(name.encode(), argument))[16:]


def _configure(control: socket.socket, name: str, index: int, config: TapConfig, mtu: int | None) -> None:
    """Does what ``config`` asks for, and brings the interface up. Where nothing has to be done, no privilege has to."""
    if mtu is not None:
        with _attempt(f"give {name} the MTU {mtu}", "give another mtu, or none"):
            _request(control, SIOCSIFMTU, name, _INT.pack(mtu))
    if config.bridge is not None:
        _add_to_bridge(control, name, index, config.bridge)
    if config.address is not None:
        with _attempt(f"give {name} the address {config.address}", "give one that a host can have"):
            _request(control, SIOCSIFADDR, name, _inet(config.address))
            if config.prefix is not None:
                _request(control, SIOCSIFNETMASK, name, _inet(_netmask(config.prefix)))
    (flags,) = _FLAGS.unpack_from(_request(control, SIOCGIFFLAGS, name))
    if not flags & IFF_UP:
        by_hand = f"ip link set {name} up"
        with _attempt(f"bring {name} up", f"try {by_hand}", f"have an administrator do it: {by_hand}"):
            _request(control, SIOCSIFFLAGS, name, _FLAGS.pack(flags | IFF_UP))


def _add_to_bridge(control: socket.socket, name: str, index: int, bridge: str) -> None:
    with _attempt(f"add {name} to the bridge {bridge}", "give another bridge"):
        try:
            _request(control, SIOCBRADDIF, bridge, _INT.pack(index))
        except OSError as error:
            match error.errno:
                case errno.ENODEV:
                    raise LguestError(
                        f"there is no bridge {bridge}; make it first: ip link add {bridge} type bridge && ip link set"
                        f" {bridge} up"
                    ) from error
                case errno.EOPNOTSUPP:
                    raise LguestError(f"the interface {bridge} is no bridge; give another one") from error
                case errno.EBUSY:
                    raise LguestError(f"{name} is a port of a bridge already; leave bridge out") from error
            raise


@contextlib.contextmanager
def _attempt(
    what: str, advice: str, without_root: str = "have an administrator do it and leave it out"
) -> Iterator[None]:
    """Turns an OSError into an LguestError."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPERM:
            advice = f"start lguest as root, or {without_root}"
        raise LguestError(f"cannot {what}: {error.strerror}; {advice}") from error


def _inet(address: str) -> bytes:
    return _SOCKADDR.pack(socket.AF_INET, 0, socket.inet_aton(address))


def _netmask(prefix: int) -> str:
    """The network mask (dotted) of ``prefix`` bits."""
    return socket.inet_ntoa(((1 << 32) - (1 << (32 - prefix))).to_bytes(4, "big"))
