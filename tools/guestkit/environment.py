"""A virtual environment with the package in it, made with nothing but Python's standard library and apt.

Debian's Python comes without pip and without the part of ``venv`` that would bring it. So the environment is made
empty, and pip, where Python itself has none to give, comes out of a Debian package that is unpacked, not installed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from guestkit.cache import locked
from guestkit.packages import Packages
from guestkit.progress import SetupError, step

#: What pip compiles, where it can.
_COMPILED = (Path("lguest_mp", "_compiled.pyx"), Path("lguest_mp", "_board.pxi"))
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


class Environment:
    """The virtual environment of one checkout, for this Python, in the cache."""

    def __init__(self, cache: Path, checkout: Path) -> None:
        self._cache = cache
        self._checkout = checkout
        self._shelf = cache / "venv"
        place = f"{checkout} {sys.implementation.cache_tag}".encode()
        #: Its directory.
        self.directory = self._shelf / f"{checkout.name}-{hashlib.sha256(place).hexdigest()[:8]}"
        #: Its interpreter.
        self.python = self.directory / "bin" / "python"

    def prepare(self, extra: str = "") -> None:
        """Makes it, or brings it up to date: the package with the dependencies of ``extra`` is in it afterwards.

        Shown is which core it has: where pip cannot compile one, it says so to nobody.
        """
        stamp = self.directory / f"prepared-{extra}"
        with locked(self._shelf):
            # Whatever the extra, the plain package is in it.
            stamps = [stamp] if extra else self.directory.glob("prepared-*")
            if self._works() and any(file.exists() and file.read_text() == self._state() for file in stamps):
                self._show_core()
                return
            if not self._works():
                step(f"Making a virtual environment in {self.directory}")
                venv.EnvBuilder(clear=True, symlinks=True, with_pip=False).create(self.directory)
            self._require_pip()
            step("Installing the package and what it needs")
            self._install(extra)
            stamp.write_text(self._state())
            self._show_core()

    def _state(self) -> str:
        """What an installation depends on: other than that, it is the checkout itself."""
        project, sources = self._checkout / "pyproject.toml", [self._checkout / each for each in _COMPILED]
        content = hashlib.sha256(b"".join(file.read_bytes() for file in (project, *sources))).hexdigest()
        built = sorted(path.name for path in sources[0].parent.glob(f"{sources[0].stem}.*.so"))
        return " ".join([content, *(str(source.stat().st_mtime_ns) for source in sources), *built])

    def _show_core(self) -> None:
        lguest = str(self.python.with_name("lguest"))
        shown = subprocess.run([lguest, "--version"], capture_output=True, text=True, check=True)
        step(f"The {shown.stdout.splitlines()[-1]}")

    def compile(self) -> None:
        """Has the package's bytecode written, as for whoever installs it; Python may have been told not to do so."""
        command = [str(self.python), "-m", "compileall", "-q", "-q", str(self._checkout / "lguest_mp")]
        subprocess.run(command, check=False)

    def _works(self) -> bool:
        return _succeeds([self.python, "-c", ""])

    def _require_pip(self) -> None:
        if _succeeds([self.python, "-m", "pip", "--version"]):
            return
        if _succeeds([self.python, "-m", "ensurepip", "--default-pip"]):
            return
        tree = Packages(self._cache).tree("pip", ["python3-pip-whl"])
        wheels = sorted(tree.glob("usr/share/python-wheels/pip-*.whl"))
        if not wheels:
            raise SetupError("Debian's package python3-pip-whl has no pip in it; install python3-venv and try again")
        command = [str(self.python), str(wheels[-1] / "pip"), "install", "--no-index", str(wheels[-1])]
        if subprocess.run(command, check=False, env=self._variables()).returncode != 0:
            raise SetupError("pip could not be unpacked: see its messages above")

    def _install(self, extra: str) -> None:
        """Installs the package: in place where we may write there, else from a copy."""
        with tempfile.TemporaryDirectory() as scratch:
            source: Path = self._checkout
            # In setuptools' other way of doing it, a module of its own finds the package, which costs each start 10 ms.
            editable = ["--config-settings", "editable_mode=compat", "--editable"] if os.access(source, os.W_OK) else []
            if not editable:
                source = Path(scratch) / "source"
                shutil.copytree(self._checkout, source, ignore=shutil.ignore_patterns(".*", "*.egg-info"))
            requirement = f"{source}[{extra}]" if extra else str(source)
            pip = [str(self.python), "-m", "pip", "--disable-pip-version-check"]
            command = [*pip, "install", *editable, requirement]
            # pip's long list of what is there already is no progress; its downloads and their bars are.
            if subprocess.run(command, check=False, stdout=2, env=self._variables()).returncode != 0:
                raise SetupError("pip could not install the package: see its messages above; is there a network?")

    def _variables(self) -> dict[str, str]:
        """The environment variables for pip: where no certificates are installed, Debian's from their package."""
        variables = dict(os.environ)
        if not _CERTIFICATES.exists() and "PIP_CERT" not in variables:
            bundle = self._cache / "certificates.crt"
            tree = Packages(self._cache).tree("ca-certificates", ["ca-certificates"])
            bundle.write_bytes(b"\n".join(p.read_bytes() for p in sorted(tree.rglob("mozilla/*.crt"))))
            variables["PIP_CERT"] = str(bundle)
        return variables


def _succeeds(command: list[str | Path]) -> bool:
    try:
        return subprocess.run(command, check=False, capture_output=True).returncode == 0
    except OSError:
        return False
