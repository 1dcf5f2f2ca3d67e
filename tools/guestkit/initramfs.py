"""The initramfs of our guests: busybox, the virtio drivers, and one script as first process."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from guestkit.cpio import CpioArchive
from guestkit.kernel import Kernel

_SCRIPTS = Path(__file__).parent / "init"
#: The drivers that are loaded at every start.
DEFAULT_MODULES = ("virtio_pci", "virtio_console", "virtio_blk", "virtio_rng")


def build_initramfs(kernel: Kernel, busybox: Path, script: str, further_modules: Sequence[str] = ()) -> bytes:
    """An initramfs whose ``/init`` is ``init/<script>.sh``; ``further_modules`` are there, but not loaded.

    ``/init-modules`` lists those that are to be loaded; what is built into the kernel is not among them.
    """
    archive = CpioArchive()
    for directory in ("dev", "proc", "sys", "tmp", "run", "mnt", "root"):
        archive.directory(directory)
    archive.character_device("dev/console", 5, 1)
    archive.file("init", (_SCRIPTS / f"{script}.sh").read_bytes(), 0o755)
    archive.file("init-common", (_SCRIPTS / "common.sh").read_bytes())
    archive.file("etc/udhcpc/default.script", (_SCRIPTS / "udhcpc.sh").read_bytes(), 0o755)
    archive.file("bin/busybox", busybox.read_bytes(), 0o755)
    for applet in _applets(busybox):
        archive.symlink(f"bin/{applet}", "busybox")
    folder = f"lib/modules/{kernel.version}"
    dependencies = []
    for module in kernel.modules([*DEFAULT_MODULES, *further_modules]):
        archive.file(f"{folder}/{module.name}.ko", module.data)
        # As depmod writes them: what is to be loaded first stands last.
        dependencies.append(f"{module.name}.ko:" + "".join(f" {name}.ko" for name in reversed(module.needs)))
    archive.file(f"{folder}/modules.dep", "\n".join([*dependencies, ""]).encode())
    default = {module.name for module in kernel.modules(DEFAULT_MODULES)}
    archive.file("init-modules", " ".join(name for name in DEFAULT_MODULES if name in default).encode())
    return archive.finish()


def _applets(busybox: Path) -> list[str]:
    listed = subprocess.run([busybox, "--list"], check=True, capture_output=True, text=True).stdout
    return [name for name in listed.split() if name != "busybox"]
