"""The embedded CPU runs a machine: what Unicorn leaves out or gets wrong, each with the guest that shows it."""

from __future__ import annotations

import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tinymachine import CODE, DATA, EXIT_PORT, GDT, PAGE_TABLES, RAM, Exit, Machine

from lguest_mp.cpu.engine import EntryState, GuestFault, GuestHalted
from lguest_mp.memory import HIGH_RAM_BASE, LOW_RAM_LIMIT, PAGE_SIZE

Assemble = Callable[[str], bytes]


def test_native_code_is_what_its_source_says(assemble: Assemble) -> None:
    tool = Path(__file__).resolve().parents[2] / "tools" / "build-native"
    subprocess.run([sys.executable, tool, "--check"], check=True)


def test_ports_in_all_widths(machine: Machine, assemble: Assemble) -> None:
    machine.load(assemble("in al, 0x10; out 0x20, al; mov dx, 0x1234; in ax, dx; out dx, ax; in eax, dx; exit"))
    assert machine.run() == 0x1234 * 0x0101_0101 & 0xFFFF_FFFF
    assert machine.platform.outputs == [(0x20, 1, 0x10), (0x1234, 2, 0x1234 * 0x0101_0101 & 0xFFFF)]


def test_memory_that_is_no_ram_is_the_platforms(machine: Machine, assemble: Assemble) -> None:
    source = """
        mov ebx, 0xfee00020
        mov eax, [rbx]
        mov [rbx + 0x10], al
        mov [rbx + 0x20], ax
        mov [rbx + 0x30], eax
        mov [rbx + 0x40], rax
        exit
    """
    machine.load(assemble(source))
    assert machine.run() == 0xFEE0_0020
    assert machine.platform.mmio_writes == [
        (0xFEE0_0030, 1, 0x20),
        (0xFEE0_0040, 2, 0x20),
        (0xFEE0_0050, 4, 0xFEE0_0020),
        (0xFEE0_0060, 4, 0xFEE0_0020),  # eight bytes come as two times four
        (0xFEE0_0064, 4, 0),
    ]


def test_cpuid_asks_the_platform(machine: Machine, assemble: Assemble) -> None:
    machine.load(assemble("mov eax, 0x40000000; mov ecx, 7; cpuid; shl ebx, 16; lea eax, [rbx + rcx]; exit"))
    assert machine.run() == 7 << 16 | 0x1234


def test_msrs_are_the_platforms_first(machine: Machine, assemble: Assemble) -> None:
    source = """
        mov ecx, 0x4b564d01; mov eax, 0x1001; mov edx, 2; wrmsr
        mov ecx, 0xc0000102; mov eax, 0x5678; mov edx, 0; wrmsr     # KERNEL_GS_BASE is the CPU's
        xor eax, eax
        rdmsr
        mov esi, eax
        mov ecx, 0x1b; rdmsr
        lea eax, [rax + rsi]
        exit
    """
    machine.load(assemble(source))
    assert machine.run() == 0xFEE0_0900 + 0x5678
    assert machine.platform.msrs[0x4B56_4D01] == 2 << 32 | 0x1001


@pytest.mark.parametrize(
    ("vector", "cause", "error_code"),
    [
        (0, "xor ecx, ecx; div ecx", None),
        (3, "int3", None),
        (6, "ud2", None),
        (13, "mov ax, 0x100; mov ds, ax", 0x100),
        (14, "mov rax, [0x100000000000]", 0),
        (0x80, "int 0x80", None),
    ],
)
def test_exceptions_go_through_the_guests_idt(
    machine: Machine, assemble: Assemble, vector: int, cause: str, error_code: int | None
) -> None:
    source = f"init; {cause}; nop; .balign 256; handler: pop rax; mov rbx, [rsp]; exit"
    machine.load(assemble(source))
    machine.set_gate(vector, CODE + 256)
    value = machine.run()
    if error_code is None:
        assert CODE < value < CODE + 256  # the return address is on top
    else:
        assert value == error_code


def test_a_fault_while_delivering_a_fault_is_a_double_fault(machine: Machine, assemble: Assemble) -> None:
    machine.load(assemble("init; mov rax, [0x100000000000]; .balign 256; mov eax, 0xdf; exit"))
    machine.set_gate(8, CODE + 256)  # and no gate for the page fault
    assert machine.run() == 0xDF


def test_a_triple_fault_ends_the_guest(machine: Machine, assemble: Assemble) -> None:
    machine.load(assemble("init; ud2"))
    machine.engine.enter(EntryState(CODE, 0, PAGE_TABLES, GDT, 0x47))
    with pytest.raises(GuestFault, match="triple fault"):
        machine.engine.run()


