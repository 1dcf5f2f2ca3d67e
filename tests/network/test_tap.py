"""Taps: what is asked for is what the host has, frames pass, the link is known, and nothing remains."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import queue
import select
import signal
import socket
import stat
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from namespaces import IFF_UP, Namespace

from lguest_mp.config import TapConfig
from lguest_mp.errors import LguestError
from lguest_mp.network import header, rtnetlink, tap
from lguest_mp.network.header import NetFeature
from lguest_mp.network.tap import Tap
from lguest_mp.network.wire import LONGEST_FRAME, WireGone

#: Generous: what is waited for takes milliseconds, on a machine that may be busy.
PATIENCE = 30.0
NOBODY = 65534

#: include/uapi/linux/if_tun.h
TUNSETPERSIST = 0x400454CB
TUNSETOWNER = 0x400454CC
TUNSETSNDBUF = 0x400454D4
TUNGETVNETHDRSZ = 0x800454D7
IFF_TUN = 0x0001
#: include/uapi/linux/if_packet.h
SOL_PACKET = 263
PACKET_VNET_HDR = 15

#: An experiment's protocol (IEEE 802.3, local use).
ETHERTYPE = 0x88B5
BROADCAST = b"\xff" * 6
GUEST = bytes([2, 0, 0, 0, 0, 1])

ALL = NetFeature.GUEST_CSUM | NetFeature.GUEST_TSO4 | NetFeature.GUEST_TSO6 | NetFeature.GUEST_ECN


@pytest.fixture
def ns() -> Iterator[Namespace]:
    if not os.path.exists(tap.DEVICE):
        pytest.skip("this host has no taps")
    with Namespace() as namespace, namespace.entered():
        yield namespace


@contextlib.contextmanager
def plugged(mtu: int | None = None, **config: str | int) -> Iterator[Tap]:
    """A tap of the namespace that was entered."""
    wire = Tap(TapConfig(**config), mtu)  # type: ignore[arg-type]
    try:
        yield wire
    finally:
        wire.close()


def receive(wire: Tap, is_wanted: Callable[[bytes], bool]) -> bytes:
    """The next frame, header included, that is wanted: the host has things of its own to say, too."""
    memory = memoryview(bytearray(LONGEST_FRAME))
    poller = select.poll()
    poller.register(wire.files[0], select.POLLIN)
    while True:
        with contextlib.suppress(BlockingIOError):
            # In two pieces, the first of which no field ends with.
            frame = bytes(memory[: wire.read([memory[:17], memory[17:]])])
            if is_wanted(frame):
                return frame
            continue
        assert poller.poll(PATIENCE * 1000), "no such frame"


class Listener:
    """The receiveq's worker as far as the link goes: waits, in a thread of its own, until the wire is gone."""

    def __init__(self, wire: Tap) -> None:
        self._wire = wire
        self._said: queue.Queue[bool | str] = queue.Queue()
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        memory = memoryview(bytearray(LONGEST_FRAME))
        try:
            while True:
                self._wire.wait(self._said.put)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        self._wire.read([memory])
        except WireGone as gone:
            self._said.put(str(gone))

    def next(self) -> bool | str:
        """The next status, or why the wire is gone."""
        return self._said.get(timeout=PATIENCE)

    def end(self) -> list[bool | str]:
        """Everything that was said and not looked at, once the wire is gone."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        return [self._said.get() for _ in range(self._said.qsize())]


# ---- What the host has ----


def test_has_an_address_and_is_up(ns: Namespace) -> None:
    with plugged(address="192.168.19.1") as wire:
        assert wire.name == "tap0"
        assert wire.description == "tap tap0, 192.168.19.1"
        assert ns.address("tap0") == "192.168.19.1"
        assert ns.netmask("tap0") == "255.255.255.0", "by the address's class"
        assert ns.flags("tap0") & IFF_UP
        assert wire.is_up()


@pytest.mark.parametrize(
    ("prefix", "netmask", "broadcast"),
    [
        (8, "255.0.0.0", "10.255.255.255"),
        (20, "255.255.240.0", "10.1.31.255"),
        (30, "255.255.255.252", "10.1.16.3"),
        (32, "255.255.255.255", None),
        (1, "128.0.0.0", "127.255.255.255"),
    ],
)
def test_has_the_network_that_is_given(ns: Namespace, prefix: int, netmask: str, broadcast: str | None) -> None:
    with plugged(address="10.1.16.1", prefix=prefix):
        assert ns.address("tap0") == "10.1.16.1"
        assert ns.netmask("tap0") == netmask
        if broadcast:
            assert ns.broadcast("tap0") == broadcast


def test_is_a_port_of_a_bridge(ns: Namespace) -> None:
    ns.make_bridge("br0")
    with plugged(bridge="br0") as first, plugged(bridge="br0", interface="second"):
        assert first.description == "tap tap0 on bridge br0"
        assert ns.ports("br0") == ["tap0", "second"]
        assert ns.flags("tap0") & ns.flags("second") & IFF_UP
        assert ns.address("tap0") is None
    assert ns.ports("br0") == []


def test_has_neither(ns: Namespace) -> None:
    with plugged() as wire:
        assert wire.description == "tap tap0"
        assert ns.address("tap0") is None
        assert ns.flags("tap0") & IFF_UP


def test_several_with_names_and_without(ns: Namespace) -> None:
    with plugged(), plugged(interface="fifteen-letters"), plugged(), plugged(interface="vm-ü"):
        assert ns.interfaces() == ["lo", "tap0", "fifteen-letters", "tap1", "vm-ü"]
    assert ns.interfaces() == ["lo"]


@pytest.mark.parametrize("mtu", [68, 1400, 9000, 65521])
def test_has_an_mtu(ns: Namespace, mtu: int) -> None:
    with plugged(mtu):
        assert ns.mtu("tap0") == mtu


def test_an_mtu_of_its_own(ns: Namespace) -> None:
    with plugged():
        assert ns.mtu("tap0") == 1500


# ---- What cannot be ----


@pytest.mark.usefixtures("ns")
@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"bridge": "br9"},
            "there is no bridge br9; make it first: ip link add br9 type bridge && ip link set br9 up",
        ),
        ({"bridge": "lo"}, "the interface lo is no bridge; give another one"),
        ({"interface": "lo"}, "the interface lo is no tap (or one with several queues); give another one, or none"),
        ({"interface": "a/b"}, "cannot make the tap a/b: Invalid argument; give another name, or none"),
        (
            {"address": "224.0.0.1"},
            "cannot give tap0 the address 224.0.0.1: Invalid argument; give one that a host can have",
        ),
    ],
)
def test_a_refusal_says_what_to_do_and_leaves_nothing(ns: Namespace, config: dict[str, str], said: str) -> None:
    files = os.listdir("/proc/self/fd")
    with pytest.raises(LguestError) as raised:
        Tap(TapConfig(**config))  # type: ignore[arg-type]
    assert str(raised.value) == said
    assert ns.interfaces() == ["lo"]
    assert os.listdir("/proc/self/fd") == files


def test_an_mtu_that_the_host_refuses(ns: Namespace) -> None:
    with pytest.raises(
        LguestError, match="cannot give tap0 the MTU 65522: Invalid argument; give another mtu, or none"
    ):
        Tap(TapConfig(), 65522)
    assert ns.interfaces() == ["lo"]


def test_a_tap_that_is_in_use(ns: Namespace) -> None:
    with plugged(interface="vm0"):
        with pytest.raises(LguestError, match="the interface vm0 is in use; give another one, or none"):
            Tap(TapConfig(interface="vm0"))
        assert ns.interfaces() == ["lo", "vm0"]


def test_a_host_without_taps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tap, "DEVICE", str(tmp_path / "tun"))
    with pytest.raises(LguestError, match=r"No such file or directory; load the kernel's module \(modprobe tun\), or"):
        Tap(TapConfig())


@pytest.fixture
def device(ns: Namespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A /dev/net/tun for everybody, as most hosts have it."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "tun")
        Path(directory).chmod(0o755)
        os.mknod(path, stat.S_IFCHR, Path(tap.DEVICE).stat().st_rdev)
        path.chmod(0o666)
        try:
            os.close(os.open(path, os.O_RDWR))
        except OSError as error:
            pytest.skip(f"no device files in {directory}: {error.strerror}")
        monkeypatch.setattr(tap, "DEVICE", str(path))
        yield


def unprivileged(body: Callable[[], str]) -> str:
    """What ``body`` returns, or the LguestError that it raises, in a process of a user who may nothing."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            try:
                said = body()
            except LguestError as error:
                said = str(error)
            os.write(writer, said.encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(pid, 0)
    return said


def make_persistent(name: str, owner: int) -> None:
    """``ip tuntap add dev NAME mode tap user OWNER``."""
    file = os.open(tap.DEVICE, os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(file, tap.TUNSETIFF, struct.pack("16sH22x", name.encode(), tap.IFF_TAP | tap.IFF_NO_PI))
    fcntl.ioctl(file, TUNSETOWNER, owner)
    fcntl.ioctl(file, TUNSETPERSIST, 1)
    os.close(file)


@pytest.mark.usefixtures("ns")
def test_without_permission_for_the_device() -> None:
    if os.stat(tap.DEVICE).st_mode & stat.S_IROTH:
        pytest.skip("everybody may open /dev/net/tun here")
    said = unprivileged(lambda: Tap(TapConfig()).name)
    assert said == f"no permission to open /dev/net/tun; {what_to_do('NAME')}"


def what_to_do(name: str) -> str:
    return (
        "start lguest as root, or have an administrator make a tap for you"
        f" (ip tuntap add dev {name} mode tap user {NOBODY} && ip link set {name} up)"
        f" and use --net=tap,interface={name}, or use --net=user"
    )


@pytest.mark.usefixtures("device")
def test_without_permission_to_make_one(ns: Namespace) -> None:
    said = unprivileged(lambda: Tap(TapConfig()).name)
    assert said == f"no permission to make a tap; {what_to_do('NAME')}"
    said = unprivileged(lambda: Tap(TapConfig(interface="vm0")).name)
    assert said == f"no permission to make a tap; {what_to_do('vm0')}"
    make_persistent("vm1", NOBODY - 1)
    said = unprivileged(lambda: Tap(TapConfig(interface="vm1")).name)
    assert said == f"the interface vm1 is not this user's; {what_to_do('vm1')}"
    assert ns.interfaces() == ["lo", "vm1"]


@pytest.mark.usefixtures("device")
def test_a_tap_that_an_administrator_made(ns: Namespace) -> None:
    make_persistent("vm0", NOBODY)
    said = unprivileged(lambda: Tap(TapConfig(interface="vm0")).name)
    assert said == (
        "cannot bring vm0 up: Operation not permitted; start lguest as root, or have an administrator do it:"
        " ip link set vm0 up"
    )
    ns.set_up("vm0")

    def body() -> str:
        wire = Tap(TapConfig(interface="vm0"))
        return f"{wire.description} {wire.is_up()}"

    assert unprivileged(body) == "tap vm0 True"
    assert ns.interfaces() == ["lo", "vm0"]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    ("config", "mtu", "what"),
    [
        (TapConfig("10.0.0.1", interface="vm0"), None, "give vm0 the address 10.0.0.1"),
        (TapConfig(bridge="br0", interface="vm0"), None, "add vm0 to the bridge br0"),
        (TapConfig(interface="vm0"), 1400, "give vm0 the MTU 1400"),
    ],
)
def test_a_tap_that_only_an_administrator_may_change(ns: Namespace, config: TapConfig, mtu: int, what: str) -> None:
    make_persistent("vm0", NOBODY)
    ns.make_bridge("br0")
    assert unprivileged(lambda: Tap(config, mtu).name) == (
        f"cannot {what}: Operation not permitted; start lguest as root, or have an administrator do it and leave it out"
    )


def test_a_port_of_a_bridge_already(ns: Namespace) -> None:
    make_persistent("vm0", 0)
    ns.make_bridge("br0")
    ns.add_port("br0", "vm0")
    with plugged(interface="vm0"):
        pass
    with pytest.raises(LguestError, match="vm0 is a port of a bridge already; leave bridge out"):
        Tap(TapConfig(interface="vm0", bridge="br0"))


def test_no_tap_but_a_tun(ns: Namespace) -> None:
    file = os.open(tap.DEVICE, os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(file, tap.TUNSETIFF, struct.pack("16sH22x", b"tun0", IFF_TUN))
    with pytest.raises(LguestError, match="the interface tun0 is no tap"):
        Tap(TapConfig(interface="tun0"))
    os.close(file)
    assert ns.interfaces() == ["lo"]


# ---- What remains ----


def test_is_gone_after_close(ns: Namespace) -> None:
    wire = Tap(TapConfig(address="10.0.0.1"))
    assert ns.interfaces() == ["lo", "tap0"]
    files = wire.files
    wire.close()
    assert ns.interfaces() == ["lo"]
    for file in files:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(file)


def test_is_gone_when_the_last_process_that_has_it_is_killed(ns: Namespace) -> None:
    wire = Tap(TapConfig(bridge=None))
    pid = os.fork()
    if pid == 0:
        while True:
            signal.pause()
    wire.close()
    assert ns.interfaces() == ["lo", "tap0"]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert ns.interfaces() == ["lo"]


@pytest.mark.usefixtures("ns")
def test_no_program_inherits_it() -> None:
    with plugged() as wire:
        assert not any(os.get_inheritable(file) for file in wire.files)
        assert not any(os.get_blocking(file) for file in wire.files)


# ---- Frames ----


def frame(payload: bytes, destination: bytes = BROADCAST) -> bytes:
    return destination + GUEST + struct.pack(">H", ETHERTYPE) + payload


def packet_socket(interface: str, ethertype: int = ETHERTYPE) -> socket.socket:
    """The host's side of the interface, in frames."""
    host = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ethertype))
    host.bind((interface, ethertype))
    host.settimeout(PATIENCE)
    return host


