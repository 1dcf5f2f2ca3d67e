"""Archives for the kernel: what is put in comes out, in an order in which it can be unpacked."""

from __future__ import annotations

import stat

from guestkit.cpio import CpioArchive


def entries(archive: bytes) -> list[tuple[str, int, bytes, tuple[int, int]]]:
    """Name, mode, data and device of every entry, as the kernel's unpacker reads them (init/initramfs.c)."""
    found: list[tuple[str, int, bytes, tuple[int, int]]] = []
    position = 0
    while True:
        assert position % 4 == 0
        assert archive[position : position + 6] == b"070701"
        fields = [int(archive[at : at + 8], 16) for at in range(position + 6, position + 110, 8)]
        size, name_size = fields[6], fields[11]
        name = archive[position + 110 : position + 110 + name_size]
        assert name.endswith(b"\0")
        start = (position + 110 + name_size + 3) & ~3
        if name == b"TRAILER!!!\0":
            return found
        found.append((name[:-1].decode(), fields[1], archive[start : start + size], (fields[9], fields[10])))
        position = (start + size + 3) & ~3


def test_what_is_put_in_comes_out() -> None:
    archive = CpioArchive()
    archive.file("init", b"#!/bin/sh\n", 0o755)
    archive.symlink("bin/sh", "busybox")
    archive.character_device("dev/console", 5, 1)
    found = {name: rest for name, *rest in entries(archive.finish())}
    assert found["init"] == [stat.S_IFREG | 0o755, b"#!/bin/sh\n", (0, 0)]
    assert found["bin/sh"] == [stat.S_IFLNK | 0o777, b"busybox", (0, 0)]
    assert found["dev/console"] == [stat.S_IFCHR | 0o600, b"", (5, 1)]


def test_a_directory_comes_once_and_before_what_is_in_it() -> None:
    archive = CpioArchive()
    archive.file("a/b/one", b"1")
    archive.file("/a/b/two", b"22")
    archive.directory("a/b")
    names = [name for name, *_ in entries(archive.finish())]
    assert names == ["a", "a/b", "a/b/one", "a/b/two"]
