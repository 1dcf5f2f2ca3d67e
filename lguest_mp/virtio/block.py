"""The block device (virtio 1.2, 5.2): a file, or a block device of the host, becomes a disk of the guest.

One queue, one worker, one request after the other: each is a system call on the image from or to the guest's memory,
with no copy in between. The guest decides where in memory and where on the disk, and every such decision is checked
before it reaches the host: sector and length against the capacity, the request's parts against its size.

**Errors** are answers. What the host fails to do (a bad sector, a full file system, an image cut short behind our
back) is S_IOERR to the guest and a line for the user, but not a line per request: a guest that repeats a request for
ever must not fill the user's log. What the standard does not know, and SCSI commands, are S_UNSUPP. Only a request
whose frame is broken, with no room for a header or a status, is against the rules; the device needs a reset then.

**What a completion says of the data** (2.7.8.2): the used length covers the status byte, which is the last byte of the
buffer, so everything before it must have been written. Where a request failed, the part that holds no data is zeroed.

**Durability** (5.2.6.2): with VIRTIO_BLK_F_FLUSH accepted the disk has a writeback cache, the host's page cache, and a
flush is fdatasync(2). A driver that did not accept it gets a disk that writes through: every write is O_DSYNC's.

**Order and latency**: requests complete in the order of the available ring, as the queue wants it. Finished requests
are not held back behind one that takes long: before a flush and the like they are published, and a read that follows
unpublished ones is first tried without waiting (RWF_NOWAIT), so that a miss of the page cache publishes them too.

**Two launchers on one image** would destroy it, so the image is locked while any process has it open: exclusively for
writing, shared for reading only. The lock belongs to the open file description (F_OFD_SETLK, fcntl(2)), which all
processes of a guest share, and ends with the last of them however that ends.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
import time
import zlib
from collections.abc import Callable
from enum import IntEnum, IntFlag
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from lguest_mp.errors import DeviceProtocolError, LguestError
from lguest_mp.jail.calls import one_of, plain
from lguest_mp.jail.needs import Needs
from lguest_mp.virtio import vectors
from lguest_mp.virtio.device import QUEUE_SIZE, Device, DeviceId
from lguest_mp.virtio.usual import DiskRequests

if TYPE_CHECKING:
    from lguest_mp.virtio.queue import Chain, Queue
    from lguest_mp.worker import WorkerContext

#: The unit of the protocol, whatever the disk's block size is (5.2.5).
SECTOR = 512


class BlockFeature(IntFlag):
    """Feature bits that are offered (5.2.3)."""

    SEG_MAX = 1 << 2
    RO = 1 << 5
    BLK_SIZE = 1 << 6
    FLUSH = 1 << 9
    DISCARD = 1 << 13
    WRITE_ZEROES = 1 << 14


class RequestType(IntEnum):
    """Types of requests that are served (5.2.6)."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


#: As plain numbers: Python has much to do for an enumeration's value, which is memory for a worker.
_F_FLUSH = BlockFeature.FLUSH.value
_IN, _OUT, _FLUSH = RequestType.IN.value, RequestType.OUT.value, RequestType.FLUSH.value
_GET_ID, _DISCARD, _WRITE_ZEROES = RequestType.GET_ID.value, RequestType.DISCARD.value, RequestType.WRITE_ZEROES.value

#: Values of the status byte (5.2.6).
S_OK = 0
S_IOERR = 1
S_UNSUPP = 2

#: le32 type, le32 reserved, le64 sector (5.2.6).
_HEADER = struct.Struct("<IIQ")
#: le64 sector, le32 num_sectors, le32 flags (5.2.6).
_RANGE = struct.Struct("<QII")
#: Bit of a range's flags: the device may deallocate what it zeroes.
UNMAP = 1
ID_LENGTH = 20

#: Limits that the configuration space tells. Without the file system's help zeroes are written, so a single request
#: for them is small enough not to look like a hang.
MAX_DISCARD_SECTORS = (1 << 30) // SECTOR
MAX_DISCARD_SEG = 64
MAX_WRITE_ZEROES_SECTORS = (64 << 20) // SECTOR
MAX_WRITE_ZEROES_SEG = 1