@pytest.mark.usefixtures("ns")
@pytest.mark.parametrize("header_size", [10, 12])
def test_what_the_host_sends_is_read(header_size: int) -> None:
    with plugged(address="192.168.19.1") as wire, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        wire.attach(0, header_size)
        host.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        host.sendto(b"from the host", ("192.168.19.255", 4711))
        got = receive(wire, lambda frame: frame.endswith(b"from the host"))
        assert not any(got[: header.HEADER.size])
        assert got[header_size:][:6] == BROADCAST
        assert len(got) == header_size + 14 + 20 + 8 + 13


@pytest.mark.usefixtures("ns")
@pytest.mark.parametrize("header_size", [10, 12])
def test_what_is_written_the_host_receives(header_size: int) -> None:
    sent = frame(bytes(range(256)) * 4)
    with plugged() as wire, packet_socket("tap0") as host:
        wire.attach(0, header_size)
        whole = memoryview(bytes(header_size) + sent)
        wire.write([whole])
        assert host.recv(2048) == sent
        wire.write([whole[:1], whole[1:13], whole[13:14], whole[14:]])
        assert host.recv(2048) == sent


@pytest.mark.usefixtures("ns")
def test_frames_both_ways_between_an_address_and_a_peer() -> None:
    """UDP from the host is answered as a guest would, and the host takes the answer."""
    with plugged(address="192.168.19.1") as wire, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        host.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        host.settimeout(PATIENCE)
        host.bind(("192.168.19.1", 4711))
        host.sendto(b"ping", ("192.168.19.255", 4712))
        asked = receive(wire, lambda frame: frame.endswith(b"ping"))
        host_mac = asked[12 + 6 : 12 + 12]
        udp = struct.pack(">HHHH", 4712, 4711, 12, 0) + b"pong"
        ip = struct.pack(
            ">BBHHHBBH4s4s", 0x45, 0, 32, 0, 0, 64, 17, 0, bytes([192, 168, 19, 2]), bytes([192, 168, 19, 1])
        )
        ip = ip[:10] + struct.pack(">H", 0xFFFF - ones_sum(ip)) + ip[12:]
        wire.write([memoryview(bytes(12)), memoryview(host_mac + GUEST + b"\x08\x00" + ip + udp)])
        assert host.recv(100) == b"pong"


