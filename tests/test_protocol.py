"""Messages: what is sent arrives, and nothing else is taken for a message."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lguest_mp import protocol
from lguest_mp.cpu.engine import EntryState
from lguest_mp.virtio.device import QueueLayout

numbers = st.integers(0, (1 << 64) - 1)
layouts = st.builds(QueueLayout, numbers, numbers, numbers, numbers)
texts = st.text(max_size=200)
messages: st.SearchStrategy[protocol.Message] = st.one_of(
    st.builds(protocol.Start, st.builds(EntryState, *[numbers] * 7)),
    st.builds(protocol.DriverReady, numbers, numbers, st.lists(st.none() | layouts, max_size=4).map(tuple)),
    st.builds(protocol.QueueReady, numbers, numbers, numbers, layouts),
    st.builds(protocol.QueueReset, numbers, numbers),
    st.builds(protocol.DeviceReset, numbers),
    st.builds(protocol.DeviceBroken, numbers),
    st.builds(protocol.DeviceMended, numbers),
    st.builds(protocol.Died, texts),
    st.builds(protocol.Failed, texts),
    st.builds(protocol.Broken, texts),
    st.builds(protocol.Log, texts, st.booleans()),
    st.builds(protocol.ConfigChanged, numbers, numbers, texts),
    st.sampled_from(
        [
            protocol.Ready(),
            protocol.PowerOff(),
            protocol.Reboot(),
            protocol.Interrupted(),
            protocol.Done(),
            protocol.Serving(),
        ]
    ),
)


@given(messages)
def test_what_is_encoded_is_decoded(message: protocol.Message) -> None:
    assert protocol.decode(protocol.encode(message)) == message


def test_every_message_is_known() -> None:
    for kind in get_args(protocol.Message):
        assert kind.__doc__


@given(st.binary(max_size=100))
def test_noise_is_no_message(noise: bytes) -> None:
    with pytest.raises(protocol.ProtocolError):
        protocol.decode(noise)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(messages, st.data())
def test_a_message_with_a_wrong_field_is_none(message: protocol.Message, data: st.DataObject) -> None:
    name, fields = json.loads(protocol.encode(message))
    if fields:
        field = data.draw(st.sampled_from(sorted(fields)))
        fields[field] = data.draw(values)
    else:
        fields["extra"] = data.draw(values)
    try:
        decoded = protocol.decode(json.dumps([name, fields]).encode())
    except protocol.ProtocolError:
        return
    assert json.loads(protocol.encode(decoded)) == [name, fields], "what was taken is what was meant"


@pytest.mark.parametrize(
    "datagram",
    [
        b"",
        b"null",
        b"[]",
        b'["Done"]',
        b'["Done",{},{}]',
        b'["Done",[]]',
        b'["Done",{"text":"x"}]',
        b'["Nonsense",{}]',
        b"[{},{}]",
        b'["DeviceReset",{}]',
        b'["DeviceReset",{"device":-1}]',
        b'["DeviceReset",{"device":true}]',
        b'["DeviceReset",{"device":1.0}]',
        b'["DeviceReset",{"device":NaN}]',
        b'["DeviceReset",{"device":"0"}]',
        b'["DeviceReset",{"device":18446744073709551616}]',
        b'["Died",{"reason":1}]',
        b'["Log",{"text":"x","verbose":1}]',
        b'["DriverReady",{"device":0,"features":0,"queues":null}]',
        b'["DriverReady",{"device":0,"features":0,"queues":[1]}]',
        b'["DriverReady",{"device":0,"features":0,"queues":[{"size":1}]}]',
        b"[" * 16384,
        b'["Done",' * 2000,
        b'["DeviceReset",{"device":' + b"9" * 16000 + b"}]",
        b'["Died",{"reason":"\xff"}]',
    ],
)
def test_what_is_no_message(datagram: bytes) -> None:
    with pytest.raises(protocol.ProtocolError):
        protocol.decode(datagram)


@pytest.fixture
def channel() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a channel."""
    ours, theirs = protocol.channel_pair()
    with ours, theirs:
        yield ours, theirs


Channel = tuple[socket.socket, socket.socket]


def test_messages_arrive_one_by_one(channel: Channel) -> None:
    sent: list[Any] = [protocol.PowerOff(), protocol.DeviceReset(3)]
    for message in sent:
        protocol.send(channel[0], message)
    assert [protocol.receive(channel[1]) for _ in sent] == sent


def test_a_channel_that_is_closed_gives_none(channel: Channel) -> None:
    channel[0].close()
    assert protocol.receive(channel[1]) is None


def test_a_channel_that_is_closed_with_words_unread_gives_none(channel: Channel) -> None:
    protocol.send(channel[1], protocol.Done())
    channel[0].close()
    assert protocol.receive(channel[1]) is None
    with pytest.raises(OSError, match="Broken pipe"):
        protocol.send(channel[1], protocol.Done())


def test_a_message_that_is_too_long_is_none(channel: Channel) -> None:
    protocol.send(channel[0], protocol.Died("x" * protocol.MAX_MESSAGE))
    with pytest.raises(protocol.ProtocolError):
        protocol.receive(channel[1])
