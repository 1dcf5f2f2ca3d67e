"""A guest of a few bytes for the host half of lguest, assembled on the spot, all that it has in known places."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from lguest_mp.codemap import CodeMap
from lguest_mp.cpu.lguest_host import NOTIFY, GuestDied, Pending, Register
from lguest_mp.cpu.softhost import SoftHost
from lguest_mp.machine.eventloop import EventLoop
from lguest_mp.memory import PAGE_SIZE, GuestMemory

#: The guest's memory, and where its devices' registers end.
PAGES, DEVICE_LIMIT = 272, 288
CODE, HANDLERS, DATA, STACK, USER_STACK = 0x1_0000, 0x1_4000, 0x8000, 0x2_0000, 0x3_0000
DIRECTORY, TABLE = 0x4_0000, 0x4_1000
SCRATCH, GATES = 0x5_0000, 0x6_0000
#: The kernel's part of the addresses, in struct lguest_data.
KERNEL_ADDRESS = 0xC000_0000

# struct lguest_data
IRQ_ENABLED, BLOCKED, CR2, TIME, IRQ_PENDING, STATUS, HCALLS = 0, 4, 8, 12, 20, 24, 88
RESERVE_MEM, TSC_KHZ, NOIRQ_START, NOIRQ_END, KERNEL, SYSCALL_VEC, DATA_SIZE = 1368, 1372, 1376, 1380, 1384, 1388, 1392

_PRELUDE = """
.intel_syntax noprefix
.globl _start
.macro hcall number, arg1=0, arg2=0, arg3=0, arg4=0
    mov eax, \\number; mov ebx, \\arg1; mov ecx, \\arg2; mov edx, \\arg3; mov esi, \\arg4
    int 0x1f
.endm
# The machine's word to the test: a NOTIFY of a number.
.macro tell number
    mov ebx, \\number
    mov eax, 17
    int 0x1f
.endm
.macro init
    mov esp, STACK
    hcall 1, DATA
    hcall 7, 0x69, STACK, 1
.endm
# A gate: kind 0xe or 0xf, and the level that may use INT.
.macro gate vector, handler, kind=0xe, level=0
    mov ecx, OFFSET \\handler
    mov edx, ecx
    and ecx, 0xffff
    and edx, 0xffff0000
    or  ecx, 0x610000
    or  edx, 0x8000 | \\kind << 8 | \\level << 13
    mov eax, 6
    mov ebx, \\vector
    int 0x1f
.endm
# The first 1 MiB and the device pages, each virtual address its physical one, for every level.
.macro paging
    hcall 4, DIRECTORY
.endm
# Segments of user level: 0x73 code, 0x7b data. Before there are page tables, all memory is the kernel's.
.macro users
    paging
    hcall 18, 14, 0x0000ffff, 0x00cffb00
    hcall 18, 15, 0x0000ffff, 0x00cff300
.endm
.macro enter_user where
    push 0x7b; push USER_STACK; push 0x202; push 0x73; push OFFSET \\where
    iretd
.endm
_start:
"""


class SoftGuest:
    """The host, the guest's memory, and the events' thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # There is more memory than the guest was told of: pages for devices that it does not have.
        self.memory = GuestMemory(DEVICE_LIMIT * PAGE_SIZE)
        self.code_map = CodeMap(self.memory, 0)
        self.loop = EventLoop()
        self.host = SoftHost(self.memory, self.code_map, self.loop)
        self.failures: list[Exception] = []
        self.loop.start(self.failures.append)
        self.set_data(KERNEL, KERNEL_ADDRESS)
        self.set_data(SYSCALL_VEC, 0x80)
        self.memory.write(DATA + STATUS, b"\xff" * 64)
        self.write_words(DIRECTORY, TABLE | 0x67)
        self.write_words(TABLE, *(page << 12 | 0x67 for page in range(PAGES)))

    def close(self) -> None:
        self.loop.stop()
        self.host.close()
        self.loop.close()
        self.code_map.close()
        assert not self.failures

    # --- what the guest is made of ---

    def set_data(self, offset: int, value: int) -> None:
        """A word of struct lguest_data."""
        self.write_words(DATA + offset, value)

    def data(self, offset: int) -> int:
        return self.word(DATA + offset)

    def word(self, address: int) -> int:
        value: int = struct.unpack("<I", self.memory.read(address, 4))[0]
        return value

    def words(self, address: int, count: int) -> tuple[int, ...]:
        return struct.unpack(f"<{count}I", self.memory.read(address, 4 * count))

    def write_words(self, address: int, *values: int) -> None:
        self.memory.write(address, struct.pack(f"<{len(values)}I", *values))

    def load(self, source: str) -> None:
        """Assembles (GNU as, Intel syntax) and puts it at CODE."""
        if shutil.which("as") is None or shutil.which("ld") is None or shutil.which("objcopy") is None:
            pytest.skip("needs GNU binutils")
        symbols = {
            "CODE": CODE,
            "DATA": DATA,
            "STACK": STACK,
            "USER_STACK": USER_STACK,
            "SCRATCH": SCRATCH,
            "DIRECTORY": DIRECTORY,
            "TABLE": TABLE,
            "MEMORY": PAGES * PAGE_SIZE,
            "IRQ_ENABLED": DATA + IRQ_ENABLED,
            "BLOCKED": DATA + BLOCKED,
        }
        source = re.sub(r" ([-+|&]|<<) ", r"\1", source)  # a macro's argument ends at a space
        text = "".join(f".set {name}, {value}\n" for name, value in symbols.items()) + _PRELUDE + source + "\n"
        source_file, object_file, image, binary = (self._folder / name for name in ("g.s", "g.o", "g", "g.bin"))
        source_file.write_text(text)
        subprocess.run(["as", "--32", "-o", object_file, source_file], check=True)
        subprocess.run(["ld", "-m", "elf_i386", f"-Ttext={CODE:#x}", "-o", image, object_file], check=True)
        subprocess.run(["objcopy", "-O", "binary", "-j", ".text", image, binary], check=True)
        self.memory.write(CODE, binary.read_bytes())

    # --- running it ---

    def start(self, source: str) -> None:
        self.load(source)
        self.host.initialize(PAGES, CODE, DEVICE_LIMIT)

    def told(self) -> int:
        """Runs until the guest tells a number."""
        pending = self.host.run()
        assert pending.trap == NOTIFY, pending
        return pending.address

    def run(self, source: str) -> int:
        """Starts the guest and runs it until it tells a number."""
        self.start(source)
        return self.told()

    def run_to(self, trap: int, source: str) -> Pending:
        """Starts the guest and runs it until the launcher has to emulate a trap."""
        self.start(source)
        pending = self.host.run()
        assert pending.trap == trap, pending
        return pending

    def dies(self, source: str) -> str:
        """Starts the guest and runs it until it dies: why."""
        self.start(source)
        return self.death()

    def death(self) -> str:
        """Runs the guest until it dies: why."""
        with pytest.raises(GuestDied) as died:
            self.host.run()
        return str(died.value)

    def register(self, register: Register) -> int:
        return self.host.get_register(register)
