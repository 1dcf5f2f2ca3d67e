"""Numbers and layouts between an lguest guest and its host: Linux 3.18, i386 without PAE.

Sources: ``arch/x86/include/asm/lguest_hcall.h``, ``include/linux/lguest.h``, ``arch/x86/include/asm/segment.h``.
Everything is little-endian and 32 bits wide unless it says otherwise.
"""

from __future__ import annotations

from enum import IntEnum


class Hypercall(IntEnum):
    """What a guest asks for with ``int $0x1f``: the number in EAX, arguments in EBX, ECX, EDX, ESI."""

    FLUSH_ASYNC = 0
    LGUEST_INIT = 1
    SHUTDOWN = 2
    NEW_PGTABLE = 4
    FLUSH_TLB = 5
    LOAD_IDT_ENTRY = 6
    SET_STACK = 7
    TS = 8
    SET_CLOCKEVENT = 9
    HALT = 10
    SET_PTE = 14
    SET_PGD = 15
    LOAD_TLS = 16
    NOTIFY = 17
    LOAD_GDT_ENTRY = 18
    SEND_INTERRUPTS = 19


#: The vector of hypercalls.
HYPERCALL_VECTOR = 0x1F
#: The vector of interrupt 0; interrupts are numbered up to IRQS.
FIRST_IRQ_VECTOR = 32
IRQS = 32
#: The only vector of interrupts that user programs may have delivered straight to their kernel.
SYSCALL_VECTOR = 0x80

SHUTDOWN_RESTART = 2
#: How much of SHUTDOWN's string is read, bytes.
SHUTDOWN_TEXT = 128

#: The privilege level of the guest's kernel.
KERNEL_LEVEL = 1
USER_LEVEL = 3
KERNEL_CS = 12 << 3 | KERNEL_LEVEL
KERNEL_DS = 13 << 3 | KERNEL_LEVEL

GDT_ENTRIES = 32
TLS_FIRST = 6
TLS_ENTRIES = 3
IDT_ENTRIES = 256

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
DIRECTORY_SHIFT = 22
#: The top 4 MiB of the guest's addresses are its host's; their entry is the last one of 1024.
RESERVED_BYTES = 4 << 20
RESERVED_BASE = (1 << 32) - RESERVED_BYTES
RESERVED_INDEX = 1023

# struct lguest_data: byte offsets.
DATA_IRQ_ENABLED = 0
DATA_BLOCKED = 4
DATA_CR2 = 8
DATA_TIME = 12
DATA_IRQ_PENDING = 20
DATA_STATUS = 24
DATA_HCALLS = 88
DATA_RESERVE_MEM = 1368
DATA_TSC_KHZ = 1372
DATA_NOIRQ_START = 1376
DATA_NOIRQ_END = 1380
DATA_KERNEL_ADDRESS = 1384
DATA_SYSCALL_VEC = 1388
DATA_SIZE = 1392

#: The ring of asynchronous hypercalls: how many, and the bytes of each (number, four arguments).
RING_SIZE = 64
HCALL_SIZE = 20
#: What `status` says of an entry without a hypercall.
RING_FREE = 0xFF

#: EFLAGS; and what says that interrupts are enabled, or pending, in struct lguest_data.
FLAG_TF = 1 << 8
FLAG_IF = 1 << 9
FLAG_IOPL = 3 << 12
FLAG_NT = 1 << 14
FLAG_RF = 1 << 16
FLAG_VM = 1 << 17

# Exceptions (Intel SDM volume 3, table 6-1), and those that push an error code.
DEVICE_NOT_AVAILABLE = 7
GENERAL_PROTECTION = 13
PAGE_FAULT = 14
WITH_ERROR_CODE = frozenset((8, 10, 11, 12, 13, 14, 17))
