"""A network without privileges: a guest made of frames on one side, the host's own sockets on the other."""

from __future__ import annotations

import errno
import os
import select
import shutil
import signal
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from tinyguest import ACK, PATIENCE, PSH, RST, SYN, Segment, TinyGuest, checksum

from guestkit.cache import cache_directory
from guestkit.kit import GuestKit
from guestkit.progress import SetupError
from guestkit.slirp import Slirp
from lguest_mp import runtime
from lguest_mp.config import Forward, UserConfig
from lguest_mp.errors import LguestError
from lguest_mp.jail import User
from lguest_mp.network import user
from lguest_mp.network.user import UserNetwork
from lguest_mp.network.wire import WireGone
from lguest_mp.supervisor import children
from lguest_mp.supervisor.children import Child

ROUTER = "10.0.2.2"

Plug = Callable[..., UserNetwork]


@pytest.fixture(scope="session")
def slirp() -> Slirp:
    """Debian's slirp4netns, unpacked."""
    try:
        return GuestKit(cache_directory()).slirp
    except SetupError as error:
        pytest.skip(f"there is no slirp4netns, and it cannot be fetched: {error}")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The runtime directory of these tests."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return runtime.directory()


@pytest.fixture
def path(slirp: Slirp, monkeypatch: pytest.MonkeyPatch) -> str:
    """PATH is such that there is a slirp4netns."""
    value = slirp.search_path() if shutil.which(user.PROGRAM) is None else os.environ["PATH"]
    monkeypatch.setenv("PATH", value)
    return value


@pytest.fixture
def nobody(path: str, slirp: Slirp, monkeypatch: pytest.MonkeyPatch) -> Iterator[User]:
    """A user without privileges, who can execute the program."""
    if os.geteuid() != 0:
        pytest.skip("only root may become another user")
    somebody = User("nobody", 65534, 65534)
    with tempfile.TemporaryDirectory(prefix="lguest-test-") as name:
        Path(name).chmod(0o755)
        monkeypatch.setenv("PATH", str(slirp.put_into(Path(name) / "bin")))
        yield somebody
    with suppress(OSError):  # not empty: that user has guests
        runtime.directory(somebody).rmdir()


@pytest.fixture
def start(place: Path, path: str) -> Iterator[Plug]:
    """Starts networks that are closed after the test; nothing of them is left in the runtime directory."""
    with ExitStack() as networks:

        def begin(
            *forwards: Forward, loopback: bool = False, mtu: int | None = None, who: User | None = None
        ) -> UserNetwork:
            network = UserNetwork(UserConfig(forwards, loopback), mtu, "demo", "net0", who)
            networks.callback(network.close)
            return network

        yield begin
    assert not list(place.iterdir())


@pytest.fixture
def plug(start: Plug, place: Path) -> Plug:
    """The same, connected."""

    def connected(*arguments: Forward, **options: object) -> UserNetwork:
        network = start(*arguments, **options)
        network.connect()
        assert not list(place.iterdir())
        return network

    return connected


def program_of(network: UserNetwork) -> Child:
    assert network.helper is not None
    return network.helper


