"""Everything of the host's that a guest needs, opened and checked before anything is forked.

Whatever the user can have got wrong is found here: a user that does not exist, a kernel that is none, a disk that
another launcher has, more memory than the host gives. Each is an LguestError, and nothing has happened yet.

What a guest reboots with is decided here as well. Normally the launcher executes itself again and opens everything
afresh. Confined to another root directory or another user it could not open its images any more, nor even find
Python: then the resources live on and the next guest is made of them (*in place*). That costs memory, since the
unpacked kernel and all of the machine's modules stay, so it is done only where it has to be.
"""

from __future__ import annotations

import gc
import os
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from lguest_mp import jail
from lguest_mp.errors import LguestError
from lguest_mp.memory import GuestMemory
from lguest_mp.record import Record
from lguest_mp.supervisor.log import Level

if TYPE_CHECKING:
    from lguest_mp.config import GuestConfig
    from lguest_mp.cpu.engine import EntryState
    from lguest_mp.jail import Confinement, Jail
    from lguest_mp.supervisor.log import Log
    from lguest_mp.supervisor.parts import Kernel, Parts
    from lguest_mp.virtio.device import Device


class Resources(Record):
    """What one launcher holds, from its start to its end. ``null`` is /dev/null, opened for reading and writing."""

    config: GuestConfig
    parts: Parts
    memory: GuestMemory
    devices: list[Device]
    null: int
    confinement: Confinement
    jail: Jail
    kernel: Kernel | None
    log: Log

    @property
    def reboots_in_place(self) -> bool:
        """Whether a reboot has to make do with what is open now."""
        return self.config.username is not None or self.config.chroot is not None

    def load_kernel(self) -> EntryState:
        """Fills guest memory for a start, and lets go of what the next start will not need."""
        if self.kernel is None:
            raise ValueError("the kernel was let go of")
        entry = self.kernel.load(self.memory)
        if not self.reboots_in_place:
            self.forget_kernel()
        self.memory.unmap_touched()
        if self.config.huge_pages and not self.memory.huge_pages:
            self.log.say("the host has no huge pages for the guest's memory", Level.INFO)
        return entry

    def forget_kernel(self) -> None:
        """Frees the unpacked kernel."""
        self.kernel = None

    def confine(self) -> None:
        """Confines this process, once, for good."""
        confinement, self.confinement = self.confinement, jail.Confinement()
        try:
            confinement.enter()
        except OSError as error:
            raise LguestError(f"cannot enter --chroot or --username: {error.strerror}") from error

    def reset(self) -> None:
        """Makes it all fit for the next guest in place, and lets go of the last one."""
        gc.unfreeze()
        gc.collect()
        self.memory.clear()

    def hand_on(self) -> None:
        """Leaves to the launcher that is executed next what it is to have of this one."""
        for device in self.devices:
            with suppress(OSError):  # out of files: it begins anew
                device.hand_on()
        self.log.hand_on()

    def close(self) -> None:
        """Closes what is open."""
        for device in self.devices:
            device.close()
        os.close(self.null)


def open_all(config: GuestConfig, parts: Parts, log: Log) -> Resources:
    """Opens what ``config`` asks for, or raises LguestError. The cheap checks come first."""
    confinement = jail.prepare(config.username, config.chroot)
    with ExitStack() as opened:
        devices = parts.open_devices(config, confinement.user)
        for device in devices:
            opened.callback(device.close)
        _check_policies(config, devices)
        if not confinement.is_empty:
            parts.load_machine()  # there may be no Python where we are going
        kernel = parts.read_kernel(config)
        memory = GuestMemory(config.memory + parts.device_memory, huge_pages=config.huge_pages)
        try:
            null = os.open(os.devnull, os.O_RDWR)
        except OSError as error:
            raise LguestError(f"cannot open {os.devnull}: {error.strerror}") from error
        opened.callback(os.close, null)
        for device in devices:
            device.connect()
        opened.pop_all()
    return Resources(config, parts, memory, devices, null, confinement, jail.Jail(config.jail), kernel, log)


def _check_policies(config: GuestConfig, devices: list[Device]) -> None:
    known = [device.name for device in devices]
    for name, _ in config.crash_policies:
        if name is not None and name not in known:
            raise LguestError(f"--on-crash={name}:...: there is no device {name}; there is {', '.join(known)}")


def freeze() -> None:
    """Moves everything that lives now out of the garbage collector's sight, and lets it begin with what comes.

    A collection writes to every object it looks at; in a forked worker each such write would copy a page that it
    shares with the supervisor (1.5 MiB of its own instead of 7).
    """
    gc.collect()
    gc.freeze()
    gc.enable()
