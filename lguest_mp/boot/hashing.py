"""The SHA-256 of a payload, by which the kernel that was unpacked of it is found (``cache.py``).

A launch has it made by a child meanwhile, since its own imports take as long.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lguest_mp.aside import Aside
from lguest_mp.boot.bzimage import is_bzimage, parse_bzimage
from lguest_mp.boot.files import HostFile
from lguest_mp.boot.zeropage import SETUP_HEADER_LIMIT
from lguest_mp.errors import LguestError


def digest_of(payload: Iterable[bytes | memoryview]) -> bytes:
    """The SHA-256 of a payload that comes in chunks."""
    import hashlib  # noqa: PLC0415 -- it brings a library of its own

    digest = hashlib.sha256()
    for chunk in payload:
        digest.update(chunk)
    return digest.digest()


class Hashing:
    """An image whose payload is being hashed by a child."""

    def __init__(self, file: HostFile, aside: Aside) -> None:
        self._file: HostFile | None = file
        self._aside = aside

    def finish(self) -> tuple[HostFile, bytes | None]:
        """Waits for it: the image, which is let go of here, and the hash; None: the child could not make it.

        To be asked once.
        """
        file, self._file = self._file, None
        assert file is not None
        return file, self._aside.answer()


def start(kernel: Path) -> Hashing | None:
    """Begins with it, if that is a bzImage for 64-bit machines; for others whoever reads them will tell why not."""
    try:
        file = HostFile("kernel", kernel)
        head = file.read(0, min(SETUP_HEADER_LIMIT, file.size))
        if not is_bzimage(head):
            return None
        image = parse_bzimage(file, head)
        return Hashing(file, Aside(lambda: digest_of(file.chunks(image.payload_size, image.payload_offset))))
    except (LguestError, OSError):
        return None
