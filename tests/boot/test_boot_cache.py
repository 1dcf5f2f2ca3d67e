"""The cache of unpacked kernels: a kernel from it is the kernel, and whatever is wrong with it does no harm."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import sys
from pathlib import Path

import pytest
from boot_images import CODE, MEMORY, MIB, PACKERS, TEXT, bzimage, elf64, is_zero

from lguest_mp.boot import cache as cache_module
from lguest_mp.boot import payload
from lguest_mp.boot.cache import KernelCache
from lguest_mp.boot.files import HostFile
from lguest_mp.boot.kernel import Kernel, read_kernel
from lguest_mp.errors import LguestError
from lguest_mp.memory import GuestMemory

DATA = bytes(range(255, 0, -1)) * 400
VMLINUX = elf64([(TEXT, CODE, len(CODE) + 4096), (TEXT + MIB, DATA + bytes(MIB) + DATA, 3 * MIB)], entry=TEXT + 0x40)
IMAGE = bzimage(PACKERS["LZ4"](VMLINUX))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """What $XDG_CACHE_HOME would be."""
    return tmp_path / "cache"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A kernel's file."""
    path = tmp_path / "bzImage"
    path.write_bytes(IMAGE)
    return path


@pytest.fixture
def unpackings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often something was unpacked: an element for each time."""
    counted: list[int] = []
    original = payload.Payload.chunks

    def chunks(self: payload.Payload) -> object:
        counted.append(1)
        return original(self)

    monkeypatch.setattr(payload.Payload, "chunks", chunks)
    return counted


def read(path: Path, base: Path | None) -> Kernel:
    return read_kernel(HostFile("kernel", path), MEMORY, KernelCache(None if base is None else str(base)))


def entries(base: Path) -> list[Path]:
    return sorted((base / "lguest" / "kernels").iterdir())


def check(kernel: Kernel) -> None:
    """It is the kernel of these tests, wherever it came from."""
    memory = GuestMemory(MEMORY)
    kernel.load(memory)
    assert memory.read(TEXT, len(CODE)) == CODE
    second = TEXT + MIB
    assert memory.read(second, len(DATA)) == DATA
    assert is_zero(memory, second + len(DATA), MIB)
    assert memory.read(second + len(DATA) + MIB, len(DATA)) == DATA
    assert is_zero(memory, 0, TEXT)
    assert is_zero(memory, TEXT + len(CODE), MIB - len(CODE))
    end = second + 2 * len(DATA) + MIB
    assert is_zero(memory, end, MEMORY - end)
    assert (kernel.entry, kernel.end, kernel.unpacks_itself) == (TEXT + 0x40, TEXT + 4 * MIB, False)


@pytest.mark.parametrize("packer", PACKERS)
def test_a_kernel_is_unpacked_once(tmp_path: Path, base: Path, unpackings: list[int], packer: str) -> None:
    path = tmp_path / "bzImage"
    path.write_bytes(bzimage(PACKERS[packer](VMLINUX)))
    for _ in range(3):
        kernel = read(path, base)
        check(kernel)
        check(kernel)  # as a reboot in place does
    assert len(unpackings) == 1
    assert len(entries(base)) == 1


def test_it_is_the_content_that_counts(image: Path, base: Path, unpackings: list[int]) -> None:
    read(image, base)
    before = image.stat()
    copy = image.with_name("copy")
    copy.write_bytes(IMAGE)
    check(read(copy, base))
    assert len(unpackings) == 1
    other = VMLINUX.replace(CODE, CODE[::-1])
    image.write_bytes(bzimage(PACKERS["LZ4"](other)))
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    memory = GuestMemory(MEMORY)
    read(image, base).load(memory)
    assert memory.read(TEXT, len(CODE)) == CODE[::-1]


def test_the_images_header_is_its_own(image: Path, base: Path) -> None:
    """The same payload may be in two images whose headers say different things."""
    read(image, base)
    image.write_bytes(bzimage(PACKERS["LZ4"](VMLINUX), setup_sects=7))
    kernel = read(image, base)
    assert bytes(kernel.header)[0x1F1] == 7
    check(kernel)


def test_too_little_memory_is_noticed_with_and_without(image: Path, base: Path) -> None:
    for _ in range(2):
        with pytest.raises(LguestError, match="give it at least"):
            read_kernel(HostFile("kernel", image), TEXT + 3 * MIB, KernelCache(str(base)))
        read(image, base)


@pytest.mark.parametrize("offset", [0, 17, 21, 60, 64 << 10, -1])
def test_a_damaged_entry_is_made_again(image: Path, base: Path, unpackings: list[int], offset: int) -> None:
    read(image, base)
    [entry] = entries(base)
    damaged = bytearray(entry.read_bytes())
    damaged[offset] ^= 0x40
    entry.write_bytes(damaged)
    check(read(image, base))
    check(read(image, base))
    assert entry.read_bytes() != damaged
    assert 2 <= len(unpackings) <= 3  # what is wrong with its pieces shows in guest memory only


@pytest.mark.parametrize("size", [0, 10, 64 << 10, -1])
def test_a_truncated_entry_is_made_again(image: Path, base: Path, size: int) -> None:
    read(image, base)
    [entry] = entries(base)
    whole = entry.read_bytes()
    os.truncate(entry, size if size >= 0 else len(whole) + size)
    check(read(image, base))
    assert entry.read_bytes() == whole


def test_an_entry_that_shrinks_while_it_is_used_is_not_believed(image: Path, base: Path) -> None:
    read(image, base)
    kernel = read(image, base)
    [entry] = entries(base)
    os.truncate(entry, 70 << 10)
    check(kernel)
    assert not entries(base)


def test_a_damaged_entry_of_a_kernel_that_has_changed_since_is_an_error(image: Path, base: Path) -> None:
    read(image, base)
    kernel = read(image, base)
    [entry] = entries(base)
    os.truncate(entry, 70 << 10)
    image.write_bytes(bytes(len(IMAGE)))
    with pytest.raises(LguestError, match="became another one"):
        kernel.load(GuestMemory(MEMORY))


def test_where_it_cannot_be_unpacked_again_that_is_an_error(
    image: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After --chroot there may be no Python."""
    read(image, base)
    kernel = read(image, base)
    os.truncate(entries(base)[0], 70 << 10)
    monkeypatch.setitem(sys.modules, "lz4.block", None)
    with pytest.raises(LguestError, match=r"damaged, and here is no lz4.block"):
        kernel.load(GuestMemory(MEMORY))