#: struct virtio_blk_config up to unused1 (5.2.4): capacity, size_max, seg_max, geometry, blk_size, topology,
#: writeback, unused0, num_queues, max_discard_sectors, max_discard_seg, discard_sector_alignment,
#: max_write_zeroes_sectors, max_write_zeroes_seg, write_zeroes_may_unmap, unused1.
_CONFIG = struct.Struct("<QII HBB I BBHI BBH III IIB3x")

#: fallocate(2), include/uapi/linux/falloc.h
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10

#: All that a worker does with the image.
_READING = plain("preadv2", "preadv", "fdatasync")
_WRITING = (
    # RWF_APPEND would not write where it is said.
    *one_of("pwritev2", 5, [(0, "no flags"), (os.RWF_DSYNC, "RWF_DSYNC")]),
    *plain("pwritev", "pwrite64"),
    *one_of(
        "fallocate",
        1,
        [
            (FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, "PUNCH_HOLE"),
            (FALLOC_FL_KEEP_SIZE | FALLOC_FL_ZERO_RANGE, "ZERO_RANGE"),
        ],
    ),
)

#: How much is zeroed by one write, where the file system cannot do it.
ZEROES = 1 << 20
#: The shortest time, in seconds, between two lines about the same kind of failure.
LOG_INTERVAL = 60.0


class Block(Device):
    """A disk: the image at ``path``, a regular file or a block device.

    Opened for reading and writing, or read-only where the host does not allow writing (or nobody may write the file,
    which root ignores and we do not). LguestError when it cannot be opened, is locked by another launcher, or is too
    small to be a disk. Bytes after the last whole sector are not part of the disk.
    """

    device_id = DeviceId.BLOCK
    queue_names = ("requestq",)

    def __init__(self, name: str, path: Path) -> None:
        self.path = path
        self._file, self.read_only = _open(path)
        try:
            _lock(self._file, path, exclusive=not self.read_only)
            self._sectors = _sectors(self._file, path)
        except LguestError:
            os.close(self._file)
            raise
        self.serial = _serial(path)
        super().__init__(name, self._configuration())

    @property
    def features(self) -> int:
        """What is offered: DISCARD and WRITE_ZEROES with a disk that can be written, RO otherwise."""
        offered = BlockFeature.SEG_MAX | BlockFeature.BLK_SIZE | BlockFeature.FLUSH
        if self.read_only:
            return offered | BlockFeature.RO
        return offered | BlockFeature.DISCARD | BlockFeature.WRITE_ZEROES

    @property
    def files(self) -> tuple[int, ...]:
        """The image."""
        return (self._file,)

    def needs(self, queue_index: int) -> Needs:
        """Reading and writing at a position, not beyond the disk's end, and no more than reading if it is read-only."""
        del queue_index
        if self.read_only:
            return Needs(_READING)
        return Needs((*_READING, *_WRITING), longest_file=self._sectors * SECTOR)

    @property
    def capacity(self) -> int:
        """The disk's size in sectors of 512 bytes."""
        return self._sectors

    def close(self) -> None:
        """Closes the image; the lock goes with the last process that has it open."""
        os.close(self._file)

    def _configuration(self) -> bytes:
        zeroes = (0, 0, 0) if self.read_only else (MAX_WRITE_ZEROES_SECTORS, MAX_WRITE_ZEROES_SEG, 1)
        discard = (0, 0, 0) if self.read_only else (MAX_DISCARD_SECTORS, MAX_DISCARD_SEG, 1)
        # A request has a header and a status descriptor besides its segments.
        segments = QUEUE_SIZE - 2
        return _CONFIG.pack(self._sectors, 0, segments, 0, 0, 0, SECTOR, 0, 0, 0, 0, 0, 0, 0, *discard, *zeroes)

    def serve(self, queue_index: int, queue: Queue, context: WorkerContext) -> None:
        """Serves ``requestq``."""
        del queue_index
        _Server(self, self._file, queue, context).serve()


