"""What all devices have: a configuration space."""

from __future__ import annotations

import pytest

from lguest_mp.virtio.console import Console
from lguest_mp.virtio.rng import Rng


def test_another_copys_change_is_applied() -> None:
    console = Console(columns=80, rows=25)
    console.apply_config(2, b"\x32\x00")
    assert console.config_space() == b"\x50\x00\x32\x00"


@pytest.mark.parametrize(("offset", "data"), [(3, b"ab"), (4, b"a"), (-1, b"a"), (5, b"")])
def test_a_change_lies_in_the_configuration_space(offset: int, data: bytes) -> None:
    with pytest.raises(ValueError, match="no configuration bytes"):
        Console().apply_config(offset, data)


def test_the_guests_writes_are_ignored() -> None:
    """5.3.4, 5.4.4: nothing of either is the driver's to write."""
    console = Console()
    before = console.config_space()
    console.write_config(0, b"\xff" * 8)
    Rng("rng0").write_config(1 << 40, b"\xff")
    assert console.config_space() == before