@pytest.mark.usefixtures("ns")
def test_nothing_to_read() -> None:
    def read_everything() -> None:
        while True:  # what the host says by itself
            wire.read([memory])

    memory = memoryview(bytearray(LONGEST_FRAME))
    with plugged() as wire, pytest.raises(BlockingIOError):
        read_everything()


@pytest.mark.usefixtures("ns")
def test_what_does_not_fit_is_lost() -> None:
    with plugged() as wire, packet_socket("tap0") as host:
        wire.attach(0, 12)
        host.send(frame(b"x" * 1000))
        host.send(frame(b"y" * 10))
        short = memoryview(bytearray(100))
        while wire.read([short]) != 100 or short[-1] != ord("x"):
            pass
        assert receive(wire, lambda frame: frame.endswith(b"y")) == bytes(12) + frame(b"y" * 10)


@pytest.mark.usefixtures("ns")
@pytest.mark.parametrize("bad", [b"", bytes(11), bytes(12 + 13), b"\x01" + bytes(11) + frame(b"")])
def test_a_frame_that_is_none_is_an_error_and_no_more(bad: bytes) -> None:
    with plugged() as wire, packet_socket("tap0") as host:
        wire.attach(ALL, 12)
        if bad:
            with pytest.raises(OSError, match="Invalid argument"):
                wire.write([memoryview(bad)])
        wire.write([memoryview(bytes(12) + frame(b"good"))])
        assert host.recv(100).endswith(b"good")


