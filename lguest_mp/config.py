"""What a guest is made of: everything the command line says, as values that nobody changes."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

from lguest_mp.record import Value

#: How long (seconds) a worker may get nothing of its work done, unless somebody says otherwise: longer than a disk
#: takes that is busy, or spins up.
STUCK_AFTER = 30.0


class BlockConfig(Value):
    """A disk: the file (or block device) that holds its bytes."""

    path: Path


class RngConfig(Value):
    """A source of random numbers, fed by the host's."""


class TapConfig(Value):
    """A network on a tap interface of the host.

    ``address`` (IPv4, dotted; with ``prefix`` bits of network, None: the address's class decides) is the host's on it,
    or it is a port of the bridge ``bridge``; neither: it is brought up and no more. ``interface`` is its name, None:
    the next free ``tap<n>``.
    """

    address: str | None = None
    prefix: int | None = None
    bridge: str | None = None
    interface: str | None = None


class Forward(Value):
    """A port of the host that leads to a port of the guest; ``protocol`` is ``tcp`` or ``udp``."""

    protocol: str
    host_address: str
    host_port: int
    guest_port: int


class UserConfig(Value):
    """A network of the user's own, behind the host's: no privileges, guests are reached through ``forwards`` only.

    ``host_loopback``: the guest may connect to the host's own 127.0.0.1 (as 10.0.2.2).
    """

    forwards: tuple[Forward, ...] = ()
    host_loopback: bool = False


class LinkConfig(Value):
    """A wire between all guests of this user that name the same ``link``."""

    link: str


WireConfig = TapConfig | UserConfig | LinkConfig


class NetConfig(Value):
    """A network device.

    ``mac``: 6 bytes, None: made of the guest's name. ``mtu``: told to the guest; None: the wire's own. ``offload``:
    whether checksums and segmentation may be left to the other side.
    """

    wire: WireConfig
    mac: bytes | None = None
    mtu: int | None = None
    offload: bool = True


class OnCrash(Enum):
    """What becomes of a device one of whose workers has crashed."""

    #: Another worker goes on where it stopped.
    RESTART = "restart"
    #: The device is stopped, and the guest told that it needs a reset.
    RESET = "reset"
    #: The guest is stopped.
    STOP = "stop"


class CrashPolicy(Value):
    """``action``; of restarts at most ``intensity`` in any ``period`` seconds, beyond which the device is stopped."""

    action: OnCrash = OnCrash.RESTART
    intensity: int = 5
    period: float = 30.0


DeviceConfig = BlockConfig | RngConfig | NetConfig


class GuestConfig(Value):
    """One guest as its user asked for it.

    ``memory`` is in bytes. ``devices`` are in the order of the command line; the console, which every guest has, is
    not among them. ``arguments`` are the kernel's, as given. ``cpu`` is what executes it: ``unicorn``, ``kvm`` or
    ``lguest``; ``auto``: what this host has. ``machine`` is ``pc`` or ``lguest``; None: the one that the kernel is for.
    ``core``: which one serves the virtqueues (``core.CHOICES``). ``rings``: what a driver is offered, ``split`` or
    ``packed`` (which it may refuse). ``jail``: whether its processes may do only what they need. ``kernel_cache``:
    whether unpacked kernels are kept and looked for. ``huge_pages``: whether its memory may be in huge pages.
    ``crash_policies``: by device; None: of all others.
    ``stuck_after``: how long (seconds) a worker may get nothing of its work done, 0: for ever.
    """

    name: str
    memory: int
    kernel: Path
    initrd: Path | None = None
    arguments: tuple[str, ...] = ()
    devices: tuple[DeviceConfig, ...] = ()
    username: str | None = None
    chroot: Path | None = None
    verbose: bool = False
    cpu: str = "auto"
    cpus: int = 1
    machine: str | None = None
    core: str = "auto"
    rings: str = "split"
    jail: bool = True
    kernel_cache: bool = True
    huge_pages: bool = True
    crash_policies: tuple[tuple[str | None, CrashPolicy], ...] = ()
    stuck_after: float = STUCK_AFTER

    def crash_policy_of(self, device: str) -> CrashPolicy:
        """The policy of the device that people call so: the last one that was given for it, or for all."""
        policies = dict(self.crash_policies)
        return policies.get(device) or policies.get(None) or CrashPolicy()
