"""A payload's hash, made by a child: the same, and no kernel is read otherwise for it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import pytest
from boot_images import CODE, MEMORY, PACKERS, TEXT, bzimage, elf64

from lguest_mp.boot import hashing
from lguest_mp.boot.bzimage import parse_bzimage
from lguest_mp.boot.cache import KernelCache
from lguest_mp.boot.files import CHUNK_SIZE, HostFile
from lguest_mp.boot.kernel import read_kernel

PAYLOAD = PACKERS["LZ4"](elf64([(TEXT, CODE + os.urandom(2 * CHUNK_SIZE), 3 * CHUNK_SIZE)], entry=TEXT))
IMAGE = bzimage(PAYLOAD)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A kernel's file."""
    path = tmp_path / "bzImage"
    path.write_bytes(IMAGE)
    return path


def test_it_is_that_of_the_payload(image: Path) -> None:
    begun = hashing.start(image)
    assert begun is not None
    file, digest = begun.finish()
    parsed = parse_bzimage(file, IMAGE[:4096])
    payload = IMAGE[parsed.payload_offset : parsed.payload_offset + parsed.payload_size]
    assert PAYLOAD in payload
    assert digest == hashlib.sha256(payload).digest()


def test_it_is_of_the_file_that_is_read(image: Path) -> None:
    """Another file may have the name by the time it is asked for."""
    begun = hashing.start(image)
    assert begun is not None
    image.unlink()
    image.write_bytes(b"another one")
    file, _ = begun.finish()
    assert file.read(0, file.size) == IMAGE


def test_the_image_is_let_go_of(image: Path) -> None:
    files = set(os.listdir("/proc/self/fd"))
    begun = hashing.start(image)
    assert begun is not None
    begun.finish()
    assert set(os.listdir("/proc/self/fd")) == files


@pytest.mark.parametrize("known", [True, False])
def test_an_entry_is_found_by_it(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    cache = KernelCache(str(tmp_path))
    read_kernel(HostFile("kernel", image), MEMORY, cache)
    begun = hashing.start(image)
    assert begun is not None
    file, digest = begun.finish()
    made = []

    def digest_of(payload: Iterable[bytes | memoryview]) -> bytes:
        made.append(True)
        return hashing.digest_of(payload)

    monkeypatch.setattr("lguest_mp.boot.kernel.digest_of", digest_of)
    kernel = read_kernel(file, MEMORY, cache, digest if known else None)
    assert kernel.kept is not None
    assert len(made) == (not known)


def test_a_child_that_fails_is_not_told(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(hashing, "digest_of", lambda _chunks: os._exit(1))
        begun = hashing.start(image)
    assert begun is not None
    file, digest = begun.finish()
    assert digest is None
    assert read_kernel(file, MEMORY, KernelCache(None), digest).entry == TEXT


@pytest.mark.parametrize("content", [b"", b"none", elf64([(TEXT, CODE, len(CODE))], entry=TEXT), IMAGE[:-4096], None])
def test_it_is_not_begun_for_what_is_no_such_image(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "kernel"
    if content is not None:
        path.write_bytes(content)
    assert hashing.start(path) is None
