"""The guest of ``lguest --demo``: a program of a few kilobytes that runs as a guest of its own, with no kernel around.

It greets on the console, lists the devices of its descriptor page, draws random numbers, reads its disk, and keeps a
clock. Its sources lie beside its image and are the shortest introduction to what an lguest guest is: ``runtime.s``
(how it begins, hypercalls, traps), ``devices.s`` (descriptors and rings), ``demo.s``. ``tools/build-guests`` builds it.
"""

from __future__ import annotations

from pathlib import Path

#: How much memory the guest gets where nobody says, in MiB; it needs 2.
MEMORY = 16


def kernel() -> Path:
    """The image, an ELF file for i386."""
    return Path(__file__).with_name("demo.elf")
