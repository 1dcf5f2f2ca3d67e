"""Unpacked kernels, kept: a launch with a kernel that was launched before only copies it.

To unpack a kernel takes 30 ms (LZ4) to half a second (xz), and what comes out is the same every time. So it is kept, a
file for each payload, in ``lguest/kernels`` below ``$XDG_CACHE_HOME`` (``~/.cache``), under the payload's SHA-256:
another payload is another entry, whatever its image's name and dates. An entry is what :class:`Unpacked` tells, and the
pieces that are not zeros, one behind the other, as they go to guest memory.

The cache is a convenience. Whatever is wrong with it (it cannot be made, is full, is somebody else's, is read-only)
means that there is none, and nobody is told. What can happen to it, and what is done about it:

- *Several launchers at once* may make the same entry, or different ones. Each writes to a file of its own, which gets
  the entry's name when it is whole; the last one stays, and they are alike.
- *A crash in the midst of writing* leaves such a file without an entry's name. Its writer held it locked (flock(2)),
  and locks end with their process: whoever writes next takes away what nobody has locked.
- *The host loses power* before the file is on its disk, or the disk forgets: an entry has a checksum (CRC-32) of its
  head, looked at before anything in it is believed, and one of its pieces, looked at when they are in guest memory. If
  it is wrong, or a piece is missing, the entry is taken away and the image unpacked as if there had been none.
- *It grows*: an entry that is used gets the present date, and whoever writes one takes away the oldest until there are
  at most :data:`LIMIT` bytes.
- *Somebody poisons it.* CRC-32 is no defence against that; the host's permissions are. The directory has to be this
  user's and nobody else's (0700), and so has the file; neither is reached through a symbolic link, and the directory
  that was looked at is the one that is used. This user is the effective one: under ``sudo`` with another's ``$HOME``
  there is no cache. A guest's processes cannot reach it, since their jail has no file system; with ``--jail=off``
  whoever breaks out of a guest is its user, and may change this user's kernels themselves.

The launcher uses it before ``--chroot`` and ``--username`` take effect, as its user finds it, like the kernel.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import zlib
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property

from lguest_mp.boot.elf import ElfImage, Segment
from lguest_mp.boot.pieces import pieces
from lguest_mp.errors import GuestAddressError
from lguest_mp.memory import GuestMemory
from lguest_mp.record import Value

#: What all entries together may take, in bytes: those of some ten kernels.
LIMIT = 512 << 20

#: An entry begins with so many bytes for its head, and then come the pieces.
_HEAD_ROOM = 64 << 10
#: magic, CRC-32 of what follows in the head, SHA-256 of the payload; CRC-32 of the pieces, their bytes in all, how many
#: segments there are and how many pieces; the entry point. All little-endian.
_HEAD = struct.Struct("<16sI32sIQIIQ")
_MAGIC = b"lguest kernel 1\n"
_CHECKED_FROM = 20
#: Of a segment: its offset, its size, its address, and its size in memory.
_SEGMENT = struct.Struct("<QQQQ")
#: Of a piece: its guest-physical address, and its size in bytes.
_PIECE = struct.Struct("<QQ")

_DIRECTORIES = ("lguest", "kernels")
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: Of files that are not entries yet; with the writer's process ID.
_NEW = ".new-"
_NAME_LENGTH = 64


class _Unusable(Exception):
    """An entry is damaged, or not to be trusted."""


class Unpacked(Value):
    """A kernel in an open entry: where it begins and its segments; addresses and sizes (bytes) of its pieces."""

    image: ElfImage
    pieces: tuple[tuple[int, int], ...]
    checksum: int
    _file: _EntryFile

    def load(self, memory: GuestMemory) -> bool:
        """Copies the pieces to guest memory; False if the entry is damaged, and then there is garbage in memory."""
        checksum, offset = 0, _HEAD_ROOM
        for address, size in self.pieces:
            try:
                piece = memory.slice(address, size)
                self._file.read_into(piece, offset)
            except (OSError, GuestAddressError, _Unusable):
                break
            checksum = zlib.crc32(piece, checksum)
            offset += size
        else:
            if checksum == self.checksum:
                return True
        self._file.remove()
        return False


class _EntryFile:
    """An open entry, and how to take it away."""

    def __init__(self, directory: _Directory, name: str, fd: int) -> None:
        self._directory = directory
        self._name = name
        self._fd = fd

    def __del__(self) -> None:
        os.close(self._fd)

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset`` on; _Unusable where it ends before."""
        data = os.pread(self._fd, size, offset)
        if len(data) != size:
            raise _Unusable
        return data

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills ``buffer`` from ``offset`` on; _Unusable where the entry ends before."""
        while buffer:
            count = os.preadv(self._fd, [buffer], offset)
            if not count:
                raise _Unusable
            buffer = buffer[count:]
            offset += count

    def size(self) -> int:
        """Of an entry that is this user's alone, in bytes."""
        status = os.fstat(self._fd)
        if not _is_ours(status) or not stat.S_ISREG(status.st_mode):
            raise _Unusable
        return status.st_size

    def touch(self) -> None:
        """Notes that it was used."""
        with suppress(OSError):
            os.utime(self._fd)

    def remove(self) -> None:
        """Takes away what has the name now, be it what another launcher has made since: it will be made again."""
        with suppress(OSError):
            os.unlink(self._name, dir_fd=self._directory.fd)


