"""The machine as a whole, with a CPU that does what the test says and a supervisor that says yes."""

from __future__ import annotations

import contextlib
import os
import pty
import socket
import struct
import sys
import threading
import time
import tty
from collections.abc import Callable, Iterator
from typing import NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lguest_mp import protocol
from lguest_mp.cpu.engine import Engine, EntryState, GuestFault, GuestHalted
from lguest_mp.machine.embedded import EmbeddedPc, MakeBoard
from lguest_mp.machine.lapic import APIC_BASE_MSR, TSC_DEADLINE_MSR
from lguest_mp.machine.layout import IO_APIC_BASE, LOCAL_APIC_BASE, PCI_WINDOW_FIRST, SERIAL_PORT
from lguest_mp.machine.power import GuestEnd
from lguest_mp.machine.process import of_core
from lguest_mp.machine.wiring import DevicePort
from lguest_mp.memory import GuestMemory
from lguest_mp.protocol import Died, Interrupted, Log, Message, PowerOff, Reboot
from lguest_mp.virtio.device import Device, DeviceId, QueueLayout
from lguest_mp.virtio.queue import Queue
from lguest_mp.worker import WorkerContext

ENTRY = EntryState(rip=0x100_0000, rsi=0x2000, cr3=0x3000, gdt_base=0x1000, gdt_limit=31)
CONSOLE, DISK = PCI_WINDOW_FIRST, PCI_WINDOW_FIRST + 0x8000
ISR, NOTIFY, MSIX_TABLE = 0x1000, 0x3000, 0x4000


def board_of(core_kind: str) -> MakeBoard:
    """Makes a core's board."""
    return of_core(core_kind)()[0]


class FakeDevice(Device):
    """A device with two queues and four bytes of configuration."""

    queue_names = ("first", "second")

    def __init__(self, name: str, device_id: DeviceId) -> None:
        super().__init__(name, bytes(4))
        self.device_id = device_id

    @property
    def features(self) -> int:
        return 0

    def serve(self, queue_index: int, queue: Queue, context: WorkerContext) -> NoReturn:
        raise NotImplementedError


class FakeEngine(Engine):
    """A CPU whose guest is a Python function."""

    def __init__(self, guest: Callable[[FakeEngine], None]) -> None:
        self._guest = guest
        self._attention = threading.Event()
        self._jobs: list[Callable[[], None]] = []
        self.entered: EntryState | None = None

    def enter(self, state: EntryState) -> None:
        self.entered = state

    def run(self) -> None:
        self._guest(self)

    def kick(self) -> None:
        self._attention.set()

    def call(self, job: Callable[[], None]) -> None:
        self._jobs.append(job)
        self._attention.set()

    def halt(self) -> None:
        """HLT: sleeps until there is something to do, does it."""
        self._attention.wait()
        self._attention.clear()
        while self._jobs:
            self._jobs.pop(0)()

    def forget_code(self, first_page: int, last_page: int) -> None:
        """There is none."""