# ---- Offloads ----


def ones_sum(data: bytes) -> int:
    """The Internet's sum (RFC 1071), not complemented."""
    total: int = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


#: Where TCP begins in a packet on IPv4 and on IPv6.
TCP_AT = {4: 14 + 20, 6: 14 + 40}
SEGMENT = 1000
PAYLOAD = bytes(range(250)) * 16
ETHERTYPES = {4: 0x0800, 6: 0x86DD}


def tcp_packet(version: int, *, gso: bool, ecn: bool = False) -> bytes:
    """4000 bytes of TCP from the host, that somebody has to sum, and to cut into four segments."""
    length = 20 + len(PAYLOAD)
    if version == 4:
        addresses = bytes([192, 168, 19, 1, 192, 168, 19, 2])
        ip = struct.pack(">BBHHHBBH8s", 0x45, 0, 20 + length, 1, 0, 64, 6, 0, addresses)
        ip = ip[:10] + struct.pack(">H", 0xFFFF - ones_sum(ip)) + ip[12:]
    else:
        addresses = bytes.fromhex("fd00" + "00" * 13 + "01" + "fd00" + "00" * 13 + "02")
        ip = struct.pack(">IHBB32s", 6 << 28, length, 6, 64, addresses)
    pseudo = ones_sum(addresses + struct.pack(">HH", 6, length))
    tcp = struct.pack(">HHIIBBHHH", 1, 2, 100, 0, 0x50, 0x90 if ecn else 0x10, 1024, pseudo, 0)
    kind = {4: header.GSO_TCPV4, 6: header.GSO_TCPV6}[version] | (header.GSO_ECN if ecn else 0) if gso else 0
    start = TCP_AT[version]
    said = header.HEADER.pack(header.F_NEEDS_CSUM, kind, start + 20, SEGMENT if gso else 0, start, 16)
    return said + GUEST + GUEST + struct.pack(">H", ETHERTYPES[version]) + ip + tcp + PAYLOAD


