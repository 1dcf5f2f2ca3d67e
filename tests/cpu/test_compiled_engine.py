"""The embedded CPU with the compiled core's callbacks does what it does with Python's, on the same instructions.

Programs are made of the pieces below, in any order. Both machines run each program; equal afterwards are the guest's
memory, which has a log of the interrupts and of what was read, what the workers were notified of, and the end.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinymachine import CODE, DATA
from tinypc import CONFIG_VECTOR, MSIX_TABLE, NOTIFY, TinyPc, as_worker

from lguest_mp import core
from lguest_mp.protocol import Log, Message, PowerOff

pytestmark = pytest.mark.skipif(core.missing() is not None, reason=f"the compiled core {core.missing()}")

Assemble = Callable[[str], bytes]

VECTORS = range(0x20, 0x100)
STUBS = CODE + 0x2000
LOG = DATA + 0x1000
LOG_BYTES = 0x4000
_STUB = 16

#: r15: the local APIC, r14: notifications, r13: the MSI-X table, r12: where the log goes on.
BEGIN = f"""
    init
    mov r15d, 0xfee00000
    mov dword ptr [r15 + 0xf0], 0x1ff
    mov dword ptr [r15 + 0x320], {2 << 17 | 0xEC:#x}
    mov r14d, {NOTIFY:#x}
    mov r13d, {MSIX_TABLE:#x}
    mov r12d, {LOG:#x}
    sti
"""
END = "cli; mov dx, 0x600; mov al, 0x34; out dx, al; jmp ."
#: An interrupt is logged; those of even vectors end, the others when a piece says so.
HANDLER = """
    push rax
    mov eax, [rsp + 8]
    mov [r12], eax
    add r12, 4
    test eax, 1
    jnz 1f
    mov dword ptr [r15 + 0xb0], 0
1:  pop rax
    add rsp, 8
    iretq
"""
WRMSR = "mov ecx, 0x6e0; mov eax, {low:#x}; mov edx, {high:#x}; wrmsr"
NOTE = "mov [r12], eax; add r12, 4"
PIECES = [
    "sti; nop",
    "cli",
    "mov dword ptr [r15 + 0xb0], 0",
    *(f"mov dword ptr [r15 + 0x80], {priority:#x}" for priority in (0, 0x40, 0x52, 0xFF)),
    # To itself, by both ways; 0x05 is no vector.
    *(f"mov dword ptr [r15 + 0x300], {0x4_0000 | vector:#x}" for vector in (0x05, 0x20, 0x41, 0x42, 0x53, 0x66, 0xE1)),
    *(f"mov dword ptr [r15 + 0x300], {vector:#x}" for vector in (0x30, 0x31)),
    # Reads: the highest requests and those in service, priorities, errors, the timer's entry.
    *(f"mov eax, [r15 + {register:#x}]; {NOTE}" for register in (0x80, 0xA0, 0x120, 0x220, 0x280, 0x320)),
    "mov dword ptr [r15 + 0x280], 0",
    # Of other widths.
    "mov word ptr [r15 + 0xb0], 0",
    "mov qword ptr [r15 + 0xb0], 0",
    "mov dword ptr [r15 + 0xb4], 0",
    # Deadlines: past, none, never.
    WRMSR.format(low=1, high=0),
    WRMSR.format(low=0, high=0),
    WRMSR.format(low=0, high=0x7000_0000),
    f"mov ecx, 0x6e0; rdmsr; mov eax, edx; {NOTE}",
    *(f"mov dword ptr [r15 + 0x320], {entry:#x}" for entry in (0xEC, 0x400EC, 0x500EC, 0x40005, 0x400ED)),
    # The disk's interrupts and notifications.
    *(f"mov {size} ptr [r14 + {4 * queue}], {queue}" for queue in (0, 1, 2) for size in ("word", "dword", "byte")),
    "mov word ptr [r14 + 2], 0",
    *(f"mov dword ptr [r13 + {16 * vector + 12}], {mask}" for vector in (1, 2) for mask in (0, 1)),
    f"mov eax, [r13 + 0x1000]; {NOTE}",
    # Gone, and back elsewhere.
    "mov ecx, 0x1b; mov eax, 0xfee00100; xor edx, edx; wrmsr",
    "mov ecx, 0x1b; mov eax, 0xfee00900; xor edx, edx; wrmsr; mov dword ptr [r15 + 0xf0], 0x1ff",
    f"mov eax, 4; cpuid; {NOTE}",
    # What has no registers, and a loop.
    "mov dword ptr [r14 + 0x10000000], 5",
    "mov eax, 50; 9: dec eax; jnz 9b",
    "push rax; pop rax; call 8f; jmp 9f; 8: ret; 9:",
]


def pieces(assemble: Assemble) -> tuple[bytes, list[bytes], bytes, bytes]:
    """The beginning, all pieces, the end, and the handler, assembled."""
    mark = b"<- piece ->"
    between = f'; .ascii "{mark.decode()}"\n'
    parts = assemble(between.join([BEGIN, *PIECES, END, HANDLER])).split(mark)
    assert len(parts) == len(PIECES) + 3
    return parts[0], parts[1:-2], parts[-2], parts[-1]


def set_up(pc: TinyPc, handler: bytes) -> None:
    common = STUBS + _STUB * len(VECTORS)
    for number, vector in enumerate(VECTORS):
        stub = STUBS + _STUB * number
        # push vector; jmp common
        pc.memory.write(stub, struct.pack("<BIBi", 0x68, vector, 0xE9, common - (stub + 10)))
        pc.set_gate(vector, stub)
    pc.memory.write(common, handler)
    pc.start_disk()


def outcome(kind: str, code: bytes, handler: bytes) -> tuple[Message, bytes, list[int]]:
    """How a program ends, what it has logged, and how often each worker was notified."""
    with ExitStack() as opened:
        pc = TinyPc(kind, opened)
        set_up(pc, handler)
        end = pc.run(code)
        notified = []
        for kick in pc.disk.kicks:
            os.eventfd_write(kick, 1)
            notified.append(os.eventfd_read(kick) - 1)
        return end, pc.memory.read(LOG, LOG_BYTES), notified


def test_the_same_instructions_have_the_same_effects(assemble: Assemble) -> None:
    begin, middle, end, handler = pieces(assemble)

    @given(st.lists(st.sampled_from(middle), min_size=80, max_size=150))
    @settings(max_examples=150)
    def runs_the_same(program: Sequence[bytes]) -> None:
        code = begin + b"".join(program) + end
        specified = outcome("unicorn", code, handler)
        assert outcome("compiled", code, handler) == specified
        assert specified[0] == PowerOff()

    runs_the_same()


def test_what_happens_all_the_time_does_not_come_to_python(assemble: Assemble) -> None:
    """Notifications, interrupts that are messages, their ends, and the CPU's sleep."""
    rounds = 50
    source = f"""
        init
        mov r15d, 0xfee00000
        mov dword ptr [r15 + 0xf0], 0x1ff
        mov r14d, {NOTIFY:#x}
        sti
        mov word ptr [r14 + 4], 1
    1:  hlt
        cmp dword ptr [DATA], {rounds}
        jb 1b
        mov dx, 0x600; mov al, 0x34; out dx, al; jmp .
        .balign 1024
        inc dword ptr [DATA]
        mov dword ptr [r15 + 0xb0], 0
        mov word ptr [r14 + 4], 1
        iretq
    """
    with ExitStack() as opened:
        pc = TinyPc("compiled", opened)
        pc.start_disk()
        pc.set_gate(CONFIG_VECTOR + 2, CODE + 1024)

        def answer() -> None:
            for _ in range(rounds):
                os.eventfd_read(pc.disk.kicks[1])
                os.eventfd_write(pc.disk.calls[1], 1)

        pc.pc.count_exits()
        worker = as_worker(answer)
        assert pc.run(assemble(source)) == PowerOff()
        worker.join()
        assert pc.word() == rounds
        # The APIC's software enable is all that came. The last notification is nobody's any more.
        assert pc.accesses == [(0xFEE0_00F0, 4, 0x1FF)]
        table = [message.text.split(maxsplit=1) for message in pc.messages if isinstance(message, Log)]
        assert {(times, what) for times, what in table if what != "exits of the guest:"} == {
            (str(rounds), "interrupt: vector 0x42"),
            (str(rounds), "store: local APIC"),
            (str(rounds + 1), "store: disk0"),
        }
