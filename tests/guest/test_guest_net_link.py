"""Guests on one wire, without any privileges: whoever names the same link is on it, in any order."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from netguest import configure, copy, mac_of, ping, pinging

from guestkit.guest import Guest, Launch


def launch_on_link(
    launch: Launch, runtime: dict[str, str], names: list[str], *options: str, tools: bool = False
) -> list[Guest]:
    """Guests on the link "lab"; they get the addresses 10.3.0.1, 10.3.0.2, ... in this order."""
    guests = [launch("--net=link:lab", *options, name=name, variables=runtime, tools=tools) for name in names]
    for number, guest in enumerate(guests, 1):
        guest.boot()
        configure(guest, f"10.3.0.{number}/24")
    return guests


def test_two_guests_on_one_link(launch: Launch, runtime: dict[str, str]) -> None:
    one, two = launch_on_link(launch, runtime, ["one", "two"], tools=True)
    assert mac_of(one) != mac_of(two)
    ping(one, "10.3.0.2")
    ping(two, "10.3.0.1")
    copy(one, two, "10.3.0.2", 16)
    copy(two, one, "10.3.0.1", 16)
    one.power_off()
    two.power_off()


def test_three_guests_while_one_reboots(launch: Launch, runtime: dict[str, str]) -> None:
    one, two, three = launch_on_link(launch, runtime, ["one", "two", "three"])
    for guest in (one, two):
        ping(guest, "10.3.0.3")
    with pinging(one, "10.3.0.2"):
        three.agent.start("reboot -f")
        three.boot()
        configure(three, "10.3.0.3/24")
        ping(three, "10.3.0.1")
        ping(three, "10.3.0.2")
    one.agent.start("reboot -f")  # who was there first is nobody special
    ping(two, "10.3.0.3")
    one.boot()
    configure(one, "10.3.0.1/24")
    ping(three, "10.3.0.1")
    for guest in (two, one, three):
        guest.power_off()


def test_a_link_outlives_whoever_leaves_it_in_whatever_way(launch: Launch, runtime: dict[str, str]) -> None:
    one, two, three = launch_on_link(launch, runtime, ["one", "two", "three"])
    ping(two, "10.3.0.1")
    one.signal(signal.SIGKILL)
    one.wait()
    ping(two, "10.3.0.3")
    two.power_off()
    (four,) = launch_on_link(launch, runtime, ["four"])  # it gets the address of the one that is gone
    ping(four, "10.3.0.3")
    three.power_off()
    four.power_off()


def test_other_links_are_other_wires(launch: Launch, runtime: dict[str, str]) -> None:
    (one,) = launch_on_link(launch, runtime, ["one"], "--net=link:other")
    (other,) = [launch("--net=link:other", name="two", variables=runtime)]
    other.boot()
    configure(other, "10.3.0.2/24")
    assert one.run("ping -c 1 -W 1 10.3.0.2 >/dev/null || echo nobody") == "nobody\n"
    one.run("ip addr flush dev eth0")
    configure(one, "10.3.0.1/24", "eth1")
    ping(one, "10.3.0.2")
    one.power_off()
    other.power_off()


def test_an_ordinary_users_guests(launch_unprivileged: Launch, public: Path) -> None:
    runtime = public / "run"
    runtime.mkdir()
    if os.geteuid() == 0:
        os.chown(runtime, 65534, 65534)
    runtime.chmod(0o700)
    one, two = launch_on_link(launch_unprivileged, {"XDG_RUNTIME_DIR": str(runtime)}, ["one", "two"])
    ping(one, "10.3.0.2")
    one.power_off()
    two.power_off()
