"""What lguestctl and a supervisor say to each other: every field is checked on both sides."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lguest_mp import control
from lguest_mp.control import (
    Answer,
    Attach,
    Attached,
    ControlError,
    Describe,
    Done,
    Goodbye,
    GuestFacts,
    ListJail,
    LogLine,
    ProcessFacts,
    ProcessJail,
    ReadLog,
    Reboot,
    Refused,
    Request,
    Reset,
    Resize,
    Restart,
    Stop,
    Welcome,
)

REQUESTS: list[Request] = [
    Describe(),
    ReadLog(None, 10, follow=True),
    ReadLog("block0/requestq", 0, follow=False),
    ListJail(),
    Attach(80, 25),
    Resize(0, 0),
    Stop(),
    Reboot(),
    Restart("block0"),
    Reset("net0"),
]
ANSWERS: list[Answer] = [
    Welcome(control.PROTOCOL),
    GuestFacts("demo", 12, "running", 1.5, 0, "pc", "kvm", 1 << 28, "/boot/vmlinuz"),
    ProcessFacts("block0/requestq", "block0", "requestq", 13, "serving", 7, 4096, 0.25, 1, "exited", "restart"),
    ProcessFacts("cpu", None, None, None, "running"),
    LogLine(2.5, 4, "", "a line\n\0ä\U0001f427"),
    ProcessJail("cpu", 12, {"on": True, "limits": {"files": 10}, "calls": None}),
    Attached(),
    Done(),
    Refused("no"),
    Goodbye(reboots=True, reason=None),
]


@pytest.mark.parametrize("message", REQUESTS, ids=str)
def test_requests_arrive_as_they_were_sent(message: Request) -> None:
    datagram = control.encode(message)
    assert control.decode_request(datagram) == message
    assert len(datagram) <= control.MAX_REQUEST
    with pytest.raises(ControlError):
        control.decode_answer(datagram)


@pytest.mark.parametrize("message", ANSWERS, ids=str)
def test_answers_arrive_as_they_were_sent(message: Answer) -> None:
    datagram = control.encode(message)
    assert control.decode_answer(datagram) == message
    with pytest.raises(ControlError):
        control.decode_request(datagram)


@pytest.mark.parametrize(
    "datagram",
    [
        *(b"", b"\xff", b"{}", b"[]", b"null", b'["Stop"]', b'["Stop",{},1]', b'["Stop",[]]', b'[["Stop"],{}]'),
        *(b'["Done",{}]', b'["Stop",{"now":true}]', b'["Restart",{}]', b'["Restart",{"device":1}]'),
        *(b'["Attach",{"columns":-1,"rows":1}]', b'["Attach",{"columns":1.0,"rows":1}]'),
        *(b'["Attach",{"columns":true,"rows":1}]', b'["Attach",{"columns":18446744073709551616,"rows":1}]'),
        *(b'["ReadLog",{"source":null,"last":null,"follow":false}]', b'["ReadLog",{"source":1,"last":1,"follow":0}]'),
        *(b"[" * 1000, b'["Attach",{"columns":' + b"9" * 900 + b',"rows":1}]'),
        b'["Restart",{"device":"' + b"x" * control.MAX_REQUEST + b'"}]',
    ],
)
def test_what_is_no_request(datagram: bytes) -> None:
    with pytest.raises(ControlError):
        control.decode_request(datagram)


@pytest.mark.parametrize("time", ["NaN", "Infinity", "1e999", "1" + "0" * 400, '"1"', "null", "true"])
def test_what_is_no_time(time: str) -> None:
    with pytest.raises(ControlError):
        control.decode_answer(b'["LogLine",{"time":%s,"level":1,"source":"","text":""}]' % time.encode())


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps).map(str.encode)
)
def test_anything_at_all(datagram: bytes) -> None:
    """It is a message, or an error that everybody expects."""
    for decode in (control.decode_request, control.decode_answer):
        try:
            message = decode(datagram)
        except ControlError:
            continue
        assert control.encode(message)


def test_long_texts_are_cut_so_that_they_fit() -> None:
    longest = "\U0001f427" * 100_000
    datagram = control.encode(ProcessFacts(longest, longest, longest, None, longest, last_end=longest, policy=longest))
    assert len(datagram) <= control.MAX_ANSWER
    answer = control.decode_answer(datagram)
    assert isinstance(answer, ProcessFacts)
    assert answer.name == "\U0001f427" * control.MAX_TEXT
