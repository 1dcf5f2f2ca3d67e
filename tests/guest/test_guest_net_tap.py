"""A guest on a tap, in a network of its own: the seed's ``--tunnet`` and the long form of it."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from netguest import configure, copy, fetch, give, mac_of, ping, pinging, traffic_of, wait_for_carrier

from guestkit import traffic
from guestkit.disk import MIB
from guestkit.guest import Guest, Launch
from guestkit.namespaces import Namespace

HOST = "10.1.0.1"
GUEST = "10.1.0.2"
REBINDS = 20


def launch_on_tap(launch: Launch, option: str = f"--tunnet={HOST}", *options: str, tools: bool = False) -> Guest:
    """A guest that has its address."""
    guest = launch(option, *options, tools=tools)
    guest.boot()
    configure(guest, f"{GUEST}/24")
    return guest


def told(guest: Guest) -> list[str]:
    """The lines in which the launcher says something of its network device."""
    return [line for line in guest.output.splitlines() if line.startswith("lguest") and "net0" in line]


def test_a_tap_with_the_address_and_the_mac_that_are_given(launch: Launch, host: Namespace) -> None:
    guest = launch_on_tap(launch, f"--tunnet={HOST}:02:00:00:00:00:07")
    assert mac_of(guest) == "02:00:00:00:00:07"
    assert (host.address("tap0"), host.netmask("tap0")) == (HOST, "255.0.0.0"), "as the address's class has it"
    ping(guest, HOST)
    assert set(guest.members()) >= {"net0/receiveq", "net0/transmitq"}
    guest.agent.start("reboot -f")
    guest.boot()
    configure(guest, f"{GUEST}/24")
    assert mac_of(guest) == "02:00:00:00:00:07"
    ping(guest, HOST)
    assert told(guest) == []
    guest.power_off()
    assert host.interfaces() == ["lo"]


def test_the_long_form(launch: Launch, host: Namespace) -> None:
    guest = launch_on_tap(
        launch,
        f"--net=tap,ip={HOST}/24,interface=wire7,mac=02:00:00:00:00:08,mtu=1280",
        *("--net=tap,ip=10.2.0.1", "--net=tap"),
    )
    assert set(host.interfaces()) == {"lo", "wire7", "tap0", "tap1"}
    assert (host.address("wire7"), host.netmask("wire7")) == (HOST, "255.255.255.0")
    assert guest.run("cat /sys/class/net/eth0/mtu") == "1280\n"
    configure(guest, "10.2.0.2/24", "eth1")
    ping(guest, HOST)
    ping(guest, "10.2.0.1")
    macs = [mac_of(guest, f"eth{number}") for number in range(3)]
    assert macs[0] == "02:00:00:00:00:08"
    assert len(set(macs)) == 3
    assert all(int(mac[:2], 16) & 3 == 2 for mac in macs), "made up, so locally administered; nobody's multicast"
    assert set(guest.members()) >= {f"net{number}/{queue}q" for number in range(3) for queue in ("receive", "transmit")}
    guest.power_off()
    assert host.interfaces() == ["lo"]


@pytest.mark.parametrize("offload", ["on", "off"])
def test_tcp_arrives_whole_both_ways(launch: Launch, host: Namespace, offload: str) -> None:
    guest = launch_on_tap(launch, f"--net=tap,ip={HOST},offload={offload}", tools=True)
    data = random.Random(6).randbytes(64 * MIB)
    before = traffic_of(guest)
    fetch(guest, data, HOST)
    give(guest, data, HOST)
    went = traffic_of(guest) - before
    longest = 1514
    if offload == "on":
        assert went.received_bytes / went.received > longest, "what is cut up comes in one piece"
        assert went.sent_bytes / went.sent > longest, "what is to be cut up goes in one piece"
    else:
        assert went.received_bytes / went.received <= longest
        assert went.sent_bytes / went.sent <= longest
    assert told(guest) == []
    guest.power_off()


def test_ten_thousand_small_packets(launch: Launch, host: Namespace) -> None:
    guest = launch_on_tap(launch, tools=True)
    ping(guest, HOST)
    before = traffic_of(guest)
    number = guest.agent.start(traffic.guest_echoes(7))
    guest.wait_for(traffic.LISTENING)
    result = traffic.exchange_datagrams((GUEST, 7), count=10_000, window=64)
    assert int(guest.agent.finish(number)) == 10_000
    assert result == traffic.EchoResult(sent=10_000, returned=10_000)
    went = traffic_of(guest) - before
    assert min(went.received, went.sent) >= 10_000
    guest.power_off()


def test_guests_on_a_bridge(launch: Launch, host: Namespace) -> None:
    host.make_bridge("br7")
    host.set_address("br7", HOST)
    one = launch("--tunnet=bridge:br7:02:00:00:00:00:0a", name="one", tools=True)
    one.boot()
    other = launch("--net=tap,bridge=br7", name="other", tools=True)
    other.boot()
    configure(one, "10.1.0.2/24")
    configure(other, "10.1.0.3/24")
    assert mac_of(one) == "02:00:00:00:00:0a"
    assert set(host.ports("br7")) == {"tap0", "tap1"}
    ping(one, HOST)
    ping(other, HOST)
    ping(one, "10.1.0.3")
    copy(one, other, "10.1.0.3", 16)
    copy(other, one, "10.1.0.2", 16)
    one.power_off()
    other.run("ip neigh flush dev eth0")  # a bridge's MAC address is one of its ports': it may have changed
    ping(other, HOST)
    assert set(host.interfaces()) == {"lo", "br7", "tap1"}
    other.power_off()
    assert set(host.interfaces()) == {"lo", "br7"}


def test_the_link_goes_down_and_up_with_the_tap(launch: Launch, host: Namespace) -> None:
    guest = launch_on_tap(launch)
    wait_for_carrier(guest, up=True)
    for _ in range(3):
        host.set_down("tap0")
        wait_for_carrier(guest, up=False)
        host.set_up("tap0")
        wait_for_carrier(guest, up=True)
        ping(guest, HOST)
    guest.power_off()


def test_a_guest_outlives_its_tap(launch: Launch, host: Namespace) -> None:
    guest = launch_on_tap(launch)
    with pinging(guest, HOST):
        pass
    guest.run(f"(while :; do ping -A -q -w 1 {HOST}; done) >/dev/null 2>&1 &")
    host.delete("tap0")
    wait_for_carrier(guest, up=False)
    assert guest.run(f"ping -c 2 -W 1 {HOST} >/dev/null || echo still here") == "still here\n"
    # A deleted interface is down first, and the transmitq's worker may have seen it then.
    assert len([line for line in told(guest) if not line.endswith("tap0 is down")]) == 1, guest.output
    guest.power_off()


def test_nothing_is_left_of_a_tap_when_the_launcher_is_killed(launch: Launch, host: Namespace) -> None:
    guest = launch_on_tap(launch)
    assert host.interfaces() == ["lo", "tap0"]
    guest.signal(signal.SIGKILL)
    guest.wait()
    guest.wait_until_gone(1.0)
    assert host.interfaces() == ["lo"]


@contextmanager
def flooded(address: str) -> Iterator[None]:
    """While this lasts, about a thousand datagrams a second are sent to ``address``, be anybody there or not."""
    stop = threading.Event()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as flood:

        def send() -> None:
            while not stop.wait(0.001):  # not connected, so nobody minds a port that is not there
                flood.sendto(bytes(200), (address, 9))

        sender = threading.Thread(target=send)
        sender.start()
        try:
            yield
        finally:
            stop.set()
            sender.join()


def test_the_driver_comes_and_goes_under_traffic(launch: Launch, host: Namespace) -> None:
    guest = launch_on_tap(launch)
    ping(guest, HOST)
    guest.run(f"(until [ -e /tmp/stop ]; do ping -A -q -w 1 {HOST}; done) >/dev/null 2>&1 &")
    device = guest.run("basename /sys/bus/virtio/drivers/virtio_net/virtio*").strip()
    rebind = f"for act in unbind bind; do echo {device} >/sys/bus/virtio/drivers/virtio_net/$act || exit 1; done"
    again = f"ip link set eth0 up; ip addr add {GUEST}/24 dev eth0"
    # While there was no driver more may have come than the host keeps, so one ping may be lost, and then another.
    reply = f"ping -A -c 10 -W 1 -q {HOST} >/dev/null && echo $i"
    with flooded(GUEST):
        answer = guest.run(f"for i in $(seq {REBINDS}); do {rebind}; {again}; {reply}; done", seconds=300)
    assert answer.split() == [str(number) for number in range(1, REBINDS + 1)]
    guest.run("touch /tmp/stop")
    assert {name for name in guest.members() if name.startswith("net0")} == {"net0/receiveq", "net0/transmitq"}
    assert told(guest) == []
    guest.power_off()


@pytest.mark.parametrize(
    "option", ["--tunnet=bridge:nowhere", "--net=tap,bridge=lo", "--net=tap,ip=10.1.0.999", "--tunnet=10.1.0.1:zz"]
)
def test_what_cannot_be_is_told_in_one_line(launch: Launch, host: Namespace, option: str) -> None:
    guest = launch(option)
    assert guest.wait() == 1
    (line,) = guest.output.splitlines()
    assert option.rpartition("=")[2].split(":")[0] in line or option in line


@pytest.mark.skipif(os.geteuid() != 0, reason="it takes root to start without privileges in a namespace")
def test_without_privileges_one_line_says_what_to_do(launch_unprivileged: Launch, host: Namespace) -> None:
    guest = launch_unprivileged(f"--tunnet={HOST}")
    assert guest.wait() == 1
    (line,) = guest.output.splitlines()
    assert "--net=user" in line
