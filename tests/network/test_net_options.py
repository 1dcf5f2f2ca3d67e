"""``--net`` and ``--tunnet``: what they mean, and what a wrong one is told."""

from __future__ import annotations

import re
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lguest_mp.config import Forward, LinkConfig, NetConfig, TapConfig, UserConfig
from lguest_mp.errors import LguestError
from lguest_mp.network.options import parse_net, parse_tunnet

MAC = bytes([2, 0, 0, 0, 0, 0x1A])


@pytest.mark.parametrize(
    ("tunnet", "net", "means"),
    [
        ("192.168.19.1", "tap,ip=192.168.19.1", NetConfig(TapConfig("192.168.19.1"))),
        ("10.0.0.1:02:00:00:00:00:1a", "tap,ip=10.0.0.1,mac=02:00:00:00:00:1A", NetConfig(TapConfig("10.0.0.1"), MAC)),
        ("10.0.0.1:2:0:0:0:0:1a", "tap,mac=2:0:0:0:0:1a,ip=10.0.0.1", NetConfig(TapConfig("10.0.0.1"), MAC)),
        ("bridge:br0", "tap,bridge=br0", NetConfig(TapConfig(bridge="br0"))),
        (
            "bridge:br0:02:00:00:00:00:1a",
            "tap,bridge=br0,mac=02:00:00:00:00:1a",
            NetConfig(TapConfig(bridge="br0"), MAC),
        ),
        # An interface that has the address zero has none.
        ("0.0.0.0", "tap,ip=0.0.0.0", NetConfig(TapConfig())),
    ],
)
def test_the_originals_option_and_its_long_form(tunnet: str, net: str, means: NetConfig) -> None:
    assert parse_tunnet(tunnet) == parse_net(net) == means


@pytest.mark.parametrize(
    ("value", "means"),
    [
        ("tap", NetConfig(TapConfig())),
        ("tap,ip=10.1.2.3/24", NetConfig(TapConfig("10.1.2.3", 24))),
        ("tap,ip=10.1.2.3/32", NetConfig(TapConfig("10.1.2.3", 32))),
        ("tap,interface=vm0", NetConfig(TapConfig(interface="vm0"))),
        ("tap,interface=fifteen-letters", NetConfig(TapConfig(interface="fifteen-letters"))),
        ("tap,bridge=brücke", NetConfig(TapConfig(bridge="brücke"))),
        ("tap,mtu=68", NetConfig(TapConfig(), mtu=68)),
        ("tap,mtu=65521", NetConfig(TapConfig(), mtu=65521)),
        ("tap,offload=off", NetConfig(TapConfig(), offload=False)),
        ("tap,offload=on", NetConfig(TapConfig())),
        ("user", NetConfig(UserConfig())),
        ("user,loopback=on,mac=02:00:00:00:00:1a", NetConfig(UserConfig(host_loopback=True), MAC)),
        ("user,loopback=off,mtu=1400", NetConfig(UserConfig(), mtu=1400)),
        (
            "user,forward=tcp:2222:22,forward=udp:0.0.0.0:5353:53,forward=udp:2222:65535",
            NetConfig(
                UserConfig(
                    (
                        Forward("tcp", "127.0.0.1", 2222, 22),
                        Forward("udp", "0.0.0.0", 5353, 53),
                        Forward("udp", "127.0.0.1", 2222, 65535),
                    )
                )
            ),
        ),
        ("link:lab", NetConfig(LinkConfig("lab"))),
        ("link,name=lab", NetConfig(LinkConfig("lab"))),
        (f"link:{'x' * 64},offload=off,mtu=9000", NetConfig(LinkConfig("x" * 64), mtu=9000, offload=False)),
        ("link:-_.Z9", NetConfig(LinkConfig("-_.Z9"))),
    ],
)
def test_what_each_means(value: str, means: NetConfig) -> None:
    assert parse_net(value) == means


@pytest.mark.parametrize(
    "address", ["", "1.2.3", "1.2.3.4.5", "1.2.3.256", "1.2.3.999", "1.2.3.04", "1.2.3.x", " 1.2.3.4"]
)
def test_no_address(address: str) -> None:
    said = re.escape(f"{address}: {address!r} is no IP address; give four numbers up to 255, for example 192.168.19.1")
    with pytest.raises(LguestError, match=f"^--tunnet={said}$"):
        parse_tunnet(address)
    with pytest.raises(LguestError, match=f"^--net=tap,ip={said}$"):
        parse_net(f"tap,ip={address}")


@pytest.mark.parametrize(
    "mac", ["", "02:00:00:00:00", "02:00:00:00:00:01:02", "02-00-00-00-00-01", "002:0:0:0:0:1", "02:0:0:0:0:g"]
)
def test_no_mac(mac: str) -> None:
    said = re.escape(f"{mac!r} is no MAC address; give six hexadecimal bytes, for example 02:00:00:00:00:01")
    for value in (f"10.0.0.1:{mac}", f"bridge:br0:{mac}"):
        with pytest.raises(LguestError, match=f"^--tunnet={value}: {said}$"):
            parse_tunnet(value)
    with pytest.raises(LguestError, match=said):
        parse_net(f"user,mac={mac}")


@pytest.mark.parametrize("mac", ["00:00:00:00:00:00", "0:0:0:0:0:0", "01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff"])
def test_a_mac_that_no_interface_has(mac: str) -> None:
    with pytest.raises(LguestError, match=f"{mac} cannot be an interface's MAC address; give one with an even first"):
        parse_net(f"tap,mac={mac}")


