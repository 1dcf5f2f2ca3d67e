"""A guest's fences order its accesses for other processors of the host's, where its devices are.

The store-buffering litmus test: two CPUs of ours, in two processes on the same memory, each store to a place of their
own and then look at the other's. A processor may let the look overtake the store, so both may find nothing; between
fences they must not.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

import pytest
from tinymachine import Machine

Assemble = Callable[[str], bytes]

ROUNDS = 8_000
#: Each side's: a round number, then a place for each round, a cache line each; and what it saw in each round.
SIDES = (0x20_0000, 0x50_0000)
SEEN = (0x80_0000, 0x90_0000)
PROGRAMS, STACKS = (0x1_0000, 0x1_4000), (0x1_3000, 0x1_7000)

PROGRAM = """
        mov esp, {stack}; mov esi, {own}; mov edi, {other}; mov ebx, {seen}; mov ecx, 1
    round:
        mov [rsi], ecx
    wait:
        cmp [rdi], ecx
        jb wait
        mov eax, ecx
        shl eax, 6
        mov dword ptr [rsi + rax], 1
        {fence}
        mov eax, [rdi + rax]
        mov [rbx + rcx*4], eax
        inc ecx
        cmp ecx, {rounds}
        jbe round
        exit
"""


def both_saw_nothing(machine: Machine, assemble: Assemble, fence: str) -> int:
    """In how many rounds."""
    for side in (0, 1):
        settings = {"own": SIDES[side], "other": SIDES[1 - side], "seen": SEEN[side], "stack": STACKS[side]}
        machine.load(assemble(PROGRAM.format(**settings, fence=fence, rounds=ROUNDS)), PROGRAMS[side])
    machine.memory.view[SIDES[0] : SEEN[0]] = bytes(SEEN[0] - SIDES[0])
    other = os.fork()
    if other == 0:
        try:
            machine.run(PROGRAMS[1])
        finally:
            os._exit(0)
    machine.run(PROGRAMS[0])
    os.waitpid(other, 0)
    seen = [struct.unpack(f"<{ROUNDS}I", machine.memory.read(place + 4, 4 * ROUNDS)) for place in SEEN]
    return sum(one == another == 0 for one, another in zip(*seen, strict=True))


@pytest.mark.parametrize(
    "fence",
    [
        "mfence",
        "lock add dword ptr [rsp - 4], 0",
        "lock or dword ptr [rsp - 4], 0",
        "lock and dword ptr [rsp - 4], 0",
        "lock xor qword ptr [rsp - 8], 0",
        "lock xadd [rsp - 4], r8d",
        "xchg [rsp - 4], r8d",
        "lock cmpxchg [rsp - 4], r8d; mov eax, ecx; shl eax, 6",
        "lock bts dword ptr [rsp - 4], 3",
        "lock btr dword ptr [rsp - 4], 3",
        "lock btc dword ptr [rsp - 4], 3",
        "lock inc word ptr [rsp - 4]",
        "lock neg byte ptr [rsp - 4]",
    ],
)
def test_no_look_overtakes_a_store_across_a_fence(machine: Machine, assemble: Assemble, fence: str) -> None:
    assert both_saw_nothing(machine, assemble, fence) == 0


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="it takes two processors")
def test_without_a_fence_looks_do_overtake_stores(machine: Machine, assemble: Assemble) -> None:
    """Which shows that these tests could fail."""
    assert any(both_saw_nothing(machine, assemble, "nop") for _ in range(50))
