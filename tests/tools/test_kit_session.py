"""A program on a terminal, and that nothing of it outlives the session."""

from __future__ import annotations

import signal

import pytest

from guestkit.session import Session, SessionError


def shell(command: str) -> Session:
    return Session(["/bin/sh", "-c", command])


def test_what_is_shown_is_found_in_order() -> None:
    with shell("echo one two; echo three") as session:
        found = session.wait_for("t(w)o")
        assert found.before == "one "
        assert found.groups == ("w",)
        with pytest.raises(SessionError, match="it ended before 'one' appeared"):
            session.wait_for("one")


def test_what_is_typed_reaches_the_program() -> None:
    with shell("stty -echo; echo ready; read line; echo got $line; exit 7") as session:
        session.wait_for("ready")
        session.type("hello\n")
        session.wait_for("got hello")
        assert session.wait() == 7


def test_the_terminal_is_the_controlling_one() -> None:
    with shell("stty -echo; echo ready; exec cat") as session:
        session.wait_for("ready")
        # A shell that is interrupted when it is about to start a program starts it all the same, and waits for it.
        session.type("cat is there\n")
        session.wait_for("cat is there")
        session.type("\x03")
        assert session.wait() == -signal.SIGINT


def test_nothing_outlives_the_session() -> None:
    with shell("trap '' HUP; sleep 1001 & sleep 1002 & echo ready; wait") as session:
        session.wait_for("ready")
        assert len(session.processes()) == 3
        session.signal(signal.SIGKILL)
        assert session.wait() == -signal.SIGKILL
        with pytest.raises(SessionError, match="there still are"):
            session.wait_until_gone(0.1)
    assert session.processes() == {}