class _Directory:
    """The cache's directory, open."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


class KernelCache:
    """The cache of this user, if there can be one."""

    def __init__(self, base: str | None) -> None:
        """``base``: the directory below which it is; None: there is none."""
        self._base = base

    @cached_property
    def _directory(self) -> _Directory | None:
        return None if self._base is None else _open_directory(self._base)

    @classmethod
    def of_user(cls) -> KernelCache:
        """As the environment says where it is."""
        base = os.environ.get("XDG_CACHE_HOME", "")
        if not os.path.isabs(base):  # the XDG Base Directory Specification: others are to be ignored
            home = os.environ.get("HOME", "")
            base = os.path.join(home, ".cache") if os.path.isabs(home) else ""
        return cls(base or None)

    @property
    def is_there(self) -> bool:
        """Whether anything can be found or kept."""
        return self._directory is not None

    def find(self, digest: bytes) -> Unpacked | None:
        """What was unpacked of the payload with this SHA-256; None: it is not there, or no good."""
        directory = self._directory
        if directory is None:
            return None
        name = digest.hex()
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory.fd)
        except OSError:
            return None
        file = _EntryFile(directory, name, fd)
        try:
            found = _read_head(file, digest)
        except (OSError, _Unusable):
            file.remove()
            return None
        file.touch()
        return found

    def keep(self, digest: bytes, image: ElfImage, stream: Iterable[bytes]) -> Unpacked | None:
        """Makes an entry of what a payload unpacks to, which comes in chunks; None: that cannot be.

        What the stream raises comes through, and nothing is kept then.
        """
        directory = self._directory
        if directory is None:
            return None
        name = f"{_NEW}{os.getpid()}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with suppress(OSError):
            self._remove_left()
            fd = os.open(name, flags, 0o600, dir_fd=directory.fd)
            file = _EntryFile(directory, name, fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                size = _write(fd, digest, image, stream)
                self._make_room(size)
                os.rename(name, digest.hex(), src_dir_fd=directory.fd, dst_dir_fd=directory.fd)
            except BaseException:
                file.remove()
                raise
            return self.find(digest)
        return None

    def _remove_left(self) -> None:
        """Takes away what writers left that are no more."""
        assert self._directory is not None
        for name in os.listdir(self._directory.fd):
            if not name.startswith(_NEW):
                continue
            with suppress(OSError):
                fd = os.open(
                    name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._directory.fd
                )
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(name, dir_fd=self._directory.fd)
                finally:
                    os.close(fd)

    def _make_room(self, size: int) -> None:
        """Takes away those that were not used for longest, until there is room for so many bytes."""
        assert self._directory is not None
        if size > LIMIT:
            raise OSError("it is larger than the cache may be")
        entries = []
        for name in os.listdir(self._directory.fd):
            if len(name) == _NAME_LENGTH:
                with suppress(FileNotFoundError):  # another one takes it away, too
                    status = os.stat(name, dir_fd=self._directory.fd, follow_symlinks=False)
                    entries.append((status.st_mtime_ns, name, status.st_size))
        left = sum(each for _, _, each in entries) + size
        for _, name, each in sorted(entries):
            if left <= LIMIT:
                return
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._directory.fd)
            left -= each


def _open_directory(base: str) -> _Directory | None:
    """The cache's directory below ``base``, made if need be; None: it is not to be had, or not this user's alone."""
    try:
        with suppress(FileExistsError):
            os.mkdir(base, 0o700)
        fd = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Whoever owns it may put what he likes in place of what is in it.
            if os.fstat(fd).st_uid != os.geteuid():
                return None
            for name in _DIRECTORIES:
                with suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=fd)
                above, fd = fd, os.open(name, _OPEN_DIRECTORY, dir_fd=fd)
                os.close(above)
                if not _is_ours(os.fstat(fd)):
                    return None
            directory = _Directory(fd)
            fd = -1
            return directory
        finally:
            if fd >= 0:
                os.close(fd)
    except OSError:
        return None


def _is_ours(status: os.stat_result) -> bool:
    """Whether a file or directory is this user's, and nobody else may touch it."""
    return status.st_uid == os.geteuid() and not status.st_mode & 0o077


