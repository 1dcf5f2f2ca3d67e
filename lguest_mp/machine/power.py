"""How a guest ends itself: sleep, reset and panic registers among the ports.

Each of them ends the machine by an exception that carries what the supervisor is told; nobody returns to a guest
that has switched itself off.
"""

from __future__ import annotations

from collections.abc import Callable

from lguest_mp.bus.pci import ALL_ONES
from lguest_mp.machine.layout import (
    KEYBOARD_COMMAND_PORT,
    KEYBOARD_RESET,
    PANIC_PORT,
    RESET_PORT,
    RESET_VALUE,
    SLEEP_CONTROL_PORT,
    SLEEP_STATUS_PORT,
    SLEEP_TYPE_S5,
)
from lguest_mp.protocol import Died, PowerOff, Reboot

#: ACPI's sleep control register (ACPI 6.4, 4.8.3.7.1): SLP_EN, and SLP_TYP in bits 2 to 4.
_SLEEP_ENABLE = 1 << 5
#: The chipset's reset control register, the last resort of kernels: bit 2 resets the CPU.
CHIPSET_RESET_PORT = 0xCF9
_CHIPSET_RESET = 1 << 2
_PANICKED = 1

#: Channel 2 of a timer that is not there. Zero ends at once what would be a calibration of 100,000 reads.
PIT_CHANNEL_2_PORT = 0x42

PortReader = Callable[[int, int], int]
PortWriter = Callable[[int, int, int], None]


class GuestEnd(Exception):
    """The guest is over; ``message`` says how."""

    def __init__(self, message: PowerOff | Reboot | Died) -> None:
        super().__init__(message)
        self.message = message


def readers() -> dict[int, PortReader]:
    """What reads answer, by port."""
    return {
        SLEEP_CONTROL_PORT: _zero,
        # Never waking up: WAK_STS stays clear.
        SLEEP_STATUS_PORT: _zero,
        # The keyboard controller is always ready for a command, so that a kernel that resets by it does not wait.
        KEYBOARD_COMMAND_PORT: _zero,
        # What can be told: a panic.
        PANIC_PORT: lambda _port, size: _PANICKED if size == 1 else ALL_ONES[size],
        PIT_CHANNEL_2_PORT: _zero,
    }


def writers() -> dict[int, PortWriter]:
    """What writes do, by port."""
    return {
        SLEEP_CONTROL_PORT: _sleep,
        RESET_PORT: _reset,
        KEYBOARD_COMMAND_PORT: _keyboard_command,
        CHIPSET_RESET_PORT: _chipset_reset,
        PANIC_PORT: _panic,
    }


def _zero(_port: int, _size: int) -> int:
    return 0


def _sleep(_port: int, _size: int, value: int) -> None:
    if value & _SLEEP_ENABLE and value >> 2 & 7 == SLEEP_TYPE_S5:
        raise GuestEnd(PowerOff())


def _reset(_port: int, _size: int, value: int) -> None:
    if value & 0xFF == RESET_VALUE:
        raise GuestEnd(Reboot())


def _keyboard_command(_port: int, _size: int, value: int) -> None:
    if value & 0xFF == KEYBOARD_RESET:
        raise GuestEnd(Reboot())


def _chipset_reset(_port: int, size: int, value: int) -> None:
    if size == 1 and value & _CHIPSET_RESET:
        raise GuestEnd(Reboot())


def _panic(_port: int, _size: int, value: int) -> None:
    if value & _PANICKED:
        raise GuestEnd(Died("the guest kernel panicked"))
