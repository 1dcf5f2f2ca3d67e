"""How a guest ends itself."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lguest_mp.machine import power
from lguest_mp.machine.power import GuestEnd
from lguest_mp.protocol import Died, PowerOff, Reboot


@pytest.mark.parametrize(
    ("port", "value", "message"),
    [
        (0x600, 1 << 5 | 5 << 2, PowerOff()),
        (0x602, 1, Reboot()),
        (0x64, 0xFE, Reboot()),
        (0xCF9, 0x06, Reboot()),
        (0xCF9, 0x0E, Reboot()),
        (0x505, 1, Died("the guest kernel panicked")),
    ],
)
def test_a_write_that_ends_the_guest(port: int, value: int, message: object) -> None:
    with pytest.raises(GuestEnd) as end:
        power.writers()[port](port, 1, value)
    assert end.value.message == message


@pytest.mark.parametrize(
    ("port", "value"),
    [(0x600, 1 << 5 | 3 << 2), (0x600, 5 << 2), (0x602, 0), (0x602, 2), (0x64, 0xAA), (0xCF9, 2), (0x505, 2)],
)
def test_a_write_that_does_not(port: int, value: int) -> None:
    power.writers()[port](port, 1, value)


@pytest.mark.parametrize(("port", "value"), [(0x505, 1), (0x64, 0), (0x42, 0), (0x600, 0), (0x601, 0)])
def test_what_the_ports_read(port: int, value: int) -> None:
    assert power.readers()[port](port, 1) == value


@given(st.sampled_from(sorted(power.writers())), st.sampled_from([1, 2, 4]), st.integers(0, 0xFFFF_FFFF))
def test_nothing_but_the_guests_end_comes_of_a_write(port: int, size: int, value: int) -> None:
    with contextlib.suppress(GuestEnd):
        power.writers()[port](port, size, value & (1 << 8 * size) - 1)
