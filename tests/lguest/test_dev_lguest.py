"""What is said to /dev/lguest, byte for byte as the original launcher said it."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from recordeddevice import FILE, RecordedDevice

from lguest_mp import protocol
from lguest_mp.bus.lguest_page import DEVICE_PAGES
from lguest_mp.cpu.dev_lguest import DevLguest, open_device
from lguest_mp.cpu.engine import EntryState
from lguest_mp.cpu.lguest_host import GuestDied, GuestRestarts, Pending, Register
from lguest_mp.errors import LguestError
from lguest_mp.machine.lguest import LguestMachine
from lguest_mp.machine.wiring import DevicePort
from lguest_mp.memory import PAGE_SIZE, GuestMemory
from lguest_mp.protocol import Died, DriverReady, Message
from lguest_mp.virtio.console import Console
from lguest_mp.virtio.rng import Rng

#: Where guest memory is in a launcher of 32 bits.
BASE = 0x4050_0000

Play = Callable[[str], DevLguest]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Iterator[Play]:
    """Makes the launcher's side of a device that follows a script to its end."""
    devices: list[RecordedDevice] = []

    def start(script: str) -> DevLguest:
        devices.append(RecordedDevice(script, monkeypatch))
        return DevLguest(FILE, BASE)

    yield start
    for device in devices:
        device.finish()


# The verbs


def test_initialize_tells_base_limits_and_start(play: Play) -> None:
    host = play("write 00000000 00005040 0a010000 20001000 00020000 = 20")
    host.initialize(pfn_limit=0x10A, start=0x10_0020, device_limit=0x200)


def test_a_notification(play: Play) -> None:
    host = play("pread 12 @0 = 1f 00000000000000 00001000")
    assert host.run() == Pending(0x1F, bytes(7), 0x10_0000)


def test_a_trap_with_its_instruction(play: Play) -> None:
    host = play("pread 12 @0 = 0e 8b053412cdab90 78563412")
    assert host.run() == Pending(14, bytes.fromhex("8b053412cdab90"), 0x1234_5678)


@pytest.mark.parametrize("register", Register)
def test_registers_are_named_by_their_place_in_user_regs_struct(play: Play, register: Register) -> None:
    host = play(
        f"""
        pwrite 05000000 {struct.pack("<I", register).hex()} @0 = 8
        pread 4 @0 = efbeadde
        pwrite 06000000 {struct.pack("<I", register).hex()} ffffffff @0 = 12
        """
    )
    assert host.get_register(register) == 0xDEAD_BEEF
    host.set_register(register, 0xFFFF_FFFF)


def test_a_trap_is_injected(play: Play) -> None:
    play("write 07000000 0e000000 = 8").inject(14)


def test_an_interrupt(play: Play) -> None:
    play("write 02000000 03000000 = 0").interrupt(3)


def test_a_queue_is_attached(play: Play) -> None:
    play("write 04000000 00101000 09000000 = 0").attach(0x10_1000, 9)


def test_the_file_is_closed(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    host = play("pread 12 @0 ! ERESTART")
    with pytest.raises(GuestRestarts):
        host.run()
    host.close()


# How a guest ends


def test_a_dead_guest_s_reason_is_read(play: Play) -> None:
    host = play(
        f"""
        pread 12 @0 ! ENOENT
        pread 1023 @0 = {b"CRASH: no init found".hex()} 00 ff
        """
    )
    with pytest.raises(GuestDied, match=r"^CRASH: no init found$"):
        host.run()


def test_a_reason_that_is_no_text(play: Play) -> None:
    host = play(
        """
        pread 12 @0 ! ENOENT
        pread 1023 @0 = 62 ff
        """
    )
    with pytest.raises(GuestDied, match=r"^b\ufffd$"):
        host.run()


def test_a_guest_that_wants_to_start_afresh(play: Play) -> None:
    with pytest.raises(GuestRestarts):
        play("pread 12 @0 ! ERESTART").run()


def test_a_dead_guest_is_not_interrupted(play: Play) -> None:
    play("write 02000000 03000000 ! ENOENT").interrupt(3)


# What fails, in the original's words


def run(host: DevLguest) -> None:
    host.run()


@pytest.mark.parametrize(
    ("script", "act", "words"),
    [
        (
            "write 00000000 00005040 01000000 02000000 03000000 ! EINVAL",
            lambda host: host.initialize(1, 2, 3),
            "Writing to /dev/lguest: Invalid argument",
        ),
        (
            "write 00000000 00005040 01000000 02000000 03000000 ! EBUSY",
            lambda host: host.initialize(1, 2, 3),
            "/dev/lguest has had a guest already, and with --chroot or --username it cannot be opened again;"
            " start lguest again",
        ),
        ("pread 12 @0 ! EFAULT", run, "Running guest failed: Bad address"),
        (
            "pread 12 @0 = 00001000",
            run,
            "Running guest failed: /dev/lguest gave 4 bytes, not 12; it is another lguest's",
        ),
        (
            "pwrite 05000000 30000000 @0 ! EINVAL",
            lambda host: host.get_register(Register.EIP),
            "Getting register 48: Invalid argument",
        ),
        (
            "pwrite 05000000 30000000 @0 = 8\npread 4 @0 = 00",
            lambda host: host.get_register(Register.EIP),
            "Reading register 48: 1 bytes",
        ),
        (
            "pwrite 06000000 30000000 01000000 @0 ! EINVAL",
            lambda host: host.set_register(Register.EIP, 1),
            "Setting register 48: Invalid argument",
        ),
        (
            "write 07000000 0d000000 ! EINVAL\npwrite 05000000 30000000 @0 = 8\npread 4 @0 = 000010c0",
            lambda host: host.inject(13),
            "Reinjecting trap 13 for fault at 0xc0100000: Invalid argument",
        ),
        ("write 02000000 40000000 ! EINVAL", lambda host: host.interrupt(64), "Triggering irq 64: Invalid argument"),
        ("write 02000000 03000000 = 8", lambda host: host.interrupt(3), "Triggering irq 3: answered 8"),
        (
            "write 04000000 00101000 09000000 ! EBADF",
            lambda host: host.attach(0x10_1000, 9),
            "Attaching eventfd: Bad file descriptor",
        ),
    ],
)
def test_what_fails(play: Play, script: str, act: Callable[[DevLguest], None], words: str) -> None:
    host = play(script)
    with pytest.raises(LguestError) as caught:
        act(host)
    assert str(caught.value) == words


@pytest.mark.parametrize("base", [0xFFFF_F000, 1 << 32, 0x7F00_0000_0000])
def test_memory_that_no_long_can_tell_of_is_refused_before_anything_is_said(play: Play, base: int) -> None:
    play("pread 12 @0 ! ERESTART")
    with pytest.raises(LguestError, match="needs a 32-bit Python"):
        DevLguest(FILE, base).initialize(1, 2, 2)
    with pytest.raises(GuestRestarts):
        DevLguest(FILE, base).run()


# The device itself


def test_a_host_without_the_device_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LguestError, match=r"there is no .*; leave --cpu=lguest out"):
        open_device(str(tmp_path / "lguest"))