def sent_by_the_host(wire: Tap, packet: bytes) -> list[bytes]:
    """As what the driver gets ``packet``: frames with their headers."""
    version = packet[header.HEADER.size + 14] >> 4
    with packet_socket(wire.name, ETHERTYPES[version]) as host:
        host.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        host.send(packet)
    frames: list[bytes] = []
    payload = 0
    while payload < len(PAYLOAD):
        frames.append(receive(wire, is_from_the_host))
        payload += len(frames[-1]) - header.LENGTH - TCP_AT[version] - 20
    return frames


def is_from_the_host(frame: bytes) -> bool:
    return frame[header.LENGTH :].startswith(GUEST + GUEST)


def assert_summed(frame: bytes, version: int) -> None:
    packet = frame[12 + 14 :]
    addresses, tcp = (packet[12:20], packet[20:]) if version == 4 else (packet[8:40], packet[40:])
    assert ones_sum(addresses + struct.pack(">HH", 6, len(tcp)) + tcp) == 0xFFFF


@pytest.mark.usefixtures("ns")
@pytest.mark.parametrize(("version", "feature"), [(4, NetFeature.GUEST_TSO4), (6, NetFeature.GUEST_TSO6)])
def test_segmentation_is_left_to_a_driver_that_takes_it(version: int, feature: NetFeature) -> None:
    with plugged(mtu=9000) as wire:
        wire.attach(NetFeature.GUEST_CSUM | feature, 12)
        packet = tcp_packet(version, gso=True)
        (got,) = sent_by_the_host(wire, packet)
        flags, kind, _, size, start, offset = header.HEADER.unpack_from(got)
        assert flags == header.F_NEEDS_CSUM
        assert kind == header.HEADER.unpack_from(packet)[1]
        assert (size, start, offset) == (SEGMENT, TCP_AT[version], 16)
        assert got[12:] == packet[header.HEADER.size :]


@pytest.mark.usefixtures("ns")
def test_congestion_notification_in_segments_is_left_to_a_driver_that_takes_it() -> None:
    with plugged(mtu=9000) as wire:
        wire.attach(ALL, 12)
        assert not wire.is_suspect
        (got,) = sent_by_the_host(wire, tcp_packet(4, gso=True, ecn=True))
        assert header.HEADER.unpack_from(got)[1] == header.GSO_TCPV4 | header.GSO_ECN
        wire.attach(ALL & ~NetFeature.GUEST_ECN, 12)
        assert len(sent_by_the_host(wire, tcp_packet(4, gso=True, ecn=True))) == 4


@pytest.mark.usefixtures("ns")
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(
    "features",
    [
        NetFeature(0),
        NetFeature.GUEST_CSUM,
        NetFeature.GUEST_CSUM | NetFeature.GUEST_ECN,
        # Against the standard: without GUEST_CSUM it means nothing.
        ALL & ~NetFeature.GUEST_CSUM,
    ],
)
def test_segmentation_is_done_for_a_driver_that_does_not_take_it(version: int, features: NetFeature) -> None:
    with plugged(mtu=9000) as wire:
        wire.attach(ALL, 12)
        wire.attach(features, 12)
        assert wire.is_suspect
        frames = sent_by_the_host(wire, tcp_packet(version, gso=True))
        assert b"".join(frame[12 + TCP_AT[version] + 20 :] for frame in frames) == PAYLOAD
        assert len(frames) == 4
        for each in frames:
            assert header.HEADER.unpack_from(each)[1] == header.GSO_NONE
            if NetFeature.GUEST_CSUM not in features:
                assert not any(each[: header.HEADER.size])
                assert_summed(each, version)


