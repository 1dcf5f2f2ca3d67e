"""Perl programs of ours for guests (``perl/``), and how they run there.

They lie in ``/soak`` of a guest whose initramfs ends with :func:`script_archive`. They use nothing but what perl-base
has: system calls by number, and no modules except ``strict``, ``warnings`` and ``constant``.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from guestkit.cpio import CpioArchive
from guestkit.guest import Guest
from guestkit.session import PATIENCE

_SCRIPTS = Path(__file__).parent / "perl"


def script_archive() -> bytes:
    """An archive with all of them, to be appended to an initramfs that has perl."""
    archive = CpioArchive()
    for path in sorted(_SCRIPTS.glob("*.pl")):
        archive.file(f"soak/{path.name}", path.read_bytes())
    return archive.finish()


def command(script: str, *arguments: object) -> str:
    """The shell command that runs ``perl/<script>.pl`` in a guest."""
    return shlex.join(["/sysroot/bin/perl", f"/soak/{script}.pl", *map(str, arguments)])


class Task:
    """A shell command that runs in the guest's background until the file :attr:`stop` appears there."""

    def __init__(self, guest: Guest, name: str) -> None:
        self._guest = guest
        self._name = name
        #: The file that the command looks for.
        self.stop = f"/tmp/{name}.stop"

    def start(self, shell: str) -> None:
        """Begins."""
        log, status = f"/tmp/{self._name}.log", f"/tmp/{self._name}.status"
        self._guest.run(f"rm -f {self.stop} {status}; (({shell}) >{log} 2>&1; echo $? >{status}) </dev/null &")

    def finish(self, seconds: float = PATIENCE) -> str:
        """Has it stop, and waits for that; what it printed. CommandFailed when it failed."""
        log, status = f"/tmp/{self._name}.log", f"/tmp/{self._name}.status"
        wait = f"touch {self.stop}; until [ -s {status} ]; do usleep 20000; done"
        return self._guest.run(f"{wait}; cat {log}; exit $(cat {status})", seconds)
