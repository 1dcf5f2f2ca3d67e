"""A stock 64-bit Linux, ready in guest memory: what lies where, and the CPU's state at the first instruction.

Where everything is put (guest-physical; the e820 map tells the kernel the same):

| from       | to         | what                                                    | e820     |
|------------|------------|---------------------------------------------------------|----------|
| 0x00001000 | 0x00002000 | GDT                                                     | RAM      |
| 0x00002000 | 0x00003000 | zero page                                               | RAM      |
| 0x00003000 | 0x00009000 | page tables: 4 GiB, each address to itself              | RAM      |
| 0x00010000 | 0x00020000 | command line                                            | RAM      |
| 0x0009fc00 | 0x000a0000 | where a BIOS would have its data                        | reserved |
| 0x000a0000 | 0x000e0000 | where a PC has its video memory and its option ROMs     | –        |
| 0x000e0000 | 0x000f0000 | ACPI tables                                             | ACPI     |
| 0x000f0000 | 0x00100000 | where a BIOS would be; at its end, where a CPU is reset | reserved |
| 0x00100000 | low end    | the kernel where it wants to be, the initrd at the end  | RAM      |
| 4 GiB      |            | the rest of a large guest's memory                      | RAM      |

The kernel begins in 64-bit mode with paging on (boot.rst, "64-bit Boot Protocol"). It copies the zero page and the
command line away and replaces GDT and page tables before it gives out any memory, so that all RAM is the guest's.

The command line is what the user wrote after the kernel, joined by spaces. There is one addition, and only when no
``console=`` is among it: ``console=ttyS0`` in front, since the serial port is the one console that every kernel has
from its first line on.

An unpacked kernel starts where it was linked; it was its own decompressor that would have chosen another place
for its text. What the kernel itself randomizes, the places of its memory maps, it still does: the flag by which the
decompressor would ask for that is set here, unless the command line has ``nokaslr``.
"""

from __future__ import annotations

import struct
from itertools import takewhile

from lguest_mp.boot import zeropage
from lguest_mp.boot.acpi import acpi_tables
from lguest_mp.boot.cache import KernelCache
from lguest_mp.boot.files import HostFile
from lguest_mp.boot.hashing import Hashing
from lguest_mp.boot.kernel import KERNEL_FIRST, MIB, Kernel, read_kernel
from lguest_mp.boot.zeropage import E820Entry, E820Type, ZeroPage
from lguest_mp.config import GuestConfig
from lguest_mp.cpu.engine import EntryState
from lguest_mp.errors import LguestError
from lguest_mp.machine.layout import RESET_PORT, RESET_VALUE
from lguest_mp.memory import GIB, HIGH_RAM_BASE, LOW_RAM_LIMIT, PAGE_SIZE, GuestMemory

GDT = 0x1000
ZERO_PAGE = 0x2000
PAGE_TABLES = 0x3000
COMMAND_LINE = 0x1_0000
COMMAND_LINE_ROOM = 0x1_0000
BIOS_DATA = 0x9_FC00
VIDEO_MEMORY = 0xA_0000
ACPI_TABLES = 0xE_0000
ACPI_TABLES_ROOM = 0x1_0000
BIOS = 0xF_0000
RESET_VECTOR = 0xF_FFF0

#: No kernel of today starts in less; the embedded CPU has 40 bits of physical addresses.
MIN_MEMORY = 16 * MIB
MAX_MEMORY = 512 * GIB

#: Page table entries: present, writable; in a page directory, a page of 2 MiB (Intel SDM 3A, 4.5).
_PRESENT_WRITABLE = 0x3
_LARGE_PAGE = 0x80
_LARGE_PAGE_SIZE = 2 * MIB

#: Flat segments, accessed: 64-bit code at selector 0x10, data at 0x18 (boot.rst names them __BOOT_CS and __BOOT_DS).
_GDT_ENTRIES = (0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)

#: What a kernel finds that resets its PC by jumping to the BIOS's reset vector in real mode. Linux does that on
#: hardware-reduced platforms: it expects EFI's reset service there, has none, and ends here (arch/x86/kernel/reboot.c).
#: mov ax, RESET_VALUE; mov dx, RESET_PORT; out dx, al; jmp to itself
_RESET_CODE = struct.pack("<BHBHBH", 0xB8, RESET_VALUE, 0xBA, RESET_PORT, 0xEE, 0xFEEB)


def prepare(config: GuestConfig, hashing: Hashing | None = None) -> Prepared:
    """Reads and checks all that goes into guest memory before the first instruction; LguestError: it cannot be.

    ``hashing``: of the kernel's payload, if that was begun.
    """
    _check_memory(config.memory)
    low_memory = min(config.memory, LOW_RAM_LIMIT)
    file, digest = (HostFile("kernel", config.kernel), None) if hashing is None else hashing.finish()
    initrd = None if config.initrd is None else HostFile("initrd", config.initrd)
    cache = KernelCache.of_user() if config.kernel_cache else KernelCache(None)
    kernel = read_kernel(file, low_memory, cache, digest)
    return Prepared(config.memory, kernel, _command_line(config.arguments, kernel), initrd, config.cpus)


def _check_memory(size: int) -> None:
    if size < MIN_MEMORY:
        raise LguestError(f"{size / MIB:g} MiB of memory are too few for a Linux; give it at least {MIN_MEMORY // MIB}")
    if size > MAX_MEMORY:
        raise LguestError(f"{size // MIB} MiB of memory are more than a guest can have, {MAX_MEMORY // MIB}")
    if size % PAGE_SIZE:
        raise LguestError(f"{size} bytes of memory are not a whole number of {PAGE_SIZE}-byte pages")


