"""slirp4netns, where the host has none: Debian's, that runs without being installed.

It needs the libraries and the dynamic loader that came with it, and yet has to be a program that is found in PATH and
keeps the name that it was given (a script would lose its argv[0]). So what stands in PATH is the smallest of programs,
which executes the loader with its own arguments and that name.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import tempfile
from functools import cached_property
from pathlib import Path

from guestkit.cache import locked
from guestkit.packages import Packages
from guestkit.progress import SetupError

_NAME = "slirp4netns"
_LOADER = "ld-linux-x86-64.so.2"
_SONAME = re.compile(r"lib[\w.-]+?\.so\.\d+")
_BASE = 0x400000
_HEADERS = 64 + 56


class Slirp:
    """The program with all it needs; ``shelf`` is the cache's."""

    def __init__(self, packages: Packages, shelf: Path) -> None:
        self._tree = packages.tree("slirp", [_NAME], dependencies="lib.*")
        self._shelf = shelf

    @cached_property
    def directory(self) -> Path:
        """A directory to be put in front of PATH."""
        with locked(self._shelf):
            target = self._shelf / _NAME
            if not target.exists():
                with tempfile.TemporaryDirectory(dir=self._shelf, prefix=".new-") as scratch:
                    # Its own path is in it, so it is made for where it will be.
                    self.put_into(Path(scratch) / _NAME, target).rename(target)
        return target

    def search_path(self) -> str:
        """A value of PATH with which there is a slirp4netns: the host's if it has one."""
        path = os.environ.get("PATH", os.defpath)
        return path if shutil.which(_NAME) else f"{self.directory}{os.pathsep}{path}"

    def put_into(self, directory: Path, final: Path | None = None) -> Path:
        """Makes ``directory``, for everybody to read, another one to be put in front of PATH; ``directory``.

        It works as ``final`` when it is renamed afterwards.
        """
        final = final or directory
        libraries = directory / "lib"
        libraries.mkdir(parents=True)
        for library in self._tree.rglob("lib*.so.*"):
            if _SONAME.fullmatch(library.name):
                shutil.copy(library, libraries)
        for name in (_LOADER, f"bin/{_NAME}"):
            shutil.copy(self._find(name), libraries)
        program = directory / _NAME
        where = final / "lib"
        program.write_bytes(starter(str(where / _LOADER), str(where), str(where / _NAME)))
        for path in (directory, libraries, program):
            path.chmod(0o755)
        return directory

    def _find(self, name: str) -> Path:
        for path in sorted(self._tree.rglob(name)):
            return path.resolve()
        raise SetupError(f"there is no {name} in {self._tree}; delete it and try again")


def starter(loader: str, libraries: str, program: str) -> bytes:
    """An ELF program that becomes ``program``, with its own arguments: the first is the new one's name, too.

    What it executes is ``loader`` with the arguments argv[0], ``--library-path``, ``libraries``, ``program``, argv[1],
    and so on. They are written over and in front of those that lie on its stack.
    """
    strings = [text.encode() + b"\0" for text in (loader, "--library-path", libraries, program)]
    address = _BASE + _HEADERS
    addresses = []
    for string in strings:
        addresses.append(struct.pack("<I", address))
        address += len(string)
    at_loader, at_option, at_libraries, at_program = addresses
    code = b"".join(
        (
            b"\x48\x8b\x0c\x24",  # mov rcx, [rsp]: argc
            b"\x48\x8d\x54\xcc\x10",  # lea rdx, [rsp+rcx*8+16]: the environment
            b"\x48\x8b\x44\x24\x08",  # mov rax, [rsp+8]: argv[0]
            b"\x48\xc7\x44\x24\x08" + at_program,  # mov qword [rsp+8], program
            b"\x48\xc7\x04\x24" + at_libraries,  # mov qword [rsp], libraries
            b"\x68" + at_option,  # push --library-path
            b"\x50",  # push rax
            b"\x48\x89\xe6",  # mov rsi, rsp
            b"\xbf" + at_loader,  # mov edi, loader
            b"\xb8\x3b\x00\x00\x00",  # mov eax, 59 (execve)
            b"\x0f\x05",  # syscall
            b"\xbf\x7f\x00\x00\x00",  # mov edi, 127
            b"\xb8\x3c\x00\x00\x00",  # mov eax, 60 (exit)
            b"\x0f\x05",  # syscall
        )
    )
    size = address - _BASE + len(code)
    identification = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, address, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 4096)
    return b"".join((identification, header, segment, *strings, code))
