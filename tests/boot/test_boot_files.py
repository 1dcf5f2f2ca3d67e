"""A file that the user named is there, a file, readable, and not empty; and stays the same one."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import pytest
from boot_images import one_line

from lguest_mp.boot.files import CHUNK_SIZE, HostFile
from lguest_mp.errors import LguestError


def refusal(path: Path) -> str:
    with pytest.raises(LguestError) as caught:
        HostFile("kernel", path)
    return one_line(caught.value)


def open_files() -> dict[str, int]:
    """What this process has open, by name."""
    files = {}
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(FileNotFoundError):  # the directory that is being listed
            files[os.readlink(f"/proc/self/fd/{number}")] = number
    return files


def test_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    assert refusal(path) == f"cannot open kernel {path}: No such file or directory"


def test_a_directory(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"kernel {tmp_path} is a directory; give a file"


def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.touch()
    assert refusal(path) == f"kernel {path} is empty"


def test_a_fifo_is_refused_at_once_and_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    assert refusal(path) == f"kernel {path} is not a regular file; give one"


def test_a_device(tmp_path: Path) -> None:
    assert "is not a regular file" in refusal(Path("/dev/zero"))


def test_a_name_that_no_file_can_have() -> None:
    assert refusal(Path("vm\0linuz")).startswith("cannot open kernel vm")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(b"kernel")
    path.chmod(0)
    assert refusal(path) == f"cannot open kernel {path}: Permission denied"


def test_a_refused_file_is_closed(tmp_path: Path) -> None:
    refusal(tmp_path)
    assert str(tmp_path) not in open_files()


def test_a_file_is_closed_with_its_last_reference(tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(b"kernel")
    file = HostFile("kernel", path)
    assert str(path) in open_files()
    del file
    assert str(path) not in open_files()


def test_a_file_is_not_passed_on_to_another_program(tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(b"kernel")
    file = HostFile("kernel", path)
    assert not os.get_inheritable(open_files()[str(path)])
    assert file.size == 6


def test_reading(tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    data = os.urandom(CHUNK_SIZE + 100)
    path.write_bytes(data)
    file = HostFile("kernel", path)
    path.unlink()
    assert file.size == len(data)
    assert file.read(10, 20) == data[10:30]
    assert file.read(len(data) - 5, 5) == data[-5:]
    assert b"".join(file.chunks(len(data))) == data
    assert b"".join(file.chunks(CHUNK_SIZE - 1)) == data[: CHUNK_SIZE - 1]
    buffer = bytearray(50)
    file.read_into(memoryview(buffer), 7)
    assert buffer == data[7:57]


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "initrd"
    path.write_bytes(bytes(100))
    file = HostFile("initrd", path)
    os.truncate(path, 50)
    told = f"initrd {path} became shorter while it was read; start again"
    with pytest.raises(LguestError) as caught:
        file.read_into(memoryview(bytearray(100)), 0)
    assert str(caught.value) == told
    with pytest.raises(LguestError) as caught:
        file.read(40, 20)
    assert str(caught.value) == told
    with pytest.raises(LguestError) as caught:
        list(file.chunks(100))
    assert str(caught.value) == told


def test_a_host_that_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "initrd"
    path.write_bytes(bytes(100))
    file = HostFile("initrd", path)

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(LguestError) as caught:
        file.read(10, 20)
    assert str(caught.value) == f"cannot read initrd {path} at byte 10: Input/output error"
    with pytest.raises(LguestError) as caught:
        file.read_into(memoryview(bytearray(10)), 5)
    assert str(caught.value) == f"cannot read initrd {path} at byte 5: Input/output error"
