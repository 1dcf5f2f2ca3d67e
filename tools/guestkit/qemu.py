"""The same guest under QEMU, to compare with: the same kernel, initramfs and memory, one CPU."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from guestkit.guest import Agent
from guestkit.progress import SetupError
from guestkit.session import Session


class Machine(Enum):
    """QEMU's machines: an old PC, and the one that is made for quick starts."""

    PC = "pc"
    MICROVM = "microvm"


#: On KVM without what no guest of ours has; with PCI, where a distribution's kernel looks for devices.
_MICROVM_ON_KVM = "microvm,acpi=on,pcie=on,pit=off,pic=off,rtc=off,isa-serial=on"
#: Translated, with what a kernel then needs to know the time. With ACPI every other start hangs (QEMU 7.2). It has no
#: PCI, and what it says of its devices on the kernel's command line a distribution's kernel does not take.
_MICROVM = "microvm,acpi=off,pit=on,pic=on,rtc=on,isa-serial=on"


class QemuGuest(Session):
    """QEMU with one guest and its agent; nothing but what is named here is in its PC.

    ``tap``: the name of an interface that it makes and attaches a network device to; it takes root. ``kvm``: on KVM.
    """

    def __init__(
        self,
        *,
        kernel: Path,
        initrd: Path,
        cpu: str = "qemu64",
        disk: Path | None = None,
        tap: str | None = None,
        memory: int = 256,
        arguments: Sequence[str] = ("quiet",),
        machine: Machine = Machine.PC,
        kvm: bool = False,
    ) -> None:
        kind = machine.value
        if machine is Machine.MICROVM:
            kind = _MICROVM_ON_KVM if kvm else _MICROVM
        has_pci = kvm or machine is not Machine.MICROVM
        command = [_program(), "-accel", "kvm" if kvm else "tcg", "-M", kind, "-cpu", "host" if kvm else cpu]
        command += ["-m", str(memory), "-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"]
        command += ["-kernel", str(kernel), "-initrd", str(initrd)]
        command += ["-append", " ".join(["console=ttyS0", *arguments])]
        if disk:
            command += ["-drive", f"file={disk},if=none,id=disk,format=raw,cache=writeback"]
            device = "virtio-blk-pci,disable-legacy=on" if has_pci else "virtio-blk-device"
            command += ["-device", f"{device},drive=disk"]
        if tap:
            # Offloads are QEMU's own choice (all of them); vhost would be the host's kernel in QEMU's place.
            command += ["-netdev", f"tap,id=net,ifname={tap},script=no,downscript=no,vhost=off"]
            command += ["-device", "virtio-net-pci,netdev=net,disable-legacy=on,romfile="]
        super().__init__(command)
        self.agent = Agent(self)


def version() -> str:
    """QEMU's version, as it says it."""
    shown = subprocess.run([_program(), "--version"], check=True, capture_output=True, text=True).stdout
    return shown.splitlines()[0]


def _program() -> str:
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        raise SetupError("qemu-system-x86_64 is not here to compare with: apt-get install qemu-system-x86")
    return program
