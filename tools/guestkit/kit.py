"""What guests are made of: the kernel, the initramfs of each kind, programs. Fetched once, kept in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from guestkit import nested
from guestkit.initramfs import build_initramfs
from guestkit.kernel import Kernel
from guestkit.nested import Qemu, build_nested
from guestkit.packages import Packages
from guestkit.progress import SetupError
from guestkit.slirp import Slirp
from guestkit.sysroot import Sysroot


class GuestKit:
    """The parts, each fetched when it is first asked for."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self._packages = Packages(cache)

    @cached_property
    def kernel(self) -> Kernel:
        """Debian's newest kernel for virtual machines."""
        tree = self._packages.tree("kernel", ["linux-image-cloud-amd64"], r"linux-(image|binary|modules)-\d\S*")
        return Kernel(tree)

    @cached_property
    def busybox(self) -> Path:
        """Debian's busybox, which needs no libraries."""
        tree = self._packages.tree("busybox", ["busybox-static"])
        for path in tree.rglob("bin/busybox"):  # below usr since Debian 13
            return path
        raise SetupError(f"there is no busybox in {tree}; delete it and try again")

    @cached_property
    def sysroot(self) -> Sysroot:
        """mke2fs, e2fsck, debugfs and perl."""
        return Sysroot(self._packages)

    @cached_property
    def slirp(self) -> Slirp:
        """slirp4netns, which --net=user takes."""
        return Slirp(self._packages, self.cache / "programs")

    @cached_property
    def qemu(self) -> Qemu:
        """QEMU, for machines with KVM where there is none."""
        return Qemu(self._packages)

    def nested_initramfs(self, package: Path) -> bytes:
        """The initramfs of such a machine, with the launcher's package in it, and a guest."""
        machine, guest = self.initramfs("agent", nested.MODULES), self.initramfs("agent", nested.GUEST_MODULES)
        return build_nested(machine, self.kernel, guest, package)

    def initramfs(self, script: str, further_modules: Sequence[str] = ()) -> bytes:
        """An initramfs whose first process is ``init/<script>.sh``."""
        return build_initramfs(self.kernel, self.busybox, script, further_modules)

    def fetch(self) -> None:
        """Fetches all of it now."""
        for part in (self.kernel, self.busybox, self.sysroot, self.slirp.directory, self.qemu.command):
            assert part