def test_syscall_and_sysret(machine: Machine, assemble: Assemble) -> None:
    source = """
        init
        mov ecx, 0xc0000080; mov eax, 0x501; xor edx, edx; wrmsr        # EFER.SCE
        mov ecx, 0xc0000081; xor eax, eax; mov edx, 0x00200010; wrmsr   # STAR
        mov ecx, 0xc0000082; mov eax, CODE + 256; xor edx, edx; wrmsr   # LSTAR
        mov ecx, 0xc0000084; mov eax, 0x600; xor edx, edx; wrmsr        # FMASK: IF, DF
        lea rcx, [rip + user]
        mov r11, 0x646                                                  # IF, ZF, PF, DF
        sysretq
    user:
        cmp esp, esp                                                    # ZF
        std
        syscall
    after:
        .balign 256
    kernel:
        pushfq
        pop rbx
        mov [DATA], rbx
        mov [DATA + 8], rcx
        mov [DATA + 16], r11
        mov ax, cs
        mov [DATA + 24], rax
        mov ax, ss
        mov [DATA + 32], rax
        lea rax, [rip + after]
        exit
    """
    machine.load(assemble(source))
    after = machine.run()
    flags, rcx, r11, cs, ss = struct.unpack("<5Q", machine.memory.read(DATA, 40))
    assert (rcx, cs & 0xFFFF, ss & 0xFFFF) == (after, 0x10, 0x18)
    assert r11 & 0x640 == 0x640  # as they were
    assert flags & 0x600 == 0  # masked
    assert flags & 0x40  # not masked, so kept


def test_syscall_while_it_is_disabled_is_undefined(machine: Machine, assemble: Assemble) -> None:
    source = """
        init
        mov ecx, 0xc0000080; mov eax, 0x500; xor edx, edx; wrmsr
        syscall
        .balign 256
        mov eax, 6; exit
    """
    machine.load(assemble(source))
    machine.set_gate(6, CODE + 256)
    assert machine.run() == 6


def test_user_code_may_not_enter_virtual_8086_mode(machine: Machine, assemble: Assemble) -> None:
    # The library would let it, with the I/O privilege level that it asks for.
    source = """
        init
        push 0x2b; push STACK - 0x1000; push 2; push 0x23; lea rax, [rip + user]; push rax
        iretq
        .code32
    user:
        push 0; push 0; push 0; push 0; push 0x2b; push 0x1000; push 0x23002; push 0x23; push 0x100
    bad:
        iretd
        .code64
        .balign 256
        pop rbx         # error code
        pop rax         # RIP
        lea rcx, [rip + bad]
        sub rax, rcx
        exit
    """
    machine.load(assemble(source))
    machine.set_gate(13, CODE + 256)
    assert machine.run() == 0


def test_user_code_may_not_use_ports(machine: Machine, assemble: Assemble) -> None:
    source = """
        init
        push 0x2b; push STACK - 0x1000; push 2; push 0x33; lea rax, [rip + user]; push rax
        iretq
    user:
        mov eax, 1
    bad:
        out 0x20, al
        jmp bad
        .balign 256
        pop rbx         # error code
        pop rax         # RIP
        lea rcx, [rip + bad]
        sub rax, rcx
        exit
    """
    machine.load(assemble(source))
    machine.set_gate(13, CODE + 256)
    assert machine.run() == 0
    assert machine.platform.outputs == []


def test_an_interrupt_waits_for_the_flag_and_the_shadow(machine: Machine, assemble: Assemble) -> None:
    source = """
        init
        mov al, 1
        out 0x20, al            # the test raises vector 0x41
        mov ecx, 1000
    1:  dec ecx
        jnz 1b
        mov ebx, 1
        sti
        mov ebx, 2              # in the shadow of STI: executed before
        mov ebx, 3
    2:  jmp 2b
        .balign 256
        mov eax, ebx
        exit
    """
    machine.load(assemble(source))
    machine.set_gate(0x41, CODE + 256)

    def interrupt(_value: int) -> None:
        machine.platform.interrupts.append(0x41)
        machine.kick()

    machine.platform.on_output[0x20] = interrupt
    assert machine.run() == 2


def test_halt_sleeps_until_an_interrupt(machine: Machine, assemble: Assemble) -> None:
    machine.load(assemble("init; out 0x20, al; sti; hlt; mov eax, 1; exit; .balign 256; out 0x21, al; iretq"))
    machine.set_gate(0x41, CODE + 256)

    def interrupt() -> None:
        machine.platform.interrupts.append(0x41)
        machine.kick()

    threads: list[threading.Thread] = []

    def start(_value: int) -> None:
        threads.append(threading.Timer(0.05, interrupt))
        threads[0].start()

    machine.platform.on_output[0x20] = start
    assert machine.run() == 1
    threads[0].join()
    assert [port for port, _, _ in machine.platform.outputs] == [0x20, 0x21]