def test_a_device_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LguestError, match=r"^Failed to open .*: Is a directory$"):
        open_device(str(tmp_path))


def test_the_device_is_not_inherited(tmp_path: Path) -> None:
    (tmp_path / "lguest").touch()
    fd = open_device(str(tmp_path / "lguest"))
    assert not os.get_inheritable(fd)
    os.close(fd)


# A whole life, with the machine around it

RAM = 1 << 20
ENTRY = EntryState(rip=0x10_0000, rsi=0, cr3=0, gdt_base=0, gdt_limit=0)


def test_the_life_of_a_guest(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte of a guest that brings up a console and an rng, traps, resets one, and dies."""
    memory = GuestMemory(RAM + DEVICE_PAGES * PAGE_SIZE)
    requests, machine_requests = protocol.channel_pair()
    events, machine_events = protocol.channel_pair()
    fds = [os.eventfd(0) for _ in range(6)]
    ports = [
        DevicePort(Console(), tuple(fds[0:2]), tuple(fds[2:4])),
        DevicePort(Rng("rng0"), (fds[4],), (fds[5],)),
    ]
    console, rng = RAM, RAM + 33
    kicks = [struct.pack("<I", fd).hex() for fd in (fds[0], fds[1], fds[4])]
    hexadecimal = {"console": console.to_bytes(4, "little").hex(), "rng": rng.to_bytes(4, "little").hex()}
    host = play(
        f"""
        write 00000000 00005040 0a010000 00001000 00020000 = 20
        pread 12 @0 = 1f 00000000000000 {hexadecimal["console"]}
        write 04000000 00101000 {kicks[0]} = 0
        write 04000000 00401000 {kicks[1]} = 0
        pread 12 @0 = 0d ec000000000000 00000000
        pwrite 05000000 34000000 @0 = 8
        pread 4 @0 = 61000000
        pwrite 05000000 08000000 @0 = 8
        pread 4 @0 = 64000000
        pwrite 05000000 18000000 @0 = 8
        pread 4 @0 = 78563412
        pwrite 06000000 18000000 01563412 @0 = 12
        pwrite 05000000 30000000 @0 = 8
        pread 4 @0 = 000010c0
        pwrite 06000000 30000000 010010c0 @0 = 12
        pread 12 @0 = 1f 00000000000000 {hexadecimal["rng"]}
        write 04000000 00701000 {kicks[2]} = 0
        write 02000000 03000000 = 0
        pread 12 @0 = 0d 0f0b0000000000 00000000
        pwrite 05000000 34000000 @0 = 8
        pread 4 @0 = 61000000
        write 07000000 0d000000 = 8
        pread 12 @0 = 0e 89000000000000 00002000
        write 07000000 0e000000 = 8
        pread 12 @0 ! ENOENT
        pread 1023 @0 = {b"CRASH: over".hex()}
        """
    )
    monkeypatch.setattr("lguest_mp.machine.lguest.LguestMachine._print", lambda *_: None)
    interrupted = threading.Event()
    interrupt = host.interrupt

    def observed(irq: int) -> None:
        interrupt(irq)
        interrupted.set()

    monkeypatch.setattr(host, "interrupt", observed)
    heard: list[Message] = []

    def supervise() -> None:
        while not isinstance(heard[-1] if heard else None, Died):
            message = protocol.receive(requests)
            assert message is not None
            heard.append(message)
            if isinstance(message, DriverReady):
                if message.device == 1:  # its worker is there, and has something at once
                    os.eventfd_write(fds[5], 1)
                    assert interrupted.wait(30)
                protocol.send(requests, protocol.Done())

    supervisor = threading.Thread(target=supervise)
    supervisor.start()
    machine = LguestMachine(memory, RAM, ports, machine_requests, machine_events, input_fd=fds[0], output_fd=1)
    for descriptor in (console, rng):
        memory.write(descriptor + 4, b"\x03")
    machine.run(host, ENTRY)
    host.close()
    supervisor.join()
    machine.close()
    assert [type(message).__name__ for message in heard] == ["DriverReady", "DriverReady", "Log", "Died"]
    assert heard[-1] == Died("CRASH: over")
    for end in (requests, machine_requests, events, machine_events):
        end.close()
    for fd in fds:
        os.close(fd)
