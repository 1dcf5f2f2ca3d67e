"""An archive in the format that the kernel takes as initramfs (Documentation/driver-api/early-userspace/buffer-format).

"newc": a header of 13 hexadecimal fields, the name, the data, each padded to 4 bytes. Everything belongs to root and
is as old as the epoch, so that the same contents give the same bytes; device nodes need no root to be written.
"""

from __future__ import annotations

import stat

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"


class CpioArchive:
    """An archive that grows; parents of a path are made when it is added."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._names: set[str] = set()
        self._inode = 0

    def directory(self, path: str) -> None:
        """A directory (mode 755), with its parents; once is enough, twice does no harm."""
        path = path.strip("/")
        if path and path not in self._names:
            self._entry(path, stat.S_IFDIR | 0o755)

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """A regular file."""
        self._entry(path.strip("/"), stat.S_IFREG | mode, data)

    def symlink(self, path: str, target: str) -> None:
        """A symbolic link."""
        self._entry(path.strip("/"), stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, path: str, major: int, minor: int) -> None:
        """A character device (mode 600)."""
        self._entry(path.strip("/"), stat.S_IFCHR | 0o600, device=(major, minor))

    def finish(self) -> bytes:
        """The whole archive; several of them one after the other are an initramfs, too."""
        return b"".join([*self._parts, self._record(_TRAILER, 0, 0, b"", (0, 0))])

    def _entry(self, path: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        if "/" in path:
            self.directory(path.rpartition("/")[0])
        self._names.add(path)
        self._inode += 1
        self._parts.append(self._record(path, self._inode, mode, data, device))

    @staticmethod
    def _record(path: str, inode: int, mode: int, data: bytes, device: tuple[int, int]) -> bytes:
        name = path.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        fields = (inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(name), 0)
        header = _MAGIC + b"".join(b"%08x" % field for field in fields)
        return _padded(header + name) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
