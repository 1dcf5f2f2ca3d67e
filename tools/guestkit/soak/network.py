"""A network's workers die while 256 MiB go through a TCP connection each way, and every byte is right."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from guestkit import traffic
from guestkit.deaths import Killer
from guestkit.disk import MIB
from guestkit.guest import Guest
from guestkit.namespaces import Namespace, obstacle
from guestkit.scripts import command
from guestkit.soak.plan import Plan, Report, Room, Unsuitable, killer, require_no_complaints

#: What goes through a connection, in MiB.
SIZE = 256
#: How long a transfer may take.
_TRANSFERRING = 600.0
_WORKERS = ("net0/receiveq", "net0/transmitq")
_CHUNK = 65536
#: Where one guest listens for another.
_PORT = 5000


@dataclass(frozen=True)
class _Route:
    """The guest's address, the host's as the guest has it, and the one at which the host listens."""

    guest: str
    host: str
    here: str


def tap(room: Room, plan: Plan, size: int = SIZE) -> Report:
    """To and from the host, over a tap in a network of its own."""
    if reason := obstacle():
        raise Unsuitable(reason)
    with Namespace() as host, host.entered(), room.guest(plan, "--net=tap,ip=10.1.0.1/24") as guest:
        return _with_host(guest, plan, size, _Route("10.1.0.2/24", "10.1.0.1", "10.1.0.1"))


def user(room: Room, plan: Plan, size: int = SIZE) -> Report:
    """To and from the host, through slirp4netns."""
    variables = {"PATH": room.kit.slirp.search_path()}
    with room.guest(plan, "--net=user,loopback=on", variables=variables) as guest:
        return _with_host(guest, plan, size, _Route("10.0.2.15/24", "10.0.2.2", "127.0.0.1"))


def link(room: Room, plan: Plan, size: int = SIZE) -> Report:
    """From one guest to another one and back; the workers of both die."""
    with tempfile.TemporaryDirectory(prefix="lguest-soak-") as runtime:
        others = {"variables": {"XDG_RUNTIME_DIR": runtime}}
        with (
            room.guest(plan, "--net=link:soak", name="one", **others) as one,
            room.guest(plan, "--net=link:soak", name="two", **others) as two,
        ):
            killers = []
            for number, (guest, address) in enumerate(((one, "10.1.0.1"), (two, "10.1.0.2"))):
                _configure(guest, f"{address}/24")
                killers.append(killer(guest, replace(plan, seed=plan.seed + number), *_WORKERS))
            pairs = [(one, two, "10.1.0.2"), (two, one, "10.1.0.1")]
            rounds = _Rounds(plan, killers)
            transfers = 0
            while transfers < len(pairs) or rounds.go_on():
                _between(*pairs[transfers % len(pairs)], size, rounds)
                transfers += 1
            report = Report(
                {f"killed in {guest.name}": each.toll for guest, each in zip((one, two), killers, strict=True)}
            )
            report["transferred"] = f"{transfers} times {size} MiB"
            for guest in (one, two):
                require_no_complaints(guest)
                guest.power_off()
    return report


class _Rounds:
    """Deaths until a transfer is over: the plan's, and for what is left of a transfer after that, none."""

    def __init__(self, plan: Plan, killers: list[Killer]) -> None:
        self._rounds = plan.rounds()
        self._killers = killers
        self._choose = plan.choose()
        self._over = False

    def go_on(self) -> bool:
        """Whether the plan has more."""
        return not self._over

    def until(self, is_done: Callable[[], bool]) -> None:
        """Kills until then."""
        while not is_done() and not self._over:
            self._over = next(self._rounds, None) is None
            if not self._over:
                self._choose.choice(self._killers).kill()


def _configure(guest: Guest, address: str) -> None:
    guest.boot()
    guest.run(f"modprobe -q virtio_net; ip link set eth0 up && ip addr add {address} dev eth0")


def _with_host(guest: Guest, plan: Plan, size: int, route: _Route) -> Report:
    """To and from the host, once at least and until the plan is done."""
    _configure(guest, route.guest)
    killing = killer(guest, plan, *_WORKERS)
    rounds = _Rounds(plan, [killing])
    transfers = 0
    while transfers < 2 or rounds.go_on():
        (_from_guest if transfers % 2 else _to_guest)(guest, size, route, rounds)
        transfers += 1
    require_no_complaints(guest)
    guest.power_off()
    return Report({"killed": killing.toll, "transferred": f"{transfers} times {size} MiB"})


def _to_guest(guest: Guest, size: int, route: _Route, rounds: _Rounds) -> None:
    with traffic.listener(route.here) as listening, ThreadPoolExecutor(1) as pool:
        sent = pool.submit(send_stream, listening, size)
        number = guest.agent.start(
            command("stream", "connect", route.host, traffic.port_of(listening), "receive", size)
        )
        rounds.until(sent.done)
        guest.agent.finish(number, seconds=_TRANSFERRING)
        sent.result()


def _from_guest(guest: Guest, size: int, route: _Route, rounds: _Rounds) -> None:
    with traffic.listener(route.here) as listening, ThreadPoolExecutor(1) as pool:
        came = pool.submit(receive_stream, listening, size)
        number = guest.agent.start(command("stream", "connect", route.host, traffic.port_of(listening), "send", size))
        rounds.until(came.done)
        guest.agent.finish(number, seconds=_TRANSFERRING)
        came.result()


def _between(sender: Guest, receiver: Guest, address: str, size: int, rounds: _Rounds) -> None:
    """From guest to guest, the receiver being at ``address``."""
    receiving = receiver.agent.start(command("stream", "listen", address, _PORT, "receive", size))
    receiver.wait_for(traffic.LISTENING)
    sending = sender.agent.start(command("stream", "connect", address, _PORT, "send", size))
    rounds.until(lambda: sender.agent.has_finished(sending))
    sender.agent.finish(sending, seconds=_TRANSFERRING)
    receiver.agent.finish(receiving, seconds=_TRANSFERRING)


def chunks(base: bytes, size: int) -> Iterator[bytes]:
    """The stream of so many MiB that begins with ``base`` (perl/stream.pl)."""
    pattern = int.from_bytes(base, "big")
    for number in range(size * MIB // _CHUNK):
        yield (pattern ^ int.from_bytes(number.to_bytes(4, "big") * (_CHUNK // 4), "big")).to_bytes(_CHUNK, "big")


def send_stream(listening: socket.socket, size: int) -> None:
    """Sends a stream to who connects, and waits until all of it is read."""
    with traffic.accepted(listening) as connection:
        for chunk in chunks(os.urandom(_CHUNK), size):
            connection.sendall(chunk)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)


def receive_stream(listening: socket.socket, size: int) -> None:
    """Receives a stream from who connects, and compares every byte."""
    with traffic.accepted(listening) as connection, connection.makefile("rb") as stream:
        base = stream.read(_CHUNK)
        for number, chunk in enumerate(chunks(base, size)):
            came = base if number == 0 else stream.read(_CHUNK)
            assert came == chunk, f"the 64 KiB number {number} from the guest are wrong ({len(came)} bytes)"
        assert not stream.read(1), "more came from the guest than was sent"
