"""How a device of the machine is connected to those who serve it."""

from __future__ import annotations

from dataclasses import dataclass

from lguest_mp.virtio.device import Device


@dataclass(frozen=True)
class DevicePort:
    """A device and its eventfds, one of each kind per queue.

    ``kicks`` go from the guest to the workers, ``calls`` from the workers to the guest. All are blocking.
    """

    device: Device
    kicks: tuple[int, ...]
    calls: tuple[int, ...]
