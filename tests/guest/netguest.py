"""A guest's end of its network: what the tests do in it, and what they see there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from guestkit import traffic
from guestkit.disk import MIB
from guestkit.guest import Guest
from guestkit.session import PATIENCE

#: Where what a guest was sent is kept.
STORED = "/tmp/stored"


def configure(guest: Guest, address: str, interface: str = "eth0") -> None:
    """Loads the driver, brings the interface up and gives it ``address/prefix``."""
    guest.run(f"modprobe -q virtio_net; ip link set {interface} up && ip addr add {address} dev {interface}")


def mac_of(guest: Guest, interface: str = "eth0") -> str:
    """The interface's MAC address, as Linux writes it."""
    return guest.run(f"cat /sys/class/net/{interface}/address").strip()


def ping(guest: Guest, address: str, count: int = 3) -> None:
    """Has the guest ping ``address``; every reply comes."""
    answer = guest.run(f"ping -A -q -c {count} {address}")
    assert f"{count} packets received, 0% packet loss" in answer


def wait_for_carrier(guest: Guest, up: bool, interface: str = "eth0") -> None:
    """Waits until the guest sees that its cable is plugged in, or that it is not."""
    carrier = f"/sys/class/net/{interface}/carrier"
    guest.run(f"for i in $(seq 1000); do [ $(cat {carrier}) = {up:d} ] && exit 0; usleep 10000; done; exit 1")


@contextmanager
def pinging(guest: Guest, address: str) -> Iterator[None]:
    """While this lasts, the guest pings ``address``, many times a second, and does other things, too: none is lost."""
    pings = f"until [ -e /tmp/stop ]; do ping -i 0.02 -q -c 25 {address}; done >/tmp/pings 2>&1"
    guest.run(f"rm -f /tmp/stop /tmp/pinged; ({pings}; mv /tmp/pings /tmp/pinged) &")
    yield
    guest.run("touch /tmp/stop; until [ -e /tmp/pinged ]; do usleep 10000; done")
    losses = [line for line in guest.run("cat /tmp/pinged").splitlines() if "packet loss" in line]
    assert losses
    assert all("25 packets received, 0% packet loss" in line for line in losses), losses


@dataclass(frozen=True)
class Traffic:
    """What went through an interface: frames, and the bytes in them."""

    received: int
    received_bytes: int
    sent: int
    sent_bytes: int

    def __sub__(self, before: Traffic) -> Traffic:
        return Traffic(
            self.received - before.received,
            self.received_bytes - before.received_bytes,
            self.sent - before.sent,
            self.sent_bytes - before.sent_bytes,
        )


def traffic_of(guest: Guest, interface: str = "eth0") -> Traffic:
    """What the guest counted so far."""
    names = ("rx_packets", "rx_bytes", "tx_packets", "tx_bytes")
    answer = guest.run(f"cd /sys/class/net/{interface}/statistics && cat {' '.join(names)}")
    return Traffic(*map(int, answer.split()))


def fetch(guest: Guest, data: bytes, host: str, here: str = "0.0.0.0") -> None:
    """The guest connects to ``host``, which is us (at ``here``), and stores ``data``: nothing is lost or changed."""
    with traffic.listener(here) as listening:
        number = guest.agent.start(traffic.guest_connects(host, traffic.port_of(listening), "receive", STORED))
        with traffic.accepted(listening) as connection:
            connection.sendall(data)
        assert int(guest.agent.finish(number)) == len(data)
    assert_stored(guest, data)


def give(guest: Guest, data: bytes, host: str, here: str = "0.0.0.0") -> None:
    """The guest connects to ``host``, which is us (at ``here``), and sends what it stored: that is ``data``."""
    with traffic.listener(here) as listening:
        number = guest.agent.start(traffic.guest_connects(host, traffic.port_of(listening), "send", STORED))
        with traffic.accepted(listening) as connection:
            came = traffic.checksum_of_the_rest(connection)
        assert int(guest.agent.finish(number)) == len(data)
    assert came == (len(data), hashlib.sha256(data).hexdigest())


def copy(sender: Guest, receiver: Guest, address: str, mebibytes: int) -> None:
    """One guest makes random bytes, stores them and sends them to the other one at ``address``, which has them then."""
    sender.run(traffic.guest_makes(STORED, mebibytes))
    waiting = receiver.agent.start(traffic.guest_listens(5000, "receive", STORED))
    receiver.wait_for(traffic.LISTENING)
    sender.run(traffic.guest_connects(address, 5000, "send", STORED))
    assert int(receiver.agent.finish(waiting)) == mebibytes * MIB
    sums = {guest.run(f"sha256sum <{STORED}") for guest in (sender, receiver)}
    assert len(sums) == 1


def assert_stored(guest: Guest, data: bytes) -> None:
    """What the guest stored is ``data``."""
    assert guest.run(f"sha256sum <{STORED}", PATIENCE).split()[0] == hashlib.sha256(data).hexdigest()
