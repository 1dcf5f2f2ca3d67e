"""Network namespaces: what is made in one is seen in it and nowhere else, and ends with it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from guestkit.namespaces import Namespace, obstacle


@pytest.fixture
def host() -> Iterator[Namespace]:
    """A namespace; the test is outside."""
    if reason := obstacle():
        pytest.skip(reason)
    with Namespace() as namespace:
        yield namespace


def test_it_has_nothing_but_a_loopback_interface(host: Namespace) -> None:
    assert host.interfaces() == ["lo"]
    with host.entered(), socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()


def test_what_is_made_in_it_is_nowhere_else(host: Namespace) -> None:
    before = socket.if_nameindex()
    host.make_bridge("br7")
    host.set_address("br7", "10.1.0.1")
    assert (host.address("br7"), host.netmask("br7")) == ("10.1.0.1", "255.255.255.0")
    assert socket.if_nameindex() == before
    host.delete("br7")
    assert host.interfaces() == ["lo"]


def test_a_thread_comes_back_to_where_it_was(host: Namespace) -> None:
    def mine() -> str:
        return os.readlink("/proc/thread-self/ns/net")

    before = mine()
    with host.entered():
        assert mine() != before
    with pytest.raises(ZeroDivisionError), host.entered():
        _ = 1 / 0
    assert mine() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root can make one")
def test_without_privileges_one_line_says_why_there_is_none() -> None:
    reason = obstacle()
    assert reason
    assert "root" in reason
    assert "\n" not in reason
