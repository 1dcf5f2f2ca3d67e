"""What a guest is made of: everything the command line says, as values that nobody changes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class BlockConfig:
    """A disk: the file (or block device) that holds its bytes."""

    path: Path


@dataclass(frozen=True)
class RngConfig:
    """A source of random numbers, fed by the host's."""


DeviceConfig = BlockConfig | RngConfig


@dataclass(frozen=True)
class GuestConfig:
    """One guest as its user asked for it.

    ``memory`` is in bytes. ``devices`` are in the order of the command line; the console, which every guest has, is
    not among them. ``arguments`` are the kernel's, as given.
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
    cpu: str = "unicorn"
    machine: str = "pc"
