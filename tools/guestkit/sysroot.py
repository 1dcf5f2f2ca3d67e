"""A few dynamically linked Debian programs (mke2fs, e2fsck, debugfs, perl) that run without being installed.

On the host they run through the dynamic loader that came with them, whatever the host's own libraries are; in a guest
they lie where they belong, out of an archive that is appended to the initramfs.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from guestkit.cpio import CpioArchive
from guestkit.packages import Packages
from guestkit.progress import SetupError

_PROGRAMS = ("mke2fs", "perl")
#: What those two are linked with.
_LIBRARIES = ("libc.", "libm.", "libcrypt.", "libext2fs.", "libcom_err.", "libblkid.", "libuuid.", "libe2p.")
_TRIPLET = "x86_64-linux-gnu"
_LOADER = "ld-linux-x86-64.so.2"
_PERL_FOLDER = f"usr/lib/{_TRIPLET}/perl-base"
_PERL_MODULES = ("strict.pm", "warnings.pm", "constant.pm", "warnings/register.pm")
_SONAME = re.compile(r"lib\w+\.so\.\d+")


class Sysroot:
    """The programs, their libraries and their loader."""

    def __init__(self, packages: Packages) -> None:
        self._tree = packages.tree("sysroot", ["e2fsprogs", "perl-base"], dependencies="lib.*")
        libraries = sorted(self._tree.rglob(f"{_TRIPLET}/lib*.so.*"))
        # A library is looked for by its soname, which has one number; the file behind it may have more.
        self._libraries = {path.name: path.resolve() for path in libraries if _SONAME.fullmatch(path.name)}
        self._loader = self._find(f"{_TRIPLET}/{_LOADER}")

    def run(self, program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Runs one of them on the host; what it printed (both streams) and its exit status."""
        folders = ":".join(sorted({str(path.parent) for path in self._libraries.values()}))
        command = [self._loader, "--library-path", folders, self._find(f"*bin/{program}"), *arguments]
        return subprocess.run(
            command, check=False, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def run_perl(self, script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs a Perl program on the host, with its own modules."""
        return self.run("perl", "-I", self._find(f"{_PERL_FOLDER}/strict.pm").parent, script, *arguments)

    def archive(self) -> bytes:
        """An archive with mke2fs and perl for a guest, to be appended to an initramfs.

        Of Perl's modules it has strict, warnings and constant.
        """
        archive = CpioArchive()
        for program in _PROGRAMS:
            archive.file(f"sysroot/bin/{program}", self._find(f"*bin/{program}").read_bytes(), 0o755)
        for name, path in self._libraries.items():
            if name.startswith(_LIBRARIES):
                archive.file(f"lib/{name}", path.read_bytes(), 0o755)
        for module in _PERL_MODULES:
            archive.file(f"{_PERL_FOLDER}/{module}", self._find(f"{_PERL_FOLDER}/{module}").read_bytes())
        archive.file(f"lib64/{_LOADER}", self._loader.read_bytes(), 0o755)
        return archive.finish()

    def _find(self, pattern: str) -> Path:
        found = [path.resolve() for path in sorted(self._tree.rglob(pattern))]
        if not found:
            raise SetupError(f"there is no {pattern} in {self._tree}; delete it and try again")
        return found[0]
