"""Being nobody: what root needs to run the launcher as a user who may do nothing.

A checkout, an interpreter and a cache that are root's may lie where other users cannot go. So what the launcher needs
is copied to where everybody can read, and an interpreter is looked for that everybody can run.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

#: The user and group "nobody" and "nogroup" of every Debian.
NOBODY = 65534
_PACKAGES = ("lguest_mp", "unicorn", "elftools", "psutil", "setproctitle", "lz4", "zstandard")
_DROP = (
    *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
    *("--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"),
)


def launcher_of_nobody(directory: Path) -> list[str]:
    """The command that runs ``lguest`` as nobody, from copies in ``directory`` (which all can read); root only."""
    # setpriv still has its privileges when it executes the next program; env has none when it executes Python.
    drop = [*(_find(name) for name in _DROP[:1]), *_DROP[1:], _find("env")]
    site = directory / "site"
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec, f"{name} is not installed"
        for source in spec.submodule_search_locations or ():
            shutil.copytree(source, site / name, ignore=shutil.ignore_patterns("__pycache__"))
            libraries = Path(source).with_name(f"{name}.libs")
            if libraries.exists():
                shutil.copytree(libraries, site / libraries.name)
    return [*drop, f"PYTHONPATH={site}", *_interpreter(drop, directory), "-m", "lguest_mp"]


def _find(program: str) -> str:
    path = shutil.which(program)
    assert path, f"every Debian has {program}"
    return path


def _interpreter(drop: list[str], directory: Path) -> list[str]:
    """The beginning of a command that runs this version of Python as nobody."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    check = f"import sys; sys.exit('%d.%d' % sys.version_info[:2] != '{version}')"
    for candidate in (sys.executable, f"/usr/bin/python{version}", f"/usr/local/bin/python{version}"):
        if subprocess.run([*drop, candidate, "-c", check], check=False, capture_output=True).returncode == 0:
            return [candidate]
    home = directory / "python"
    ignored = shutil.ignore_patterns("__pycache__", "site-packages", "test", "*.a")
    library = Path("lib") / f"python{version}"
    shutil.copytree(Path(sys.base_prefix) / library, home / library, ignore=ignored)
    for shared in (Path(sys.base_prefix) / "lib").glob("libpython*.so*"):
        shutil.copy(shared, home / "lib" / shared.name)
    shutil.copy(Path(sys.executable).resolve(), home / "python")
    return [f"PYTHONHOME={home}", f"LD_LIBRARY_PATH={home / 'lib'}", str(home / "python")]
