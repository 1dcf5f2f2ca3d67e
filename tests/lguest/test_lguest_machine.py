"""The machine around a guest of lguest's own, with a host that does as the test says and a supervisor that says yes."""

from __future__ import annotations

import os
import pty
import select
import threading
import tty
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, NoReturn

import pytest
from scriptedhost import PATIENCE, Guest, ScriptedHost

from lguest_mp import protocol
from lguest_mp.bus.lguest_page import DEVICE_PAGES
from lguest_mp.cpu.engine import EntryState
from lguest_mp.cpu.lguest_host import GuestDied, GuestRestarts, Pending, Register
from lguest_mp.errors import LguestError
from lguest_mp.machine.lguest import MOST_WARNINGS, LguestMachine
from lguest_mp.machine.wiring import DevicePort
from lguest_mp.memory import PAGE_SIZE, GuestMemory
from lguest_mp.protocol import (
    ConfigChanged,
    DeviceBroken,
    DeviceReset,
    Died,
    DriverReady,
    Failed,
    Interrupted,
    Log,
    Message,
    PowerOff,
    Reboot,
)
from lguest_mp.virtio.device import Device, DeviceId, QueueLayout
from lguest_mp.virtio.queue import Queue
from lguest_mp.worker import WorkerContext

RAM = 1 << 20
PAGE = RAM
ENTRY = EntryState(rip=0x10_0020, rsi=0, cr3=0, gdt_base=0, gdt_limit=0)
#: Descriptors: the console's with two queues and four bytes of configuration, then the disk's with one queue.
CONSOLE = PAGE
DISK = PAGE + 5 + 16 + 8 + 4
CONSOLE_CONFIG = CONSOLE + 5 + 16 + 8
#: Where the rings are, three pages for each queue.
INPUT, OUTPUT, REQUESTS = (PAGE + PAGE_SIZE * pages for pages in (1, 4, 7))
END = PAGE + PAGE_SIZE * 10
READY = 3
IN_AL_DX = b"\xec" + bytes(6)
UNKNOWN = b"\x0f\x0b" + bytes(5)


class FakeDevice(Device):
    """A device that nobody serves here."""

    def __init__(self, name: str, device_id: DeviceId, queues: tuple[str, ...], config: bytes = b"") -> None:
        super().__init__(name, config)
        self.device_id = device_id
        self.queue_names = queues

    @property
    def features(self) -> int:
        return 1

    def serve(self, queue_index: int, queue: Queue, context: WorkerContext) -> NoReturn:
        raise NotImplementedError


