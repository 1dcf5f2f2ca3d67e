"""How a device of the machine is connected to those who serve it."""

from __future__ import annotations

from collections.abc import Sequence

from lguest_mp.line import Line
from lguest_mp.record import Value
from lguest_mp.virtio.console import Console
from lguest_mp.virtio.device import Device


class DevicePort(Value):
    """A device and its eventfds, one of each kind per queue.

    ``kicks`` go from the guest to the workers, ``calls`` from the workers to the guest. All are blocking. ``packed``:
    packed virtqueues are offered, too.
    """

    device: Device
    kicks: tuple[int, ...]
    calls: tuple[int, ...]
    packed: bool = False


def console_line(ports: Sequence[DevicePort]) -> Line | None:
    """The line to the console among the devices, if there is one."""
    return next((port.device.line for port in ports if isinstance(port.device, Console)), None)