def _command_line(arguments: tuple[str, ...], kernel: Kernel) -> bytes:
    """The kernel's command line without its terminating zero."""
    line = " ".join(arguments)
    # What follows "--" is for init and not for the kernel.
    words = list(takewhile("--".__ne__, line.split()))
    if not any(word.startswith("console=") for word in words):
        line = f"console=ttyS0 {line}".rstrip()
    data = line.encode(errors="surrogateescape")
    limit = min(kernel.header[zeropage.CMDLINE_SIZE], COMMAND_LINE_ROOM - 1)
    if len(data) > limit:
        raise LguestError(
            f"the kernel's command line has {len(data)} bytes, {kernel.name} takes at most {limit}; shorten it"
        )
    return data


class Prepared:
    """A kernel and what belongs to it, checked against each other and ready to be loaded.

    As long as it lives it holds the initrd and a vmlinux open (close-on-exec), and a bzImage's payload in memory:
    whoever does not load again lets go of it before forking.
    """

    def __init__(
        self, memory_size: int, kernel: Kernel, command_line: bytes, initrd: HostFile | None, cpus: int = 1
    ) -> None:
        self.kernel = kernel
        self.command_line = command_line
        self._memory_size = memory_size
        self._initrd = initrd
        self._initrd_address = self._place_initrd(initrd) if initrd else 0
        self._acpi = acpi_tables(ACPI_TABLES, cpus)

    def _place_initrd(self, initrd: HostFile) -> int:
        """As high as the kernel can reach it, page-aligned: the guest-physical address."""
        highest = min(self.kernel.header[zeropage.INITRD_ADDR_MAX] + 1, LOW_RAM_LIMIT)
        top = min(self._memory_size, highest)
        address = (top - initrd.size) & -PAGE_SIZE
        if address < self.kernel.end:
            needed = self.kernel.end + initrd.size + PAGE_SIZE
            remedy = f"give the guest at least {-(-needed // MIB)} MiB" if needed <= highest else "make it smaller"
            raise LguestError(
                f"{initrd.name} has {initrd.size} bytes; between the kernel's end at {self.kernel.end:#x} and {top:#x}"
                f" are {max(top - self.kernel.end, 0)}: {remedy}"
            )
        return address

    def memory_map(self) -> tuple[E820Entry, ...]:
        """The e820 map: what of the guest-physical addresses is RAM, and what of it is taken."""
        low_end = min(self._memory_size, LOW_RAM_LIMIT)
        entries = [
            E820Entry(0, BIOS_DATA, E820Type.RAM),
            E820Entry(BIOS_DATA, VIDEO_MEMORY - BIOS_DATA, E820Type.RESERVED),
            E820Entry(ACPI_TABLES, ACPI_TABLES_ROOM, E820Type.ACPI),
            E820Entry(BIOS, KERNEL_FIRST - BIOS, E820Type.RESERVED),
            E820Entry(KERNEL_FIRST, low_end - KERNEL_FIRST, E820Type.RAM),
        ]
        if self._memory_size > low_end:
            entries.append(E820Entry(HIGH_RAM_BASE, self._memory_size - low_end, E820Type.RAM))
        return tuple(entries)

    def load(self, memory: GuestMemory) -> EntryState:
        """Puts everything into ``memory``, which has to be zeros (fresh or cleared); can be done again.

        LguestError: a file became unreadable, or shorter, since it was checked.
        """
        if memory.size != self._memory_size:
            raise ValueError(f"prepared for {self._memory_size} bytes of memory, loaded into {memory.size}")
        self.kernel.load(memory)
        if self._initrd:
            memory.make_huge(self._initrd_address, self._initrd.size)
            self._initrd.read_into(memory.slice(self._initrd_address, self._initrd.size), 0)
        memory.write(COMMAND_LINE, self.command_line + b"\0")
        memory.write(ACPI_TABLES, self._acpi)
        memory.write(RESET_VECTOR, _RESET_CODE)
        memory.write(ZERO_PAGE, bytes(self._zero_page()))
        memory.write(PAGE_TABLES, _identity_page_tables(PAGE_TABLES))
        memory.write(GDT, struct.pack(f"<{len(_GDT_ENTRIES)}Q", *_GDT_ENTRIES))
        return EntryState(
            rip=self.kernel.entry, rsi=ZERO_PAGE, cr3=PAGE_TABLES, gdt_base=GDT, gdt_limit=8 * len(_GDT_ENTRIES) - 1
        )

    def _zero_page(self) -> ZeroPage:
        page = self.kernel.header.copy()
        page.set_loader()
        if not self.kernel.unpacks_itself and b"nokaslr" not in self.command_line.split():
            page[zeropage.LOADFLAGS] |= zeropage.KASLR_FLAG
        page.set_command_line(COMMAND_LINE)
        if self._initrd:
            page.set_initrd(self._initrd_address, self._initrd.size)
        page.set_memory_map(self.memory_map())
        page[zeropage.ACPI_RSDP_ADDR] = ACPI_TABLES
        return page


def _identity_page_tables(base: int) -> bytes:
    """A PML4, a directory pointer table and four directories at ``base``: 4 GiB in pages of 2 MiB."""
    directories = HIGH_RAM_BASE // GIB
    pml4 = struct.pack("<Q", (base + PAGE_SIZE) | _PRESENT_WRITABLE).ljust(PAGE_SIZE, b"\0")
    pointers = b"".join(
        struct.pack("<Q", (base + (2 + index) * PAGE_SIZE) | _PRESENT_WRITABLE) for index in range(directories)
    ).ljust(PAGE_SIZE, b"\0")
    pages = range(0, HIGH_RAM_BASE, _LARGE_PAGE_SIZE)
    return pml4 + pointers + struct.pack(f"<{len(pages)}Q", *(page | _PRESENT_WRITABLE | _LARGE_PAGE for page in pages))