Ranges = list[tuple[int, int]]
_length = itemgetter(1)


class _Server:
    """A worker's view of one disk."""

    def __init__(self, disk: Block, file: int, queue: Queue, context: WorkerContext) -> None:
        self._disk = disk
        self._file = file
        self._bytes = disk.capacity * SECTOR
        self._queue = queue
        self._failures = _Failures(disk.name, context.log)
        self._nowait = os.RWF_NOWAIT
        # Without FLUSH a completed write has to be stable (5.2.6.2, case 1).
        self._writeback = bool(queue.features & _F_FLUSH)
        self._write_flags = 0 if self._writeback else os.RWF_DSYNC
        # By type: those that fill the writable part (and say how much of it), and those that take the readable part.
        self._fills = {_IN: self._in, _GET_ID: self._get_id}
        self._takes = {
            _OUT: self._out,
            _FLUSH: self._flush,
            _DISCARD: self._discard,
            _WRITE_ZEROES: self._write_zeroes,
        }

    def serve(self) -> None:
        queue = self._queue
        wait = queue.waiter(DiskRequests(self._file, self._bytes, self._disk.read_only, self._write_flags))
        while True:
            chain = wait()
            queue.push(chain, *self._request(chain))

    def _request(self, chain: Chain) -> tuple[int, int]:
        """Serves one request: the length of the buffer's writable part, all of which is written, and of its data."""
        memory = chain.memory
        outgoing = chain.readable_ranges
        incoming = chain.writable_ranges
        # The usual frame, in which the header and the status have a descriptor each, and any other (2.7.4.1).
        if outgoing and outgoing[0][1] == _HEADER.size and incoming and incoming[-1][1] == 1:
            kind, _, sector = _HEADER.unpack_from(memory, outgoing[0][0])
            outgoing = outgoing[1:]
            status_byte = incoming[-1][0]
            incoming = incoming[:-1]
        else:
            kind, sector, outgoing = _cut_header(memory, outgoing)
            status_byte, incoming = _cut_status(incoming)

        filled = given = 0
        room = _size(incoming)
        status = S_OK
        try:
            if (fill := self._fills.get(kind)) is not None:
                filled = fill(sector, _views(memory, incoming), room)
            elif (take := self._takes.get(kind)) is not None:
                given = _size(outgoing)
                take(sector, _views(memory, outgoing), given)
            else:
                status = S_UNSUPP
        except _Refused as refusal:
            status = refusal.status
        except OSError as error:
            self._failures.note(kind, sector, error)
            status = S_IOERR
        if filled < room:
            _clear(_views(memory, _split(incoming, filled)[1]))
        memory[status_byte] = status
        return room + 1, filled + given

    def _in(self, sector: int, views: list[memoryview], size: int) -> int:
        position = self._position(sector, size)
        # Whoever waits for an earlier request need not wait for the disk as well.
        flags = self._nowait if self._queue.unpublished else 0
        left = size
        while left:
            try:
                count = os.preadv(self._file, views[: vectors.IOV_MAX], position, flags)
            except OSError as error:
                if not flags or error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                    raise
                if error.errno == errno.EOPNOTSUPP:
                    self._nowait = 0
                count = 0
            else:
                if not count and not flags:
                    raise OSError(errno.EIO, "the image is shorter than it was")
            left -= count
            if left:
                position += count
                views = vectors.advance(views, count)
                if flags:
                    self._queue.flush()
                    flags = 0
        return size

    def _out(self, sector: int, views: list[memoryview], size: int) -> None:
        if self._disk.read_only:
            raise _Refused(S_IOERR)  # 5.2.6.2
        position = self._position(sector, size)
        left = size
        while left:
            count = os.pwritev(self._file, views[: vectors.IOV_MAX], position, self._write_flags)
            left -= count
            if left:
                position += count
                views = vectors.advance(views, count)

    def _position(self, sector: int, size: int) -> int:
        """Where ``size`` bytes from ``sector`` on begin in the image (5.2.6.1: whole sectors, none past the end)."""
        position = sector * SECTOR
        if size % SECTOR or position + size > self._bytes:
            raise _Refused(S_IOERR)
        return position

    def _flush(self, sector: int, views: list[memoryview], size: int) -> None:
        del sector, views, size
        self._queue.flush()
        os.fdatasync(self._file)

    def _get_id(self, sector: int, views: list[memoryview], size: int) -> int:
        """The ID, as much of it as there is room for."""
        del sector, size
        identity = self._disk.serial.ljust(ID_LENGTH, b"\0")
        done = 0
        for view in views:
            part = identity[done : done + len(view)]
            view[: len(part)] = part
            done += len(part)
        return done

    def _discard(self, sector: int, views: list[memoryview], size: int) -> None:
        del sector
        self._need(BlockFeature.DISCARD)
        for position, length, _ in self._ranges(views, size, MAX_DISCARD_SEG, MAX_DISCARD_SECTORS, known_flags=0):
            # A discard is a hint (5.2.6.2: "MAY deallocate"), so a file system that has no holes is no error.
            _try_fallocate(self._file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, position, length)
        self._write_through()

    def _write_zeroes(self, sector: int, views: list[memoryview], size: int) -> None:
        del sector
        self._need(BlockFeature.WRITE_ZEROES)
        for position, length, flags in self._ranges(
            views, size, MAX_WRITE_ZEROES_SEG, MAX_WRITE_ZEROES_SECTORS, known_flags=UNMAP
        ):
            mode = FALLOC_FL_PUNCH_HOLE if flags & UNMAP else FALLOC_FL_ZERO_RANGE
            if not _try_fallocate(self._file, mode | FALLOC_FL_KEEP_SIZE, position, length):
                self._zero(position, length)
        self._write_through()

    def _zero(self, position: int, length: int) -> None:
        zeroes = bytes(min(length, ZEROES))
        end = position + length
        while position < end:
            position += os.pwrite(self._file, zeroes[: end - position], position)

    def _need(self, feature: BlockFeature) -> None:
        """What was not negotiated is not known; a read-only disk offers neither of the two features."""
        if not self._queue.features & feature.value:  # a number: a flag of the result would have to be made
            raise _Refused(S_UNSUPP)
        self._queue.flush()

    def _ranges(
        self, views: list[memoryview], size: int, most: int, longest: int, known_flags: int
    ) -> list[tuple[int, int, int]]:
        """The (position, length, flags) of a discard or write-zeroes request, every one of them checked.

        ``most`` ranges of up to ``longest`` sectors (5.2.4).
        """
        if size % _RANGE.size or not 0 < size <= most * _RANGE.size:
            raise _Refused(S_IOERR)
        ranges = []
        for sector, sectors, flags in _RANGE.iter_unpack(b"".join(views)):
            if flags & ~known_flags:
                raise _Refused(S_UNSUPP)  # 5.2.6.2
            if sectors > longest:
                raise _Refused(S_IOERR)
            position = self._position(sector, sectors * SECTOR)
            if sectors:
                ranges.append((position, sectors * SECTOR, flags))
        return ranges

    def _write_through(self) -> None:
        if not self._writeback:
            os.fdatasync(self._file)


