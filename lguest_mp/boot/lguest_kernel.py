"""One of lguest's own guests, ready in guest memory: a 32-bit kernel that knows what it runs on.

Where everything is put (guest-physical; the e820 map is one region of RAM from 0 to the top):

| from       | to         | what                                                                     |
|------------|------------|--------------------------------------------------------------------------|
| 0x00000000 | 0x00001000 | zero page                                                                |
| 0x00001000 | 0x00002000 | command line                                                             |
| 0x00100000 |            | a bzImage's code, which begins at its code32_start and unpacks itself    |
| p_paddr    |            | the segments of a vmlinux, which begins at e_entry                       |
|            | top        | the initrd, page-aligned                                                 |

The kernel begins with paging off and every register zero, so that ESI leads to the zero page. That page is not the
image's header, as for a stock kernel, but empty except for what the original launcher wrote: a kernel that finds boot
protocol 2.07 looks at the subarchitecture, and with 1 it enters lguest's code. KEEP_SEGMENTS tells that the flat
segments that it runs on are all there are.

**What the original did not check.** It copied what the files said to where they said. Here every number is compared
with the file and with the guest's memory first; nothing reaches the zero page or the command line, which are not the
kernel's to overwrite; and a command line that would not fit is refused.

Source: the original launcher; the kernel's Documentation/x86/boot.txt.
"""

from __future__ import annotations

from lguest_mp.boot import zeropage
from lguest_mp.boot.bzimage import DEFAULT_SETUP_SECTS, SECTOR, is_bzimage
from lguest_mp.boot.elf import I386, Segment, is_elf, parse_elf
from lguest_mp.boot.files import HostFile
from lguest_mp.boot.kernel import MIB, Kernel
from lguest_mp.boot.kind import has_64_bit_entry
from lguest_mp.boot.zeropage import E820Entry, E820Type, ZeroPage
from lguest_mp.bus.lguest_page import DEVICE_PAGES
from lguest_mp.config import GuestConfig
from lguest_mp.cpu.engine import EntryState
from lguest_mp.errors import LguestError
from lguest_mp.memory import LOW_RAM_LIMIT, PAGE_SIZE, GuestMemory

ZERO_PAGE = 0
COMMAND_LINE = 0x1000
#: Below this there is nothing of the kernel's.
KERNEL_FIRST = 0x2000
#: Where a bzImage's protected-mode code is put, whatever it prefers.
BZIMAGE_CODE = 0x10_0000

#: RAM and device pages are one run of guest-physical addresses below the end of low memory.
MAX_MEMORY = LOW_RAM_LIMIT - DEVICE_PAGES * PAGE_SIZE

#: The first boot protocol whose header knows of lguest, by which the kernel's entry recognizes a loader that does, too.
PROTOCOL = 0x0207
#: The first ones with cmdline_size, and with init_size and pref_address.
_PROTOCOL_CMDLINE_SIZE = 0x0206
_PROTOCOL_INIT_SIZE = 0x020A
#: The command line's length without cmdline_size.
_SHORT_CMDLINE_SIZE = 255
SUBARCH_LGUEST = 1
#: CONFIG_PHYSICAL_ALIGN of most kernels: a bzImage that can be anywhere unpacks itself to the first multiple of this.
KERNEL_ALIGNMENT = 0x100_0000

#: The headers of an ELF file, as many as there may be.
_HEAD_SIZE = 128 << 10


def prepare(config: GuestConfig) -> Prepared:
    """Reads and checks all that goes into guest memory before the first instruction; LguestError: it cannot be."""
    _check_memory(config.memory)
    file = HostFile("kernel", config.kernel)
    initrd = None if config.initrd is None else HostFile("initrd", config.initrd)
    kernel = _read_kernel(file, config.memory)
    return Prepared(config.memory, kernel, _command_line(config.arguments, kernel), initrd)


def _check_memory(size: int) -> None:
    if size < MIB:
        raise LguestError("a guest without memory cannot run; give it some MiB")
    if size > MAX_MEMORY:
        raise LguestError(
            f"{size // MIB} MiB of memory are more than a 32-bit guest can have here, {MAX_MEMORY // MIB}"
        )


def _read_kernel(file: HostFile, memory: int) -> Kernel:
    head = file.read(0, min(_HEAD_SIZE, file.size))
    if is_elf(head):
        kernel = _vmlinux(file, head)
    elif is_bzimage(head):
        kernel = _bzimage(file, ZeroPage.of_image(head))
    else:
        raise LguestError(f"{file.name} is no kernel: neither an ELF vmlinux nor a bzImage")
    if kernel.end > memory:
        raise LguestError(
            f"{file.name} needs memory up to {kernel.end:#x}; the guest's {memory // MIB} MiB end at {memory:#x}:"
            f" give it at least {-(-kernel.end // MIB)} MiB"
        )
    return kernel


def _vmlinux(file: HostFile, head: bytes) -> Kernel:
    image = parse_elf(file.name, head, file.size, I386)
    first = min(segment.address for segment in image.segments)
    if first < KERNEL_FIRST:
        raise LguestError(
            f"{file.name} wants to be at {first:#x}, where the boot information is (below {KERNEL_FIRST:#x})"
        )
    # Behind the last segment a vmlinux may have ten times as much for debuggers.
    length = max((segment.offset + segment.size for segment in image.segments if segment.size), default=0)
    return Kernel(
        file.name,
        ZeroPage.of_vmlinux(),
        image.entry,
        image.segments,
        max(segment.end for segment in image.segments),
        unpacks_itself=False,
        source=lambda: file.chunks(length),
    )