@pytest.mark.usefixtures("ns")
@pytest.mark.parametrize("version", [4, 6])
def test_sums_are_left_to_a_driver_that_takes_them(version: int) -> None:
    with plugged(mtu=9000) as wire:
        packet = tcp_packet(version, gso=False)
        wire.attach(NetFeature.GUEST_CSUM, 12)
        (got,) = sent_by_the_host(wire, packet)
        assert header.HEADER.unpack_from(got) == (header.F_NEEDS_CSUM, 0, 0, 0, TCP_AT[version], 16)
        assert got[12:] == packet[header.HEADER.size :]
        wire.attach(0, 12)
        (got,) = sent_by_the_host(wire, packet)
        assert not any(got[: header.HEADER.size])
        assert_summed(got, version)


@pytest.mark.usefixtures("ns")
def test_what_the_guest_leaves_to_the_host_is_done_there() -> None:
    packet = tcp_packet(4, gso=True)
    with plugged() as wire, packet_socket("tap0", 0x0800) as host:
        host.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        wire.attach(ALL, 12)
        wire.write([memoryview(packet[:10]), memoryview(bytes(2)), memoryview(packet[10:])])
        got = host.recv(LONGEST_FRAME)
        assert header.HEADER.unpack_from(got)[1] == header.GSO_TCPV4, "nobody had to cut it up yet"
        assert got[10:] == packet[10:]


@pytest.mark.usefixtures("ns")
def test_a_header_has_the_size_that_was_last_set() -> None:
    with plugged() as wire:
        for size in (10, 12):
            wire.attach(0, size)
            assert struct.unpack("i", fcntl.ioctl(wire.files[0], TUNGETVNETHDRSZ, bytes(4))) == (size,)


@pytest.mark.usefixtures("ns")
def test_a_frame_that_was_sent_when_more_was_accepted_is_suspect() -> None:
    with plugged(mtu=9000) as wire:
        wire.attach(ALL, 12)
        with packet_socket("tap0", ETHERTYPES[4]) as host:
            host.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            host.send(tcp_packet(4, gso=True))
        wire.attach(0, 12)
        assert header.HEADER.unpack_from(receive(wire, is_from_the_host))[1] == header.GSO_TCPV4
        assert wire.is_suspect
        wire.attach(ALL | 1 << 32, 12)
        assert not wire.is_suspect


# ---- The link ----


def test_down_and_up_are_told(ns: Namespace) -> None:
    with plugged(address="10.0.0.1") as wire:
        assert wire.is_up()
        listener = Listener(wire)
        for _ in range(3):
            ns.set_down("tap0")
            assert listener.next() is False
            ns.set_up("tap0")
            assert listener.next() is True
        ns.delete("tap0")
        assert listener.next() is False
        assert listener.next() == "tap0 was deleted; the guest has no network there until lguest is started again"
        assert listener.end() == []


def test_a_change_while_nobody_listened_is_told(ns: Namespace) -> None:
    with plugged() as wire:
        assert wire.is_up()
        ns.set_down("tap0")
        listener = Listener(wire)
        assert listener.next() is False
        ns.delete("tap0")
        assert isinstance(listener.next(), str), "it was down already"
        assert listener.end() == []


def test_more_changes_than_anybody_could_hear_of(ns: Namespace) -> None:
    with plugged() as wire:
        assert wire.is_up()
        overrun(ns, wire)
        ns.set_down("tap0")
        listener = Listener(wire)
        assert listener.next() is False
        ns.set_up("tap0")
        assert listener.next() is True
        ns.delete("tap0")
        assert listener.next() is False
        assert len(listener.end()) == 1


def test_is_known_in_spite_of_an_overrun(ns: Namespace) -> None:
    with plugged() as wire:
        overrun(ns, wire)
        assert wire.is_up()
        ns.set_down("tap0")
        assert not wire.is_up()


def overrun(ns: Namespace, wire: Tap) -> None:
    """Changes the interface until the kernel could not tell it all."""
    poller = select.poll()
    poller.register(wire.files[1], 0)
    while not poller.poll(0):
        ns.set_down("tap0")
        ns.set_up("tap0")
    assert poller.poll(0) == [(wire.files[1], select.POLLERR)]


def test_other_interfaces_wake_nobody(ns: Namespace) -> None:
    with plugged() as wire:
        assert wire.is_up()
        other = Tap(TapConfig())
        ns.set_down("tap1")
        other.close()
        poller = select.poll()
        poller.register(wire.files[1], select.POLLIN)
        assert not poller.poll(0)
        ns.set_down("tap0")
        assert poller.poll(0)


