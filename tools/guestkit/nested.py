"""A machine with KVM, on any host: QEMU's translator is a processor of AMD's with virtualization, and a stock kernel
with ``kvm_amd`` runs on it. So KVM, the real one, can be tested where there is none. In it, everything is slow.

Its initramfs has the agent (``init/agent.sh``), the Python that runs here with its libraries, the launcher and what it
needs of this Python's packages, and a kernel and an initramfs for guests. Nothing but the launcher runs in it: who
drives the tests stays outside, and has two lines to it. On the machine's console is the machine's agent, and its
second serial port is the guest's terminal.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import marshal
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from guestkit.cpio import CpioArchive
from guestkit.guest import Agent, by_what_they_serve
from guestkit.kernel import Kernel
from guestkit.packages import Packages
from guestkit.progress import SetupError
from guestkit.session import PATIENCE, Found, Session, SessionError, Terminal

#: Of the standard library: what nothing here imports, and much of it; and what brings libraries of its own.
_UNUSED = frozenset(
    "site-packages __pycache__ test tests idlelib lib2to3 tkinter turtledemo ensurepip pydoc_data distutils asyncio "  # noqa: SIM905
    "unittest sqlite3 xml xmlrpc wsgiref".split()
)
_UNUSED_EXTENSION = re.compile(r"_tkinter|_sqlite3|_curses|_dbm|_gdbm|_test|_xxtest|_ctypes_test|xx|readline|nis")
#: Of this Python's packages: what the launcher on KVM needs.
_PACKAGES = ("pyelftools", "psutil", "setproctitle", "lz4", "zstandard")
#: What the machine loads when it is asked to, and what the guests do.
MODULES = ("kvm_amd", "tun")
GUEST_MODULES = ("virtio_net",)
_LOADER = "ld-linux-x86-64.so.2"
_SHARED = re.compile(r"\.so(\.\d+)*$")

_PYTHON = "PYTHONHOME=/usr PYTHONPATH=/site:/lguest LD_LIBRARY_PATH=/lib python3"
#: QEMU marks a processor's virtual interrupt in the word in which another thread marks a real one, and does so by plain
#: loads and stores (helper_vmrun and do_vmexit in 7.2's svm_helper.c): a real one may be lost. If it was a timer's,
#: which is set anew each time, no other comes. One that ticks brings the next, and with it the rest.
_TICKS = "nohz=off highres=off"
_KERNEL, _INITRD = "/guest/vmlinuz", "/guest/initrd.img"
#: The guest's terminal, in the machine.
_TERMINAL = "/dev/ttyS1"


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


class MachineHung(SessionError):
    """The machine does nothing any more, kernel and all, which none of its processes could bring about."""


class NestedMachine(Session):
    """A running machine with KVM. Its agent does what it is told; :meth:`launch` starts a guest in it."""

    def __init__(self, qemu: Qemu, kernel: Kernel, initrd: Path, cpus: int = 2, memory: int = 1536) -> None:
        """``initrd``: what :func:`build_nested` makes; ``memory`` in MiB."""
        #: The guest's terminal, from outside.
        self.line, theirs = socket.socketpair()
        theirs.set_inheritable(True)
        command = [*qemu.command, "-accel", "tcg,thread=multi", "-M", "pc", "-cpu", "qemu64,+svm,+npt,+x2apic"]
        command += ["-m", str(memory), "-smp", str(cpus), "-nodefaults", "-no-reboot", "-display", "none"]
        command += ["-chardev", f"socket,id=guest,fd={theirs.fileno()}", "-serial", "stdio", "-serial", "chardev:guest"]
        command += ["-kernel", str(kernel.image), "-initrd", str(initrd)]
        command += [
            "-append",
            "console=ttyS0 quiet agent=ttyS0 load=none mitigations=off panic=-1 nohz=off highres=off",
        ]
        super().__init__(command, variables=qemu.variables, columns=200)
        theirs.close()
        self.agent = Agent(self)
        #: Whether it has been found to be.
        self.is_hung = False

    def boot(self) -> None:
        """Waits until it is there, and has KVM, taps, and KVM's statistics."""
        try:
            self.agent.wait_until_ready("ttyS0")
        except SessionError as error:
            self.is_hung = True
            raise MachineHung(str(error)) from None
        self.run(f"modprobe -a {' '.join(MODULES)} && ls /dev/kvm && ifconfig lo up")
        self.run("mount -t debugfs debugfs /sys/kernel/debug")

    def run(self, command: str, seconds: float = PATIENCE) -> str:
        """Runs a shell command in it (not in the guest); its output."""
        try:
            return self.agent.run(command, seconds)
        except SessionError as error:
            self.is_hung = True
            raise MachineHung(str(error)) from None

    def launch(self, *options: str, arguments: str = "quiet") -> NestedGuest:
        """Starts the launcher; one at a time."""
        return NestedGuest(self, options, arguments)

    def close(self) -> None:
        """Ends it, and the guest with it."""
        super().close()
        self.line.close()


