"""A bzImage: the header that the kernel's build put in front, and the two ways in.

The file is the real-mode part (boot sector and setup code, which nobody runs here), whose header says everything about
the rest, and the protected-mode code: a decompressor and its payload. The fast way in is the payload, unpacked outside
the guest (``payload.py``). The other one is the decompressor itself, at its 64-bit entry, which then needs
``init_size`` bytes from where it is put to do its work in.

Source: the kernel's Documentation/arch/x86/boot.rst.
"""

from __future__ import annotations

from lguest_mp.boot import zeropage
from lguest_mp.boot.files import HostFile
from lguest_mp.boot.zeropage import ZeroPage
from lguest_mp.errors import LguestError
from lguest_mp.record import Value

SECTOR = 512
#: The first header with xloadflags, by which an image says that it is 64-bit: Linux 3.8.
OLDEST_PROTOCOL = 0x020C
#: Where the 64-bit entry is in the protected-mode code.
ENTRY_64 = 0x200
DEFAULT_SETUP_SECTS = 4
#: KERNEL_IMAGE_SIZE of x86-64: no kernel unpacks to more, so no image of one is larger.
MAX_IMAGE_SIZE = 1 << 30


def is_bzimage(head: bytes) -> bool:
    """Whether a file that begins like this has a setup header."""
    return len(head) >= zeropage.SETUP_HEADER_LIMIT and ZeroPage.of_image(head)[zeropage.HEADER] == (
        zeropage.HEADER_SIGNATURE
    )


class BzImage(Value):
    """Where the parts of an image lie in its file, in bytes, all of them checked against the file's size.

    ``payload_size`` is 0 when the header knows of none.
    """

    header: ZeroPage
    code_offset: int
    code_size: int
    payload_offset: int
    payload_size: int

    @property
    def own_address(self) -> int:
        """Where the protected-mode code has to be to unpack itself: what it prefers, aligned as it needs."""
        address = self.header[zeropage.PREF_ADDRESS]
        alignment = self.header[zeropage.KERNEL_ALIGNMENT]
        if self.header[zeropage.RELOCATABLE_KERNEL] and alignment:
            address = -(-address // alignment) * alignment
        return address

    @property
    def own_size(self) -> int:
        """How much memory it needs from there on, before the kernel proper looks at the memory map."""
        return max(self.header[zeropage.INIT_SIZE], self.code_size)


def parse_bzimage(file: HostFile, head: bytes) -> BzImage:
    """Reads the setup header of a 64-bit image; LguestError: too old, 32-bit, truncated, or damaged."""
    header = ZeroPage.of_image(head)
    version = header[zeropage.VERSION]
    if version < OLDEST_PROTOCOL:
        raise LguestError(
            f"{file.name} speaks boot protocol {version >> 8}.{version & 0xFF:02};"
            " lguest needs 2.12, a 64-bit Linux 3.8 or later"
        )
    if not header[zeropage.XLOADFLAGS] & zeropage.XLF_KERNEL_64:
        raise LguestError(f"{file.name} is a 32-bit kernel (no 64-bit entry); give a 64-bit x86 (x86-64) kernel")
    if file.size > MAX_IMAGE_SIZE:
        raise LguestError(f"{file.name} has {file.size} bytes, more than any kernel (at most {MAX_IMAGE_SIZE})")
    code_offset = ((header[zeropage.SETUP_SECTS] or DEFAULT_SETUP_SECTS) + 1) * SECTOR
    # The size is counted in paragraphs of 16 bytes, the last of which may be cut short.
    told = header[zeropage.SYSSIZE] * 16
    code_size = min(told, file.size - code_offset)
    if told < 2 * ENTRY_64 or code_size <= told - 16:
        raise LguestError(
            f"{file.name} is truncated: its header tells of {code_offset + told} bytes, there are {file.size}"
        )
    payload_size = header[zeropage.PAYLOAD_LENGTH]
    payload_offset = header[zeropage.PAYLOAD_OFFSET]
    if payload_offset + payload_size > code_size:
        raise LguestError(
            f"{file.name} is damaged: its payload ends at byte {payload_offset + payload_size} of {code_size}"
        )
    return BzImage(header, code_offset, code_size, code_offset + payload_offset, payload_size)
