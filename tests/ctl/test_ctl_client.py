"""Finding guests and asking them, whatever those do meanwhile."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from fakelaunchers import GUEST, running

from lguest_mp import control, registry
from lguest_mp.control import Answer, Done, Goodbye, Restart, Welcome
from lguest_mp.ctl import orders
from lguest_mp.ctl.client import Connection, Description, GuestGone, NoAnswer, Place
from lguest_mp.errors import LguestError


@contextmanager
def launcher(name: str, speak: Callable[[socket.socket], None] | None = None) -> Iterator[registry.Claim]:
    """A launcher that speaks so with whoever connects first; None: that does not answer."""
    claim = registry.claim(name)
    claim.listener.setblocking(True)

    def accept() -> None:
        if speak is not None:
            with claim.listener.accept()[0] as channel:
                speak(channel)

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield claim
    finally:
        thread.join()
        claim.release()


def saying(*answers: Answer | bytes) -> Callable[[socket.socket], None]:
    """What says these things and goes."""

    def speak(channel: socket.socket) -> None:
        for answer in answers:
            channel.send(answer if isinstance(answer, bytes) else control.encode(answer))

    return speak


def test_what_a_guest_says_when_it_goes_is_heard_by_who_asks_too_late(place: Path) -> None:
    with launcher("one", saying(Welcome(control.PROTOCOL), Goodbye(reboots=True))), ExitStack() as opened:
        connection = opened.enter_context(Place(place).connect("one"))
        with pytest.raises(GuestGone) as gone:
            connection.describe()
    assert gone.value.reboots


def test_what_a_guest_says_when_it_goes_is_heard_by_who_was_not_heard(place: Path) -> None:
    """To the kernel it is an error to go without having read all."""
    asked = threading.Event()

    def speak(channel: socket.socket) -> None:
        asked.wait()
        channel.send(control.encode(Goodbye(reboots=True)))

    with launcher("one", speak), Connection("one", registry.Guests(place).connect("one", 10.0)) as connection:
        connection.send(Restart("block0"))
        asked.set()
        with pytest.raises(GuestGone) as gone:
            connection.receive()
    assert gone.value.reboots


@pytest.mark.parametrize("answer", [b"x" * 1000, b"y" * 140_000, b'["GuestFacts",{}]', Done()])
def test_nonsense(place: Path, answer: Answer | bytes) -> None:
    with launcher("one", saying(Welcome(control.PROTOCOL), answer)), Place(place).connect("one") as connection:
        expected = "guest one (says what makes no sense|does not say what it is)"
        with pytest.raises(LguestError, match=expected):
            connection.describe()


def test_files_that_nobody_asked_for_are_not_kept(place: Path, tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:

        def speak(channel: socket.socket) -> None:
            socket.send_fds(channel, [control.encode(Done())], [file.fileno()] * 20)

        with launcher("one", speak), Connection("one", registry.Guests(place).connect("one", 10.0)) as connection:
            assert connection.receive() == Done()
            # The launcher is a thread of this process, whose descriptors come and go: only these are counted.
            opened = [each for each in Path("/proc/self/fd").iterdir() if os.path.realpath(each) == file.name]
            assert len(opened) == 1


def test_those_that_do_not_answer_take_no_time_from_the_others(place: Path) -> None:
    with launcher("a"), launcher("b"), running("c"), launcher("d"), running("e"):
        found = Place(place).describe_all(["a", "b", "c", "d", "e", "f"], 0.5)
    assert list(found) == ["a", "b", "c", "d", "e"]
    for name, description in found.items():
        if name in "ce":
            assert isinstance(description, Description)
            assert description.guest.kernel == GUEST.kernel
        else:
            assert isinstance(description, NoAnswer)


def test_nobody_is_accepted_any_more(place: Path) -> None:
    with launcher("one") as claim, ExitStack() as waiting:
        for _ in range(registry.BACKLOG + 1):
            waiting.enter_context(registry.Guests(place).connect("one", 10.0))
        with pytest.raises(NoAnswer, match=rf"is its launcher \(process {os.getpid()}\) stopped\?"):
            Place(place).connect("one", 0.1)
        assert claim.name == "one"


class TestStopping:
    """Until the guest has ended, for whatever reason."""

    def test_one_that_ends_by_itself_before_it_hears(self, place: Path) -> None:
        with launcher("one", saying(Welcome(control.PROTOCOL), Goodbye(reboots=False))):
            orders.stop(Place(place), "one", wait=False)

    def test_one_that_reboots_in_this_very_moment(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is stopped in its next life."""
        monkeypatch.setattr(orders, "_pidfd", lambda pid: None)  # the launcher's process is this one
        with running("one") as guest:
            stop = guest.stop

            def reboot_instead() -> None:
                monkeypatch.setattr(guest, "stop", stop)
                guest.reboot()

            monkeypatch.setattr(guest, "stop", reboot_instead)
            orders.stop(Place(place), "one", wait=True)
        assert guest.calls == ["reboot", "stop"]

    def test_one_whose_launcher_does_not_answer(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Place.connect, "__defaults__", (0.2,))

        def speak(channel: socket.socket) -> None:
            channel.send(control.encode(Welcome(control.PROTOCOL)))
            channel.recv(100)
            channel.recv(100)

        with launcher("one", speak), pytest.raises(NoAnswer):
            orders.stop(Place(place), "one", wait=True)