def _read_head(file: _EntryFile, digest: bytes) -> Unpacked:
    """What an entry says of itself; _Unusable where that cannot be."""
    size = file.size()
    head = file.read(0, _HEAD_ROOM)
    magic, head_checksum, its_digest, checksum, data_size, segments, count, entry = _HEAD.unpack_from(head)
    end = _HEAD.size + segments * _SEGMENT.size + count * _PIECE.size
    if magic != _MAGIC or end > _HEAD_ROOM or zlib.crc32(head[_CHECKED_FROM:end]) != head_checksum:
        raise _Unusable
    if its_digest != digest or size != _HEAD_ROOM + data_size:
        raise _Unusable
    tables = _HEAD.size + segments * _SEGMENT.size
    found = tuple(Segment(*each) for each in _SEGMENT.iter_unpack(head[_HEAD.size : tables]))
    return Unpacked(ElfImage(entry, found), tuple(_PIECE.iter_unpack(head[tables:end])), checksum, file)


def _write(fd: int, digest: bytes, image: ElfImage, stream: Iterable[bytes]) -> int:
    """Writes an entry; its size in bytes. OSError: it has no room."""
    offset, checksum, places = _HEAD_ROOM, 0, []
    for address, piece in pieces(image.segments, stream):
        checksum = zlib.crc32(piece, checksum)
        places.append((address, len(piece)))
        _write_all(fd, piece, offset)
        offset += len(piece)
        del piece  # the next one takes its memory
    tables = [_SEGMENT.pack(each.offset, each.size, each.address, each.memory_size) for each in image.segments]
    tables += [_PIECE.pack(*place) for place in places]
    data_size, sizes = offset - _HEAD_ROOM, (len(image.segments), len(places))
    head = _HEAD.pack(_MAGIC, 0, digest, checksum, data_size, *sizes, image.entry) + b"".join(tables)
    if len(head) > _HEAD_ROOM:
        raise OSError("it has more pieces than there is room for")
    head_checksum = zlib.crc32(head[_CHECKED_FROM:])
    _write_all(fd, head[: len(_MAGIC)] + head_checksum.to_bytes(4, "little") + head[_CHECKED_FROM:], 0)
    return offset


def _write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    left = memoryview(data)
    while left:
        count = os.pwrite(fd, left, offset)
        left = left[count:]
        offset += count
