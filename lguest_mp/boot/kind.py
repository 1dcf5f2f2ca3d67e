"""Whether a kernel is a stock one or for lguest, by its headers alone."""

from __future__ import annotations

from pathlib import Path

from lguest_mp.boot import zeropage
from lguest_mp.boot.bzimage import is_bzimage
from lguest_mp.boot.elf import I386, is_elf_of
from lguest_mp.boot.files import HostFile
from lguest_mp.boot.zeropage import SETUP_HEADER_LIMIT, ZeroPage
from lguest_mp.errors import LguestError


def is_for_lguest(path: Path) -> bool:
    """Whether the kernel in this file is a 32-bit one: an i386 ELF, or a bzImage without a 64-bit entry point.

    False for what cannot be read or is no kernel; whoever reads it next will tell why.
    """
    try:
        file = HostFile("kernel", path)
        head = file.read(0, min(SETUP_HEADER_LIMIT, file.size))
    except LguestError:
        return False
    return is_elf_of(I386, head) or (is_bzimage(head) and not has_64_bit_entry(ZeroPage.of_image(head)))


def has_64_bit_entry(header: ZeroPage) -> bool:
    """Whether a bzImage says that it can be entered in 64-bit mode, as all of 64-bit kernels since Linux 3.8 do."""
    return bool(header[zeropage.XLOADFLAGS] & zeropage.XLF_KERNEL_64)