class Machine:
    """A machine with a console and a disk, its supervisor, and its guest's way of doing things."""

    def __init__(self, core_kind: str = "python") -> None:
        self.requests, machine_requests = protocol.channel_pair()
        self.events, machine_events = protocol.channel_pair()
        self._ends = [self.requests, machine_requests, self.events, machine_events]
        self.person, terminal = pty.openpty()
        tty.setraw(terminal)
        self.output, output = os.pipe()
        self._fds = [self.person, terminal, self.output, output]
        self.terminal = terminal
        self.devices = [
            DevicePort(device, (self._eventfd(), self._eventfd()), (self._eventfd(), self._eventfd()))
            for device in (FakeDevice("console", DeviceId.CONSOLE), FakeDevice("disk0", DeviceId.BLOCK))
        ]
        self.memory = GuestMemory(1 << 20)
        self.pc = EmbeddedPc(
            self.memory, self.devices, machine_requests, machine_events, terminal, output, board_of(core_kind)
        )
        self.messages: list[Message] = []
        self.on_request: Callable[[Message], None] = lambda _message: None
        self.interrupted = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise)

    def _eventfd(self) -> int:
        fd = os.eventfd(0)
        self._fds.append(fd)
        return fd

    def _supervise(self) -> None:
        while (message := protocol.receive(self.requests)) is not None:
            self.messages.append(message)
            match message:
                case Interrupted():
                    self.interrupted.set()
                case protocol.DriverReady() | protocol.DeviceReset() | protocol.QueueReady() | protocol.QueueReset():
                    self.on_request(message)
                    protocol.send(self.requests, protocol.Done())
                case PowerOff() | Reboot() | Died():
                    return

    def run(self, guest: Callable[[FakeEngine], None]) -> Message:
        """Runs the guest to its end; the machine's last words."""
        self._supervisor.start()
        self.pc.run(FakeEngine(guest), ENTRY)
        self._supervisor.join()
        return self.messages[-1]

    def close(self) -> None:
        self.pc.close()
        for end in self._ends:
            end.close()
        for fd in self._fds:
            os.close(fd)

    # What a guest does

    def power_off(self) -> None:
        self.pc.port_write(0x600, 1, 1 << 5 | 5 << 2)

    def next_vector(self, cpu: FakeEngine) -> int:
        """Sleeps until an interrupt comes, takes it and ends it."""
        while not self.pc.interrupt_pending():
            cpu.halt()
        vector = self.pc.take_interrupt()
        assert vector is not None
        self.pc.mmio_write(LOCAL_APIC_BASE + 0xB0, 4, 0)
        return vector

    def enable_apic(self) -> None:
        self.pc.mmio_write(LOCAL_APIC_BASE + 0xF0, 4, 0x1FF)

    def start(self, window: int, *, msix: bool = True) -> None:
        """Brings a device up; its vectors are 0x40 (configuration), 0x41 and 0x42."""
        write = self.pc.mmio_write
        self.pc.port_write(0xCF8, 4, 0x8000_0000 | ((window - PCI_WINDOW_FIRST >> 15) + 1) << 11 | 4)
        self.pc.port_write(0xCFC, 2, 6)
        if msix:
            self.pc.port_write(0xCF8, 4, 0x8000_0000 | ((window - PCI_WINDOW_FIRST >> 15) + 1) << 11 | 0x40)
            self.pc.port_write(0xCFE, 2, 0x8000)
        for vector in range(3):
            entry = window + MSIX_TABLE + 16 * vector
            for offset, word in ((0, 0xFEE0_0000), (4, 0), (8, 0x40 + vector), (12, 0)):
                write(entry + offset, 4, word)
        for status in (1, 3):
            write(window + 20, 1, status)
        write(window + 8, 4, 1)
        write(window + 12, 4, 1)
        write(window + 20, 1, 11)
        write(window + 16, 2, 0)
        for queue in (0, 1):
            write(window + 22, 2, queue)
            write(window + 26, 2, queue + 1)
            write(window + 28, 2, 1)
        write(window + 20, 1, 15)

    def reset(self, window: int) -> None:
        self.pc.mmio_write(window + 20, 1, 0)

    def route(self, pin: int, entry: int) -> None:
        for half, word in ((1, entry >> 32), (0, entry & 0xFFFF_FFFF)):
            self.pc.mmio_write(IO_APIC_BASE, 4, 0x10 + pin * 2 + half)
            self.pc.mmio_write(IO_APIC_BASE + 0x10, 4, word)


@pytest.fixture
def machine(core_kind: str) -> Iterator[Machine]:
    machine = Machine(core_kind)
    yield machine
    machine.close()


# How a guest ends


def test_the_engine_is_entered_at_the_entry_and_run(machine: Machine) -> None:
    entered: list[EntryState | None] = []

    def guest(cpu: FakeEngine) -> None:
        entered.append(cpu.entered)
        machine.power_off()

    assert machine.run(guest) == PowerOff()
    assert entered == [ENTRY]


def raising(error: Exception) -> Callable[[FakeEngine], None]:
    def guest(_cpu: FakeEngine) -> None:
        raise error

    return guest