def _try_fallocate(file: int, mode: int, position: int, length: int) -> bool:
    """fallocate(2); False where the file system (or the block device, for this range) cannot do it.

    Looked up for each call, which takes far less time than what it does: few disks ever need it, and each worker
    would pay for it with memory.
    """
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    while fallocate(file, mode, ctypes.c_int64(position), ctypes.c_int64(length)) != 0:
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return True


class _Refused(Exception):
    """A request that is answered with ``status``, and that is all."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class _Failures:
    """Tells the user of the host's failures: each kind at once, and then no more than once in LOG_INTERVAL."""

    def __init__(self, name: str, log: Callable[[str], None]) -> None:
        self._name = name
        self._log = log
        self._quiet_until: dict[tuple[int, int | None], float] = {}
        self._untold = 0

    def note(self, kind: int, sector: int, error: OSError) -> None:
        now = time.monotonic()
        key = (kind, error.errno)
        if now < self._quiet_until.get(key, 0.0):
            self._untold += 1
            return
        self._quiet_until[key] = now + LOG_INTERVAL
        more = f" ({self._untold} more since the last such line)" if self._untold else ""
        self._untold = 0
        self._log(f"{self._name}: {RequestType(kind).name} at sector {sector} failed: {error.strerror}{more}")


def _open(path: Path) -> tuple[int, bool]:
    """The image's file descriptor, and whether it can only be read."""
    try:
        information = os.stat(path)
        if not stat.S_ISREG(information.st_mode) and not stat.S_ISBLK(information.st_mode):
            raise LguestError(f"{path} is neither a file nor a block device: no disk for a guest")
        if stat.S_ISBLK(information.st_mode) or information.st_mode & 0o222:
            try:
                return os.open(path, os.O_RDWR), False
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
        return os.open(path, os.O_RDONLY), True
    except OSError as error:
        raise LguestError(f"cannot open {path}: {error.strerror}") from error