def test_halt_with_interrupts_off_is_the_end(machine: Machine, assemble: Assemble) -> None:
    machine.load(assemble("cli; hlt"))
    machine.engine.enter(EntryState(CODE, 0, PAGE_TABLES, GDT, 0x47))
    with pytest.raises(GuestHalted):
        machine.engine.run()


def test_preemption_never_repeats_an_instruction(
    machine: Machine, assemble: Assemble, kicker: Callable[[], None]
) -> None:
    # Fails (thousands too many) when the check after each load and store is left in.
    source = """
        init
        sti
        mov rbx, DATA
        mov ecx, 20000000
    1:  add qword ptr [rbx], 1
        dec ecx
        jnz 1b
        xor eax, eax
        exit
    """
    machine.load(assemble(source))
    kicker()
    machine.run()
    assert struct.unpack("<Q", machine.memory.read(DATA, 8)) == (20_000_000,)


def test_no_interrupt_is_lost_under_load(machine: Machine, assemble: Assemble) -> None:
    # One interrupt at a time; the next is raised when the handler of the last said so. One lost would hang.
    source = """
        init
        out 0x20, al
        sti
    1:  jmp 1b
        .balign 256
        inc dword ptr [DATA]
        cmp dword ptr [DATA], 20000
        je 2f
        out 0x20, al
        iretq
    2:  mov eax, [DATA]
        exit
    """
    machine.load(assemble(source))
    machine.set_gate(0x41, CODE + 256)
    wanted = threading.Semaphore(0)
    done = threading.Event()

    def raise_them() -> None:
        while wanted.acquire() and not done.is_set():
            machine.platform.interrupts.append(0x41)
            machine.kick()

    thread = threading.Thread(target=raise_them)
    thread.start()
    machine.platform.on_output[0x20] = lambda _value: wanted.release()
    try:
        assert machine.run() == 20000
    finally:
        done.set()
        wanted.release()
        thread.join()


def test_an_interrupt_that_comes_together_with_a_job_is_not_lost(machine: Machine, assemble: Assemble) -> None:
    # The guest is in a loop of linked blocks, so that it looks up once: for both.
    machine.load(assemble("init; sti; out 0x20, al; 1: jmp 1b; .balign 256; mov eax, 1; exit"))
    machine.set_gate(0x41, CODE + 256)

    def both() -> None:
        machine.platform.interrupts.append(0x41)
        machine.call(lambda: None)

    def give_up() -> None:
        machine.platform.port_write(EXIT_PORT, 4, 0)

    timers = [threading.Timer(0.1, both), threading.Timer(5, machine.call, (give_up,))]

    def start(_value: int) -> None:
        for timer in timers:
            timer.start()

    machine.platform.on_output[0x20] = start
    assert machine.run() == 1
    for timer in timers:
        timer.cancel()
        timer.join()


def test_an_interrupt_is_not_lost_in_the_shadow_of_an_sti_before_a_ret(machine: Machine, assemble: Assemble) -> None:
    # The first time, without an interrupt, has all blocks translated and linked.
    source = """
        init
        mov rdi, 1000
        xor esi, esi
    again:
        cli
        test esi, esi
        jz 1f
        out 0x20, al
    1:  call enable
    2:  dec rdi
        jnz 2b
        inc esi
        jmp again
    enable:
        sti
        ret
        .balign 256
        mov eax, 1
        exit
    """
    machine.load(assemble(source))
    machine.set_gate(0x41, CODE + 256)

    def interrupt(_value: int) -> None:
        machine.platform.interrupts.append(0x41)
        machine.kick()
        give_up.start()

    def stop() -> None:
        machine.platform.port_write(EXIT_PORT, 4, 0)

    give_up = threading.Timer(5, machine.call, (stop,))
    machine.platform.on_output[0x20] = interrupt
    assert machine.run() == 1
    give_up.cancel()
    give_up.join()


def test_a_job_reaches_a_guest_that_is_stuck_with_interrupts_off(machine: Machine, assemble: Assemble) -> None:
    machine.load(assemble("cli; out 0x20, al; 1: jmp 1b"))

    def stop() -> None:
        machine.platform.exit_value = 7
        raise Exit

    timer = threading.Timer(0.05, machine.call, (stop,))
    machine.platform.on_output[0x20] = lambda _value: timer.start()
    assert machine.run() == 7
    timer.join()


# --- translated code never goes stale (internals.py, 3) ---