def _bzimage(file: HostFile, header: ZeroPage) -> Kernel:
    if has_64_bit_entry(header):
        raise LguestError(f"{file.name} is a 64-bit kernel; give {I386.wanted}, or leave --machine=lguest out")
    offset = ((header[zeropage.SETUP_SECTS] or DEFAULT_SETUP_SECTS) + 1) * SECTOR
    size = file.size - offset
    entry = header[zeropage.CODE32_START]
    if size <= 0:
        raise LguestError(f"{file.name} is truncated: its code begins at byte {offset}, the file has {file.size}")
    if not BZIMAGE_CODE <= entry < BZIMAGE_CODE + size:
        raise LguestError(
            f"{file.name} is damaged: its code32_start {entry:#x} is not in its {size} bytes from {BZIMAGE_CODE:#x} on"
        )
    end = BZIMAGE_CODE + size
    if header[zeropage.VERSION] >= _PROTOCOL_INIT_SIZE:
        target = header[zeropage.PREF_ADDRESS]
        if header[zeropage.RELOCATABLE_KERNEL]:
            target = max(target, KERNEL_ALIGNMENT)
        end = max(end, target + header[zeropage.INIT_SIZE])
    return Kernel(
        file.name,
        header,
        entry,
        (Segment(offset, size, BZIMAGE_CODE, size),),
        end,
        unpacks_itself=True,
        source=lambda: file.chunks(file.size),
    )


def _command_line(arguments: tuple[str, ...], kernel: Kernel) -> bytes:
    """The kernel's command line without its terminating zero: the arguments as they are, with spaces between."""
    data = " ".join(arguments).encode(errors="surrogateescape")
    limit = kernel.header[zeropage.CMDLINE_SIZE] if _knows_cmdline_size(kernel.header) else _SHORT_CMDLINE_SIZE
    limit = min(limit, KERNEL_FIRST - COMMAND_LINE - 1)
    if len(data) > limit:
        raise LguestError(
            f"the kernel's command line has {len(data)} bytes, {kernel.name} takes at most {limit}; shorten it"
        )
    return data


def _knows_cmdline_size(header: ZeroPage) -> bool:
    return header[zeropage.VERSION] >= _PROTOCOL_CMDLINE_SIZE


class Prepared:
    """A kernel and what belongs to it, checked against each other and ready to be loaded.

    As long as it lives it holds kernel and initrd open (close-on-exec).
    """

    def __init__(self, memory_size: int, kernel: Kernel, command_line: bytes, initrd: HostFile | None) -> None:
        self.kernel = kernel
        self.command_line = command_line
        self._memory_size = memory_size
        self._initrd = initrd
        self._initrd_address = 0 if initrd is None else _place_initrd(initrd, kernel, memory_size)

    def load(self, memory: GuestMemory) -> EntryState:
        """Puts everything into ``memory``, which has to be zeros (fresh or cleared); can be done again.

        LguestError: a file became unreadable, or shorter, since it was checked.
        """
        if memory.size != self._memory_size + DEVICE_PAGES * PAGE_SIZE:
            raise ValueError(f"prepared for {self._memory_size} bytes of RAM, loaded into {memory.size}")
        self.kernel.load(memory)
        if self._initrd is not None:
            memory.make_huge(self._initrd_address, self._initrd.size)
            self._initrd.read_into(memory.slice(self._initrd_address, self._initrd.size), 0)
        memory.write(COMMAND_LINE, self.command_line + b"\0")
        memory.write(ZERO_PAGE, bytes(self._zero_page()))
        return EntryState(rip=self.kernel.entry, rsi=ZERO_PAGE, cr3=0, gdt_base=0, gdt_limit=0)

    def _zero_page(self) -> ZeroPage:
        page = ZeroPage()
        page[zeropage.HEADER] = zeropage.HEADER_SIGNATURE
        page[zeropage.VERSION] = PROTOCOL
        page[zeropage.TYPE_OF_LOADER] = zeropage.LOADER_UNDEFINED
        page[zeropage.LOADFLAGS] = zeropage.KEEP_SEGMENTS
        page[zeropage.KERNEL_ALIGNMENT] = KERNEL_ALIGNMENT
        page[zeropage.HARDWARE_SUBARCH] = SUBARCH_LGUEST
        page.set_command_line(COMMAND_LINE)
        if self._initrd is not None:
            page.set_initrd(self._initrd_address, self._initrd.size)
        page.set_memory_map([E820Entry(0, self._memory_size, E820Type.RAM)])
        return page


def _place_initrd(initrd: HostFile, kernel: Kernel, memory: int) -> int:
    """At the top of memory, page-aligned: the guest-physical address."""
    address = (memory - initrd.size) & -PAGE_SIZE
    if address < kernel.end:
        needed = kernel.end + initrd.size + PAGE_SIZE
        remedy = f"give the guest at least {-(-needed // MIB)} MiB" if needed <= MAX_MEMORY else "make it smaller"
        raise LguestError(
            f"{initrd.name} has {initrd.size} bytes; between the kernel's end at {kernel.end:#x} and {memory:#x}"
            f" are {max(memory - kernel.end, 0)}: {remedy}"
        )
    return address
