"""How long a soak goes on, when a supervisor has grown, and what a guest's program says of a stream that is wrong."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from guestkit import traffic
from guestkit.cache import cache_directory
from guestkit.disk import MIB
from guestkit.growth import Grown, Holdings, require_no_growth
from guestkit.kit import GuestKit
from guestkit.soak import Plan
from guestkit.soak.network import chunks, receive_stream, send_stream
from guestkit.sysroot import Sysroot

PERL = Path(traffic.__file__).parent / "perl"


@pytest.fixture(scope="module")
def sysroot() -> Sysroot:
    return GuestKit(cache_directory()).sysroot


def test_a_plan_goes_on_so_many_times() -> None:
    assert list(Plan(1, times=3).rounds()) == [0, 1, 2]
    assert list(Plan(1, times=0).rounds()) == []


def test_a_plan_goes_on_for_so_long() -> None:
    assert list(Plan(1, seconds=0).rounds()) == []
    assert list(Plan(1, times=2, seconds=1000).rounds()) == [0, 1]
    rounds: Iterator[int] = Plan(1, seconds=0.05).rounds()
    assert max(rounds) > 0


def test_a_plan_is_in_its_seed() -> None:
    assert Plan(5).choose().random() == Plan(5).choose().random() != Plan(6).choose().random()


BEFORE = Holdings(files=40, memory=3 * MIB, processes=6)


@pytest.mark.parametrize("now", [BEFORE, Holdings(files=39, memory=4 * MIB, processes=5)])
def test_a_supervisor_that_has_not_grown(now: Holdings) -> None:
    now.require_no_more_than(BEFORE)


@pytest.mark.parametrize(
    "now",
    [
        Holdings(files=41, memory=3 * MIB, processes=6),
        Holdings(files=40, memory=4 * MIB + 1, processes=6),
        Holdings(files=40, memory=3 * MIB, processes=7),
    ],
)
def test_a_supervisor_that_has_grown(now: Holdings) -> None:
    with pytest.raises(Grown, match="the supervisor had 40 files"):
        now.require_no_more_than(BEFORE)


def memories(*mebibytes: float) -> list[Holdings]:
    return [Holdings(40, int(each * MIB), 6) for each in mebibytes]


@pytest.mark.parametrize("memory", [(2.5,), (5.5, 2.5, 2.5, 2.5), (2.5, 2.25, 5.5, 3.25), (2.5, 9.0, 2.5)])
def test_memory_goes_up_and_down_without_growth(memory: tuple[float, ...]) -> None:
    require_no_growth(memories(*memory))


@pytest.mark.parametrize("memory", [(2.5, 3.6), (5.5, 2.5, 4.0, 4.0), (2.0, 2.5, 3.0, 3.5, 4.0, 4.5)])
def test_memory_that_only_goes_up_is_growth(memory: tuple[float, ...]) -> None:
    with pytest.raises(Grown):
        require_no_growth(memories(*memory))


def test_one_file_more_at_any_time_is_growth() -> None:
    with pytest.raises(Grown):
        require_no_growth([BEFORE, replace(BEFORE, files=41), BEFORE])


def stream_of_perl(sysroot: Sysroot, port: int, verb: str) -> str:
    """What the guest's program prints when it runs here."""
    return sysroot.run_perl(PERL / "stream.pl", "connect", "127.0.0.1", str(port), verb, "1").stdout


def test_a_stream_is_whole_both_ways(sysroot: Sysroot) -> None:
    with traffic.listener("127.0.0.1") as listening:
        thread = threading.Thread(target=send_stream, args=(listening, 1))
        thread.start()
        assert stream_of_perl(sysroot, traffic.port_of(listening), "receive") == "1 MiB\n"
        thread.join()
        said: list[str] = []
        thread = threading.Thread(
            target=lambda: said.append(stream_of_perl(sysroot, traffic.port_of(listening), "send"))
        )
        thread.start()
        receive_stream(listening, 1)
        thread.join()
        assert said == ["1 MiB\n"]


@pytest.mark.parametrize(
    ("at", "change", "complaint"),
    [
        (500_000, b"\0\1\2\3", "the 64 KiB number 7 are wrong"),
        (MIB, b"more", "more came than was sent"),
        (MIB - 1, b"", "the stream ended early"),
    ],
)
def test_the_guest_notices_a_stream_that_is_wrong(sysroot: Sysroot, at: int, change: bytes, complaint: str) -> None:
    stream = bytearray(b"".join(chunks(bytes(range(256)) * 256, 1)))
    stream[at : at + max(len(change), 1)] = change

    def send() -> None:
        # Who finds a mistake does not wait for the rest.
        with traffic.accepted(listening) as connection, suppress(OSError):
            connection.sendall(stream)
            connection.shutdown(socket.SHUT_WR)

    with traffic.listener("127.0.0.1") as listening:
        thread = threading.Thread(target=send)
        thread.start()
        assert complaint in stream_of_perl(sysroot, traffic.port_of(listening), "receive")
        thread.join()


def test_a_stream_that_is_wrong_is_noticed_here(sysroot: Sysroot) -> None:
    stream = bytearray(b"".join(chunks(bytes(range(256)) * 256, 1)))
    stream[700_000] ^= 1

    def send() -> None:
        address = ("127.0.0.1", traffic.port_of(listening))
        with socket.create_connection(address) as connection, suppress(OSError):
            connection.sendall(stream)

    with traffic.listener("127.0.0.1") as listening:
        thread = threading.Thread(target=send)
        thread.start()
        with pytest.raises(AssertionError, match="the 64 KiB number 10 from the guest are wrong"):
            receive_stream(listening, 1)
        thread.join()