@pytest.mark.parametrize(
    ("port", "value", "end"),
    [(0x602, 1, Reboot()), (0x64, 0xFE, Reboot()), (0x505, 1, Died("the guest kernel panicked"))],
)
def test_a_guest_that_ends_itself(machine: Machine, port: int, value: int, end: Message) -> None:
    assert machine.run(lambda _cpu: machine.pc.port_write(port, 1, value)) == end


def test_a_guest_that_halts_for_good_has_powered_off(machine: Machine) -> None:
    assert machine.run(raising(GuestHalted())) == PowerOff()
    assert machine.messages[0] == Log("the guest halted")


def test_a_guest_that_cannot_go_on_has_died(machine: Machine) -> None:
    assert machine.run(raising(GuestFault("triple fault at RIP 0x1"))) == Died("triple fault at RIP 0x1")


def test_a_bug_of_ours_ends_the_guest_and_shows_where_it_is(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert machine.run(raising(ZeroDivisionError("x / 0"))) == Died("internal error: ZeroDivisionError: x / 0")
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_on_the_events_thread_does_so_too(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ZeroDivisionError("in a handler")

    reader, writer = os.pipe()
    machine.pc.add_reader(reader, fail)

    def guest(cpu: FakeEngine) -> None:
        os.write(writer, b"x")
        while True:
            cpu.halt()

    assert machine.run(guest) == Died("internal error: ZeroDivisionError: in a handler")
    assert "in fail" in capsys.readouterr().err
    os.close(reader)
    os.close(writer)


def test_without_a_supervisor_there_is_nothing_to_run_for(machine: Machine) -> None:
    def guest(cpu: FakeEngine) -> None:
        machine.events.shutdown(socket.SHUT_RDWR)
        while True:
            cpu.halt()

    thread = threading.Thread(target=machine._supervise)
    thread.start()
    machine.pc.run(FakeEngine(guest), ENTRY)
    machine.requests.shutdown(socket.SHUT_RDWR)
    thread.join()
    assert machine.messages == []


def test_a_machine_leaves_nothing_behind(machine: Machine) -> None:
    interval = sys.getswitchinterval()
    machine.run(lambda _cpu: machine.power_off())
    assert sys.getswitchinterval() == interval
    assert [thread.name for thread in threading.enumerate() if thread.name == "events"] == []


# Who answers where


def test_where_nobody_is_reads_are_all_ones_and_writes_do_nothing(machine: Machine) -> None:
    for size in (1, 2, 4):
        assert machine.pc.port_read(0x1234, size) == (1 << 8 * size) - 1
        machine.pc.port_write(0x1234, size, 0)
    for size in (1, 2, 4, 8):
        assert machine.pc.mmio_read(0xE000_0000, size) == (1 << 8 * size) - 1
        machine.pc.mmio_write(0xE000_0000, size, 0)
    assert machine.pc.msr_read(0x10) is None
    assert machine.pc.msr_write(0x10, 0) is False


def test_everybody_answers_where_the_layout_has_them(machine: Machine) -> None:
    pc = machine.pc
    assert pc.mmio_read(LOCAL_APIC_BASE + 0x30, 4) == 0x6_0014
    pc.mmio_write(IO_APIC_BASE, 4, 1)
    assert pc.mmio_read(IO_APIC_BASE + 0x10, 4) == 0x17_0020
    assert pc.mmio_read(CONSOLE + 18, 2) == 2
    assert pc.port_read(SERIAL_PORT + 5, 1) == 0x60
    pc.port_write(0xCF8, 4, 0x8000_1000)
    assert pc.port_read(0xCFC, 4) == 0x1042_1AF4
    assert pc.cpuid(0x4000_0000, 0, (0, 0, 0, 0))[1] == int.from_bytes(b"KVMK", "little")
    assert pc.msr_read(APIC_BASE_MSR) == 0xFEE0_0900


def test_registers_follow_their_windows(machine: Machine) -> None:
    pc = machine.pc
    pc.port_write(0xCF8, 4, 0x8000_0810)
    pc.port_write(0xCFC, 4, 0xD000_0000)
    assert pc.mmio_read(0xD000_0000 + 18, 2) == 2
    assert pc.mmio_read(CONSOLE + 18, 2) == 0xFFFF
    pc.msr_write(APIC_BASE_MSR, 0xFED0_0900)
    assert pc.mmio_read(0xFED0_0030, 4) == 0x6_0014
    assert pc.mmio_read(LOCAL_APIC_BASE + 0x30, 4) == 0xFFFF_FFFF


def test_serial_output_reaches_standard_output(machine: Machine) -> None:
    for byte in b"hello\n":
        machine.pc.port_write(SERIAL_PORT, 1, byte)
    assert os.read(machine.output, 100) == b"hello\n"


# Devices


def test_a_device_starts_notifies_interrupts_and_is_reset(machine: Machine) -> None:
    kick, call = machine.devices[1].kicks[1], machine.devices[1].calls[1]

    def guest(cpu: FakeEngine) -> None:
        machine.enable_apic()
        machine.start(DISK)
        machine.pc.mmio_write(DISK + NOTIFY + 4, 2, 1)
        assert os.eventfd_read(kick) == 1
        for _ in range(3):
            os.eventfd_write(call, 1)
            assert machine.next_vector(cpu) == 0x42
        machine.reset(DISK)
        assert machine.pc.mmio_read(DISK + 20, 1) == 0
        machine.power_off()

    assert machine.run(guest) == PowerOff()
    empty = QueueLayout(256, 0, 0, 0)
    assert machine.messages[:2] == [protocol.DriverReady(1, 1 << 32, (empty, empty)), protocol.DeviceReset(1)]


def test_an_interrupt_of_the_first_moment_is_not_lost(machine: Machine) -> None:
    machine.on_request = lambda _message: os.eventfd_write(machine.devices[1].calls[0], 1)

    def guest(cpu: FakeEngine) -> None:
        machine.enable_apic()
        machine.start(DISK)
        assert machine.next_vector(cpu) == 0x41
        machine.power_off()

    assert machine.run(guest) == PowerOff()


def test_without_msix_the_interrupt_comes_by_the_io_apic(machine: Machine) -> None:
    def guest(cpu: FakeEngine) -> None:
        machine.enable_apic()
        machine.route(18, 1 << 15 | 0x55)
        machine.start(DISK, msix=False)
        for _ in range(3):
            os.eventfd_write(machine.devices[1].calls[0], 1)
            while not machine.pc.interrupt_pending():
                cpu.halt()
            assert machine.pc.take_interrupt() == 0x55
            assert machine.pc.mmio_read(DISK + ISR, 1) == 1
            machine.pc.mmio_write(LOCAL_APIC_BASE + 0xB0, 4, 0)
            assert not machine.pc.interrupt_pending()
        machine.power_off()

    assert machine.run(guest) == PowerOff()


def test_a_change_of_configuration_reaches_the_guest(machine: Machine) -> None:
    def guest(cpu: FakeEngine) -> None:
        machine.enable_apic()
        machine.start(DISK)
        protocol.send(machine.events, protocol.ConfigChanged(1, 1, "abcd"))
        assert machine.next_vector(cpu) == 0x40
        assert machine.pc.mmio_read(DISK + 0x2000, 4) == 0x00CD_AB00
        machine.power_off()

    assert machine.run(guest) == PowerOff()


def test_a_broken_device_needs_a_reset(machine: Machine) -> None:
    def guest(cpu: FakeEngine) -> None:
        machine.enable_apic()
        machine.start(DISK)
        protocol.send(machine.events, protocol.DeviceBroken(1))
        assert machine.next_vector(cpu) == 0x40
        assert machine.pc.mmio_read(DISK + 20, 1) == 15 | 64
        machine.reset(DISK)
        machine.start(DISK)
        assert machine.pc.mmio_read(DISK + 20, 1) == 15
        machine.power_off()

    assert machine.run(guest) == PowerOff()


def test_news_from_before_a_reset_does_not_break_what_comes_after(machine: Machine) -> None:
    """The supervisor says that the device is broken, and then that it is reset; both are there at the same time."""

    def on_request(message: Message) -> None:
        if isinstance(message, protocol.DeviceReset):
            protocol.send(machine.events, protocol.DeviceBroken(1))

    machine.on_request = on_request

    def guest(_cpu: FakeEngine) -> None:
        for _ in range(50):
            machine.start(DISK)
            machine.reset(DISK)
        machine.start(DISK)
        assert machine.pc.mmio_read(DISK + 20, 1) == 15
        machine.power_off()

    assert machine.run(guest) == PowerOff()


def test_a_driver_that_breaks_the_rules_costs_one_line(machine: Machine) -> None:
    def guest(_cpu: FakeEngine) -> None:
        for status in (1, 3, 11, 11, 11):
            machine.pc.mmio_write(DISK + 20, 1, status)
        machine.power_off()

    machine.run(guest)
    assert [message for message in machine.messages if isinstance(message, Log)] == [
        Log("disk0: the driver is a legacy one, which this device does not support (no VERSION_1)", verbose=False)
    ]


def test_no_interrupt_is_lost_between_the_threads(machine: Machine) -> None:
    """A worker of each queue interrupts as fast as the guest answers; a lost one would leave both asleep for ever."""
    rounds = 2000
    disk = machine.devices[1]

    def worker(queue: int) -> None:
        for _ in range(rounds):
            os.eventfd_write(disk.calls[queue], 1)
            os.eventfd_read(disk.kicks[queue])

    workers = [threading.Thread(target=worker, args=(queue,)) for queue in (0, 1)]

    def guest(cpu: FakeEngine) -> None:
        machine.enable_apic()
        machine.start(DISK)
        for thread in workers:
            thread.start()
        counts = [0, 0]
        while counts != [rounds, rounds]:
            queue = machine.next_vector(cpu) - 0x41
            counts[queue] += 1
            machine.pc.mmio_write(DISK + NOTIFY + 4 * queue, 2, queue)
        machine.power_off()

    assert machine.run(guest) == PowerOff()
    for thread in workers:
        thread.join()


# Time


def test_the_timer_interrupts_at_the_deadline(machine: Machine) -> None:
    def guest(cpu: FakeEngine) -> None:
        pc = machine.pc
        machine.enable_apic()
        pc.mmio_write(LOCAL_APIC_BASE + 0x320, 4, 2 << 17 | 0xEC)
        khz = pc.cpuid(0x4000_0010, 0, (0, 0, 0, 0))[0]
        pc.msr_write(0x4B56_4D01, 0x1001)
        _, _, tsc, *_ = struct.unpack("<IIQQIbBH", machine.memory.read(0x1000, 32))
        before = time.monotonic()
        pc.msr_write(TSC_DEADLINE_MSR, tsc + 20 * khz)
        assert machine.next_vector(cpu) == 0xEC
        assert time.monotonic() - before > 0.015
        assert pc.msr_read(TSC_DEADLINE_MSR) == 0
        machine.power_off()

    assert machine.run(guest) == PowerOff()


# The terminal


def listen(machine: Machine) -> None:
    """The guest opens its serial port: FIFOs, OUT2, receiver interrupts on pin 4."""
    machine.enable_apic()
    machine.route(4, 0x34)
    for register, value in ((2, 0x07), (4, 0x0B), (1, 0x01)):
        machine.pc.port_write(SERIAL_PORT + register, 1, value)


def type_line(machine: Machine, cpu: FakeEngine, text: bytes) -> bytes:
    """Types, and reads as much from the serial port."""
    os.write(machine.person, text)
    received = bytearray()
    while len(received) < len(text):
        while not machine.pc.port_read(SERIAL_PORT + 5, 1) & 1:
            assert machine.next_vector(cpu) == 0x34
        received.append(machine.pc.port_read(SERIAL_PORT, 1))
    return bytes(received)


def test_what_is_typed_reaches_the_serial_port_until_the_console_is_ready_and_again_after_it(
    machine: Machine,
) -> None:
    def guest(cpu: FakeEngine) -> None:
        listen(machine)
        assert type_line(machine, cpu, b"before") == b"before"
        machine.start(CONSOLE)
        os.write(machine.person, b"for the console")
        assert os.read(machine.terminal, 100) == b"for the console"
        assert not machine.pc.port_read(SERIAL_PORT + 5, 1) & 1
        machine.reset(CONSOLE)
        assert type_line(machine, cpu, b"after") == b"after"
        machine.power_off()

    assert machine.run(guest) == PowerOff()


def test_a_console_that_has_started_is_told_to_look_at_its_size(machine: Machine) -> None:
    def guest(cpu: FakeEngine) -> None:
        machine.enable_apic()
        machine.start(CONSOLE)
        assert machine.next_vector(cpu) == 0x40  # the configuration's
        machine.power_off()

    assert machine.run(guest) == PowerOff()


def test_a_broken_console_gives_the_terminal_back(machine: Machine) -> None:
    def guest(cpu: FakeEngine) -> None:
        listen(machine)
        machine.start(CONSOLE)
        protocol.send(machine.events, protocol.DeviceBroken(0))
        assert machine.next_vector(cpu) == 0x40
        assert type_line(machine, cpu, b"back") == b"back"
        machine.power_off()

    assert machine.run(guest) == PowerOff()


def test_three_control_c_ask_for_the_end(machine: Machine) -> None:
    def guest(cpu: FakeEngine) -> None:
        listen(machine)
        for _ in range(3):
            assert type_line(machine, cpu, b"\x03") == b"\x03"
        machine.interrupted.wait()
        machine.power_off()

    assert machine.run(guest) == PowerOff()


# A hostile guest

PLACES = st.one_of(
    st.integers(0, (1 << 64) - 1),
    *(
        st.integers(base, base + size)
        for base, size in ((CONSOLE, 0x10000), (CONSOLE, 64), (LOCAL_APIC_BASE, 0xFFF), (IO_APIC_BASE, 0x40))
    ),
    st.sampled_from([LOCAL_APIC_BASE + 16 * index for index in range(64)]),
    st.sampled_from([0x1B, 0x6E0, 0x4B56_4D00, 0x4B56_4D01]),
    st.sampled_from([0xCF8, 0xCFC, 0xCFD, 0xCFE, 0xCFF, *range(SERIAL_PORT, SERIAL_PORT + 8)]),
)
VALUES = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.integers(0, 255),
    st.integers(0, 0x1FF).map(lambda value: 0x8000_0000 | value << 2),
)


@given(st.lists(st.tuples(st.integers(0, 5), PLACES, st.sampled_from([1, 2, 4, 8]), VALUES), max_size=100))
@settings(max_examples=60)
def test_whatever_a_guest_accesses_it_harms_nobody_else(
    core_kind: str, accesses: list[tuple[int, int, int, int]]
) -> None:
    machine = Machine(core_kind)
    pc = machine.pc

    def access(kind: int, place: int, size: int, value: int) -> None:
        port, port_size = place & 0xFFFF, min(size, 4)
        match kind:
            case 0:
                pc.mmio_write(place, size, value & (1 << 8 * size) - 1)
            case 1:
                assert 0 <= pc.mmio_read(place, size) < 1 << 8 * size
            case 2:
                with contextlib.suppress(GuestEnd):
                    pc.port_write(port, port_size, value & (1 << 8 * port_size) - 1)
            case 3:
                assert 0 <= pc.port_read(port, port_size) < 1 << 8 * port_size
            case 4:
                pc.msr_write(place, value)
            case 5:
                assert (pc.msr_read(place) or 0) < 1 << 64

    def guest(_cpu: FakeEngine) -> None:
        machine.enable_apic()
        for each in accesses:
            access(*each)
            assert pc.interrupt_pending() == (pc.take_interrupt() is not None)
        machine.power_off()

    try:
        assert machine.run(guest) == PowerOff()
    finally:
        machine.close()
