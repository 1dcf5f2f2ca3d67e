"""A machine with KVM, on any host: QEMU's translator is a processor of AMD's with virtualization, and a stock kernel
with ``kvm_amd`` runs on it. So KVM, the real one, can be tested where there is none. In it, everything is slow.

Its initramfs has the agent (``init/agent.sh``), the Python that runs here with its libraries, what the tests need of
this Python's packages, the checkout, and of the cache what guests are made of: tests run in it as they do here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import marshal
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from guestkit.cpio import CpioArchive
from guestkit.guest import Agent
from guestkit.kernel import Kernel
from guestkit.packages import Packages
from guestkit.progress import SetupError
from guestkit.session import Session

#: Of the standard library: what nothing here imports, and much of it.
_UNUSED = frozenset(
    "site-packages __pycache__ test tests idlelib lib2to3 tkinter turtledemo ensurepip pydoc_data distutils".split()  # noqa: SIM905
)
#: Of this Python's packages: what the launcher on KVM needs, and what its tests do.
_PACKAGES = (
    *("pyelftools", "psutil", "setproctitle", "lz4"),
    *("pytest", "pluggy", "iniconfig", "packaging", "pygments", "hypothesis", "sortedcontainers"),
)
_CHECKOUT = ("lguest_mp", "tests", "tools", "pyproject.toml")
_MODULES = ("virtio_pci", "virtio_console", "virtio_blk", "virtio_rng", "virtio_net", "pvpanic_mmio")
_LOADER = "ld-linux-x86-64.so.2"
_SHARED = re.compile(r"\.so(\.\d+)*$")

_ENVIRONMENT = "PYTHONHOME=/usr PYTHONPATH=/site LD_LIBRARY_PATH=/lib LGUEST_CACHE=/cache"


class Qemu:
    """QEMU for x86-64: the host's, or Debian's that runs without being installed."""

    def __init__(self, packages: Packages) -> None:
        self._packages = packages

    @cached_property
    def _tree(self) -> Path:
        return self._packages.tree("qemu-system", ["qemu-system-x86"], r"lib.*|seabios|qemu-system-\w+|zlib1g")

    @property
    def variables(self) -> dict[str, str]:
        """What its environment has to have, too."""
        if shutil.which("qemu-system-x86_64"):
            return {}
        return {"QEMU_MODULE_DIR": str(next(self._tree.rglob("accel-tcg-x86_64.so")).parent)}

    @property
    def command(self) -> list[str]:
        """The words that a command of it begins with."""
        if program := shutil.which("qemu-system-x86_64"):
            return [program]
        tree = self._tree
        libraries = ":".join(sorted({str(path.parent) for path in tree.rglob("lib*.so.*")}))
        loader = next(tree.rglob(f"x86_64-linux-gnu/{_LOADER}")).resolve()
        data = [word for name in ("qemu", "seabios") for word in ("-L", str(tree / "usr/share" / name))]
        return [str(loader), "--library-path", libraries, str(tree / "usr/bin/qemu-system-x86_64"), *data]


class NestedMachine(Session):
    """A running machine with KVM; commands are given to its agent."""

    def __init__(self, qemu: Qemu, kernel: Kernel, initrd: Path, cpus: int = 2, memory: int = 2048) -> None:
        """``initrd``: what :func:`build_nested` makes; ``memory`` in MiB."""
        command = [*qemu.command, "-accel", "tcg,thread=multi", "-M", "pc", "-cpu", "qemu64,+svm,+npt,+x2apic"]
        command += ["-m", str(memory), "-smp", str(cpus), "-nodefaults", "-no-reboot", "-display", "none"]
        command += ["-serial", "stdio", "-kernel", str(kernel.image), "-initrd", str(initrd)]
        command += ["-append", "console=ttyS0 quiet agent=ttyS0 load=none mitigations=off panic=-1"]
        super().__init__(command, variables=qemu.variables, columns=200)
        self.agent = Agent(self)

    def boot(self) -> None:
        """Waits until it is there, and has its KVM loaded."""
        self.agent.wait_until_ready("ttyS0")
        self.agent.run("modprobe kvm_amd && ls /dev/kvm && ifconfig lo up")

    def python(self, *arguments: str, variables: str = "", seconds: float) -> str:
        """Runs Python in the checkout; what it printed."""
        command = f"cd /lguest && {_ENVIRONMENT} {variables} python3 {' '.join(arguments)} 2>&1"
        return self.agent.run(command, seconds)


def build_nested(initramfs: bytes, kernel: Kernel, busybox: Path, checkout: Path) -> bytes:
    """The machine's initramfs; ``initramfs`` is one with the agent and the module kvm_amd."""
    archive = CpioArchive()
    libraries: dict[str, Path] = {}
    _add_python(archive, libraries)
    for package in _PACKAGES:
        _add_package(archive, package, libraries)
    for name in _CHECKOUT:
        _add_tree(archive, checkout / name, f"lguest/{name}", libraries)
    _add_cache(archive, kernel, busybox)
    for name, path in libraries.items():
        archive.file(f"lib/{name}" if name != _LOADER else f"lib64/{name}", path.read_bytes(), 0o755)
    return initramfs + archive.finish()