def test_leaving_a_bridge_is_no_deletion(ns: Namespace) -> None:
    ns.make_bridge("br0")
    with plugged(bridge="br0") as wire:
        assert wire.is_up()
        listener = Listener(wire)
        ns.remove_port("br0", "tap0")
        ns.set_down("tap0")
        assert listener.next() is False
        ns.set_up("tap0")
        assert listener.next() is True
        ns.delete("tap0")
        assert len(listener.end()) == 2


def test_another_name_changes_nothing(ns: Namespace) -> None:
    with plugged() as wire:
        assert wire.is_up()
        listener = Listener(wire)
        ns.set_down("tap0")
        ns.rename("tap0", "vm0")
        assert listener.next() is False
        ns.set_up("vm0")
        assert listener.next() is True
        ns.delete("vm0")
        assert len(listener.end()) == 2


def test_down_frames_are_lost_and_up_they_pass_again(ns: Namespace) -> None:
    with plugged() as wire, packet_socket("tap0") as host:
        wire.attach(0, 12)
        sent = [memoryview(bytes(12) + frame(b"good"))]
        ns.set_down("tap0")
        with pytest.raises(OSError, match="tap0 is down") as raised:
            wire.write(sent)
        assert raised.value.errno == errno.ENETDOWN
        assert raised.value.strerror == "tap0 is down"
        ns.set_up("tap0")
        with pytest.raises(OSError, match="Network is down"):  # a packet socket is told so once
            host.recv(100)
        wire.write(sent)
        assert host.recv(100) == frame(b"good")


def test_deleted_is_gone_for_good(ns: Namespace) -> None:
    with plugged() as wire:
        assert wire.is_up()
        ns.delete("tap0")
        gone = "tap0 was deleted; the guest has no network there until lguest is started again"
        told: list[bool] = []
        with pytest.raises(BlockingIOError):  # first the link is down
            wire.read([memoryview(bytearray(100))])
        with pytest.raises(WireGone, match=gone):
            wire.wait(told.append)
        assert told == [False]
        for _ in range(2):
            with pytest.raises(WireGone, match=gone):
                wire.read([memoryview(bytearray(100))])
            with pytest.raises(WireGone, match=gone):
                wire.write([memoryview(bytes(100))])
            with pytest.raises(WireGone, match=gone):
                wire.wait(told.append)
            assert not wire.is_up()
            wire.attach(ALL, 12)
        assert told == [False]


def test_moved_away_it_still_carries_frames(ns: Namespace) -> None:
    with plugged() as wire, Namespace() as elsewhere:
        wire.attach(0, 12)
        assert wire.is_up()
        ns.move("tap0", elsewhere)
        assert wire.is_up(), "nobody can know"
        elsewhere.set_up("tap0")
        with elsewhere.entered():
            host = packet_socket("tap0")
        with host:
            wire.write([memoryview(bytes(12) + frame(b"there"))])
            assert host.recv(100) == frame(b"there")
            host.send(frame(b"back"))
            assert receive(wire, lambda frame: frame.endswith(b"back"))
        listener = Listener(wire)
        elsewhere.delete("tap0")
        assert listener.end()[0] is False


def test_a_worker_in_another_namespace_hears_of_the_link(ns: Namespace) -> None:
    with plugged() as wire, Namespace() as elsewhere:
        with elsewhere.entered():
            assert wire.is_up()
            listener = Listener(wire)
        ns.set_down("tap0")
        assert listener.next() is False
        ns.delete("tap0")
        assert len(listener.end()) == 1


@pytest.mark.usefixtures("device")
def test_a_worker_needs_no_privileges(ns: Namespace) -> None:
    with plugged(address="10.0.0.1") as wire:

        def body() -> str:
            wire.attach(ALL, 12)
            wire.write([memoryview(bytes(12) + frame(b"hello"))])
            wire.wait(lambda is_up: None)
            return f"{wire.is_up()}"

        ns.set_down("tap0")
        ns.set_up("tap0")
        with packet_socket("tap0") as host:
            host.send(frame(b"something to wait for"))
            assert unprivileged(body) == "True"
            assert host.recv(100).endswith(b"hello")


