"""Debian packages, downloaded and unpacked without being installed, by anybody.

apt does the work (mirrors, proxies, signatures are as ``/etc/apt`` says), but with lists and caches of our own: neither
is the system's state changed, nor does it take root, nor does the system's index have to be there or be fresh. A mirror
of some third party that does not answer makes ``apt-get update`` fail in part; that matters only when the package that
is wanted is then unknown.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from guestkit.cache import locked
from guestkit.progress import SetupError, step

_TRIES = 3
_PAUSE = 5.0
_INDEX_LASTS = 24 * 3600.0


class Packages:
    """Unpacked packages below ``cache``: each tree is fetched once and then stays as it is."""

    def __init__(self, cache: Path) -> None:
        self._shelf = cache / "packages"
        self._state = cache / "apt"

    def tree(self, name: str, packages: Sequence[str], dependencies: str = "") -> Path:
        """A directory with what ``packages`` (newest versions) contain, one over the other.

        It is called ``name`` and made when it is not there yet. What the packages need is added where its name matches
        the regular expression ``dependencies``, and so on. SetupError when apt cannot get them.
        """
        target = self._shelf / name
        if target.exists():
            return target
        with locked(self._shelf):
            if not target.exists():
                self._fetch(target, packages, re.compile(dependencies))
        return target

    def _fetch(self, target: Path, packages: Sequence[str], dependencies: re.Pattern[str]) -> None:
        for tool in ("apt-get", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise SetupError(f"{tool} is not here: this needs a Debian (or one of its relatives) to get packages")
        self._require_known(packages)
        packages = self._closure(packages, dependencies)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-") as scratch:
            downloads, tree = Path(scratch) / "debs", Path(scratch) / "tree"
            downloads.mkdir()
            tree.mkdir()
            self._download(downloads, packages)
            for archive in sorted(downloads.glob("*.deb")):
                step(f"Unpacking {archive.name} ({archive.stat().st_size / 1e6:.1f} MB)")
                subprocess.run(["dpkg-deb", "-x", archive, tree], check=True)
            tree.chmod(0o755)
            tree.rename(target)

    def _download(self, directory: Path, packages: Sequence[str]) -> None:
        step(f"Downloading {', '.join(packages)}")
        for attempt in range(_TRIES):
            if attempt:  # a mirror may have moved on since its index was read
                time.sleep(_PAUSE)
                self._update()
            if self._apt("apt-get", "download", *packages, directory=directory) == 0:
                return
        raise SetupError(f"apt-get cannot download {', '.join(packages)}: see its messages above; is there a network?")

    def _require_known(self, packages: Sequence[str]) -> None:
        """Brings the index up to date where it is missing, old, or does not know one of ``packages``."""
        stamp = self._state / "updated"
        if not stamp.exists() or time.time() - stamp.stat().st_mtime > _INDEX_LASTS:
            self._update()
        for attempt in range(_TRIES):
            unknown = [name for name in packages if not self._ask("show", name)]
            if not unknown:
                return
            if attempt:
                time.sleep(_PAUSE)
            self._update()
        raise SetupError(
            f"apt knows no package {', '.join(unknown)}: see the messages of apt-get update above; "
            "are there a network and a Debian source for amd64 in /etc/apt?"
        )

    def _update(self) -> None:
        step("Reading the package index (into a folder of our own)")
        if self._apt("apt-get", "update") != 0:
            step("Some of the index could not be read; going on with the rest")
        (self._state / "updated").touch()

    def _closure(self, packages: Sequence[str], pattern: re.Pattern[str]) -> list[str]:
        """``packages`` and, again and again, what they depend on by a name that matches ``pattern``."""
        found = dict.fromkeys(packages)
        new = list(packages)
        while new:
            listed = self._ask("depends", "--important", "--no-recommends", *new)
            needed = (line.split()[-1] for line in listed.splitlines() if "Depends:" in line)
            new = [name for name in dict.fromkeys(needed) if pattern.fullmatch(name) and name not in found]
            found.update(dict.fromkeys(new))
        return list(found)

    def _ask(self, *arguments: str) -> str:
        command = ["apt-cache", *self._options(), *arguments]
        return subprocess.run(command, check=False, capture_output=True, text=True).stdout

    def _apt(self, program: str, *arguments: str, directory: Path | None = None) -> int:
        """Runs apt, its messages (with its progress, on a terminal) on standard error; its exit status."""
        (self._state / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        (self._state / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
        command = [program, *self._options(), *arguments]
        finished = subprocess.run(
            command, check=False, cwd=directory or self._state, stdin=subprocess.DEVNULL, stdout=2
        )
        return finished.returncode

    def _options(self) -> list[str]:
        settings = {
            "Dir::State": self._state,
            "Dir::State::status": "/var/lib/dpkg/status",
            "Dir::Cache": self._state / "cache",
            "Acquire::Languages": "none",
            "Acquire::Retries": _TRIES,
            # As root, apt would download as the user _apt, who may not write here.
            "APT::Sandbox::User": "root",
        }
        return [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