class Machine:
    """A machine with a console and a disk, and its supervisor."""

    def __init__(self, ram: int = RAM, *, verbose: bool = False) -> None:
        self.requests, machine_requests = protocol.channel_pair()
        self.events, machine_events = protocol.channel_pair()
        self._ends = [self.requests, machine_requests, self.events, machine_events]
        self.person, self.terminal = pty.openpty()
        tty.setraw(self.terminal)
        self.output, output = os.pipe()
        self._fds = [self.person, self.terminal, self.output, output]
        devices = [
            FakeDevice("console", DeviceId.CONSOLE, ("receiveq", "transmitq"), bytes(4)),
            FakeDevice("block0", DeviceId.BLOCK, ("requestq",)),
        ]
        self.ports = [
            DevicePort(
                device,
                tuple(self._eventfd() for _ in device.queue_names),
                tuple(self._eventfd() for _ in device.queue_names),
            )
            for device in devices
        ]
        self.memory = GuestMemory(ram + DEVICE_PAGES * PAGE_SIZE)
        self.lguest = LguestMachine(
            self.memory, ram, self.ports, machine_requests, machine_events, self.terminal, output, verbose=verbose
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
                case DriverReady() | DeviceReset():
                    self.on_request(message)
                    protocol.send(self.requests, protocol.Done())
                case PowerOff() | Reboot() | Died() | Failed():
                    return

    def run(self, guest: Guest) -> Message:
        """Runs the guest to its end; the machine's last words."""
        self.host = ScriptedHost(self.memory, guest)
        self._supervisor.start()
        self.lguest.run(self.host, ENTRY)
        self._supervisor.join()
        return self.messages[-1]

    def close(self) -> None:
        self.lguest.close()
        for end in self._ends:
            end.close()
        for fd in self._fds:
            os.close(fd)

    def printed(self) -> bytes:
        return os.read(self.output, 65536)

    def tell(self, message: Message) -> None:
        protocol.send(self.events, message)

    @property
    def lines(self) -> list[str]:
        """What the user is shown."""
        return [message.text for message in self.messages if isinstance(message, Log) and not message.verbose]


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.close()


def nothing(_host: ScriptedHost) -> Iterator[Pending]:
    yield from ()


def raising(error: Exception) -> Guest:
    def guest(_host: ScriptedHost) -> Iterator[Pending]:
        yield from ()
        raise error

    return guest


def yielding(*pendings: Pending) -> Guest:
    def guest(_host: ScriptedHost) -> Iterator[Pending]:
        yield from pendings

    return guest


# How a guest begins and ends


def test_the_host_is_told_of_memory_and_device_pages_as_the_original_told_it(machine: Machine) -> None:
    machine.run(nothing)
    assert machine.host.initialized == (END // PAGE_SIZE, ENTRY.rip, RAM // PAGE_SIZE + 256)


@pytest.mark.parametrize(("mib", "told"), [(891, False), (892, True)])
def test_a_kernel_that_may_look_for_its_devices_elsewhere_is_told_of(mib: int, told: bool) -> None:
    machine = Machine(mib << 20)
    try:
        machine.run(nothing)
        assert any("CONFIG_HIGHMEM4G" in line for line in machine.lines) is told
    finally:
        machine.close()


def test_a_guest_that_switches_itself_off(machine: Machine) -> None:
    assert machine.run(raising(GuestDied("CRASH: Power down"))) == PowerOff()


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (GuestRestarts(), Reboot()),
        (GuestDied("CRASH: Attempted to kill init!"), Died("CRASH: Attempted to kill init!")),
        (GuestDied("Bad hypercall 77\n"), Died("Bad hypercall 77")),
        (LguestError("Running guest failed: No such device"), Failed("Running guest failed: No such device")),
    ],
)
def test_a_guest_that_ends_otherwise(machine: Machine, error: Exception, end: Message) -> None:
    assert machine.run(raising(error)) == end


def test_a_bug_is_the_guest_s_end_and_is_told(machine: Machine, capfd: pytest.CaptureFixture[str]) -> None:
    assert machine.run(raising(KeyError("oops"))) == Died("internal error: KeyError: 'oops'")
    assert "Traceback" in capfd.readouterr().err


def test_a_host_that_cannot_is_the_launcher_s_failure(machine: Machine) -> None:
    class CannotHost(ScriptedHost):
        def initialize(self, pfn_limit: int, start: int, device_limit: int) -> None:
            raise LguestError("Writing to /dev/lguest: Device or resource busy")

    with pytest.raises(LguestError, match="busy"):
        machine.lguest.run(CannotHost(machine.memory, nothing), ENTRY)


def test_a_supervisor_that_is_gone_ends_the_machine_quietly(machine: Machine) -> None:
    machine.requests.close()

    def guest(host: ScriptedHost) -> Iterator[Pending]:
        yield from host.set_status(DISK, READY)

    machine.lguest.run(ScriptedHost(machine.memory, guest), ENTRY)


def test_a_trap_that_is_not_for_the_launcher(machine: Machine) -> None:
    assert machine.run(yielding(Pending(99, address=0x1234))) == Died("Unknown trap 99 addr 0x001234")


# Devices


def test_a_driver_brings_a_device_up_and_is_interrupted_by_its_worker(machine: Machine) -> None:
    machine.on_request = lambda _message: os.eventfd_write(machine.ports[1].calls[0], 1)
    seen: list[int] = []

    def guest(host: ScriptedHost) -> Iterator[Pending]:
        yield from host.set_status(DISK, 0)
        host.memory.write(DISK + 5 + 8 + 4, b"\xff\xff\xff\xff")
        yield from host.set_status(DISK, READY)
        seen.append(host.next_interrupt())
        yield from host.notify(REQUESTS)

    assert machine.run(guest) == PowerOff()
    layout = QueueLayout(256, REQUESTS, REQUESTS + 4096, REQUESTS + 8192)
    assert machine.messages == [DriverReady(1, 1 | 0b111 << 27, (layout,)), PowerOff()]
    assert seen == [3]
    assert os.eventfd_read(machine.ports[1].kicks[0]) == 1


