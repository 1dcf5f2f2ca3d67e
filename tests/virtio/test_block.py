"""The block device (virtio 1.2, 5.2): every command, in every layout, and what it does when the host fails."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mockdriver import ALL, Buffer, Context, DriverFactory, MockDriver

from lguest_mp.errors import DeviceProtocolError, LguestError
from lguest_mp.virtio import block
from lguest_mp.virtio.block import Block, BlockFeature, RequestType
from lguest_mp.virtio.device import QUEUE_SIZE, DeviceId

SECTOR = 512
SECTORS = 64
OK, IOERR, UNSUPP = 0, 1, 2
#: Everything that a disk offers, accepted.
FEATURES = ALL | 1 << 2 | 1 << 6 | 1 << 9 | 1 << 13 | 1 << 14
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = (
    RequestType.IN,
    RequestType.OUT,
    RequestType.FLUSH,
    RequestType.GET_ID,
    RequestType.DISCARD,
    RequestType.WRITE_ZEROES,
)


def pattern(sectors: int = SECTORS) -> bytes:
    """A disk on which no two sectors are the same."""
    return b"".join(struct.pack("<Q", sector) * (SECTOR // 8) for sector in range(1, sectors + 1))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(pattern())
    return path


@pytest.fixture
def disk(image: Path) -> Iterator[Block]:
    with closing(Block("block0", image)) as disk:
        yield disk


@pytest.fixture
def driver(new_driver: DriverFactory) -> MockDriver:
    return new_driver(64, FEATURES)


def header(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


def ranges(*parts: tuple[int, int, int]) -> bytes:
    """Segments of a discard or write-zeroes request: sector, number of sectors, flags."""
    return b"".join(struct.pack("<QII", *part) for part in parts)


def ask(
    driver: MockDriver, disk: Block, kind: int, sector: int = 0, *, data: bytes = b"", room: int = 0
) -> tuple[int, bytes]:
    """One request in the usual layout: its status, and what was filled in before it."""
    buffer = driver.add([header(kind, sector), *([data] if data else [])], [*([room] if room else []), 1])
    driver.serve(disk)
    assert driver.used() == [(buffer.head, room + 1)], "2.7.8.2: the status lies within the length"
    answer = driver.content(buffer)
    return answer[-1], answer[:-1]


class TestOpening:
    """What may be a disk, and who may have it."""

    def test_a_disk(self, disk: Block, image: Path) -> None:
        """5.2.1, 5.2.2."""
        assert (disk.device_id, disk.queue_names) == (DeviceId.BLOCK, ("requestq",))
        assert (disk.capacity, disk.read_only) == (SECTORS, False)
        (file,) = disk.files
        assert os.path.samestat(os.fstat(file), image.stat())
        assert not os.get_inheritable(file)

    @pytest.mark.parametrize("size", [512, 1023, 1024])
    def test_bytes_after_the_last_sector_do_not_exist(self, tmp_path: Path, size: int) -> None:
        path = tmp_path / "odd.img"
        path.write_bytes(bytes(size))
        with closing(Block("block0", path)) as disk:
            assert disk.capacity == size // SECTOR

    @pytest.mark.parametrize("size", [0, 511])
    def test_too_small(self, tmp_path: Path, size: int) -> None:
        path = tmp_path / "small.img"
        path.write_bytes(bytes(size))
        with pytest.raises(LguestError, match=r"small\.img is smaller than a sector"):
            Block("block0", path)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(LguestError, match=r"cannot open .*none\.img: No such file"):
            Block("block0", tmp_path / "none.img")

    def test_neither_a_file_nor_a_block_device(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        for path in (tmp_path, tmp_path / "fifo", Path("/dev/null")):
            with pytest.raises(LguestError, match="neither a file nor a block device"):
                Block("block0", path)

    def test_nobody_may_write(self, image: Path) -> None:
        """For root too, whom the host would not refuse."""
        image.chmod(0o444)
        with closing(Block("block0", image)) as disk:
            assert disk.read_only
            assert fcntl.fcntl(disk.files[0], fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY

    @pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
    def test_the_host_does_not_let_us_write(self, image: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        real = os.open

        def refuse(path: Path, flags: int) -> int:
            if flags & os.O_RDWR:
                raise OSError(number, os.strerror(number))
            return real(path, flags)

        monkeypatch.setattr("os.open", refuse)
        with closing(Block("block0", image)) as disk:
            assert disk.read_only

    def test_no_more_files_after_a_failure(self, image: Path) -> None:
        with closing(Block("block0", image)):
            before = set(os.listdir("/proc/self/fd"))
            with pytest.raises(LguestError):
                Block("block1", image)
            assert set(os.listdir("/proc/self/fd")) == before


class TestLocking:
    """Two guests on one image would destroy it."""

    def test_a_second_writer_is_refused(self, disk: Block, image: Path) -> None:
        with pytest.raises(LguestError, match=r"disk\.img is locked: another guest uses it"):
            Block("block0", image)

    def test_under_another_name_too(self, disk: Block, image: Path, tmp_path: Path) -> None:
        os.link(image, tmp_path / "other.img")
        with pytest.raises(LguestError, match=r"other\.img is locked"):
            Block("block0", tmp_path / "other.img")

    def test_readers_share(self, image: Path) -> None:
        image.chmod(0o444)
        with closing(Block("block0", image)), closing(Block("block1", image)):
            pass

    def test_a_reader_keeps_writers_out_and_the_other_way_round(self, image: Path) -> None:
        image.chmod(0o444)
        with closing(Block("block0", image)):
            image.chmod(0o644)
            with pytest.raises(LguestError, match="is locked"):
                Block("block0", image)
        with closing(Block("block0", image)):
            image.chmod(0o444)
            with pytest.raises(LguestError, match="is locked"):
                Block("block0", image)

    def test_it_ends_with_the_last_process_however_that_ends(self, image: Path) -> None:
        disk = Block("block0", image)
        child = os.fork()
        if not child:
            signal.pause()
            os._exit(0)
        disk.close()
        with pytest.raises(LguestError, match="is locked"):
            Block("block0", image)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        Block("block0", image).close()

    def test_a_file_system_without_locks(self, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*arguments: object) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr("fcntl.fcntl", refuse)
        with pytest.raises(LguestError, match=r"cannot lock .*disk\.img: No locks available"):
            Block("block0", image)


class TestConfiguration:
    """5.2.3 and 5.2.4."""

    def test_a_disk_that_can_be_written(self, disk: Block) -> None:
        assert disk.features == 1 << 2 | 1 << 6 | 1 << 9 | 1 << 13 | 1 << 14
        config = disk.config_space()
        assert len(config) == 60
        (capacity, size_max, seg_max), geometry, (blk_size,) = (
            struct.unpack_from("<QII", config),
            config[16:20],
            struct.unpack_from("<I", config, 20),
        )
        assert (capacity, size_max, seg_max, geometry, blk_size) == (SECTORS, 0, QUEUE_SIZE - 2, bytes(4), SECTOR)
        assert config[24:36] == bytes(12), "topology, writeback, unused0 and num_queues belong to what is not offered"
        assert struct.unpack_from("<III", config, 36) == (block.MAX_DISCARD_SECTORS, block.MAX_DISCARD_SEG, 1)
        assert struct.unpack_from("<IIB", config, 48) == (block.MAX_WRITE_ZEROES_SECTORS, 1, 1)
        assert config[57:] == bytes(3), "5.2.5.2: unused1 MUST be 0"

    def test_a_read_only_disk(self, image: Path) -> None:
        image.chmod(0o444)
        with closing(Block("block0", image)) as disk:
            assert disk.features == 1 << 2 | 1 << 5 | 1 << 6 | 1 << 9
            assert disk.config_space()[36:] == bytes(24)


def cut(data: list[int], points: list[int]) -> list[int]:
    """``sum(data)`` bytes in pieces that end at ``points``."""
    total = sum(data)
    ends = [*sorted({point for point in points if point < total}), total]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def pieces(data: bytes, points: list[int]) -> list[bytes]:
    start = 0
    result = []
    for length in cut([len(data)], points):
        result.append(data[start : start + length])
        start += length
    return result


Points = st.lists(st.integers(0, 3000), max_size=5)


@st.composite
def requests(draw: st.DrawFn) -> tuple[int, int, int]:
    """A legal read or write: type, sector, number of sectors."""
    sector = draw(st.integers(0, SECTORS))
    return draw(st.sampled_from([IN, OUT])), sector, draw(st.integers(0, min(5, SECTORS - sector)))


class TestReadingAndWriting:
    """VIRTIO_BLK_T_IN and VIRTIO_BLK_T_OUT (5.2.6)."""

    @settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        script=st.lists(
            st.tuples(requests(), Points, Points, st.booleans(), st.booleans(), st.integers(0, 1)), max_size=12
        )
    )
    def test_any_layout(
        self,
        new_driver: DriverFactory,
        disk: Block,
        image: Path,
        script: list[tuple[tuple[int, int, int], list[int], list[int], bool, bool, int]],
    ) -> None:
        """2.7.4.1: header, data and status may be cut and joined anywhere."""
        driver = new_driver(64, FEATURES)
        queue = driver.queue()
        model = bytearray(image.read_bytes())
        for (kind, sector, count), out_points, in_points, indirect, backwards, direct in script:
            where = slice(sector * SECTOR, (sector + count) * SECTOR)
            data = os.urandom(count * SECTOR) if kind == OUT else b""
            room = count * SECTOR if kind == IN else 0
            buffer = driver.add(
                pieces(header(kind, sector) + data, out_points),
                cut([room + 1], in_points),
                indirect=indirect,
                direct=direct,
                backwards=backwards,
            )
            driver.serve(disk, queue=queue)
            if kind == OUT:
                model[where] = data
            assert driver.used() == [(buffer.head, room + 1)]
            assert driver.content(buffer) == (bytes(model[where]) if kind == IN else b"") + bytes([OK])
        assert image.read_bytes() == model

    @pytest.mark.parametrize("kind", [IN, OUT])
    @pytest.mark.parametrize(
        ("sector", "length"),
        [
            (SECTORS, SECTOR),
            (SECTORS - 1, 2 * SECTOR),
            (SECTORS + 1, SECTOR),
            (1 << 63, SECTOR),
            ((1 << 64) - 1, SECTOR),
            ((1 << 64) - 1, 2 * SECTOR),
            ((1 << 55) - 1, SECTOR),
        ],
    )
    def test_beyond_the_end(  # noqa: PLR0917
        self, driver: MockDriver, disk: Block, image: Path, kind: int, sector: int, length: int
    ) -> None:
        """5.2.6.1: nothing of it is done, also where the offset in bytes would wrap."""
        if kind == IN:
            assert ask(driver, disk, IN, sector, room=length) == (IOERR, bytes(length))
        else:
            assert ask(driver, disk, OUT, sector, data=b"x" * length) == (IOERR, b"")
        assert image.read_bytes() == pattern()

    @pytest.mark.parametrize("length", [1, 511, 513])
    def test_no_whole_sectors(self, driver: MockDriver, disk: Block, image: Path, length: int) -> None:
        """5.2.6.1: the length MUST be a multiple of 512 bytes."""
        assert ask(driver, disk, IN, room=length) == (IOERR, bytes(length))
        assert ask(driver, disk, OUT, data=b"x" * length) == (IOERR, b"")
        assert image.read_bytes() == pattern()

    def test_nothing_at_the_very_end(self, driver: MockDriver, disk: Block) -> None:
        assert ask(driver, disk, IN, SECTORS) == (OK, b"")

    def test_the_last_sector(self, driver: MockDriver, disk: Block, image: Path) -> None:
        assert ask(driver, disk, OUT, SECTORS - 1, data=b"z" * SECTOR) == (OK, b"")
        assert ask(driver, disk, IN, SECTORS - 1, room=SECTOR) == (OK, b"z" * SECTOR)
        assert image.stat().st_size == SECTORS * SECTOR

    def test_a_read_only_disk_refuses_to_be_written(self, driver: MockDriver, image: Path) -> None:
        """5.2.6.2: MUST be IOERR, and MUST NOT write any data."""
        image.chmod(0o444)
        with closing(Block("block0", image)) as disk:
            assert ask(driver, disk, OUT, 0, data=b"x" * SECTOR) == (IOERR, b"")
            assert ask(driver, disk, IN, 0, room=SECTOR) == (OK, pattern()[:SECTOR])
        assert image.read_bytes() == pattern()

    def test_more_pieces_than_a_system_call_takes(self, new_driver: DriverFactory, disk: Block, image: Path) -> None:
        """A queue of 4096 allows a chain that is longer than IOV_MAX."""
        driver = new_driver(4096, FEATURES)
        data = os.urandom(4 * SECTOR)
        driver.add([header(OUT), *(data[i : i + 1] for i in range(len(data)))], [1])
        answer = driver.add([header(IN)], [1] * (len(data) + 1), indirect=True)
        driver.serve(disk)
        assert driver.content(answer) == data + bytes([OK])
        assert image.read_bytes()[: len(data)] == data

    def test_short_transfers_are_continued(
        self, driver: MockDriver, disk: Block, image: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real_read, real_write = os.preadv, os.pwritev

        def short_read(fd: int, views: list[memoryview], position: int, flags: int) -> int:
            return real_read(fd, [views[0][:100]], position, flags)

        def short_write(fd: int, views: list[memoryview], position: int, flags: int) -> int:
            return real_write(fd, [views[0][:100]], position, flags)

        monkeypatch.setattr("os.preadv", short_read)
        monkeypatch.setattr("os.pwritev", short_write)
        data = os.urandom(3 * SECTOR)
        driver.add([header(OUT, 1), data[:700], data[700:]], [1])
        answer = driver.add([header(IN, 1)], [333, 3 * SECTOR - 333, 1])
        driver.serve(disk)
        assert driver.content(answer) == data + bytes([OK])
        monkeypatch.undo()
        assert image.read_bytes()[SECTOR : 4 * SECTOR] == data


class TestFrame:
    """5.2.6: a header to read, a status to write; without them the device cannot answer."""

    @pytest.mark.parametrize("readable", [[], [b""], [header(IN)[:15]], [b"\0" * 8, b"", b"\0" * 7]])
    def test_no_header(self, driver: MockDriver, disk: Block, readable: list[bytes]) -> None:
        driver.add(readable, [SECTOR, 1])
        with pytest.raises(DeviceProtocolError, match=r"header of .* bytes \(virtio 1\.2, 5\.2\.6\)"):
            driver.serve(disk)

    @pytest.mark.parametrize("writable", [[], [0], [0, 0]])
    def test_no_room_for_the_status(self, driver: MockDriver, disk: Block, writable: list[int]) -> None:
        driver.add([header(IN)], writable)
        with pytest.raises(DeviceProtocolError, match=r"no room for the status \(virtio 1\.2, 5\.2\.6\)"):
            driver.serve(disk)

    def test_the_status_is_the_last_writable_byte(self, driver: MockDriver, disk: Block) -> None:
        buffer = driver.add([header(IN, 3)], [SECTOR + 1, 0, 0])
        driver.serve(disk)
        assert driver.content(buffer) == pattern()[3 * SECTOR : 4 * SECTOR] + bytes([OK])

    def test_room_that_a_write_does_not_need_is_cleared(self, driver: MockDriver, disk: Block) -> None:
        """2.7.8.2: the length covers the status, so all before it has to be written."""
        buffer = driver.add([header(OUT), b"x" * SECTOR], [10, 7])
        for address, length in buffer.writable:
            driver.memory.write(address, b"\xff" * length)
        driver.serve(disk)
        assert driver.content(buffer) == bytes(16) + bytes([OK])
        assert driver.used() == [(buffer.head, 17)]


class TestOtherCommands:
    """5.2.6."""

    @pytest.mark.parametrize("kind", [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 0x80000000, 0xFFFFFFFF])
    def test_scsi_and_unknown_commands(self, driver: MockDriver, disk: Block, kind: int) -> None:
        """Types are values and not bits: 3 is no write, 9 no read."""
        assert ask(driver, disk, kind, data=b"x" * SECTOR, room=SECTOR) == (UNSUPP, bytes(SECTOR))

    @pytest.mark.parametrize("room", [0, 5, 20, 30])
    def test_get_id(self, driver: MockDriver, disk: Block, room: int) -> None:
        """A NUL-padded ASCII string of up to 20 bytes."""
        status, identity = ask(driver, disk, GET_ID, room=room)
        assert status == OK
        assert identity == disk.serial.ljust(20, b"\0").ljust(30, b"\0")[:room]

    def test_get_id_in_pieces(self, driver: MockDriver, disk: Block) -> None:
        buffer = driver.add([header(GET_ID)], [1, 0, 7, 13])
        driver.serve(disk)
        assert driver.content(buffer) == disk.serial.ljust(20, b"\0") + bytes([OK])

    def test_the_id_tells_images_apart(self, tmp_path: Path) -> None:
        serials = []
        for name in ("a/disk.img", "b/disk.img", "a rather long name with an ümlaut.img"):
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(bytes(SECTOR))
            with closing(Block("block0", path)) as disk:
                serials.append(disk.serial)
        assert len(set(serials)) == 3
        assert all(serial.isascii() and len(serial) <= 20 and b" " not in serial for serial in serials)

    def test_flush(self, driver: MockDriver, disk: Block, monkeypatch: pytest.MonkeyPatch) -> None:
        synced: list[int] = []
        monkeypatch.setattr("os.fdatasync", synced.append)
        assert ask(driver, disk, FLUSH) == (OK, b"")
        assert synced == list(disk.files)

    def test_a_flush_that_fails(self, driver: MockDriver, disk: Block, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("os.fdatasync", _fail(errno.EIO))
        assert ask(driver, disk, FLUSH) == (IOERR, b"")


class TestDurability:
    """5.2.6.2: when a completed write has to be on the disk."""

    def _write(self, driver: MockDriver, disk: Block, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
        flags: list[int] = []
        synced: list[int] = []
        real = os.pwritev

        def record(fd: int, views: list[memoryview], position: int, how: int) -> int:
            flags.append(how)
            return real(fd, views, position, how)

        monkeypatch.setattr("os.pwritev", record)
        monkeypatch.setattr("os.fdatasync", synced.append)
        ask(driver, disk, OUT, 0, data=b"x" * SECTOR)
        ask(driver, disk, WRITE_ZEROES, data=ranges((8, 8, 0)))
        ask(driver, disk, DISCARD, data=ranges((16, 8, 0)))
        return flags, synced

    def test_with_flush_accepted_when_it_is_flushed(
        self, driver: MockDriver, disk: Block, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert self._write(driver, disk, monkeypatch) == ([0], [])

    def test_without_at_its_completion(
        self, new_driver: DriverFactory, disk: Block, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        driver = new_driver(64, FEATURES & ~BlockFeature.FLUSH)
        flags, synced = self._write(driver, disk, monkeypatch)
        assert flags == [os.RWF_DSYNC]
        assert len(synced) == 2


class TestDiscardAndWriteZeroes:
    """5.2.6: VIRTIO_BLK_T_DISCARD and VIRTIO_BLK_T_WRITE_ZEROES."""

    @pytest.mark.parametrize("flags", [0, 1])
    def test_zeroes_are_read_afterwards(self, driver: MockDriver, disk: Block, image: Path, flags: int) -> None:
        assert ask(driver, disk, WRITE_ZEROES, data=ranges((3, 20, flags))) == (OK, b"")
        expected = bytearray(pattern())
        expected[3 * SECTOR : 23 * SECTOR] = bytes(20 * SECTOR)
        assert image.read_bytes() == expected

    @pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
    def test_a_file_system_that_cannot_gets_zeroes_written(
        self, driver: MockDriver, disk: Block, image: Path, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        monkeypatch.setattr(block, "ZEROES", 1000)
        queue = driver.queue()
        _without_fallocate(monkeypatch, number)
        driver.add([header(WRITE_ZEROES), ranges((3, 20, 1))], [1])
        driver.add([header(DISCARD), ranges((30, 5, 0))], [1])
        driver.serve(disk, queue=queue)
        expected = bytearray(pattern())
        expected[3 * SECTOR : 23 * SECTOR] = bytes(20 * SECTOR)
        assert image.read_bytes() == expected

    def test_discard_makes_holes(self, driver: MockDriver, disk: Block, image: Path) -> None:
        before = image.stat()
        assert ask(driver, disk, DISCARD, data=ranges((8, 8, 0), (32, 16, 0))) == (OK, b"")
        after = image.stat()
        assert after.st_size == before.st_size
        assert after.st_blocks <= before.st_blocks
        content = image.read_bytes()
        assert content[: 8 * SECTOR] == pattern()[: 8 * SECTOR]
        assert content[16 * SECTOR : 32 * SECTOR] == pattern()[16 * SECTOR : 32 * SECTOR]

    @pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
    @pytest.mark.parametrize(
        ("data", "status"),
        [
            (b"", IOERR),  # 5.2.6.1: a multiple of the segment's size; one segment at least (5.2.6)
            (bytes(15), IOERR),
            (bytes(17), IOERR),
            (ranges((SECTORS, 1, 0)), IOERR),  # beyond the end
            (ranges((0, SECTORS + 1, 0)), IOERR),
            (ranges(((1 << 64) - 1, 2, 0)), IOERR),
            (ranges((0, 0xFFFFFFFF, 0)), IOERR),
            (ranges((0, 1, 2)), UNSUPP),  # 5.2.6.2: unknown flags
            (ranges((0, 1, 1 << 31)), UNSUPP),
            (ranges(*[(0, 1, 0)] * 65), IOERR),  # more segments than we said we take (5.2.6.1)
        ],
    )
    def test_what_is_refused(  # noqa: PLR0917
        self, driver: MockDriver, disk: Block, image: Path, kind: int, data: bytes, status: int
    ) -> None:
        assert ask(driver, disk, kind, data=data) == (status, b"")
        assert image.read_bytes() == pattern()

    def test_all_segments_are_checked_before_one_is_served(self, driver: MockDriver, disk: Block, image: Path) -> None:
        assert ask(driver, disk, DISCARD, data=ranges((0, 8, 0), (SECTORS, 1, 0))) == (IOERR, b"")
        assert image.read_bytes() == pattern()

    def test_a_discard_does_not_know_unmap(self, driver: MockDriver, disk: Block) -> None:
        """5.2.6.2: MUST be UNSUPP."""
        assert ask(driver, disk, DISCARD, data=ranges((0, 1, 1))) == (UNSUPP, b"")

    def test_more_sectors_than_we_said(self, driver: MockDriver, tmp_path: Path) -> None:
        path = tmp_path / "sparse.img"
        with path.open("wb") as file:
            file.truncate((block.MAX_DISCARD_SECTORS + 8) * SECTOR)
        with closing(Block("block0", path)) as disk:
            for kind, most in ((DISCARD, block.MAX_DISCARD_SECTORS), (WRITE_ZEROES, block.MAX_WRITE_ZEROES_SECTORS)):
                assert ask(driver, disk, kind, data=ranges((0, most + 1, 0)))[0] == IOERR
                assert ask(driver, disk, kind, data=ranges((0, 0, 0)))[0] == OK

    @pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
    def test_without_the_feature_it_is_an_unknown_command(
        self, new_driver: DriverFactory, image: Path, kind: int
    ) -> None:
        image.chmod(0o444)
        driver = new_driver(64, ALL)
        with closing(Block("block0", image)) as disk:
            assert ask(driver, disk, kind, data=ranges((0, 1, 0))) == (UNSUPP, b"")


class TestHostErrors:
    """What the host fails to do is an answer to the guest and a line for the user; the worker lives on."""

    @pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EAGAIN])
    def test_they_become_ioerr(
        self, driver: MockDriver, disk: Block, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        monkeypatch.setattr("os.preadv", _fail(number))
        monkeypatch.setattr("os.pwritev", _fail(number))
        assert ask(driver, disk, IN, 5, room=SECTOR) == (IOERR, bytes(SECTOR))
        assert ask(driver, disk, OUT, 5, data=b"x" * SECTOR) == (IOERR, b"")
        monkeypatch.undo()
        assert ask(driver, disk, IN, 5, room=SECTOR)[0] == OK

    def test_an_image_cut_short_behind_our_back(self, driver: MockDriver, disk: Block, image: Path) -> None:
        os.truncate(image, 2 * SECTOR)
        buffer = driver.add([header(IN, 1)], [2 * SECTOR, 1])
        context = driver.serve(disk)
        assert driver.content(buffer) == bytes(2 * SECTOR) + bytes([IOERR])
        assert context.lines == ["block0: IN at sector 1 failed: the image is shorter than it was"]

    def test_fallocate_fails(self, driver: MockDriver, disk: Block, monkeypatch: pytest.MonkeyPatch) -> None:
        _without_fallocate(monkeypatch, errno.ENOSPC)
        assert ask(driver, disk, WRITE_ZEROES, data=ranges((0, 1, 0))) == (IOERR, b"")

    def test_one_line_and_not_one_per_request(
        self, driver: MockDriver, disk: Block, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = 0.0
        monkeypatch.setattr("time.monotonic", lambda: now)
        monkeypatch.setattr("os.preadv", _fail(errno.EIO))
        context = Context()
        server = block._Server(disk, disk.files[0], driver.queue(), context)

        def fail(times: int) -> None:
            for _ in range(times):
                server._failures.note(IN, 7, OSError(errno.EIO, "Input/output error"))

        fail(10)
        assert context.lines == ["block0: IN at sector 7 failed: Input/output error"]
        now = block.LOG_INTERVAL + 1
        fail(10)
        assert context.lines[1:] == [
            "block0: IN at sector 7 failed: Input/output error (9 more since the last such line)"
        ]


class TestLatency:
    """What is finished does not wait for what takes long."""

    def _two(self, driver: MockDriver, disk: Block, second: int) -> tuple[Buffer, Buffer]:
        first = driver.add([header(IN, 1)], [SECTOR, 1])
        return first, driver.add([header(second, 2 if second == IN else 0)], [SECTOR, 1])

    def test_a_flush_publishes_first(self, driver: MockDriver, disk: Block, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []
        monkeypatch.setattr("os.fdatasync", lambda fd: seen.append(driver.used_index))
        self._two(driver, disk, FLUSH)
        driver.serve(disk)
        assert seen == [1]

    def test_a_read_that_misses_the_page_cache_publishes_first(
        self, driver: MockDriver, disk: Block, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first is read as it is; the second, with the first unpublished, is tried without waiting."""
        calls: list[tuple[int, int]] = []
        real = os.preadv

        def miss(fd: int, views: list[memoryview], position: int, flags: int) -> int:
            calls.append((flags, driver.used_index))
            if flags:
                raise BlockingIOError(errno.EAGAIN, "not in the page cache")
            return real(fd, views, position, flags)

        monkeypatch.setattr("os.preadv", miss)
        _, second = self._two(driver, disk, IN)
        driver.serve(disk)
        assert calls == [(0, 0), (os.RWF_NOWAIT, 0), (0, 1)]
        assert driver.content(second) == pattern()[2 * SECTOR : 3 * SECTOR] + bytes([OK])

    def test_a_read_that_is_cached_in_part_is_completed(
        self, driver: MockDriver, disk: Block, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = os.preadv

        def part(fd: int, views: list[memoryview], position: int, flags: int) -> int:
            return real(fd, [views[0][:100]] if flags else views, position, flags)

        monkeypatch.setattr("os.preadv", part)
        _, second = self._two(driver, disk, IN)
        driver.serve(disk)
        assert driver.content(second) == pattern()[2 * SECTOR : 3 * SECTOR] + bytes([OK])

    def test_a_file_system_that_does_not_know_nowait_is_asked_once(
        self, driver: MockDriver, disk: Block, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[int] = []
        real = os.preadv

        def unknown(fd: int, views: list[memoryview], position: int, flags: int) -> int:
            asked.append(flags)
            if flags:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            return real(fd, views, position, flags)

        monkeypatch.setattr("os.preadv", unknown)
        buffers = [driver.add([header(IN, sector)], [SECTOR, 1]) for sector in range(4)]
        driver.serve(disk)
        assert asked.count(os.RWF_NOWAIT) == 1
        for sector, buffer in enumerate(buffers):
            assert driver.content(buffer) == pattern()[sector * SECTOR : (sector + 1) * SECTOR] + bytes([OK])


def _fail(number: int):  # type: ignore[no-untyped-def]  # noqa: ANN202
    def fail(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    return fail


def _without_fallocate(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The host's fallocate(2) fails with ``number``."""

    class Library:
        def __init__(self, name: None, use_errno: bool) -> None:
            self.fallocate = lambda *_: -1

    monkeypatch.setattr("ctypes.CDLL", Library)
    monkeypatch.setattr("ctypes.get_errno", lambda: number)