@pytest.mark.parametrize(
    "name", ["", "sixteen-letters!", "ümlaut-ümlaut-", "a/b", "a b", "a:b", "tap%d", ".", "..", "a\nb", "\udc80"]
)
def test_no_interface(name: str) -> None:
    for key in ("bridge", "interface"):
        with pytest.raises(
            LguestError, match="is no name for an interface; give one of 1 to 15 characters without '/'"
        ):
            parse_net(f"tap,{key}={name}")


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "x" * 65, "lä", "a b", "a:b", "lab\n"])
def test_no_link(name: str) -> None:
    for value in (f"link:{name}", f"link,name={name}"):
        with pytest.raises(LguestError, match="is no name for a link; write --net=link:NAME with 1 to 64 letters"):
            parse_net(value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("", "there is no network ''; there is tap, user and link:NAME"),
        ("bridge", "there is no network 'bridge'; there is tap, user and link:NAME"),
        ("Tap", "there is no network 'Tap'; there is tap, user and link:NAME"),
        ("tap:tap0", "tap has no name; write --net=tap,..."),
        ("user:", "user has no name; write --net=user,..."),
        (
            "link",
            "'' is no name for a link; write --net=link:NAME with 1 to 64 letters, digits, '.', '_' or '-', not "
            "beginning with '.'",
        ),
        ("link:a,name=b", "the link is named twice; write --net=link:NAME"),
        ("tap,", "'' is unknown to --net=tap; there is ip, bridge, interface, mac, mtu, offload"),
        ("tap,forward=tcp:1:1", "'forward' is unknown to --net=tap; there is ip, bridge, interface, mac, mtu, offload"),
        ("user,offload=on", "'offload' is unknown to --net=user; there is forward, loopback, mac, mtu"),
        ("tap,mtu", "mtu says nothing; write mtu=..."),
        ("tap,mtu=1500,mtu=1500", "mtu is given twice; give it once"),
        ("tap,mtu=67", "'67' is no mtu; give a number from 68 to 65521"),
        ("tap,mtu=65522", "'65522' is no mtu; give a number from 68 to 65521"),
        ("tap,mtu=-1500", "'-1500' is no mtu; give a number from 68 to 65521"),
        ("tap,mtu=٦٨٠", "'٦٨٠' is no mtu; give a number from 68 to 65521"),
        ("tap,mtu=" + "9" * 9999, f"'{'9' * 9999}' is no mtu; give a number from 68 to 65521"),
        ("tap,offload=yes", "'yes' is neither on nor off"),
        ("user,loopback=", "'' is neither on nor off"),
        ("tap,ip=10.0.0.1/0", "'0' is no prefix; give a number from 1 to 32"),
        ("tap,ip=10.0.0.1/33", "'33' is no prefix; give a number from 1 to 32"),
        ("tap,ip=10.0.0.1/255.0.0.0", "'255.0.0.0' is no prefix; give a number from 1 to 32"),
        ("tap,ip=0.0.0.0/8", "0.0.0.0/8 is no address; leave ip out for an interface without one"),
        ("tap,ip=10.0.0.1,bridge=br0", "a port of a bridge has no address of its own; leave out ip or bridge"),
        *(
            (
                f"user,forward={forward}",
                f"forward={forward}: write tcp or udp, [hostaddr:]hostport:guestport, for example forward=tcp:2222:22",
            )
            for forward in ("", "tcp", "tcp:22", "sctp:22:22", "tcp:1:2:3:4", ":22:22")
        ),
        ("user,forward=tcp:0:22", "'0' is no port; give a number from 1 to 65535"),
        ("user,forward=tcp:22:65536", "'65536' is no port; give a number from 1 to 65535"),
        ("user,forward=tcp:22:", "'' is no port; give a number from 1 to 65535"),
        ("user,forward=tcp:host:1:2", "'host' is no IP address; give four numbers up to 255, for example 192.168.19.1"),
        (
            "user,forward=tcp:2222:22,forward=tcp:2222:23",
            "forward=tcp:2222:23: the host's port 2222 is forwarded already; give another one",
        ),
    ],
)
def test_a_wrong_value_is_named_and_told_what_to_do(value: str, said: str) -> None:
    with pytest.raises(LguestError) as raised:
        parse_net(value)
    assert str(raised.value) == f"--net={value}: {said}"


@pytest.mark.parametrize("value", ["10.0.0.1/24", "bridge", "bridge:", "bridge::02:00:00:00:00:01", "br0"])
def test_what_the_original_does_not_know(value: str) -> None:
    with pytest.raises(LguestError, match=f"^--tunnet={value}: "):
        parse_tunnet(value)


WORDS = st.sampled_from(
    [
        "tap",
        "user",
        "link",
        "bridge",
        "ip",
        "mac",
        "mtu",
        "forward",
        "tcp",
        "udp",
        "10.0.0.1",
        "22",
        "br0",
        "on",
        *",=:/.%",
    ]
)


@given(st.one_of(st.text(), st.lists(WORDS).map("".join), st.text().map("tap,".__add__)))
def test_nothing_is_more_than_an_error(value: str) -> None:
    for parse in (parse_net, parse_tunnet):
        with suppress(LguestError):
            assert isinstance(parse(value), NetConfig)
