"""The host half of lguest in software, driven by guests of a few instructions each."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import softguest
from softguest import CODE, DATA, DEVICE_LIMIT, DIRECTORY, PAGES, SCRATCH, STACK, TABLE, USER_STACK, SoftGuest

from lguest_mp.cpu.lguest_host import (
    GENERAL_PROTECTION,
    PAGE_FAULT,
    GuestDied,
    GuestRestarts,
    Pending,
    Register,
)
from lguest_mp.errors import LguestError
from lguest_mp.memory import PAGE_SIZE

IF = 0x200


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[SoftGuest]:
    guest = SoftGuest(tmp_path)
    yield guest
    guest.close()


# --- the beginning ---


def test_the_first_instruction_finds_the_kernels_level_and_zeros(guest: SoftGuest) -> None:
    # One instruction that the launcher has to see, so that nothing has changed yet.
    assert guest.run_to(GENERAL_PROTECTION, "hlt") == Pending(GENERAL_PROTECTION, b"\xf4" + bytes(6))
    state = {register: guest.register(register) for register in Register}
    assert state == {
        **dict.fromkeys(Register, 0),
        Register.CS: 0x61,
        Register.DS: 0x69,
        Register.ES: 0x69,
        Register.SS: 0x69,
        Register.EFLAGS: 0x202,
        Register.EIP: CODE,
        Register.ORIG_EAX: 0xFFFF_FFFF,
    }


def test_init_tells_the_guest_about_its_host(guest: SoftGuest) -> None:
    before = time.time()
    guest.run("hcall 1, DATA; tell 1")
    assert guest.data(softguest.RESERVE_MEM) == 4 << 20
    assert 100_000 < guest.data(softguest.TSC_KHZ) < 10_000_000
    seconds, nanoseconds = guest.words(DATA + softguest.TIME, 2)
    assert before - 1 < seconds + nanoseconds / 1e9 < time.time() + 1


def test_a_guest_has_to_fit_its_memory(guest: SoftGuest) -> None:
    with pytest.raises(LguestError, match="does not fit"):
        guest.host.initialize(DEVICE_LIMIT + 1, CODE, DEVICE_LIMIT + 2)
    with pytest.raises(LguestError, match="does not fit"):
        guest.host.initialize(PAGES, CODE, PAGES - 1)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("hcall 17, 5", "hypercall 17 before INIT"),
        ("hcall -1", "hypercall -1 before INIT"),
        ("hcall 1, MEMORY - 4", f"bad guest page {PAGES * PAGE_SIZE - 4:#x}"),
        ("hcall 1, 0xfffffff0", "bad guest page 0xfffffff0"),
        ("hcall 1, DATA; hcall 1, DATA", "already have lguest_data"),
        ("hcall 1, DATA; hcall 3", "Bad hypercall 3"),
        ("hcall 1, DATA; hcall 13", "Bad hypercall 13"),  # SET_PMD, of guests with PAE
        ("hcall 1, DATA; hcall 0x80000000", "Bad hypercall -2147483648"),
        ("hcall 1, DATA; hcall 2, SCRATCH, 1", "CRASH: because"),
        ("hcall 1, DATA; hcall 2, MEMORY - 64, 1", f"bad read address {PAGES * PAGE_SIZE - 64:#x} len 128"),
        ("hcall 1, DATA; hcall 4, MEMORY - 2048", f"bad read address {PAGES * PAGE_SIZE - 2048:#x} len 4096"),
        ("hcall 1, DATA; hcall 6, 256, 0, 0x8e00", "Setting idt entry 256"),
        ("hcall 1, DATA; hcall 6, 3, 0, 0x8500", "bad IDT type 5"),
        ("hcall 1, DATA; hcall 7, 0x68, STACK, 1", "bad stack segment 104"),
        ("hcall 1, DATA; hcall 7, 0x69, STACK, 3", "bad stack pages 3"),
        ("hcall 1, DATA; hcall 7, 0x69, MEMORY + 4096, 1", f"bad stack page {PAGES * PAGE_SIZE + 4095:#x}"),
        ("hcall 1, DATA; hcall 14, 0, 0xffc00000, 0", "attempt to access switcher pages"),
        ("hcall 1, DATA; hcall 14, 0, 0x1000, 0xe1", "bad page table entry"),
        ("hcall 1, DATA; hcall 14, 0, 0x1000, 0x10000061", "bad page table entry"),
        ("mov eax, [0x10000000]", "bad page table entry"),
        ("hcall 1, DATA; hcall 16, MEMORY - 16", f"bad read address {PAGES * PAGE_SIZE - 16:#x} len 24"),
        ("hcall 1, DATA; hcall 18, 32", "too many gdt entries 32"),
        ("ud2", f"unhandled trap 6 at {CODE:#x} (0x0)"),
        ("mov eax, 0x58; mov ds, eax", f"unhandled trap 13 at {CODE + 5:#x} (0x58)"),
        ("mov eax, [0xffc00800]; mov [0xffc00800], eax", f"unhandled trap 14 at {CODE + 5:#x} (0xffc00800)"),
        ("mov eax, [0xffc01000]", "attempt to access switcher pages"),
    ],
)
def test_nonsense_is_death_with_a_reason(guest: SoftGuest, source: str, reason: str) -> None:
    guest.memory.write(SCRATCH, b"because\0not shown")
    assert guest.dies(source) == reason
    assert guest.death() == reason  # and stays it


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (softguest.SYSCALL_VEC, 0x40, "bad syscall vector"),
        (softguest.KERNEL, 0xFFC0_0000, "bad kernel address 0xffc00000"),
    ],
)
def test_init_looks_at_what_the_guest_says_of_itself(guest: SoftGuest, offset: int, value: int, reason: str) -> None:
    guest.set_data(offset, value)
    assert guest.dies("hcall 1, DATA") == reason


@pytest.mark.parametrize("reason", ["SCRATCH", "0x40000000"], ids=["a reason", "none, as Linux has it"])
def test_shutdown_can_be_a_restart(guest: SoftGuest, reason: str) -> None:
    guest.start(f"hcall 1, DATA; hcall 2, {reason}, 2")
    with pytest.raises(GuestRestarts):
        guest.host.run()


# --- hypercalls ---


def test_a_hypercall_leaves_the_registers_alone(guest: SoftGuest) -> None:
    guest.run("hcall 1, DATA; mov edi, 0x111; mov ebp, 0x222; stc; tell 0x333")
    registers = (Register.EAX, Register.EBX, Register.EDI, Register.EBP)
    assert [guest.register(register) for register in registers] == [17, 0x333, 0x111, 0x222]
    assert guest.register(Register.EFLAGS) & 1


def test_notify_reaches_the_launcher_or_whom_it_attached(guest: SoftGuest) -> None:
    eventfd = os.eventfd(0)
    guest.host.attach(0x1234, eventfd)
    assert guest.run("hcall 1, DATA; tell 0x1234; tell 0x1234; tell 0x1235") == 0x1235
    assert os.eventfd_read(eventfd) == 2
    os.close(eventfd)


def ring(guest: SoftGuest, index: int, *call: int) -> None:
    """Puts a hypercall into the ring."""
    guest.write_words(DATA + softguest.HCALLS + 20 * index, *call, *[0] * (5 - len(call)))
    guest.memory.write(DATA + softguest.STATUS + index, b"\0")


def test_the_rings_hypercalls_come_before_the_direct_one_in_their_order(guest: SoftGuest) -> None:
    ring(guest, 0, 17, 0xA)
    ring(guest, 1, 17, 0xB)
    guest.start("hcall 1, DATA; tell 0xc; tell 0xd")
    assert [guest.told() for _ in range(4)] == [0xA, 0xB, 0xC, 0xD]
    assert guest.memory.read(DATA + softguest.STATUS, 64) == b"\xff" * 64


def test_the_ring_goes_round(guest: SoftGuest) -> None:
    for index in range(64):
        ring(guest, index, 0)
    guest.run("hcall 1, DATA; tell 1; hcall 0; hcall 0; tell 2")
    ring(guest, 0, 17, 0xA)
    assert [guest.told() for _ in range(2)] == [0xA, 2]


def test_the_ring_stops_at_a_free_entry(guest: SoftGuest) -> None:
    ring(guest, 1, 17, 0xB)
    guest.start("hcall 1, DATA; tell 1")
    assert guest.told() == 1


def test_nonsense_in_the_ring_is_death_too(guest: SoftGuest) -> None:
    ring(guest, 0, 12)
    assert guest.dies("hcall 1, DATA; hcall 0") == "Bad hypercall 12"


# --- segments ---


def test_a_segment_of_level_0_becomes_one_of_the_kernels(guest: SoftGuest) -> None:
    source = """
        init
        hcall 18, 20, 0x1000ffff, 0x00409205        # data, base 0x51000, not accessed, level 0
        mov eax, 0xa1
        mov ds, eax
        mov eax, ds:[0]
        mov ebx, 0x69
        mov ds, ebx
        tell eax
    """
    guest.write_words(0x5_1000, 0x1234_5678)
    assert guest.run(source) == 0x1234_5678


@pytest.mark.parametrize("index", [10, 11, 16, 31])
def test_the_hosts_own_entries_stay_away_from_the_guest(guest: SoftGuest, index: int) -> None:
    source = f"init; hcall 18, {index}, 0xffff, 0x00cfb200; mov eax, {index << 3 | 1}; mov ds, eax"
    assert guest.dies(source) == f"unhandled trap 13 at {guest.register(Register.EIP):#x} ({index << 3:#x})"


@pytest.mark.parametrize("kind", [0x2, 0x4, 0x5, 0x9, 0xB, 0xC])
def test_gates_and_tasks_do_not_reach_the_cpu(guest: SoftGuest, kind: int) -> None:
    # A call gate to level 0, a TSS to switch to: real hardware would take them.
    source = f"init; hcall 18, 20, 0x00610000 | (CODE & 0xffff), 0xe000 | {kind} << 8; .byte 0x9a; .long 0; .word 0xa3"
    assert "unhandled trap 13" in guest.dies(source)


def test_a_threads_segments_are_loaded_together(guest: SoftGuest) -> None:
    descriptors = struct.pack("<6I", 0x1000FFFF, 0x0040F205, 0x2000FFFF, 0x0040F205, 0x3000FFFF, 0x0040F205)
    guest.memory.write(SCRATCH, descriptors)
    for page in (1, 2, 3):
        guest.write_words(SCRATCH + page * 0x1000, page)
    source = "init; hcall 16, SCRATCH; " + "; ".join(
        f"mov eax, {(5 + page) << 3 | 3}; mov gs, eax; add edi, gs:[0]; shl edi, 4" for page in (1, 2, 3)
    )
    assert guest.run(source + "; tell edi") == 0x1230


# --- traps ---


def test_a_trap_in_the_kernel_is_put_on_its_stack(guest: SoftGuest) -> None:
    source = """
        init
        gate 6, handler
        movd [IRQ_ENABLED], 0x200
        mov esp, STACK - 0x100
        stc
    bad:
        ud2
        .balign 64
    handler:
        mov eax, [esp]
        sub eax, OFFSET bad
        mov edi, esp
        tell eax
    """.replace("movd [", "mov dword ptr [")
    assert guest.run(source) == 0
    assert guest.register(Register.EDI) == STACK - 0x100 - 12
    _, cs, flags = guest.words(STACK - 0x10C, 3)
    assert cs == 0x61
    assert flags & (IF | 1) == IF | 1
    assert guest.data(softguest.IRQ_ENABLED) == 0  # an interrupt gate


def test_the_pushed_interrupt_flag_is_the_guests_not_the_cpus(guest: SoftGuest) -> None:
    source = "init; gate 6, handler, 0xe; ud2; .balign 64; handler: mov eax, [esp + 8]; and eax, 0x200; tell eax"
    assert guest.run(source) == 0


@pytest.mark.parametrize("kind", [0xE, 0xF])
def test_an_error_code_is_pushed_where_there_is_one(guest: SoftGuest, kind: int) -> None:
    source = f"init; gate 13, handler, {kind}; mov eax, 0x58; mov ds, eax; .balign 64; handler: pop eax; tell eax"
    assert guest.run(source) == 0x58


@pytest.mark.parametrize("kind", [0xE, 0xF])
def test_a_trap_of_a_program_changes_to_the_kernels_stack(guest: SoftGuest, kind: int) -> None:
    source = f"""
        init
        users
        gate 6, handler, {kind}
        mov dword ptr [IRQ_ENABLED], 0x200
        enter_user user
    user:
        stc
    bad:
        ud2
        .balign 64
    handler:
        mov eax, [esp]
        sub eax, OFFSET bad
        mov edi, esp
        tell eax
    """
    assert guest.run(source) == 0
    assert guest.register(Register.EDI) == STACK - 20
    cs, flags, esp, ss = guest.words(STACK - 16, 4)
    assert (cs, esp, ss) == (0x73, USER_STACK, 0x7B)
    assert flags & (IF | 1) == IF | 1
    assert guest.data(softguest.IRQ_ENABLED) == (0 if kind == 0xE else IF)
    assert guest.register(Register.CS) == 0x61
    assert guest.register(Register.SS) == 0x69


@pytest.mark.parametrize("kind", [0xE, 0xF])
def test_a_system_call_and_back(guest: SoftGuest, kind: int) -> None:
    source = f"""
        init
        users
        gate 0x80, handler, {kind}, 3
        gate 6, done
        enter_user user
    user:
        mov eax, 20
        int 0x80
        int 0x80
        ud2
    handler:
        add eax, 1
        iretd
    done:
        tell eax
    """
    assert guest.run(source) == 22


@pytest.mark.parametrize(
    ("instruction", "length", "vector"),
    [
        ("int 0x80", 2, 0x80),
        ("int3", 1, 3),
        ("int 3", 1, 3),
        ("int 0x1f", 2, 0x1F),
        ("int 14", 2, 14),
        ("int 0x21", 2, 0x21),
        ("int 0x20", 2, 0x20),
    ],
)
@pytest.mark.parametrize("kind", [0xE, 0xF])
def test_a_program_may_not_use_what_is_not_for_it(
    guest: SoftGuest, instruction: str, length: int, vector: int, kind: int
) -> None:
    source = f"""
        init
        users
        gate {vector}, 0, {kind}, {3 if vector == 0x20 else 1}
        gate 13, handler
        enter_user user
    user:
        mov eax, 1
    bad:
        {instruction}
        .balign 64
    handler:
        pop edi
        pop eax
        sub eax, OFFSET bad
        tell eax
    """
    assert guest.run(source) == 0
    assert guest.register(Register.EDI) == vector << 3 | 2


def test_ports_and_halting_are_the_launchers_to_emulate(guest: SoftGuest) -> None:
    pending = guest.run_to(GENERAL_PROTECTION, "init; mov edi, 7; mov dx, 0x1234; out dx, al; 1: cli; tell edi")
    assert pending.instruction[:2] == b"\xee\xfa"
    guest.host.set_register(Register.EIP, guest.register(Register.EIP) + 1)
    assert guest.host.run().instruction[:1] == b"\xfa"
    guest.host.set_register(Register.EIP, guest.register(Register.EIP) + 1)
    guest.host.set_register(Register.EDI, 0x1_0000_0009)
    assert guest.told() == 9


def test_what_the_launcher_does_not_emulate_it_hands_back(guest: SoftGuest) -> None:
    guest.run_to(
        GENERAL_PROTECTION, "init; gate 13, handler; 1: wrmsr; .balign 64; handler: pop eax; pop edi; tell eax"
    )
    at = guest.register(Register.EIP)
    guest.host.inject(GENERAL_PROTECTION)
    assert guest.told() == 0
    assert guest.register(Register.EDI) == at


def test_a_trap_that_is_handed_back_without_a_handler_is_death(guest: SoftGuest) -> None:
    guest.run_to(GENERAL_PROTECTION, "init; hlt")
    at = guest.register(Register.EIP)
    guest.host.inject(GENERAL_PROTECTION)
    assert guest.death() == f"unhandled trap 13 at {at:#x} (0x0)"


def test_the_launcher_sets_no_segments(guest: SoftGuest) -> None:
    guest.run("init; tell 1")
    for register in (Register.CS, Register.SS, Register.EFLAGS, Register.ORIG_EAX):
        with pytest.raises(ValueError, match=f"{register.name} cannot be set"):
            guest.host.set_register(register, 0)


def test_instruction_bytes_end_where_memory_does(guest: SoftGuest) -> None:
    end = PAGES * PAGE_SIZE
    guest.memory.write(end - 1, b"\xf4")
    assert guest.run_to(GENERAL_PROTECTION, f"mov eax, {end - 1}; jmp eax") == Pending(
        GENERAL_PROTECTION, b"\xf4" + bytes(6)
    )


def test_the_task_switched_flag_traps_the_fpu(guest: SoftGuest) -> None:
    source = """
        init
        gate 7, handler
        fninit
        hcall 8, 1
        xor edi, edi
        fld1
        inc edi
        tell edi
        .balign 64
    handler:
        add edi, 0x10
        hcall 8, 0
        iretd
    """
    assert guest.run(source) == 0x11


@pytest.mark.parametrize(("instruction", "vector"), [("int3", 3), ("ud2", 6), ("syscall", 6)])
def test_exceptions_of_programs_have_their_vectors(guest: SoftGuest, instruction: str, vector: int) -> None:
    source = (
        f"init; users; gate {vector}, handler, 0xe, 3; enter_user user; user: {instruction}; handler: tell {vector}"
    )
    assert guest.run(source) == vector


def test_the_fpu_keeps_its_state_across_traps(guest: SoftGuest) -> None:
    source = """
        init
        gate 6, handler
        fninit
        fld1
        fldpi
        ud2
        .balign 64
    handler:
        fxch
        fistp dword ptr [SCRATCH]
        mov eax, [SCRATCH]
        tell eax
    """
    assert guest.run(source) == 1


def test_a_step_and_a_nested_task_end_where_the_handler_begins(guest: SoftGuest) -> None:
    source = """
        init
        gate 1, handler
        pushfd
        or dword ptr [esp], 0x4100          # TF, NT
        popfd
        nop
        nop
        .balign 64
    handler:
        pushfd
        pop eax
        and eax, 0x4100
        tell eax
    """
    assert guest.run(source) == 0


@pytest.mark.parametrize("level", ["kernel", "user"])
def test_nobody_gets_into_virtual_8086_mode(guest: SoftGuest, level: str) -> None:
    # The library would let them, with the I/O privilege level that they ask for.
    source = f"""
        init
        users
        {"enter_user inside" if level == "user" else ""}
    inside:
        push 0; push 0; push 0; push 0; push 0x7b; push 0x1000; push 0x23202; push 0x73; push 0x100
        iretd
    """
    pending = guest.run_to(GENERAL_PROTECTION, source)
    assert pending.instruction[:1] == b"\xcf"


@pytest.mark.parametrize(
    ("direct", "reason"), [(0xF, f"bad stack page {0x8_0000 - 4:#x}"), (0xE, f"Bad address {0x8_0000 - 20:#x}")]
)
def test_a_stack_that_went_away_is_death(guest: SoftGuest, direct: int, reason: str) -> None:
    source = f"""
        init
        users
        gate 0x80, 0, {direct}, 3
        hcall 7, 0x69, 0x80000, 1
        mov dword ptr [TABLE + 4 * 0x7f], 0
        hcall 5, 1
        enter_user user
    user:
        int 0x80
    """
    assert guest.dies(source) == reason


@pytest.mark.parametrize("kind", [0xE, 0xF])
def test_a_stack_segment_that_is_none_is_death(guest: SoftGuest, kind: int) -> None:
    source = f"init; users; gate 0x80, 0, {kind}, 3; hcall 7, 0xf1, STACK, 1; enter_user user; user: int 0x80"
    # Through the IDT it is the CPU that finds out.
    assert guest.dies(source).startswith("bad stack segment 241" if kind == 0xE else "unhandled trap 10 at")


def test_a_code_segment_that_is_none_is_death(guest: SoftGuest) -> None:
    assert guest.dies("init; gate 6, 0; hcall 18, 12, 0, 0; ud2") == "bad code segment 97"


# --- page tables ---


def test_page_tables_are_the_guests(guest: SoftGuest) -> None:
    guest.write_words(SCRATCH, 0xABCD)
    guest.write_words(TABLE + 4 * 0x3FF, SCRATCH | 3)
    assert guest.run("init; paging; mov eax, [0x3ff000]; tell eax") == 0xABCD
    assert guest.word(TABLE + 4 * 0x3FF) == SCRATCH | 0x23  # and the CPU says that they were used


@pytest.mark.parametrize(
    ("entry", "access", "error"),
    [(0, "mov eax, [ebp]", 0), (0, "mov [ebp], eax", 2), (SCRATCH | 1, "mov [ebp], eax", 3), (0, "jmp ebp", 0)],
)
def test_a_page_fault_says_where_and_why(guest: SoftGuest, entry: int, access: str, error: int) -> None:
    guest.write_words(TABLE + 4 * 0x3FF, entry)
    source = f"init; paging; gate 14, handler; mov ebp, 0x3ff123; {access}; .balign 64; handler: pop eax; tell eax"
    assert guest.run(source) == error
    assert guest.data(softguest.CR2) == 0x3FF123


def test_a_programs_page_fault_says_so(guest: SoftGuest) -> None:
    guest.write_words(TABLE + 4 * 0x3FF, SCRATCH | 3)
    source = """
        init; users; gate 14, handler; enter_user user
    user:
        mov eax, [0x3ff000]
    handler: pop eax; tell eax
    """
    assert guest.run(source) == 5


def test_a_second_page_fault_is_no_double_fault(guest: SoftGuest) -> None:
    source = """
        init; paging; gate 14, handler
        mov eax, [0x3ff000]
        mov eax, [0x3fe000]
        .balign 64
    handler:
        inc edi
        cmp edi, 2
        je 1f
        add esp, 4
        add dword ptr [esp], 5
        iretd
    1:  tell edi
    """
    assert guest.run(source) == 2


ACCESSES = ["mov eax, [ebp]", "mov [ebp], eax", "jmp ebp", "lock inc dword ptr [ebp]"]


@pytest.mark.parametrize("address", [PAGES * PAGE_SIZE, DEVICE_LIMIT * PAGE_SIZE - PAGE_SIZE])
@pytest.mark.parametrize("access", ACCESSES)
def test_what_is_devices_is_the_launchers_to_emulate(guest: SoftGuest, address: int, access: str) -> None:
    guest.write_words(TABLE + 4 * 0x3FF, address | 0x67)
    pending = guest.run_to(PAGE_FAULT, f"init; paging; mov ebp, 0x3ff010; {access}")
    assert pending.address == address + 0x10


@pytest.mark.parametrize("address", [DEVICE_LIMIT * PAGE_SIZE, 0x1000_0000, 0xFFC0_0000, 0xFFC0_1000, 0xFFFF_F000])
@pytest.mark.parametrize("access", ACCESSES)
def test_a_page_table_that_leads_to_nobodys_memory_is_death(guest: SoftGuest, address: int, access: str) -> None:
    guest.write_words(TABLE + 4 * 0x3FF, address | 0x67)
    assert guest.dies(f"init; paging; mov ebp, 0x3ff010; {access}") == "bad page table entry"


def test_device_registers_are_there_before_paging(guest: SoftGuest) -> None:
    address = PAGES * PAGE_SIZE + 0x24
    assert guest.run_to(PAGE_FAULT, f"init; mov eax, [{address}]").address == address
    assert guest.register(Register.EIP) < PAGES * PAGE_SIZE


def test_an_access_that_the_launcher_hands_back_is_a_page_fault(guest: SoftGuest) -> None:
    guest.write_words(TABLE + 4 * 0x3FF, PAGES << 12 | 0x67)
    guest.run_to(
        PAGE_FAULT, "init; paging; gate 14, handler; mov [0x3ff010], eax; .balign 64; handler: pop eax; tell eax"
    )
    guest.host.inject(PAGE_FAULT)
    assert guest.told() == 2
    assert guest.data(softguest.CR2) == 0x3FF010


@pytest.mark.parametrize(
    "entry", [PAGES << 12 | 7, 0xFFC0_1067, TABLE | 0x87, TABLE | 0x1E7, TABLE | 0xF, TABLE | 0x207]
)
def test_a_bad_directory_entry_kills_when_it_is_used(guest: SoftGuest, entry: int) -> None:
    guest.write_words(DIRECTORY + 4, entry)
    guest.start("init; paging; tell 1; mov eax, [0x400000]")
    assert guest.told() == 1
    assert guest.death() == "bad page directory entry"


def test_the_top_of_the_addresses_is_the_hosts(guest: SoftGuest) -> None:
    guest.write_words(DIRECTORY + 4 * 1023, TABLE | 7)
    guest.start("init; paging; hcall 15, DIRECTORY, 1023; tell 1; mov eax, [0xffd00000]")
    assert guest.told() == 1
    assert guest.death() == "attempt to access switcher pages"


def test_a_program_that_reaches_for_the_top_gets_a_page_fault(guest: SoftGuest) -> None:
    source = """
        init; users; gate 14, handler; enter_user user
    user: mov eax, [0xffc00000]
    handler: pop eax; tell eax
    """
    assert guest.run(source) == 5
    assert guest.data(softguest.CR2) == 0xFFC0_0000


def test_nobody_writes_the_hosts_page(guest: SoftGuest) -> None:
    source = "init; paging; gate 14, handler; mov [0xffc00000], eax; .balign 64; handler: pop eax; tell eax"
    assert guest.run(source) == 3


def test_a_changed_entry_counts_once_the_guest_says_so(guest: SoftGuest) -> None:
    guest.write_words(SCRATCH, 1)
    guest.write_words(SCRATCH + 0x1000, 2)
    source = """
        init; paging
        mov dword ptr [TABLE + 4 * 0x3ff], SCRATCH + 0x67
        mov edi, [0x3ff000]
        mov dword ptr [TABLE + 4 * 0x3ff], SCRATCH + 0x1067
        hcall 14, DIRECTORY, 0x3ff000, SCRATCH + 0x1067
        shl edi, 4
        or edi, [0x3ff000]
        mov dword ptr [TABLE + 4 * 0x3ff], SCRATCH + 0x67
        hcall 5, 0
        shl edi, 4
        or edi, [0x3ff000]
        tell edi
    """
    assert guest.run(source) == 0x121


def test_a_new_directory_entry_needs_no_word_but_a_changed_one_does(guest: SoftGuest) -> None:
    guest.write_words(0x5_1000, SCRATCH | 0x67)
    guest.write_words(0x5_2000, SCRATCH + 0x3000 | 0x67)
    guest.write_words(SCRATCH, 1)
    guest.write_words(SCRATCH + 0x3000, 2)
    source = """
        init; paging
        mov dword ptr [DIRECTORY + 4], 0x51067
        mov edi, [0x400000]
        mov dword ptr [DIRECTORY + 4], 0x52067
        hcall 15, DIRECTORY, 1
        shl edi, 4
        or edi, [0x400000]
        tell edi
    """
    assert guest.run(source) == 0x12


def test_every_address_space_has_its_directory(guest: SoftGuest) -> None:
    other, table = 0x7_0000, 0x7_1000
    guest.write_words(other, table | 0x67)
    guest.write_words(table, *(page << 12 | 0x67 for page in range(PAGES)))
    guest.write_words(table + 4 * 0x3FF, SCRATCH + 0x1000 | 0x67)
    guest.write_words(TABLE + 4 * 0x3FF, SCRATCH | 0x67)
    guest.write_words(SCRATCH, 1)
    guest.write_words(SCRATCH + 0x1000, 2)
    source = f"""
        init; paging
        mov edi, [0x3ff000]
        hcall 4, {other}
        shl edi, 4
        or edi, [0x3ff000]
        hcall 4, DIRECTORY
        shl edi, 4
        or edi, [0x3ff000]
        tell edi
    """
    assert guest.run(source) == 0x121


def test_a_frame_across_two_pages_lands_in_both(guest: SoftGuest) -> None:
    # Two pages that are neighbours for the guest only.
    guest.write_words(TABLE + 4 * 0x3FE, SCRATCH | 0x67, 0x7_0067)
    source = "init; paging; gate 6, handler; mov esp, 0x3ff004; ud2; .balign 64; handler: mov edi, esp; tell edi"
    assert guest.run(source) == 0x3FEFF8
    assert guest.word(SCRATCH + 0xFFC) == 0x61
    assert guest.word(0x7_0000) & 0x202 == 2


# --- interrupts ---


HANDLER = """
    .balign 64
