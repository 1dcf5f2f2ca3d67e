"""What kind of kernel a file holds, and what of it goes where.

Every kind comes down to the same: segments (pieces of a stream of bytes that have an address), an entry point, and a
setup header. The stream is the file (vmlinux), the unpacked payload (bzImage; kept in a cache, ``cache.py``), or the
image's own code (a bzImage whose payload nobody here can unpack). All checks are made when it is read; loading only
copies.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from lguest_mp.boot.bzimage import ENTRY_64, MAX_IMAGE_SIZE, BzImage, is_bzimage, parse_bzimage
from lguest_mp.boot.cache import KernelCache, Unpacked
from lguest_mp.boot.elf import HEADERS_SIZE, ElfImage, Segment, is_elf, parse_elf
from lguest_mp.boot.files import HostFile
from lguest_mp.boot.hashing import digest_of
from lguest_mp.boot.payload import Payload, find_compression
from lguest_mp.boot.pieces import pieces
from lguest_mp.boot.zeropage import ZeroPage
from lguest_mp.errors import LguestError
from lguest_mp.memory import LOW_RAM_LIMIT, GuestMemory
from lguest_mp.record import Value

MIB = 1 << 20
#: Below 1 MiB are the tables that the loader makes.
KERNEL_FIRST = 1 * MIB


class Kernel(Value):
    """A kernel, read and checked: guest-physical addresses, sizes in bytes.

    Below ``end`` (and above 1 MiB) memory is the kernel's until it manages it itself. ``unpacks_itself``: what runs
    first is the image's own decompressor. ``kept``: what of ``source`` goes to memory, from the cache.
    """

    name: str
    header: ZeroPage
    entry: int
    segments: tuple[Segment, ...]
    end: int
    unpacks_itself: bool
    source: Callable[[], Iterable[bytes]]
    kept: Unpacked | None = None

    def load(self, memory: GuestMemory) -> None:
        """Copies the segments into memory that is zeros. LguestError: the file became unreadable, or another one."""
        for segment in self.segments:
            memory.make_huge(segment.address, segment.size)
        if self.kept is not None:
            if self.kept.load(memory):
                return
            memory.clear()
        for address, piece in pieces(self.segments, self.source()):
            memory.write(address, piece)
            del piece  # the next one takes its memory


def read_kernel(file: HostFile, low_memory: int, cache: KernelCache, digest: bytes | None = None) -> Kernel:
    """Finds out what ``file`` is and checks it for a guest whose RAM begins with ``low_memory`` bytes at 0.

    ``digest``: of its payload, if that is known.
    """
    head = file.read(0, min(HEADERS_SIZE, file.size))
    if is_elf(head):
        image = parse_elf(file.name, head, file.size)
        # Behind the last segment a vmlinux may have ten times as much for debuggers.
        end = max((segment.offset + segment.size for segment in image.segments if segment.size), default=0)
        return _direct(file.name, ZeroPage.of_vmlinux(), image, lambda: file.chunks(end), low_memory)
    if is_bzimage(head):
        return _read_bzimage(file, parse_bzimage(file, head), low_memory, cache, digest)
    raise LguestError(f"{file.name} is no kernel: neither an ELF vmlinux nor a bzImage")


def _direct(  # noqa: PLR0917 -- what a kernel is made of
    name: str,
    header: ZeroPage,
    image: ElfImage,
    source: Callable[[], Iterable[bytes]],
    low_memory: int,
    kept: Unpacked | None = None,
) -> Kernel:
    first = min(segment.address for segment in image.segments)
    end = max(segment.end for segment in image.segments)
    _check_place(name, first, end, low_memory)
    return Kernel(name, header, image.entry, image.segments, end, unpacks_itself=False, source=source, kept=kept)


def _check_place(name: str, first: int, end: int, low_memory: int) -> None:
    if first < KERNEL_FIRST:
        raise LguestError(f"{name} wants to be at {first:#x}, where the boot tables are (below {KERNEL_FIRST:#x})")
    if end > LOW_RAM_LIMIT:
        raise LguestError(f"{name} wants memory up to {end:#x}; a guest's low memory ends at {LOW_RAM_LIMIT:#x}")
    if end > low_memory:
        raise LguestError(
            f"{name} needs memory up to {end:#x}; the guest's {low_memory >> 20} MiB end at {low_memory:#x}:"
            f" give it at least {-(-end // MIB)} MiB"
        )


def _read_bzimage(file: HostFile, image: BzImage, low_memory: int, cache: KernelCache, digest: bytes | None) -> Kernel:
    if cache.is_there:
        digest = digest or digest_of(file.chunks(image.payload_size, image.payload_offset))
        kept = cache.find(digest)
        if kept is not None:
            return _kept(file, image, kept, digest, low_memory)
    packed = file.read(image.payload_offset, image.payload_size)
    compression = find_compression(memoryview(packed))
    if compression:
        kernel = _unpack(file, image, Payload(file.name, memoryview(packed), compression), low_memory, cache)
        if kernel:
            return kernel
    return _own_entry(file, image, low_memory)


def _kept(file: HostFile, image: BzImage, kept: Unpacked, digest: bytes, low_memory: int) -> Kernel:
    """The kernel inside, which was found good before it was kept."""

    def source() -> Iterator[bytes]:
        """Should what was kept turn out to be damaged, it is unpacked after all."""
        packed = file.read(image.payload_offset, image.payload_size)
        compression = find_compression(memoryview(packed))
        if compression is None or digest_of([packed]) != digest:
            raise LguestError(f"{file.name} became another one while it was read; start again")
        try:
            yield from Payload(file.name, memoryview(packed), compression).chunks()
        except ImportError as error:  # another root directory may hold no decompressor
            raise LguestError(
                f"what was kept of {file.name} is damaged, and here is no {error.name}; start again"
            ) from error

    return _direct(file.name, image.header, kept.image, source, low_memory, kept)


def _unpack(file: HostFile, image: BzImage, payload: Payload, low_memory: int, cache: KernelCache) -> Kernel | None:
    """The kernel inside, unpacked once from beginning to end to know that it can be; None: it is not ELF."""
    name = file.name
    if not 0 < payload.size <= MAX_IMAGE_SIZE:
        raise LguestError(f"{name} is damaged: no kernel unpacks to {payload.size} bytes (at most {MAX_IMAGE_SIZE})")
    if payload.size > low_memory:
        raise LguestError(
            f"{name} unpacks to {payload.size} bytes; the guest has {low_memory >> 20} MiB:"
            f" give it at least {-(-payload.size // MIB)} MiB"
        )
    chunks = payload.chunks()
    read_already = [next(chunks)]
    head = read_already[0][:HEADERS_SIZE]
    if not is_elf(head):
        return None
    elf = parse_elf(f"{name} (unpacked)", head, payload.size)
    kernel = _direct(name, image.header, elf, payload.chunks, low_memory)
    stream = _all(read_already, chunks)
    if cache.is_there:
        digest = digest_of([payload.data])  # of what is unpacked, whatever the file has become since
        kept = cache.keep(digest, elf, stream)
        if kept is not None:
            return _kept(file, image, kept, digest, low_memory)
        stream = payload.chunks()
    if payload.compression.cheap:
        deque(stream, maxlen=0)  # takes them all and keeps none
        return kernel
    held = list(stream)
    return kernel.replace(source=lambda: held)


def _all(first: list[bytes], others: Iterator[bytes]) -> Iterator[bytes]:
    """All chunks, and a reference to none of them: the one that is let go of gives its memory to the next."""
    yield first.pop()
    yield from others


def _own_entry(file: HostFile, image: BzImage, low_memory: int) -> Kernel:
    address, end = image.own_address, image.own_address + image.own_size
    _check_place(file.name, address, end, low_memory)
    code = file.read(image.code_offset, image.code_size)
    segment = Segment(0, len(code), address, image.own_size)
    return Kernel(
        file.name,
        image.header,
        address + ENTRY_64,
        (segment,),
        end,
        unpacks_itself=True,
        source=lambda: (code,),
    )
