"""A network of the user's own, without any privileges: outgoing connections, DHCP, and ports that lead to the guest."""

from __future__ import annotations

import os
import random
import re
import signal
import socket

import pytest
from netguest import STORED, assert_stored, fetch, give, ping, wait_for_carrier

from guestkit import traffic
from guestkit.disk import MIB
from guestkit.guest import Guest, Launch

#: Where a guest finds its host, if it may.
GATEWAY = "10.0.2.2"


def free_port(kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    """A port of 127.0.0.1 that nobody has."""
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return traffic.port_of(probe)


def get_address(guest: Guest) -> str:
    """Has the guest ask for an address; what it got."""
    guest.run("modprobe -q virtio_net; udhcpc -q -n -f -i eth0 >/dev/null 2>&1")
    found = re.search(r"inet (\S+)", guest.run("ip -4 addr show dev eth0"))
    assert found
    return found[1]


def test_dhcp_and_outgoing_connections(launch: Launch, with_slirp: dict[str, str]) -> None:
    guest = launch("--net=user,loopback=on", tools=True, variables=with_slirp)
    guest.boot()
    assert get_address(guest) == "10.0.2.15/24"
    assert f"default via {GATEWAY}" in guest.run("ip route")
    data = random.Random(7).randbytes(16 * MIB)
    fetch(guest, data, GATEWAY, here="127.0.0.1")
    give(guest, data, GATEWAY, here="127.0.0.1")
    guest.agent.start("reboot -f")
    guest.boot()
    assert get_address(guest) == "10.0.2.15/24"
    guest.power_off()


def test_a_port_that_leads_to_the_guest(launch: Launch, with_slirp: dict[str, str]) -> None:
    tcp = free_port()
    guest = launch(f"--net=user,forward=tcp:{tcp}:2222", tools=True, variables=with_slirp)
    guest.boot()
    get_address(guest)
    data = random.Random(8).randbytes(8 * MIB)
    number = guest.agent.start(traffic.guest_listens(2222, "receive", STORED))
    guest.wait_for(traffic.LISTENING)
    with socket.create_connection(("127.0.0.1", tcp)) as connection:
        connection.sendall(data)
    assert int(guest.agent.finish(number)) == len(data)
    assert_stored(guest, data)

    # Who may come in need not be reached from there.
    with traffic.listener("127.0.0.1") as listening:
        port = traffic.port_of(listening)
        assert guest.run(f"nc -w 2 {GATEWAY} {port} </dev/null >/dev/null 2>&1 || echo refused") == "refused\n"
        listening.setblocking(False)
        with pytest.raises(BlockingIOError):
            listening.accept()
    guest.power_off()


def test_a_port_for_datagrams(launch: Launch, with_slirp: dict[str, str]) -> None:
    udp = free_port(socket.SOCK_DGRAM)
    guest = launch(f"--net=user,loopback=on,forward=udp:{udp}:7", tools=True, variables=with_slirp)
    guest.boot()
    get_address(guest)
    number = guest.agent.start(traffic.guest_echoes(7))
    guest.wait_for(traffic.LISTENING)
    assert traffic.exchange_datagrams(("127.0.0.1", udp), 1000, window=8) == traffic.EchoResult(1000, 1000)
    assert int(guest.agent.finish(number)) == 1000
    guest.power_off()


def test_an_ordinary_users_guest(launch_unprivileged: Launch, with_slirp: dict[str, str]) -> None:
    guest = launch_unprivileged("--net=user,loopback=on", variables=with_slirp)
    guest.boot()
    assert get_address(guest) == "10.0.2.15/24"
    with traffic.listener("127.0.0.1") as listening:
        number = guest.agent.start(f"nc {GATEWAY} {traffic.port_of(listening)} </dev/null")
        with traffic.accepted(listening) as connection:
            connection.sendall(b"hello\n")
        assert guest.agent.finish(number) == "hello\n"
    guest.power_off()


def test_nothing_is_left_of_it_when_the_launcher_is_killed(launch: Launch, with_slirp: dict[str, str]) -> None:
    guest = launch("--net=user", variables=with_slirp)
    guest.boot()
    get_address(guest)
    guest.signal(signal.SIGKILL)
    guest.wait()
    guest.wait_until_gone(1.0)


def test_a_guest_outlives_its_network(launch: Launch, with_slirp: dict[str, str]) -> None:
    guest = launch("--net=user", variables=with_slirp)
    guest.boot()
    get_address(guest)
    ping(guest, GATEWAY)
    os.kill(guest.members()["net0/slirp4netns"], signal.SIGKILL)
    wait_for_carrier(guest, up=False)
    assert guest.run(f"ping -c 2 -W 1 {GATEWAY} >/dev/null || echo still here") == "still here\n"
    assert [line for line in guest.output.splitlines() if line.startswith("lguest: net0/slirp4netns")]
    guest.power_off()


def test_without_the_program_one_line_says_what_to_install(launch: Launch) -> None:
    guest = launch("--net=user", variables={"PATH": "/nonexistent"})
    assert guest.wait() == 1
    (line,) = guest.output.splitlines()
    assert "apt" in line
    assert "slirp4netns" in line