def test_a_vmlinux_is_not_kept(tmp_path: Path, base: Path) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(VMLINUX)
    check(read(path, base))
    assert not base.exists()


def test_what_does_not_unpack_is_not_kept(image: Path, base: Path) -> None:
    packed = bytearray(PACKERS["gzip"](VMLINUX))
    packed[len(packed) // 2] ^= 0xFF
    image.write_bytes(bzimage(bytes(packed)))
    for _ in range(2):
        with pytest.raises(LguestError, match="damaged"):
            read(image, base)
    assert not entries(base)


def test_others_may_not_look_into_it(image: Path, base: Path) -> None:
    old = os.umask(0)
    try:
        read(image, base)
    finally:
        os.umask(old)
    [entry] = entries(base)
    modes = [path.stat().st_mode & 0o7777 for path in (base, base / "lguest", base / "lguest" / "kernels", entry)]
    assert modes == [0o700, 0o700, 0o700, 0o600]


@pytest.mark.parametrize("name", ["lguest", "lguest/kernels"])
def test_a_directory_that_others_may_use_is_none(image: Path, base: Path, name: str) -> None:
    read(image, base)
    [entry] = entries(base)
    entry.write_bytes(b"not looked at")
    (base / name).chmod(0o770)
    check(read(image, base))
    assert entry.read_bytes() == b"not looked at"


def test_an_entry_that_others_may_write_is_made_again(image: Path, base: Path) -> None:
    read(image, base)
    [entry] = entries(base)
    entry.chmod(0o620)
    check(read(image, base))
    assert entry.stat().st_mode & 0o7777 == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", [".", "lguest", "lguest/kernels"])
def test_a_directory_of_another_users_is_none(image: Path, base: Path, name: str) -> None:
    read(image, base)
    [entry] = entries(base)
    entry.write_bytes(b"not looked at")
    os.chown(base / name, 65534, 65534)
    check(read(image, base))
    assert entry.read_bytes() == b"not looked at"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_an_entry_of_another_users_is_not_believed(image: Path, base: Path) -> None:
    read(image, base)
    [entry] = entries(base)
    os.chown(entry, 65534, 65534)
    check(read(image, base))
    assert entry.stat().st_uid == 0


def test_symbolic_links_are_not_followed(image: Path, base: Path, tmp_path: Path) -> None:
    read(image, base)
    [entry] = entries(base)
    elsewhere = entry.rename(tmp_path / "elsewhere")
    entry.symlink_to(elsewhere)
    check(read(image, base))
    assert not entry.is_symlink()
    folder = entry.parent.rename(tmp_path / "folder")
    entry.parent.symlink_to(folder)
    left = sorted(folder.iterdir())
    (folder / entry.name).write_bytes(b"not looked at")
    check(read(image, base))
    assert sorted(folder.iterdir()) == left


def test_a_fifo_in_an_entrys_place_holds_nobody_up(image: Path, base: Path) -> None:
    read(image, base)
    [entry] = entries(base)
    entry.unlink()
    os.mkfifo(entry, 0o600)
    check(read(image, base))
    assert entry.is_file()


def test_where_there_can_be_none_it_works_without(image: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check(read(image, None))
    check(read(image, tmp_path / "file"))
    check(read(image, tmp_path / "missing" / "cache"))


@pytest.mark.parametrize("packer", ["LZ4", "xz"])
def test_a_full_host_means_no_cache(image: Path, base: Path, monkeypatch: pytest.MonkeyPatch, packer: str) -> None:
    image.write_bytes(bzimage(PACKERS[packer](VMLINUX)))
    room = 100_000
    original = os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if offset >= room:
            raise OSError(28, "No space left on device")
        return original(fd, data[: room - offset], offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    kernel = read(image, base)
    check(kernel)
    check(kernel)
    assert not entries(base)


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images: list[Path] = []
    places: list[Path] = []
    for number in range(4):
        images.append(tmp_path / str(number))
        images[-1].write_bytes(bzimage(PACKERS["LZ4"](VMLINUX + bytes([number]))))
    for path in images[:3]:
        read(path, base)
        [place] = set(entries(base)).difference(places)
        places.append(place)
        os.utime(place, (1000 + len(places), 1000 + len(places)))
    monkeypatch.setattr(cache_module, "LIMIT", sum(place.stat().st_size for place in places))
    read(images[0], base)  # the oldest is used now
    read(images[3], base)
    assert [place.exists() for place in places] == [True, False, True]
    assert len(entries(base)) == 3


def test_what_is_larger_than_the_cache_is_not_kept(image: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "LIMIT", 1000)
    check(read(image, base))
    assert not entries(base)


def test_what_a_writer_left_that_is_no_more_goes(image: Path, base: Path) -> None:
    read(image, base)
    folder = entries(base)[0].parent
    left, under_way = folder / ".new-1", folder / ".new-2"
    left.touch(0o600)
    under_way.touch(0o600)
    with under_way.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        image.write_bytes(bzimage(PACKERS["LZ4"](VMLINUX + b"x")))
        read(image, base)
    assert not left.exists()
    assert under_way.exists()
    assert len(entries(base)) == 3


def _read_often(path: Path, base: Path) -> None:
    for _ in range(10):
        check(read(path, base))
        for entry in entries(base):
            entry.unlink(missing_ok=True)


def test_launchers_do_not_mind_each_other(image: Path, base: Path) -> None:
    """Several make, use and take away the same entry."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_read_often, args=(image, base)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, image: Path, tmp_path: Path) -> None:
    def keeps_in(place: Path, variables: dict[str, str]) -> bool:
        for name in ("XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        read_kernel(HostFile("kernel", image), MEMORY, KernelCache.of_user())
        return (place / "lguest" / "kernels").exists()

    home = tmp_path / "home"
    home.mkdir()
    assert keeps_in(tmp_path / "xdg", {"XDG_CACHE_HOME": str(tmp_path / "xdg"), "HOME": str(home)})
    assert not (home / ".cache").exists()
    assert keeps_in(home / ".cache", {"XDG_CACHE_HOME": "relative", "HOME": str(home)})
    monkeypatch.chdir(tmp_path)
    assert not keeps_in(tmp_path / ".cache", {})