handler:
    mov edi, esp
    tell 0x99
"""


def test_an_interrupt_reaches_a_guest_that_wants_it(guest: SoftGuest) -> None:
    guest.start("init; gate 0x25, handler; mov dword ptr [IRQ_ENABLED], 0x200; tell 1; 1: jmp 1b" + HANDLER)
    assert guest.told() == 1
    guest.set_data(softguest.TIME, 0)
    guest.host.interrupt(5)
    assert guest.told() == 0x99
    frame = guest.words(guest.register(Register.EDI), 3)
    assert frame[1] == 0x61
    assert frame[2] & IF
    assert guest.data(softguest.IRQ_ENABLED) == 0
    assert guest.data(softguest.TIME) > 0


def test_an_interrupt_reaches_a_loop_from_another_thread(guest: SoftGuest) -> None:
    guest.start("init; gate 0x25, handler; mov dword ptr [IRQ_ENABLED], 0x200; 1: jmp 1b" + HANDLER)
    timer = threading.Timer(0.02, guest.loop.call_later, (0, lambda: guest.host.interrupt(5)))
    timer.start()
    assert guest.told() == 0x99
    timer.join()


def test_the_lowest_interrupt_comes_first_and_says_that_there_is_more(guest: SoftGuest) -> None:
    source = """
        init; gate 0x23, three; gate 0x25, five
        mov dword ptr [IRQ_ENABLED], 0x200
        tell 1
    1:  jmp 1b
    three:
        tell 3
        mov dword ptr [IRQ_ENABLED], 0x200
    2:  jmp 2b
    five:
        tell 5
    """
    guest.start(source)
    guest.told()
    guest.host.interrupt(5)
    guest.host.interrupt(3)
    assert guest.told() == 3
    assert guest.told() == 5
    assert guest.data(softguest.IRQ_PENDING) == 0


def test_a_disabled_interrupt_is_told_and_comes_at_the_next_return(guest: SoftGuest) -> None:
    source = """
        init; gate 0x25, handler
        tell 1
        mov ecx, 100000
    1:  dec ecx
        jnz 1b
        mov ebp, [DATA + 20]
        xor edx, edx
        call enable
        inc edx
        .fill 8, 1, 0x90
        inc edx
        tell edx
    enable:
        mov dword ptr [IRQ_ENABLED], 0x200
        ret
    """
    guest.start(source + HANDLER)
    guest.told()
    guest.host.interrupt(5)
    assert guest.told() == 0x99
    assert guest.register(Register.EBP) == IF
    assert guest.register(Register.EDX) == 0  # at once
    assert guest.data(softguest.IRQ_PENDING) == 0


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "mov dword ptr [IRQ_ENABLED], 0x200"),
        ("mov dword ptr [IRQ_ENABLED], 0x200; mov dword ptr [BLOCKED], 0x20", "mov dword ptr [BLOCKED], 0"),
    ],
)
def test_a_guest_need_not_say_that_it_wants_its_interrupt_now(guest: SoftGuest, before: str, after: str) -> None:
    # No indirect jump, no hypercall: only the host's own retry is left.
    source = f"init; gate 0x25, handler; {before}; tell 1; mov ecx, 1000000; 1: dec ecx; jnz 1b; {after}; 2: jmp 2b"
    guest.start(source + HANDLER)
    guest.told()
    guest.host.interrupt(5)
    assert guest.told() == 0x99


def test_no_interrupt_between_a_trap_and_the_launcher(guest: SoftGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    # It comes while the host looks at the instruction; the launcher has to find the guest there.
    source = "init; gate 0x25, handler; mov dword ptr [IRQ_ENABLED], 0x200; tell 1; cli; nop"
    guest.start(source + HANDLER)
    guest.told()
    at = guest.register(Register.EIP)
    host = guest.host
    look = host._instruction

    def instruction() -> bytes:
        host.interrupt(5)
        return look()

    monkeypatch.setattr(host, "_instruction", instruction)
    assert host.run() == Pending(GENERAL_PROTECTION, look())
    assert guest.register(Register.EIP) == at
    host.set_register(Register.EIP, at + 1)
    assert guest.told() == 0x99
    assert guest.word(guest.register(Register.EDI)) == at + 1


def test_no_interrupt_where_the_guest_wants_none(guest: SoftGuest) -> None:
    source = """
        init; gate 0x25, handler
        mov dword ptr [IRQ_ENABLED], 0x200
        tell 1
        mov ecx, 10000
        jmp quiet
        .balign 4096
    quiet:
        inc dword ptr [SCRATCH]
        mov eax, OFFSET next
        jmp eax
    next:
        dec ecx
        jnz quiet
        jmp loud
        .balign 4096
    loud:
        jmp loud
    """
    guest.set_data(softguest.NOIRQ_START, CODE + 0x1000)
    guest.set_data(softguest.NOIRQ_END, CODE + 0x2000)
    guest.start(source + HANDLER)
    guest.told()
    guest.host.set_register(Register.EIP, CODE + 0x1000)
    guest.host.set_register(Register.ECX, 10000)
    guest.host.interrupt(5)
    assert guest.told() == 0x99
    assert guest.word(SCRATCH) == 10000
    assert guest.word(guest.register(Register.EDI)) >= CODE + 0x2000


def test_an_interrupt_without_a_handler_waits_for_one(guest: SoftGuest) -> None:
    guest.start("init; mov dword ptr [IRQ_ENABLED], 0x200; tell 1; gate 0x25, handler; 1: jmp 1b" + HANDLER)
    guest.told()
    guest.host.interrupt(5)
    assert guest.told() == 0x99


def test_a_guest_that_asks_for_its_interrupts_gets_them_at_once(guest: SoftGuest) -> None:
    source = "init; gate 0x25, handler; tell 1; mov dword ptr [IRQ_ENABLED], 0x200; hcall 19; tell 2"
    guest.start(source + HANDLER)
    guest.told()
    guest.host.interrupt(5)
    assert guest.told() == 0x99


def test_an_interrupt_of_a_program_changes_to_the_kernels_stack(guest: SoftGuest) -> None:
    source = """
        init; users; gate 0x25, handler
        gate 0x80, syscall, 0xf, 3
        enter_user user
    user:
        int 0x80
    1:  jmp 1b
    syscall:
        mov dword ptr [IRQ_ENABLED], 0x200
        tell 1
        iretd
    """
    guest.start(source + HANDLER)
    guest.told()
    guest.loop.call_later(0.01, lambda: guest.host.interrupt(5))
    assert guest.told() == 0x99
    _, cs, _, esp, ss = guest.words(STACK - 20, 5)
    assert (cs, esp, ss) == (0x73, USER_STACK, 0x7B)


def test_halting_waits_for_an_interrupt_and_enables_them(guest: SoftGuest) -> None:
    guest.start("init; gate 0x25, handler; tell 1; hcall 10; tell 2" + HANDLER)
    guest.told()
    guest.loop.call_later(0.02, lambda: guest.host.interrupt(5))
    assert guest.told() == 0x99
    assert guest.words(guest.register(Register.EDI), 3)[2] & IF


def test_halting_with_an_interrupt_there_does_not_wait(guest: SoftGuest) -> None:
    guest.start("init; gate 0x25, handler; tell 1; hcall 10; tell 2" + HANDLER)
    guest.told()
    guest.host.interrupt(5)
    assert guest.told() == 0x99


def test_a_job_reaches_a_guest_that_halts(guest: SoftGuest) -> None:
    guest.start("init; tell 1; hcall 10; tell 2")
    guest.told()

    def job() -> None:
        raise GuestDied("because of a job")

    guest.loop.call_later(0.02, lambda: guest.host.call(job))
    assert guest.death() == "because of a job"


def test_a_job_reaches_a_guest_that_loops(guest: SoftGuest) -> None:
    guest.start("init; tell 1; 1: jmp 1b")
    guest.told()

    def job() -> None:
        raise GuestDied("because of a job")

    guest.loop.call_later(0.02, lambda: guest.host.call(job))
    assert guest.death() == "because of a job"


def test_the_clock_event_is_interrupt_0(guest: SoftGuest) -> None:
    guest.set_data(softguest.BLOCKED, 0)
    guest.start("init; gate 0x20, handler; hcall 9, 10000000; hcall 10; tell 2" + HANDLER)
    started = time.monotonic()
    assert guest.told() == 0x99
    assert time.monotonic() - started >= 0.01


def test_a_clock_event_can_be_taken_back(guest: SoftGuest) -> None:
    source = "init; gate 0x20, handler; gate 0x25, five; hcall 9, 5000000; hcall 9, 0; hcall 10; five: tell 5"
    guest.loop.call_later(0.05, lambda: guest.host.interrupt(5))
    assert guest.run(source + HANDLER) == 5


def test_there_are_32_interrupts(guest: SoftGuest) -> None:
    for irq in (-1, 32):
        with pytest.raises(ValueError, match="no interrupt"):
            guest.host.interrupt(irq)


def test_no_interrupt_is_lost_and_no_instruction_done_twice(guest: SoftGuest) -> None:
    # The guest counts its interrupts, and in between it adds; half of the time it does not want any.
    source = """
        init; gate 0x25, handler
        mov dword ptr [SCRATCH + 8], 0
        tell 1
        mov ebp, 20000
    again:
        call disable
        mov ecx, 10
    1:  add dword ptr [SCRATCH], 1
        dec ecx
        jnz 1b
        call enable
        mov ecx, 10
    2:  add dword ptr [SCRATCH], 1
        dec ecx
        jnz 2b
        dec ebp
        jnz again
    3:  cmp dword ptr [SCRATCH + 8], 1
        jne 3b
        tell [SCRATCH + 4]
    enable:
        mov dword ptr [IRQ_ENABLED], 0x200
        ret
    disable:
        mov dword ptr [IRQ_ENABLED], 0
        ret
        .balign 64
    handler:
        inc dword ptr [SCRATCH + 4]
        mov dword ptr [IRQ_ENABLED], 0x200
        iretd
    """
    guest.start(source)
    guest.told()
    raised = 0
    done = threading.Event()

    def raise_them() -> None:
        nonlocal raised
        while raised < 300:
            seen = guest.word(SCRATCH + 4)
            guest.host.interrupt(5)
            guest.loop.before_sleep()
            raised += 1
            while guest.word(SCRATCH + 4) == seen and not done.is_set():
                time.sleep(0)
        guest.write_words(SCRATCH + 8, 1)

    thread = threading.Thread(target=raise_them)
    thread.start()
    try:
        assert guest.told() == 300
        assert guest.word(SCRATCH) == 400_000
    finally:
        done.set()
        thread.join()


# --- translated code ---


def test_a_workers_write_is_executed_once_it_was_told(guest: SoftGuest) -> None:
    guest.memory.write(SCRATCH, bytes.fromhex("b801000000c3"))
    guest.start(f"init; mov ebp, {SCRATCH}; call ebp; tell eax; call ebp; tell eax")
    assert guest.told() == 1
    page = SCRATCH // PAGE_SIZE
    assert guest.code_map.marks[page] == 1
    guest.memory.write(SCRATCH + 1, b"\2")
    guest.host.call(lambda: guest.host.forget_code(page, page))
    assert guest.told() == 2
    assert not guest.code_map.marks[PAGES - 1]


def test_a_frame_of_the_hosts_over_code_is_executed_as_it_is(guest: SoftGuest) -> None:
    # `ret` where the frame's instruction pointer will be.
    guest.memory.write(SCRATCH + 0x20, b"\xc3")
    source = f"""
        init; gate 6, handler
        mov ebp, {SCRATCH + 0x20}
        call ebp
        mov esp, {SCRATCH + 0x2C}
        ud2
        .balign 64
    handler:
        mov eax, [esp]
        tell eax
    """
    guest.run(source)
    assert guest.code_map.marks[SCRATCH // PAGE_SIZE] == 0