def test_a_host_that_does_not_tell_of_its_links(ns: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(rtnetlink, "_hear_only", refuse)
    with pytest.raises(LguestError, match="cannot set up tap0: Operation not permitted; "):
        Tap(TapConfig())
    assert ns.interfaces() == ["lo"]


@pytest.mark.usefixtures("ns")
def test_a_question_that_the_kernel_does_not_answer() -> None:
    watch = rtnetlink.LinkWatch(0)  # which no interface has
    with pytest.raises(OSError, match="Invalid argument"):
        watch.is_up()
    watch.close()


def say_nothing(patch: pytest.MonkeyPatch, times: int) -> None:
    """Has the kernel be out of memory when it is asked so many times."""
    is_up = rtnetlink.LinkWatch.is_up
    failures = iter(range(times))

    def fail_or_ask(watch: rtnetlink.LinkWatch) -> bool | None:
        if next(failures, None) is not None:
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        return is_up(watch)

    patch.setattr(rtnetlink.LinkWatch, "is_up", fail_or_ask)


def test_a_host_that_does_not_say_whether_the_link_is_up(ns: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it said last is true; before that, what nobody can see: it is up."""
    with plugged() as wire:
        for expected in (True, False, True):
            with monkeypatch.context() as patch:
                say_nothing(patch, 1)
                assert wire.is_up() is expected
            (ns.set_down if expected else ns.set_up)("tap0")
            assert wire.is_up() is not expected


def test_a_host_that_did_not_say_it_is_asked_again(ns: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap, "ASK_AGAIN", 0.01)
    with plugged() as wire:
        assert wire.is_up()
        ns.set_down("tap0")
        say_nothing(monkeypatch, 3)
        listener = Listener(wire)
        assert listener.next() is False
        ns.delete("tap0")
        assert isinstance(listener.next(), str)
        assert listener.end() == []


# ---- A host that takes no frames ----


def refuse_writes(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Has so many writes fail as they do when what was written before takes all the memory that there is for it."""
    write = os.writev
    refusals = iter(range(times))

    def writev(file: int, views: list[memoryview]) -> int:
        if next(refusals, None) is not None:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return write(file, views)

    monkeypatch.setattr(os, "writev", writev)


def set_writable(wire: Tap, *, is_writable: bool) -> None:
    """Whether poll(2) says that a write would succeed."""
    fcntl.ioctl(wire.files[0], TUNSETSNDBUF, struct.pack("i", 1 << 30 if is_writable else 1))


@pytest.mark.usefixtures("ns")
def test_a_host_that_takes_nothing_loses_the_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap, "WRITE_PATIENCE", 0.01)
    refuse_writes(monkeypatch, 2)
    with plugged() as wire, packet_socket("tap0") as host:
        wire.attach(0, 12)
        set_writable(wire, is_writable=False)
        for _ in range(2):
            with pytest.raises(OSError, match="the host does not take them") as raised:
                wire.write([memoryview(bytes(12) + frame(b"lost"))])
            assert raised.value.strerror == "the host does not take them"
        wire.write([memoryview(bytes(12) + frame(b"taken"))])
        assert host.recv(100) == frame(b"taken")


@pytest.mark.usefixtures("ns")
def test_a_host_that_takes_nothing_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And again when it has taken something."""
    monkeypatch.setattr(tap, "WRITE_PATIENCE", 0.01)
    lost = [memoryview(bytes(12) + frame(b"lost"))]
    with plugged() as wire:
        wire.attach(0, 12)
        for _ in range(2):
            with monkeypatch.context() as patch:
                refuse_writes(patch, 1 << 30)
                set_writable(wire, is_writable=False)
                with pytest.raises(OSError, match="the host does not take them"):
                    wire.write(lost)
                waits: list[float] = []
                patch.setattr("select.poll", lambda waits=waits: NoPoll(waits))
                with pytest.raises(OSError, match="the host does not take them"):
                    wire.write(lost)
                assert waits == []
            wire.write(lost)
            set_writable(wire, is_writable=True)
        with monkeypatch.context() as patch:
            refuse_writes(patch, 1)
            wire.write(lost)  # it waits, or this fails


class NoPoll:
    """A poll(2) that notes how long somebody would have waited in it (ms)."""

    def __init__(self, waits: list[float]) -> None:
        self._waits = waits

    def register(self, file: int, events: int) -> None:
        pass

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        self._waits.append(timeout)
        return []


@pytest.mark.usefixtures("ns")
def test_a_host_that_never_keeps_its_word_loses_the_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that it takes a frame, and does not."""
    monkeypatch.setattr(tap, "WRITE_PATIENCE", 0.01)
    refuse_writes(monkeypatch, 1 << 30)
    with plugged() as wire, pytest.raises(OSError, match="the host does not take them"):
        wire.write([memoryview(bytes(12) + frame(b"lost"))])


@pytest.mark.usefixtures("ns")
def test_a_host_that_takes_nothing_for_a_moment_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap, "WRITE_PATIENCE", PATIENCE)
    refuse_writes(monkeypatch, 3)
    with plugged() as wire, packet_socket("tap0") as host:
        wire.attach(0, 12)
        wire.write([memoryview(bytes(12) + frame(b"late"))])
        assert host.recv(100) == frame(b"late")