def _lock(file: int, path: Path, *, exclusive: bool) -> None:
    # struct flock: l_type, l_whence, l_start, l_len (0: to the end), l_pid (0 for these locks).
    lock = struct.pack("hhqqi4x", fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise LguestError(
                f"{path} is locked: another guest uses it; only one at a time may write to an image"
            ) from error
        raise LguestError(f"cannot lock {path}: {error.strerror}") from error


def _sectors(file: int, path: Path) -> int:
    sectors = os.lseek(file, 0, os.SEEK_END) // SECTOR
    if not sectors:
        raise LguestError(f"{path} is smaller than a sector ({SECTOR} bytes): no disk for a guest")
    return sectors


def _serial(path: Path) -> bytes:
    """A device ID of at most 20 bytes of ASCII, the same at every start: the file's name, and a sum of its path."""
    name = "".join(c if c.isascii() and c.isprintable() and c not in " /" else "_" for c in path.name)
    checksum = zlib.crc32(os.fsencode(path.absolute()))
    return f"{name[: ID_LENGTH - 9]}-{checksum:08x}".encode("ascii")


def _cut_header(memory: memoryview, readable: Ranges) -> tuple[int, int, Ranges]:
    """A request's type and sector, and what follows its header."""
    header, rest = _split(readable, _HEADER.size)
    if _size(header) < _HEADER.size:
        raise DeviceProtocolError("5.2.6", f"a request with a header of {_size(header)} bytes")
    kind, _, sector = _HEADER.unpack(b"".join(_views(memory, header)))
    return kind, sector, rest


def _cut_status(writable: Ranges) -> tuple[int, Ranges]:
    """The offset of a request's status byte, and what precedes it."""
    room = _size(writable) - 1
    if room < 0:
        raise DeviceProtocolError("5.2.6", "a request with no room for the status")
    rest, status = _split(writable, room)
    return next(offset for offset, length in status if length), rest


def _views(memory: memoryview, ranges: Ranges) -> list[memoryview]:
    return [memory[offset : offset + length] for offset, length in ranges]


def _size(ranges: Ranges) -> int:
    return sum(map(_length, ranges))


def _split(ranges: Ranges, count: int) -> tuple[Ranges, Ranges]:
    """``ranges`` cut in two after ``count`` bytes."""
    head: Ranges = []
    for index, (offset, length) in enumerate(ranges):
        if count < length:
            if count:
                head.append((offset, count))
            return head, [(offset + count, length - count), *ranges[index + 1 :]]
        head.append((offset, length))
        count -= length
    return head, []


def _clear(views: list[memoryview]) -> None:
    for view in views:
        for start in range(0, len(view), ZEROES):
            part = view[start : start + ZEROES]
            part[:] = bytes(len(part))