class NestedGuest(Terminal):
    """A guest of ours in such a machine: its terminal. It is launched with these options, and 256 MiB."""

    def __init__(self, machine: NestedMachine, options: tuple[str, ...], arguments: str) -> None:
        super().__init__(machine.line.fileno())
        self._machine = machine
        self._name = f"guest-{secrets.token_hex(4)}"
        self.agent = Agent(self)
        words = (f"--name={self._name}", *options, f"--initrd={_INITRD}", "256", _KERNEL, arguments)
        launcher = f"{_PYTHON} -m lguest_mp {' '.join(words)}"
        # The shell leads a session with that terminal; the last word of it lets the terminal's output out.
        machine.run(
            f"setsid sh -c 'exec <>{_TERMINAL} >&0 2>&1; stty rows 30 columns 100; {launcher}; "
            r"""printf "\nlauncher: %s\n" $?; stty sane' &"""
        )

    def wait_for(self, pattern: str, seconds: float = PATIENCE) -> Found:
        """See Terminal. MachineHung, if that is why it does not appear."""
        try:
            return super().wait_for(pattern, seconds)
        except SessionError:
            self._machine.run("true")
            raise

    def boot(self) -> None:
        """Waits until its agent is ready."""
        self.agent.wait_until_ready()

    def run(self, command: str, seconds: float = PATIENCE) -> str:
        """Runs a shell command in the guest; its output."""
        return self.agent.run(command, seconds)

    def is_idle(self) -> bool:
        """Whether it runs, and is not busy with what somebody began and did not finish."""
        if self.has_ended():
            return False
        try:
            self.run("true", seconds=30)
        except SessionError:
            if self._machine.is_hung:
                raise
            return False
        return True

    def members(self) -> dict[str, int]:
        """Who serves what, by process IDs of the machine's; see :meth:`guestkit.guest.Guest.members`."""
        listed = self._machine.run("ps -o pid,args")
        # What stands in braces is a process's short name, where it is another.
        processes = re.findall(r"^ *(\d+) (?:\{.*?\} )?(.*)$", listed, re.MULTILINE)
        return by_what_they_serve(self._name, {int(pid): title for pid, title in processes})

    def kill(self, member: str, number: signal.Signals) -> None:
        """Sends a signal to who serves that."""
        self._machine.run(f"kill -{number.value} {self.members()[member]}")

    def count(self, name: str) -> int:
        """How often something happened so far on all its processors, as KVM counts it."""
        return int(self._machine.run(f"cat /sys/kernel/debug/kvm/{self.members()['cpu']}-*/{name}"))

    def exit_status(self) -> int | None:
        """How its launcher ended, as a shell says it; None: it still runs."""
        match = re.search(rb"^launcher: (\d+)\r*\n", self._output, re.MULTILINE)
        return int(match[1]) if match else None

    def has_ended(self) -> bool:
        """Whether its launcher has, or the machine."""
        return self.exit_status() is not None or self._machine.has_ended()

    def wait(self, seconds: float = PATIENCE) -> int:
        """Waits until the launcher has ended and nothing is left of it; its exit status, as a shell says it."""
        deadline = time.monotonic() + seconds
        while (status := self.exit_status()) is None:
            if not self._read(deadline):
                self._machine.run("true")
                raise SessionError(f"it did not end within {seconds:g} s; it showed:\n{self.ending()}")
        if left := self.members():
            raise SessionError(f"it ended and left {left}")
        return status

    def power_off(self) -> None:
        """Has the guest switch itself off, and checks that the launcher ends well."""
        self.agent.start("poweroff -f")
        if (status := self.wait()) != 0:
            raise SessionError(f"exit status {status} after power-off:\n{self.ending()}")


def build_nested(initramfs: bytes, kernel: Kernel, guests_initramfs: bytes, package: Path) -> bytes:
    """The machine's initramfs: ``initramfs``, which has the agent and ``MODULES``, the ``package``, and a guest."""
    archive = CpioArchive()
    libraries: dict[str, Path] = {}
    _add_python(archive, libraries)
    for name in _PACKAGES:
        _add_package(archive, name, libraries)
    for path in _files(package, frozenset({"__pycache__"})):
        _add_file(archive, path, f"lguest/{package.name}/{path.relative_to(package)}", libraries)
    archive.file(_KERNEL.lstrip("/"), kernel.image.read_bytes())
    archive.file(_INITRD.lstrip("/"), guests_initramfs)
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
        elif _SHARED.search(path.name) and not _UNUSED_EXTENSION.match(path.name):
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


def _add_file(archive: CpioArchive, path: Path, target: str, libraries: dict[str, Path]) -> None:
    """A file of a package: with what it is compiled to, or with the libraries that it needs."""
    archive.file(target, path.read_bytes(), 0o755)
    if path.suffix == ".py":
        place = Path(target)
        tag = sys.implementation.cache_tag
        archive.file(str(place.parent / "__pycache__" / f"{place.stem}.{tag}.pyc"), _compiled(path))
    elif _SHARED.search(path.name):
        libraries.update(_needed(path))


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
