"""The network: TCP between guest and host over a tap, and pings."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from guestkit import traffic
from guestkit.measures.bench import AnyGuest, Bench, Row
from guestkit.namespaces import Namespace, obstacle
from guestkit.progress import step

#: What goes through a TCP connection, in MiB, and how many pings there are in a row.
_STREAM_SIZE = 256
_PINGS = 2000


def net(bench: Bench) -> Iterator[Row]:
    """TCP between guest and host over a tap, both ways, and pings; left out where no tap can be made.

    QEMU moves the frames itself (no vhost), with all its offloads.
    """
    if reason := obstacle():
        step(f"net is left out: {reason}")
        return
    initrd = bench.initrd.with_name("net.img")
    initrd.write_bytes(bench.initrd.read_bytes() + bench.kit.sysroot.archive())
    bench = replace(bench, initrd=initrd)
    with (
        Namespace() as host,
        host.entered(),
        bench.both("--net=tap,ip=10.1.0.1/24,interface=ours", tap="theirs") as guests,
    ):
        host.set_address("theirs", "10.2.0.1")
        host.set_up("theirs")
        ends = [_End(guests[0], "10.1.0"), _End(guests[1], "10.2.0")]
        for end in ends:
            end.configure()
        for name, transfer in (("TCP to the guest", _End.read), ("TCP from the guest", _End.send)):
            rounds = [[transfer(end) for end in ends] for _ in range(bench.rounds)]
            ours, theirs = zip(*rounds, strict=True)
            our_speed, their_speed = (tuple(stream.speed for stream in side) for side in (ours, theirs))
            yield Row(name, "MiB/s", our_speed, their_speed, goal=1.0, more_is_better=True)
            our_packets, their_packets = (tuple(stream.per_interrupt for stream in side) for side in (ours, theirs))
            yield Row("- packets per interrupt", "", our_packets, their_packets, more_is_better=True)
        times = [[end.round_trip() for end in ends] for _ in range(bench.rounds)]
        our_times, their_times = zip(*times, strict=True)
        yield Row("ping round trip", "us", our_times, their_times, goal=1.0)


@dataclass(frozen=True)
class _Stream:
    """How fast many bytes went through, in MiB/s, and how many packets there were to an interrupt of their queue."""

    speed: float
    per_interrupt: float


@dataclass(frozen=True)
class _End:
    """A guest at the end of a tap: in its ``network`` (``10.1.0``) the host is number 1, and it is number 2."""

    guest: AnyGuest
    network: str

    def configure(self) -> None:
        """Loads the driver and gives the interface its address; each side learns where the other one is."""
        address = f"{self.network}.2/24"
        self.guest.agent.run(f"modprobe -q virtio_net; ip link set eth0 up && ip addr add {address} dev eth0")
        self.round_trip()

    def read(self) -> _Stream:
        """The host sends, the guest reads."""
        return self._transfer(traffic.guest_reads, traffic.seconds_to_send, "rx_packets", "input")

    def send(self) -> _Stream:
        """The guest sends, the host reads."""
        return self._transfer(traffic.guest_sends, traffic.seconds_to_receive, "tx_packets", "output")

    def round_trip(self) -> float:
        """How long a ping takes, program and all, in microseconds by the host's clock."""
        started = time.monotonic()
        self.guest.agent.run(f"ping -A -q -c {_PINGS} {self.network}.1")
        return (time.monotonic() - started) / _PINGS * 1e6

    def _transfer(
        self,
        in_guest: Callable[[str, int, int], str],
        here: Callable[[socket.socket, int], float],
        counter: str,
        queue: str,
    ) -> _Stream:
        packets, interrupts = self._counts(counter, queue)
        host = f"{self.network}.1"
        with traffic.listener(host) as listening:
            number = self.guest.agent.start(in_guest(host, traffic.port_of(listening), _STREAM_SIZE))
            with traffic.accepted(listening) as connection:
                seconds = here(connection, _STREAM_SIZE)
            self.guest.agent.finish(number)
        packets_after, interrupts_after = self._counts(counter, queue)
        return _Stream(_STREAM_SIZE / seconds, (packets_after - packets) / max(1, interrupts_after - interrupts))

    def _counts(self, counter: str, queue: str) -> tuple[int, int]:
        """Packets and interrupts of a queue so far."""
        answer = self.guest.agent.run(
            f"cat /sys/class/net/eth0/statistics/{counter}; awk '/-{queue}/ {{ print $2 }}' /proc/interrupts"
        )
        packets, interrupts = map(int, answer.split())
        return packets, interrupts