def _add_python(archive: CpioArchive, libraries: dict[str, Path]) -> None:
    stdlib = Path(sysconfig.get_path("stdlib"))
    program = Path(sys.executable).resolve()
    archive.file("bin/python3", program.read_bytes(), 0o755)
    libraries.update(_needed(program))
    target = f"usr/lib/{stdlib.name}"
    for path in _files(stdlib, _UNUSED):
        relative = path.relative_to(stdlib)
        if path.suffix == ".py":  # compiled only
            archive.file(f"{target}/{relative.with_suffix('.pyc')}", _compiled(path))
        elif _SHARED.search(path.name) and "config-" not in str(relative):
            archive.file(f"{target}/{relative}", path.read_bytes(), 0o755)
            libraries.update(_needed(path))


def _add_package(archive: CpioArchive, name: str, libraries: dict[str, Path]) -> None:
    """A package as it was installed; programs, which lie elsewhere, are left out."""
    try:
        package = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise SetupError(f"this Python has no {name}") from error
    for file in package.files or ():
        if file.parts[0] != ".." and "__pycache__" not in file.parts:
            _add_file(archive, Path(str(package.locate_file(file))), f"site/{file}", libraries)


def _add_tree(archive: CpioArchive, root: Path, target: str, libraries: dict[str, Path]) -> None:
    if root.is_file():
        archive.file(target, root.read_bytes())
        return
    for path in _files(root, frozenset({"__pycache__"})):
        _add_file(archive, path, f"{target}/{path.relative_to(root)}", libraries)


def _add_file(archive: CpioArchive, path: Path, target: str, libraries: dict[str, Path]) -> None:
    """A file of a package: with what it is compiled to, or with the libraries that it needs."""
    archive.file(target, path.read_bytes(), 0o755)
    if path.suffix == ".py":
        place = Path(target)
        tag = sys.implementation.cache_tag
        archive.file(str(place.parent / "__pycache__" / f"{place.stem}.{tag}.pyc"), _compiled(path))
    elif _SHARED.search(path.name):
        libraries.update(_needed(path))


def _add_cache(archive: CpioArchive, kernel: Kernel, busybox: Path) -> None:
    """The cache's kernel, with the modules that guests load, and its busybox."""
    archive.file(f"cache/packages/kernel/boot/{kernel.image.name}", kernel.image.read_bytes())
    modules = f"cache/packages/kernel/lib/modules/{kernel.version}"
    for module in kernel.modules(_MODULES):
        archive.file(f"{modules}/{module.name}.ko", module.data)
    archive.file(f"{modules}/modules.builtin", b"\n")
    archive.file("cache/packages/busybox/bin/busybox", busybox.read_bytes(), 0o755)


def _files(root: Path, without: frozenset[str]) -> Iterator[Path]:
    for path in sorted(root.iterdir()):
        if path.name in without:
            continue
        if path.is_dir():
            yield from _files(path, without)
        elif path.is_file():
            yield path


def _compiled(path: Path) -> bytes:
    """The module's bytecode, to be taken without a look at its source (PEP 552: hash-based, unchecked)."""
    code = compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
    return importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + bytes(8) + marshal.dumps(code)


def _needed(program: Path) -> dict[str, Path]:
    """The shared libraries that a program or a library needs, by name, the loader among them."""
    shown = subprocess.run(["ldd", str(program)], check=False, capture_output=True, text=True).stdout
    found = {}
    for path in re.findall(r"(?:=> |^\s)(/\S+) \(0x", shown, re.MULTILINE):
        found[Path(path).name] = Path(path)
    return found