#: Two functions in one page, each returning a constant in eax; `first` at +0, `second` at +0x80.
_FUNCTIONS = bytes.fromhex("b801000000c3").ljust(0x80, b"\x90") + bytes.fromhex("b802000000c3")
_FUNCTION_PAGE = 0x3_0000


def test_a_guests_store_through_another_mapping_reaches_its_code(machine: Machine, assemble: Assemble) -> None:
    source = f"""
        init
        mov ecx, 0xc0000080; mov eax, 0xd00; xor edx, edx; wrmsr        # EFER.NXE
        mov rbx, {_FUNCTION_PAGE}
        lea rsi, [rbx + 0x80]
        mov rdi, ALIAS + {_FUNCTION_PAGE}
        call rbx
        call rsi
        mov byte ptr [rdi + 0x40], 0        # next to them: the page must stay watched
        mov byte ptr [rdi + 1], 0x11
        call rbx
        mov r8d, eax
        mov byte ptr [rdi + 0x81], 0x22
        call rsi
        shl eax, 8
        or eax, r8d
        exit
    """
    machine.load(assemble(source))
    machine.load(_FUNCTIONS, _FUNCTION_PAGE)
    assert machine.run() == 0x2211


def test_the_map_says_which_pages_hold_code(machine: Machine, assemble: Assemble) -> None:
    source = f"""
        init
        mov ecx, 0xc0000080; mov eax, 0xd00; xor edx, edx; wrmsr        # EFER.NXE
        mov rbx, {_FUNCTION_PAGE}
        mov rdi, ALIAS + {_FUNCTION_PAGE}
        out 0x20, al
        call rbx
        out 0x21, al
        mov byte ptr [rdi + 1], 0x11        # its only translation goes
        out 0x22, al
        call rbx
        exit
    """
    machine.load(assemble(source))
    machine.load(_FUNCTIONS, _FUNCTION_PAGE)
    marks: list[int] = []
    for port in (0x20, 0x21, 0x22):
        machine.platform.on_output[port] = lambda _value: marks.append(
            machine.code_map.marks[_FUNCTION_PAGE // PAGE_SIZE]
        )
    assert machine.run() == 0x11
    assert marks == [0, 1, 0]
    assert machine.code_map.marks[_FUNCTION_PAGE // PAGE_SIZE] == 1


def test_a_devices_write_is_executed_after_forget_code(machine: Machine, assemble: Assemble) -> None:
    source = f"""
        init
        mov rbx, {_FUNCTION_PAGE}
        lea rsi, [rbx + 0x80]
        call rbx
        call rsi
        out 0x20, al
        call rbx
        mov r8d, eax
        call rsi
        shl eax, 8
        or eax, r8d
        exit
    """
    machine.load(assemble(source))
    machine.load(_FUNCTIONS, _FUNCTION_PAGE)
    page = _FUNCTION_PAGE // PAGE_SIZE

    def device_writes(_value: int) -> None:
        machine.memory.write(_FUNCTION_PAGE + 1, b"\x33")
        machine.memory.write(_FUNCTION_PAGE + 0x81, b"\x44")
        assert machine.code_map.marks[page] == 1
        machine.call(lambda: machine.engine.forget_code(page, page))

    machine.platform.on_output[0x20] = device_writes
    assert machine.run() == 0x4433


def test_code_above_4_gib_is_marked_where_it_lies_in_the_mapping(assemble: Assemble) -> None:
    machine = Machine(LOW_RAM_LIMIT + RAM)
    try:
        machine.load(assemble("init; mov rax, 0x100000000; call rax; exit"))
        machine.load(_FUNCTIONS, HIGH_RAM_BASE)
        assert machine.run() == 1
        assert machine.code_map.marks[LOW_RAM_LIMIT // PAGE_SIZE] == 1
    finally:
        machine.engine.close()


def test_a_job_that_comes_while_an_interrupt_is_taken_is_run(machine: Machine, assemble: Assemble) -> None:
    """The look for jobs is over by then, and taking an interrupt clears the request that brought the CPU there."""
    machine.load(assemble("init; sti; out 0x20, al; 1: jmp 1b; .balign 256; iretq"))
    machine.set_gate(0x41, CODE + 256)

    def stop() -> None:
        machine.platform.exit_value = 7
        raise Exit

    def take() -> int | None:
        machine.engine.call(stop)
        machine.engine._internals.interrupt_request.value = 0
        return 0x41

    machine.platform.take_interrupt = take  # type: ignore[method-assign]
    machine.platform.on_output[0x20] = lambda _value: machine.engine.kick()
    give_up = threading.Timer(20, machine.call, (stop,))
    give_up.start()
    assert machine.run() == 7
    assert give_up.is_alive()
    give_up.cancel()
    give_up.join()