def test_every_queue_has_an_interrupt_of_its_own(machine: Machine) -> None:
    seen: list[int] = []

    def guest(host: ScriptedHost) -> Iterator[Pending]:
        yield from host.set_status(CONSOLE, READY)
        yield from host.set_status(DISK, READY)
        for port, queue in ((0, 1), (1, 0), (0, 0), (0, 1)):
            os.eventfd_write(machine.ports[port].calls[queue], 1)
            seen.append(host.next_interrupt())

    machine.run(guest)
    assert seen == [2, 3, 1, 2]


def test_a_reset_is_asked_for_and_waited_for(machine: Machine) -> None:
    done: list[Message] = []
    machine.on_request = done.append

    def guest(host: ScriptedHost) -> Iterator[Pending]:
        yield from host.set_status(DISK, READY)
        yield from host.set_status(DISK, 0)
        yield from host.set_status(DISK, READY)
        assert [type(message) for message in done] == [DriverReady, DeviceReset, DriverReady]

    assert machine.run(guest) == PowerOff()


def test_a_driver_that_gives_up_is_a_line(machine: Machine) -> None:
    def guest(host: ScriptedHost) -> Iterator[Pending]:
        yield from host.set_status(DISK, READY | 128)

    machine.run(guest)
    assert machine.lines == ["Device block0 configuration FAILED"]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (REQUESTS, "Notification on block0 before setup!"),
        (INPUT, "Notification on console before setup!"),
        (END, f"Bad NOTIFY {END:#x}"),
        (0xFFFF_FFFF, "Bad NOTIFY 0xffffffff"),
    ],
)
def test_what_ends_the_guest_in_the_original_s_words(machine: Machine, address: int, words: str) -> None:
    assert machine.run(yielding(Pending(0x1F, address=address))) == Died(words)


def test_ready_twice_ends_the_guest(machine: Machine) -> None:
    def guest(host: ScriptedHost) -> Iterator[Pending]:
        yield from host.set_status(DISK, READY)
        yield from host.set_status(DISK, READY)

    assert machine.run(guest) == Died("Device block0 features finalized twice")


def wait_until(condition: Callable[[], bool]) -> None:
    tick = threading.Event()
    for _ in range(int(PATIENCE / 0.01)):
        if condition():
            return
        tick.wait(0.01)
    raise TimeoutError


def test_the_supervisor_s_news_are_on_the_page(machine: Machine) -> None:
    def guest(host: ScriptedHost) -> Iterator[Pending]:
        yield from host.set_status(DISK, READY)
        machine.tell(ConfigChanged(0, 0, "50001900"))
        machine.tell(DeviceBroken(1))
        wait_until(lambda: machine.memory.read(CONSOLE_CONFIG, 4) == b"\x50\0\x19\0")
        wait_until(lambda: machine.memory.read(DISK + 4, 1) == bytes([READY | 64]))

    assert machine.run(guest) == PowerOff()


def test_news_of_a_life_that_has_ended_are_none(machine: Machine) -> None:
    def on_request(message: Message) -> None:
        if isinstance(message, DeviceReset):
            machine.tell(DeviceBroken(1))

    machine.on_request = on_request

    def guest(host: ScriptedHost) -> Iterator[Pending]:
        yield from host.set_status(DISK, READY)
        yield from host.set_status(DISK, 0)
        yield from host.set_status(DISK, READY)
        assert host.memory.read(DISK + 4, 1) == bytes([READY])

    assert machine.run(guest) == PowerOff()


def test_news_that_are_none_end_the_guest(machine: Machine, capfd: pytest.CaptureFixture[str]) -> None:
    machine.tell(PowerOff())
    finish = threading.Event()
    ended: list[Any] = []

    def guest(_host: ScriptedHost) -> Iterator[Pending]:
        yield from ()
        assert finish.wait(PATIENCE), "the host is inside the guest"

    def supervise() -> None:
        ended.append(protocol.receive(machine.requests))
        finish.set()

    supervisor = threading.Thread(target=supervise)
    supervisor.start()
    machine.lguest.run(ScriptedHost(machine.memory, guest), ENTRY)
    supervisor.join()
    assert ended == [Died("internal error: ProtocolError: PowerOff() is no news for the machine")]
    assert "Traceback" in capfd.readouterr().err


# Traps


