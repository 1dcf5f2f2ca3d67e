"""The hardware address of a network device whose user gives none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lguest_mp.network import mac


def test_is_the_same_at_every_start() -> None:
    assert mac.default("web", 0) == mac.default("web", 0)


def test_differs_between_guests_and_devices() -> None:
    addresses = {mac.default(guest, index) for guest in ("web", "db", "web1") for index in range(11)}
    assert len(addresses) == 33


def test_differs_between_users_and_hosts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = mac.default("web", 0)
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    for_another_user = mac.default("web", 0)
    (tmp_path / "machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    monkeypatch.setattr(mac, "_MACHINE_ID", tmp_path / "machine-id")
    assert len({here, for_another_user, mac.default("web", 0)}) == 3


@pytest.mark.parametrize("content", [None, "", "\n"])
def test_a_host_without_an_id_has_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "machine-id").write_text(content)
    monkeypatch.setattr(mac, "_MACHINE_ID", tmp_path / "machine-id")
    here = mac.default("web", 0)
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "elsewhere", "", "", "")))
    assert mac.default("web", 0) != here


@given(st.text(), st.integers(0, 100))
def test_is_one_interfaces_and_locally_administered(guest: str, index: int) -> None:
    address = mac.default(guest, index)
    assert len(address) == 6
    assert address[0] & 0b11 == 0b10
    assert mac.is_unicast(address)


@pytest.mark.parametrize("text", ["00:00:00:00:00:00", "01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff"])
def test_no_interface_has_a_groups_address_or_zero(text: str) -> None:
    assert not mac.is_unicast(bytes.fromhex(text.replace(":", "")))


def test_as_people_write_it() -> None:
    assert mac.text(bytes([2, 0, 0xAB, 9, 0, 1])) == "02:00:ab:09:00:01"