def free_port(kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """Somebody who listens on a port of the host's loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(PATIENCE)
        yield listening


def fake(directory: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Has a script of these lines in place of the program."""
    script = directory / user.PROGRAM
    script.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


# ---- What the guest sees ----


def test_the_guest_is_told_its_address_its_router_and_its_name_server(plug: Plug) -> None:
    address, options = TinyGuest(plug()).ask_for_address()
    assert address == user.GUEST_ADDRESS
    assert options[53] == b"\2"  # DHCPOFFER
    assert options[1] == socket.inet_aton("255.255.255.0")
    assert options[3] == socket.inet_aton(ROUTER)
    assert options[6] == socket.inet_aton("10.0.2.3")


def test_the_router_is_there(plug: Plug) -> None:
    guest = TinyGuest(plug())
    assert guest.find_router() not in {b"", bytes(6)}
    assert guest.ping(ROUTER) == b"echo this"


def test_data_goes_both_ways_in_frames_as_long_as_the_mtu_says(plug: Plug, server: socket.socket) -> None:
    network = plug(loopback=True)
    guest = TinyGuest(network)
    guest.find_router()
    port = server.getsockname()[1]
    longest = network.mtu - 40
    guest.send_segment(ROUTER, Segment(1025, port, 100, 0, SYN, b""), longest)
    answer = guest.receive_segment()
    assert (answer.source_port, answer.target_port, answer.acknowledged, answer.flags) == (port, 1025, 101, SYN | ACK)
    theirs = answer.sequence + 1
    data = bytes(range(256)) * 256
    with server.accept()[0] as connection:
        connection.settimeout(PATIENCE)
        guest.send_segment(ROUTER, Segment(1025, port, 101, theirs, ACK | PSH, data[:longest]))
        assert connection.recv(longest, socket.MSG_WAITALL) == data[:longest]
        connection.sendall(data)
        received = bytearray()
        sizes = []
        while len(received) < len(data):
            segment = guest.receive_segment()
            if segment.data and segment.sequence == theirs + len(received):
                received += segment.data
                acknowledged = theirs + len(received)
                guest.send_segment(ROUTER, Segment(1025, port, 101 + longest, acknowledged, ACK, b""))
                sizes.append(len(segment.data))
        assert received == data
    assert max(sizes) > 1460


def test_the_hosts_loopback_is_closed_to_it(plug: Plug, server: socket.socket) -> None:
    guest = TinyGuest(plug())
    guest.find_router()
    guest.send_segment(ROUTER, Segment(1025, server.getsockname()[1], 100, 0, SYN, b""))
    answer = guest.receive_packet()
    assert answer.protocol != socket.IPPROTO_TCP or answer.payload[13] & RST
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.accept()


def test_forwarded_ports_lead_to_the_guest(plug: Plug) -> None:
    tcp, udp = free_port(), free_port(socket.SOCK_DGRAM)
    network = plug(Forward("tcp", "127.0.0.1", tcp, 22), Forward("udp", "127.0.0.1", udp, 53), loopback=True)
    assert network.description == f"user network, tcp port {tcp} leads to 22, udp port {udp} leads to 53"
    guest = TinyGuest(network)
    with socket.create_connection(("127.0.0.1", tcp), PATIENCE):
        segment = guest.receive_segment()
    assert (segment.target_port, segment.flags) == (22, SYN)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(PATIENCE)
        client.sendto(b"question", ("127.0.0.1", udp))
        port, own_port, data = guest.receive_datagram()
        assert (own_port, data) == (53, b"question")
        guest.find_router()
        guest.send_datagram(ROUTER, 53, port, b"answer")
        assert client.recv(100) == b"answer"


def test_a_forwarded_port_works_both_ways_while_the_loopback_is_closed(plug: Plug) -> None:
    port = free_port()
    guest = TinyGuest(plug(Forward("tcp", "127.0.0.1", port, 22)))
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
        segment = guest.receive_segment()
        guest.find_router()
        next_one = segment.sequence + 1
        guest.send_segment(ROUTER, Segment(22, segment.source_port, 100, next_one, SYN | ACK, b""), 1460)
        guest.send_segment(ROUTER, Segment(22, segment.source_port, 101, next_one, ACK | PSH, b"welcome"))
        assert client.recv(7, socket.MSG_WAITALL) == b"welcome"


def test_a_datagrams_answer_could_not_come_back_while_the_loopback_is_closed(start: Plug) -> None:
    with pytest.raises(LguestError, match=r"forward=udp:127.0.0.1:53:53: answers .* need loopback=on"):
        start(Forward("udp", "127.0.0.1", 53, 53))


# ---- A wire ----

ARP = 0x0806
#: Who has 10.0.2.2?
QUESTION = memoryview(
    bytes.fromhex("ffffffffffff 52540a0b0c0d 0806 0001 0800 0604 0001 52540a0b0c0d 0a00020f 000000000000 0a000202")
)


def test_there_is_no_frame_until_one_comes(plug: Plug) -> None:
    network = plug()
    buffer = memoryview(bytearray(2000))
    with pytest.raises(BlockingIOError):
        network.read([buffer])
    network.write([QUESTION[:14], QUESTION[14:]])
    network.wait(lambda _is_up: None)
    length = network.read([buffer[:14], buffer[14:]])
    assert length >= 42
    assert bytes(buffer[20:22]) == b"\0\2"


def test_what_does_not_fit_is_lost_and_the_next_frame_is_whole(plug: Plug) -> None:
    network = plug()
    guest = TinyGuest(network)
    buffer = memoryview(bytearray(10))
    network.write([QUESTION])
    network.wait(lambda _is_up: None)
    assert network.read([buffer]) == len(buffer)
    guest.find_router()


def test_a_frame_that_the_mtu_does_not_allow_is_lost(plug: Plug) -> None:
    network = plug(mtu=1500)
    assert network.mtu == 1500
    network.write([memoryview(bytes(1518))])
    with pytest.raises(OSError, match="a frame of 1519 bytes") as caught:
        network.write([memoryview(bytes(1519))])
    assert caught.value.errno == errno.EMSGSIZE
    assert TinyGuest(network).ask_for_address()[0] == user.GUEST_ADDRESS


def test_frames_are_lost_while_nobody_takes_them(plug: Plug, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user, "WRITE_PATIENCE", 0.01)
    network = plug()
    program_of(network).signal(signal.SIGSTOP)
    frame = memoryview(bytes(60000))

    def write_many() -> None:
        for _ in range(10000):
            network.write([frame])

    with pytest.raises(OSError, match="takes no frames") as caught:
        write_many()
    assert caught.value.errno == errno.ENOBUFS
    assert network.is_up()
    program_of(network).signal(signal.SIGCONT)
    assert network._poll(select.POLLOUT, PATIENCE)
    monkeypatch.setattr(user, "WRITE_PATIENCE", PATIENCE)
    assert TinyGuest(network).ask_for_address()[0] == user.GUEST_ADDRESS


def test_a_program_that_takes_nothing_is_waited_for_once(plug: Plug, monkeypatch: pytest.MonkeyPatch) -> None:
    """And again as soon as it has taken something."""
    network = plug()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    waits: list[float | None] = []

    def poll(_events: int, seconds: float | None) -> bool:
        waits.append(seconds)
        return False

    monkeypatch.setattr(network, "_poll", poll)
    with ours, theirs:
        ours.setblocking(False)
        monkeypatch.setattr(network, "_fd", ours.fileno())
        for count in (1, 2):
            frames = 0
            while len(waits) < count:
                with suppress(OSError):
                    network.write([QUESTION])
                    frames += 1
            for _ in range(10):
                with pytest.raises(OSError, match="takes no frames"):
                    network.write([QUESTION])
            assert waits == [user.WRITE_PATIENCE] * count
            for _ in range(frames):
                theirs.recv(100)
            network.write([QUESTION])
            theirs.recv(100)


def test_a_program_that_takes_a_frame_late_gets_it(plug: Plug, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for every time that there is no room, since it took the frame before."""
    network = plug()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    waits = 0

    def poll(_events: int, _seconds: float | None) -> bool:
        nonlocal waits
        waits += 1
        return bool(theirs.recv(100))

    monkeypatch.setattr(network, "_poll", poll)
    with ours, theirs:
        ours.setblocking(False)
        monkeypatch.setattr(network, "_fd", ours.fileno())
        while waits < 2:
            network.write([QUESTION])


# ---- Fragments ----

#: An echo request with 2900 bytes, and the header that its fragments have in common.
ECHO = b"\x08\0" + checksum(b"\x08\0\0\0\0\1\0\1" + bytes(2900)) + b"\0\1\0\1" + bytes(2900)
MORE, RESERVED = 0x2000, 0x8000


def fragment(offset: int, end: int, flags: int = 0, *, ttl: int = 64, error: int = 0) -> bytes:
    """A piece of ECHO, in a frame; ``error`` is what its checksum is wrong by."""
    length = 20 + end - offset
    before = struct.pack("!BBHHHBB", 0x45, 0, length, 7, flags | offset // 8, ttl, socket.IPPROTO_ICMP)
    addresses = socket.inet_aton(user.GUEST_ADDRESS) + socket.inet_aton(ROUTER)
    right = int.from_bytes(checksum(before + bytes(2) + addresses))
    header = before + (right ^ error).to_bytes(2) + addresses
    return bytes.fromhex("52550a000202 52540a0b0c0d 0800") + header + ECHO[offset:end]


FIRST, MIDDLE, LAST = fragment(0, 1480, MORE), fragment(1480, 2400, MORE), fragment(2400, len(ECHO))


def write_each(network: UserNetwork, frames: list[bytes]) -> None:
    """Writes them; what the wire loses is lost."""
    for frame in frames:
        with suppress(OSError):
            network.write([memoryview(frame)[:21], memoryview(frame)[21:]])


def test_a_packet_in_fragments_arrives(plug: Plug) -> None:
    guest = TinyGuest(network := plug(mtu=1500))
    guest.find_router()
    write_each(network, [FIRST, MIDDLE, LAST])
    answer = b""
    while len(answer) < len(ECHO):
        answer += guest.receive_packet().payload
    assert (answer[0], answer[4:]) == (0, ECHO[4:])


#: The rest after FIRST.
REST = fragment(1480, len(ECHO))


@pytest.mark.parametrize(
    "frames",
    [
        pytest.param([LAST], id="the last alone"),
        pytest.param([FIRST, MIDDLE, LAST, LAST], id="the last twice"),
        pytest.param([LAST, FIRST, MIDDLE], id="out of order"),
        pytest.param([FIRST, LAST, MIDDLE, LAST], id="after a gap"),
        pytest.param([fragment(0, 1480, MORE, error=1), REST], id="after one with a wrong checksum"),
        pytest.param([fragment(0, 1480, MORE, ttl=0), REST], id="after one that has no time to live"),
        pytest.param([FIRST, fragment(0, 100, RESERVED), REST], id="after the first was given up"),
    ],
)
def test_no_fragments_end_the_program(plug: Plug, frames: list[bytes]) -> None:
    """It does not live through any of these with libslirp 4.7.0."""
    network = plug(mtu=1500)
    write_each(network, [*frames, bytes(QUESTION)])
    guest = TinyGuest(network)
    while guest.receive()[0] != ARP:  # first it may answer a packet that was complete
        pass
    assert network.is_up()


def test_a_guest_cannot_change_what_was_looked_at(plug: Plug, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here it makes a fragment of a packet just before it is written."""
    network = plug(mtu=1500)
    memory = bytearray(fragment(0, 100))
    writev = os.writev

    def change_and_write(fd: int, pieces: list[bytes | memoryview]) -> int:
        memory[20:22] = LAST[20:22]
        memory[24:26] = bytes(2)
        return writev(fd, pieces)

    monkeypatch.setattr(os, "writev", change_and_write)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        monkeypatch.setattr(network, "_fd", ours.fileno())
        network.write([memoryview(memory)])
        assert theirs.recv(2000)[12:22] == fragment(0, 100)[12:22]


def test_when_the_program_is_killed_the_wire_is_gone(plug: Plug) -> None:
    network = plug()
    assert network.is_up()
    program = program_of(network)
    program.signal(signal.SIGKILL)
    assert program.has_ended(PATIENCE)
    network.wait(lambda _is_up: None)
    assert not network.is_up()
    with pytest.raises(WireGone):
        network.read([memoryview(bytearray(2000))])
    with pytest.raises(WireGone):
        network.write([memoryview(bytes(60))])
    assert children.how_it_ended(program.reap()) == "was killed by SIGKILL"
    network.helper_ended()
    assert network.helper is None
    network.close()  # has nobody to end


# ---- The program ----


def test_ps_tells_whose_it_is(plug: Plug) -> None:
    words = Path(f"/proc/{program_of(plug()).pid}/cmdline").read_bytes().split(b"\0")
    assert words[0] == b"lguest[demo] net0/slirp4netns"


def test_debians_program_runs_without_being_installed_and_keeps_its_name(
    slirp: Slirp, plug: Plug, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(slirp.directory))
    network = plug()
    assert Path(f"/proc/{program_of(network).pid}/cmdline").read_bytes().startswith(b"lguest[demo] net0/slirp4netns\0")
    assert TinyGuest(network).ask_for_address()[0] == user.GUEST_ADDRESS


def test_it_has_no_files_of_ours(plug: Plug) -> None:
    with tempfile.TemporaryFile() as ours:
        os.set_inheritable(ours.fileno(), True)
        files = Path(f"/proc/{program_of(plug()).pid}/fd")
        targets = {int(each.name): os.readlink(each) for each in files.iterdir()}
    assert targets.pop(0) == targets.pop(1) == os.devnull
    assert all(target.startswith(("socket:", "pipe:")) for target in targets.values())


def test_it_does_not_speak_for_the_service_that_it_is_part_of(start: Plug, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/no/such/socket")
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    network = start()
    network.connect()
    assert network.helper is not None
    variables = Path(f"/proc/{network.helper.pid}/environ").read_bytes().split(b"\0")
    names = {each.partition(b"=")[0] for each in variables}
    assert b"PATH" in names
    assert not names & {b"NOTIFY_SOCKET", b"WATCHDOG_USEC", b"WATCHDOG_PID"}


def test_the_terminals_signals_do_not_reach_it(plug: Plug) -> None:
    program = program_of(plug())
    assert os.getpgid(program.pid) == program.pid
    assert os.getsid(program.pid) == os.getsid(0)


def test_it_may_execute_nothing(plug: Plug) -> None:
    status = Path(f"/proc/{program_of(plug()).pid}/status").read_text()
    assert "Seccomp:\t2\n" in status


def test_it_runs_as_the_user_that_the_guest_runs_as(plug: Plug, nobody: User) -> None:
    network = plug(who=nobody)
    status = Path(f"/proc/{program_of(network).pid}/status").read_text()
    assert "Uid:\t65534\t65534\t65534\t65534\nGid:\t65534\t65534\t65534\t65534\n" in status
    assert not list(runtime.directory(nobody).glob(f"user-{os.getpid()}-*"))
    assert TinyGuest(network).ask_for_address()[0] == user.GUEST_ADDRESS


def test_it_lives_and_ends_under_a_launcher_whose_parent_ignores_its_children(plug: Plug) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        network = plug()
        assert TinyGuest(network).ask_for_address()[0] == user.GUEST_ADDRESS
        network.close()
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_close_ends_it_even_if_it_is_stopped(plug: Plug) -> None:
    network = plug()
    program = program_of(network)
    program.signal(signal.SIGSTOP)
    network.close()
    assert not Path(f"/proc/{program.pid}").exists()
    network.close()


@pytest.mark.parametrize("connects", [False, True], ids=["while it starts", "when it serves"])
def test_nothing_of_it_is_left_when_the_launcher_is_killed(
    place: Path, path: str, connects: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()

    def say_and_hang(network: UserNetwork) -> bool:
        os.write(writer, str(program_of(network).pid).encode())
        signal.pause()
        return False

    def launch() -> int:
        network = UserNetwork(UserConfig(), None, "demo", "net0")
        if not connects:
            # It has said something: it waits for us, as two processes.
            tries = iter([False])

            def try_to_connect() -> bool:
                for result in tries:
                    return result
                return say_and_hang(network)

            monkeypatch.setattr(network, "_try_to_connect", try_to_connect)
        network.connect()
        say_and_hang(network)
        return 0

    launcher = children.fork("launcher", launch)
    os.close(writer)
    group = int(os.read(reader, 20))
    os.close(reader)
    members = [pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if in_group(pid, group)]
    assert len(members) == (1 if connects else 2)
    ends = [Child("", pid, os.pidfd_open(pid)) for pid in members]
    launcher.signal(signal.SIGKILL)
    launcher.reap()
    for each in ends:
        assert each.has_ended(PATIENCE)
        os.close(each.pidfd)


def in_group(pid: int, group: int) -> bool:
    try:
        return os.getpgid(pid) == group
    except ProcessLookupError:
        return False


# ---- What can go wrong ----


def test_it_works_in_a_directory_whose_name_is_too_long_for_a_socket(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("a" * 100) / ("b" * 100)
    deep.mkdir(parents=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    network = UserNetwork(UserConfig((Forward("tcp", "127.0.0.1", free_port(), 22),)), None, "demo", "net0")
    network.connect()
    network.close()
    assert not list((deep / "lguest").iterdir())


def test_a_program_that_is_not_installed(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LguestError, match=r"--net=user needs slirp4netns.*apt install slirp4netns.*or take --net=tap"):
        UserNetwork(UserConfig(), None, "demo", "net0")


def test_a_port_that_is_taken(start: Plug, server: socket.socket) -> None:
    port = server.getsockname()[1]
    network = start(Forward("tcp", "127.0.0.1", port, 22))
    program = program_of(network)
    with pytest.raises(
        LguestError, match=f"--net=user,forward=tcp:127.0.0.1:{port}:22: that port of the host is taken"
    ):
        network.connect()
    assert not Path(f"/proc/{program.pid}").exists()


def test_an_address_that_is_not_the_hosts(start: Plug) -> None:
    with pytest.raises(LguestError, match=r"forward=udp:192.0.2.77:2222:22: that is no address of this host"):
        start(Forward("udp", "192.0.2.77", 2222, 22)).connect()


def test_a_port_that_is_not_for_that_user(start: Plug, nobody: User) -> None:
    if int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) <= 81:
        pytest.skip("this host lets everybody have every port")
    with pytest.raises(LguestError, match=r"forward=tcp:127.0.0.1:81:80: that port of the host is for root"):
        start(Forward("tcp", "127.0.0.1", 81, 80), who=nobody).connect()


def test_an_mtu_that_no_network_has(start: Plug) -> None:
    with pytest.raises(LguestError, match="--net=user,mtu=65522: give 68 to 65521"):
        start(mtu=65522)


def test_a_program_that_ends_at_once_is_quoted(start: Plug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, monkeypatch, "echo 'unrecognized option --target-type' >&2", "exit 3")
    with pytest.raises(
        LguestError, match=r"^--net=user: slirp4netns exited with status 3: unrecognized option --target-type$"
    ):
        start().connect()


def test_a_program_that_does_nothing(start: Plug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, monkeypatch, "echo dreaming >&2", "exec sleep 1000")
    monkeypatch.setattr(user, "START_PATIENCE", 0.1)
    network = start()
    program = program_of(network)
    with pytest.raises(LguestError, match=r"^--net=user: slirp4netns does not answer: dreaming$"):
        network.connect()
    assert not Path(f"/proc/{program.pid}").exists()


def test_a_program_that_cannot_be_executed(start: Plug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, monkeypatch)
    (tmp_path / user.PROGRAM).write_text("#!/nowhere\n")
    with pytest.raises(LguestError, match=r"slirp4netns exited with status 69: .*: No such file or directory"):
        start().connect()


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(
    "complaint",
    ["cannot unshare new mount namespace\ncreate_sandbox failed\ndo_slirp is exiting", "enable_seccomp failed"],
    ids=["sandbox", "seccomp"],
)
def test_where_the_host_forbids_what_protects_it_it_runs_without(
    plug: Plug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], complaint: str
) -> None:
    """The user is told, once."""
    real = shutil.which(user.PROGRAM)
    refusal = f'case "$*" in *--enable-*) echo "{complaint}" >&2; exit 1;; esac'
    fake(tmp_path, monkeypatch, refusal, f'exec {real} "$@"')
    assert TinyGuest(plug()).ask_for_address()[0] == user.GUEST_ADDRESS
    said = complaint.replace("\n", "; ")
    assert capfd.readouterr().err == f"lguest: --net=user: slirp4netns runs without seccomp and sandbox: {said}\n"


@pytest.mark.parametrize(
    "end",
    [
        "kill -KILL $$",
        "exit 1",
        # What it says in front of that, and when all is well.
        "echo 'sandbox: /etc/resolv.conf (-> /a) seems a symlink to a file outside {/etc, /run}.' >&2; kill -KILL $$",
        "echo 'seccomp: WARNING: a test' >&2; exit 1",
    ],
)
def test_whatever_else_ends_it_it_keeps_its_protection(
    start: Plug, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    real = shutil.which(user.PROGRAM)
    fake(tmp_path, monkeypatch, f'case "$*" in *--enable-*) {end};; esac', f'exec {real} "$@"')
    with pytest.raises(LguestError, match=r"^--net=user: slirp4netns (exited with status 1|was killed by SIGKILL)"):
        start().connect()


def test_a_host_without_files_to_spare(start: Plug, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pipe2(_flags: int) -> tuple[int, int]:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "pipe2", pipe2)
    with pytest.raises(LguestError, match=r"^--net=user: cannot start slirp4netns: Too many open files$"):
        start()