def test_a_privileged_instruction_is_carried_out(machine: Machine) -> None:
    def guest(host: ScriptedHost) -> Iterator[Pending]:
        host.registers |= {Register.EIP: 0x1000, Register.EDX: 0x64}
        yield Pending(13, IN_AL_DX)
        assert (host.registers[Register.EAX], host.registers[Register.EIP]) == (1, 0x1001)
        assert host.injected == []

    assert machine.run(guest) == PowerOff()


def test_any_other_trap_is_the_guest_s(machine: Machine) -> None:
    def guest(host: ScriptedHost) -> Iterator[Pending]:
        yield Pending(13, UNKNOWN)
        yield Pending(14, IN_AL_DX, END)
        assert host.injected == [13, 14]

    assert machine.run(guest) == PowerOff()
    assert machine.lines == [f"MMIO touching {END:#08x} (not a device)"]


def test_a_guest_that_does_odd_things_for_ever_does_not_fill_the_log(machine: Machine) -> None:
    machine.run(yielding(*[Pending(14, UNKNOWN, END + number) for number in range(1000)]))
    assert len(machine.lines) == MOST_WARNINGS + 1
    assert machine.lines[-1] == "the guest goes on like this; no more is said of it"


# The consoles


def test_the_early_console_prints(machine: Machine) -> None:
    def guest(host: ScriptedHost) -> Iterator[Pending]:
        host.memory.write(0x5000, b"Linux\n\0")
        yield from host.notify(0x5000)

    machine.run(guest)
    assert machine.printed() == b"Linux\n"


@pytest.fixture
def read_by_machine(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> SimpleQueue[bytes]:
    """What the machine reads from the terminal, which nobody else would see."""
    reads: SimpleQueue[bytes] = SimpleQueue()
    read = os.read

    def observed(fd: int, length: int) -> bytes:
        data = read(fd, length)
        if fd == machine.terminal:
            reads.put(data)
        return data

    monkeypatch.setattr(os, "read", observed)
    return reads


def test_three_ctrl_c_before_there_is_a_driver(machine: Machine, read_by_machine: SimpleQueue[bytes]) -> None:
    def guest(_host: ScriptedHost) -> Iterator[Pending]:
        yield from ()
        for _ in range(3):
            os.write(machine.person, b"\x03")
            assert read_by_machine.get(timeout=PATIENCE) == b"\x03"
        assert machine.interrupted.wait(PATIENCE)

    assert machine.run(guest) == PowerOff()


def test_what_is_typed_is_the_machine_s_unless_the_console_is_served(
    machine: Machine, read_by_machine: SimpleQueue[bytes]
) -> None:
    def machine_reads(what: bytes) -> None:
        os.write(machine.person, what)
        assert read_by_machine.get(timeout=PATIENCE) == what

    def guest(host: ScriptedHost) -> Iterator[Pending]:
        machine_reads(b"before")
        yield from host.set_status(CONSOLE, READY)
        os.write(machine.person, b"served")
        poll = select.poll()
        poll.register(machine.terminal, select.POLLIN)
        assert poll.poll(PATIENCE * 1000)
        assert read_by_machine.empty()
        assert os.read(machine.terminal, 100) == read_by_machine.get() == b"served"
        yield from host.set_status(CONSOLE, 0)
        machine_reads(b"reset")
        yield from host.set_status(CONSOLE, READY)
        machine.tell(DeviceBroken(0))
        machine_reads(b"broken")

    assert machine.run(guest) == PowerOff()


# What happens is told


def test_a_verbose_machine_tells_what_happens() -> None:
    machine = Machine(verbose=True)

    def guest(host: ScriptedHost) -> Iterator[Pending]:
        yield from host.set_status(DISK, 0)
        yield Pending(13, UNKNOWN)

    try:
        machine.run(guest)
        told = [message.text for message in machine.messages if isinstance(message, Log) and message.verbose]
    finally:
        machine.close()
    assert told[:4] == [
        f"Guest: {END:#x} bytes, MMIO up to {RAM + 256 * PAGE_SIZE:#x}",
        f"console/receiveq: Virtqueue page {INPUT:#x}, interrupt 1",
        f"console/transmitq: Virtqueue page {OUTPUT:#x}, interrupt 2",
        f"block0/requestq: Virtqueue page {REQUESTS:#x}, interrupt 3",
    ]
    assert told[4:] == [f"Notify on address {DISK:#08x}", "Emulating instruction at 0x0"]
