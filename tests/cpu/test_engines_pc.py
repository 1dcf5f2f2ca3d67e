"""The `pc` machine is the same on every engine: notifications, interrupts, time, the end.

What is not the same is who carries a notification or an interrupt; the tests of that are KVM's alone, and say so.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from tinymachine import CODE, DATA
from tinypc import CONFIG_VECTOR, DISK, MSIX_TABLE, NOTIFY, PIN, TinyPc, as_worker

from lguest_mp import core, protocol
from lguest_mp.protocol import Died, Log, PowerOff, Reboot

Assemble = Callable[[str], bytes]

#: Labels and macros of the guests here. A handler is at CODE + 1024; there are two, 256 bytes apart.
PRELUDE = f"""
    .macro poweroff
        mov dx, 0x600
        mov al, 0x34
        out dx, al
        jmp .
    .endm
    .macro eoi
        mov dword ptr [r15 + 0xb0], 0
    .endm
    .macro apic
        mov r15d, 0xfee00000
        mov dword ptr [r15 + 0xf0], 0x1ff
        mov r14d, {NOTIFY:#x}
        mov r13d, {MSIX_TABLE:#x}
    .endm
"""
HANDLER = CODE + 1024


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(params=["unicorn", "compiled", "kvm"])
def pc(request: pytest.FixtureRequest, opened: ExitStack) -> TinyPc:
    if request.param == "compiled" and (lacks := core.missing()):
        pytest.skip(f"the compiled core {lacks}")
    return TinyPc(request.param, opened)


@pytest.fixture
def on_kvm(opened: ExitStack) -> TinyPc:
    return TinyPc("kvm", opened)


@pytest.fixture
def guest(assemble: Assemble) -> Assemble:
    """Assembles a guest: its code, and after ``handler:`` what is at HANDLER."""

    def build(source: str) -> bytes:
        return assemble(PRELUDE + source.replace("handler:", ".balign 1024; handler:").replace("\n", "\n  "))

    return build


# Notifications and interrupts

#: Notifies queue 1, and does so in each of its interrupts until there were 100.
PING_PONG = """
    init
    apic
    sti
    mov word ptr [r14 + 4], 1
1:  hlt
    cmp dword ptr [DATA], 100
    jb 1b
    poweroff
handler:
    inc dword ptr [DATA]
    eoi
    mov word ptr [r14 + 4], 1
    iretq
"""


def answer(pc: TinyPc, times: int = 100) -> None:
    """Answers each notification of queue 1 with an interrupt."""
    kick, call = pc.disk.kicks[1], pc.disk.calls[1]
    for _ in range(times):
        os.eventfd_read(kick)
        os.eventfd_write(call, 1)


def test_notifications_reach_the_worker_and_its_interrupts_the_guest(pc: TinyPc, guest: Assemble) -> None:
    pc.start_disk()
    pc.set_gate(CONFIG_VECTOR + 2, HANDLER)
    worker = as_worker(lambda: answer(pc))
    assert pc.run(guest(PING_PONG)) == PowerOff()
    worker.join()
    assert pc.word() == 100


def test_on_kvm_neither_passes_through_the_machine(on_kvm: TinyPc, guest: Assemble) -> None:
    on_kvm.start_disk()
    on_kvm.set_gate(CONFIG_VECTOR + 2, HANDLER)
    worker = as_worker(lambda: answer(on_kvm))
    on_kvm.run(guest(PING_PONG))
    worker.join()
    assert on_kvm.accesses == []
    # Nor is there anything left: each interrupt was one.
    for call in on_kvm.disk.calls:
        os.set_blocking(call, False)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(call)


def test_a_masked_interrupt_is_pending_and_comes_once_when_it_is_unmasked(pc: TinyPc, guest: Assemble) -> None:
    pc.start_disk()
    pc.pc.mmio_write(MSIX_TABLE + 32 + 12, 4, 1)
    pc.set_gate(CONFIG_VECTOR + 2, HANDLER)
    for _ in range(3):
        os.eventfd_write(pc.disk.calls[1], 1)
    source = """
        init
        apic
        sti
    1:  mov eax, [r13 + 0x1000]         # the pending bits
        test eax, 4
        jz 1b
        mov [DATA + 4], eax
        mov dword ptr [r13 + 32 + 12], 0
    2:  cmp dword ptr [DATA], 0
        je 2b
        mov eax, [r13 + 0x1000]
        mov [DATA + 8], eax
        mov ecx, 20000
    3:  dec ecx
        jnz 3b
        poweroff
    handler:
        inc dword ptr [DATA]
        eoi
        iretq
    """
    assert pc.run(guest(source)) == PowerOff()
    assert [pc.word(index) for index in range(3)] == [1, 4, 0]


def test_a_vector_that_is_masked_and_unmasked_all_the_time_loses_nothing(pc: TinyPc, guest: Assemble) -> None:
    """One answer at a time: if one got lost, both sides would wait for ever."""
    pc.start_disk()
    pc.set_gate(CONFIG_VECTOR + 2, HANDLER)
    source = """
        init
        apic
        sti
        mov word ptr [r14 + 4], 1
    1:  mov dword ptr [r13 + 32 + 12], 1
        mov dword ptr [r13 + 32 + 12], 0
        cmp dword ptr [DATA], 100
        jb 1b
        poweroff
    handler:
        inc dword ptr [DATA]
        eoi
        mov word ptr [r14 + 4], 1
        iretq
    """
    worker = as_worker(lambda: answer(pc))
    assert pc.run(guest(source)) == PowerOff()
    worker.join()


def test_an_interrupt_follows_its_vectors_message(pc: TinyPc, guest: Assemble) -> None:
    pc.start_disk()
    pc.set_gate(CONFIG_VECTOR + 2, HANDLER)
    pc.set_gate(0x77, HANDLER + 256)
    source = """
        init
        apic
        sti
        mov word ptr [r14 + 4], 1
    1:  hlt
        jmp 1b
    handler:
        inc dword ptr [DATA]
        eoi
        mov dword ptr [r13 + 32 + 8], 0x77
        mov word ptr [r14 + 4], 1
        iretq
        .balign 256
        poweroff
    """
    worker = as_worker(lambda: answer(pc, 2))
    assert pc.run(guest(source)) == PowerOff()
    worker.join()
    assert pc.word() == 1


def test_a_level_comes_again_until_the_guest_has_read_why(pc: TinyPc, guest: Assemble) -> None:
    """By the pin: the handler reads the ISR status every other time only, so each interrupt is two.

    It waits without HLT: a KVM that interprets guests tells of an EOI too late when there is a HLT soon after it.
    """
    pc.start_disk(msix=False)
    pc.route(PIN, 1 << 15 | 0x55)
    pc.set_gate(0x55, HANDLER)
    source = f"""
        init
        apic
        mov r12d, {DISK + 0x1000:#x}
        sti
        mov word ptr [r14 + 4], 1
    1:  jmp 1b
    handler:
        inc dword ptr [DATA]
        test dword ptr [DATA], 1
        jnz 2f
        mov al, [r12]
        add [DATA + 4], al
        cmp dword ptr [DATA], 40
        je 3f
        mov word ptr [r14 + 4], 1
    2:  eoi
        iretq
    3:  poweroff
    """
    worker = as_worker(lambda: answer(pc, 20))
    assert pc.run(guest(source)) == PowerOff()
    worker.join()
    assert (pc.word(0), pc.word(1)) == (40, 20)


def test_a_device_that_was_reset_is_not_notified(pc: TinyPc, guest: Assemble) -> None:
    pc.start_disk()
    pc.pc.mmio_write(DISK + 20, 1, 0)
    pc.run(guest("init; apic; mov word ptr [r14 + 4], 1; mov word ptr [r14], 0; poweroff"))
    for kick in pc.disk.kicks:
        os.set_blocking(kick, False)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(kick)


def test_notifications_follow_the_window(pc: TinyPc, guest: Assemble) -> None:
    pc.start_disk()
    pc.config_write(0x10, 4, 0xD000_0000)
    source = """
        init; apic
        mov word ptr [r14 + 4], 1           # where it was
        mov r14d, 0xd0003000
        mov word ptr [r14], 0
        poweroff
    """
    pc.run(guest(source))
    assert os.eventfd_read(pc.disk.kicks[0]) == 1
    os.set_blocking(pc.disk.kicks[1], False)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(pc.disk.kicks[1])


def test_where_two_windows_lie_on_each_other_nothing_breaks(pc: TinyPc, guest: Assemble) -> None:
    pc.start_disk()
    pc.config_write(0x10, 4, DISK - 0x8000)
    assert (
        pc.run(guest("init; apic; mov word ptr [r14 - 0x8000], 0; mov word ptr [r14 + 4], 1; poweroff")) == PowerOff()
    )


def test_a_change_of_configuration_interrupts(pc: TinyPc, guest: Assemble) -> None:
    pc.start_disk()
    pc.set_gate(CONFIG_VECTOR, HANDLER)

    def change() -> None:
        os.eventfd_read(pc.disk.kicks[0])
        protocol.send(pc.events, protocol.ConfigChanged(1, 0, "ab"))

    worker = as_worker(change)
    assert pc.run(guest("init; apic; sti; mov word ptr [r14], 0; 1: hlt; jmp 1b; handler: poweroff")) == PowerOff()
    worker.join()


# Time, and what the CPU is


def test_the_apics_timer_interrupts(pc: TinyPc, guest: Assemble) -> None:
    pc.set_gate(0xEC, HANDLER)
    source = """
        init
        apic
        mov dword ptr [r15 + 0x3e0], 0xb        # a count is a nanosecond
        mov dword ptr [r15 + 0x320], 0xec
        mov dword ptr [r15 + 0x380], 20000000
        sti
    1:  hlt
        jmp 1b
    handler:
        poweroff
    """
    code = guest(source)
    before = time.monotonic()
    assert pc.run(code) == PowerOff()
    assert time.monotonic() - before >= 0.02


def test_the_clock_is_kvms(pc: TinyPc, guest: Assemble) -> None:
    source = """
        mov ecx, 0x4b564d01; mov eax, DATA + 0x101; xor edx, edx; wrmsr
        mov eax, 0x40000000; cpuid
        mov [DATA], eax; mov [DATA + 4], ebx; mov [DATA + 8], ecx; mov [DATA + 12], edx
        mov eax, 0x40000001; cpuid; mov [DATA + 16], eax
        mov eax, 0x40000010; cpuid; mov [DATA + 20], eax; mov [DATA + 24], ebx
        poweroff
    """
    pc.run(guest(source))
    last, *signature = struct.unpack("<I12s", pc.memory.read(DATA, 16))
    assert signature == [b"KVMKVMKVM\0\0\0"]
    assert last >= 0x4000_0010
    assert pc.word(4) & 1 << 3  # KVM_FEATURE_CLOCKSOURCE2
    assert pc.word(6) == 1_000_000
    version, _, tsc, _, multiplier, _, _, _ = struct.unpack("<IIQQIbBH", pc.memory.read(DATA + 0x100, 32))
    assert version % 2 == 0
    assert min(version, tsc, multiplier) > 0


@pytest.mark.parametrize("cpus", [1, 2, 6])
def test_a_guest_finds_as_many_processors_as_there_are(opened: ExitStack, guest: Assemble, cpus: int) -> None:
    """KVM's: each is started by the first one, says who it is, and stops."""
    pc = TinyPc("kvm", opened, cpus)
    source = f"""
        init
        apic
        mov rsi, {CODE + 1024:#x}                   # real mode's code goes to 0x9000
        mov edi, 0x9000
        mov ecx, 64
        rep movsb
        mov eax, 0xb; xor ecx, ecx; cpuid; mov [DATA + 4], edx
        mov eax, 0xb; mov ecx, 1; cpuid; mov [DATA + 8], ebx
        mov dword ptr [r15 + 0x300], 0xc4500        # INIT to all others
        mov dword ptr [r15 + 0x300], 0xc4609        # start-up at 0x9000
    1:  cmp word ptr [0x8ff0], {cpus - 1}
        jb 1b
        poweroff
    handler:
        .code16
        xor eax, eax
        mov ds, ax
        lock inc word ptr [0x8ff0]
        cli
        hlt
        .code64
    """
    assert pc.run(guest(source)) == PowerOff()
    assert (pc.word(1), pc.word(2)) == (0, cpus)


# The end


@pytest.mark.parametrize(
    ("source", "end"),
    [
        ("mov dx, 0x602; mov al, 1; out dx, al", Reboot()),
        ("mov al, 0xfe; out 0x64, al", Reboot()),
        ("mov dx, 0x505; mov al, 1; out dx, al", Died("the guest kernel panicked")),
        ("cli; hlt", PowerOff()),
    ],
)
def test_a_guest_ends_itself(pc: TinyPc, guest: Assemble, source: str, end: protocol.Message) -> None:
    assert pc.run(guest(source + "; 1: jmp 1b")) == end


def test_a_guest_that_faults_for_good_has_died_and_kvm_tells_its_registers(pc: TinyPc, guest: Assemble) -> None:
    code = guest("lidt [rip + 1f]; mov rbx, 0xabcdef; mov rax, [0x100000000000]; 1: .word 0; .quad 0")
    last = pc.run(code)
    assert isinstance(last, Died)
    assert last.reason.startswith("triple fault at RIP 0x100")
    told = [message for message in pc.messages if isinstance(message, Log)]
    if told:
        assert all(message.verbose for message in told)
        assert "RBX 0xabcdef" in told[0].text


def test_the_end_of_the_events_thread_is_the_guests(
    pc: TinyPc, guest: Assemble, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("in a handler")

    reader, writer = os.pipe()
    pc.pc.add_reader(reader, fail)
    os.write(writer, b"x")
    assert pc.run(guest("1: jmp 1b")) == Died("internal error: ZeroDivisionError: in a handler")
    assert "in fail" in capsys.readouterr().err
    os.close(reader)
    os.close(writer)
