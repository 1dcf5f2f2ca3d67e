"""The `pc` machine around any engine, with a console and a disk that nobody serves, and a guest of a few bytes."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import NoReturn

from kvmhost import open_or_skip
from tinymachine import CODE, DATA, GDT, PAGE_TABLES, RAM, set_gate, write_tables

from lguest_mp import protocol
from lguest_mp.codemap import CodeMap
from lguest_mp.cpu.engine import Engine, EntryState
from lguest_mp.machine.layout import IO_APIC_BASE, PCI_WINDOW_FIRST
from lguest_mp.machine.pc import Pc
from lguest_mp.machine.wiring import DevicePort
from lguest_mp.memory import GuestMemory
from lguest_mp.protocol import Died, Message, PowerOff, Reboot
from lguest_mp.virtio.device import Device, DeviceId
from lguest_mp.virtio.queue import Queue
from lguest_mp.worker import WorkerContext

#: The disk's window.
DISK = PCI_WINDOW_FIRST + 0x8000
NOTIFY, MSIX_TABLE = DISK + 0x3000, DISK + 0x4000
#: The disk's slot, and the input of the I/O APIC that its pin goes to.
SLOT, PIN = 2, 18
#: The vectors of its configuration changes and its two queues.
CONFIG_VECTOR = 0x40


class FakeDevice(Device):
    """A device with two queues and nothing else."""

    queue_names = ("first", "second")

    def __init__(self, name: str, device_id: DeviceId) -> None:
        super().__init__(name, bytes(4))
        self.device_id = device_id

    @property
    def features(self) -> int:
        return 0

    def serve(self, queue_index: int, queue: Queue, context: WorkerContext) -> NoReturn:
        raise NotImplementedError


class TinyPc:
    """The machine, its supervisor, and what the test is instead of workers.

    ``kind`` is ``unicorn``, ``compiled`` (the same with the compiled core's board) or ``kvm``.
    """

    def __init__(self, kind: str, opened: ExitStack, cpus: int = 1) -> None:
        self._opened = opened
        self.memory = GuestMemory(RAM)
        write_tables(self.memory)
        self.requests, requests = self._channel()
        self.events, events = self._channel()
        self.output, output = os.pipe()
        for fd in (self.output, output):
            opened.callback(os.close, fd)
        console, self.disk = (
            DevicePort(device, (self._eventfd(), self._eventfd()), (self._eventfd(), self._eventfd()))
            for device in (FakeDevice("console", DeviceId.CONSOLE), FakeDevice("disk0", DeviceId.BLOCK))
        )
        #: The guest's accesses to device memory that came to the machine: address, size, value (None: a load).
        self.accesses: list[tuple[int, int, int | None]] = []
        self.messages: list[Message] = []
        self._supervisor = threading.Thread(target=self._supervise)
        self._supervisor.start()
        opened.callback(self._end_supervisor)
        ports = [console, self.disk]
        self.pc, self.engine = (
            self._on_kvm(ports, requests, events, output, cpus)
            if kind == "kvm"
            else self._on_unicorn(ports, requests, events, output, kind)
        )
        opened.callback(self.pc.close)

    def _channel(self) -> tuple[socket.socket, socket.socket]:
        ours, theirs = protocol.channel_pair()
        return self._opened.enter_context(ours), self._opened.enter_context(theirs)

    def _eventfd(self) -> int:
        fd = os.eventfd(0)
        self._opened.callback(os.close, fd)
        return fd

    def _on_unicorn(
        self, ports: list[DevicePort], requests: socket.socket, events: socket.socket, output: int, kind: str
    ) -> tuple[Pc, Engine]:
        from lguest_mp.machine.embedded import EmbeddedPc  # noqa: PLC0415
        from lguest_mp.machine.process import of_core  # noqa: PLC0415

        code_map = CodeMap(self.memory, 0)
        self._opened.callback(code_map.close)
        make_board, make_engine = of_core("compiled" if kind == "compiled" else "python")()
        pc = EmbeddedPc(self.memory, ports, requests, events, None, output, make_board)
        self._record(pc)
        engine = make_engine(self.memory, pc, code_map)
        self._opened.callback(engine.close)
        return pc, engine

    def _on_kvm(
        self, ports: list[DevicePort], requests: socket.socket, events: socket.socket, output: int, cpus: int
    ) -> tuple[Pc, Engine]:
        from lguest_mp.cpu.kvm.engine import KvmEngine  # noqa: PLC0415
        from lguest_mp.machine.kvm_process import KvmPc  # noqa: PLC0415

        file = open_or_skip()
        self._opened.callback(os.close, file)
        engine = KvmEngine(file, self.memory, cpus)
        self._opened.callback(engine.close)
        pc = KvmPc(engine, ports, requests, events, None, output)
        self._record(pc)
        return pc, engine

    def _record(self, pc: Pc) -> None:
        """Has the machine's accesses remembered. They are its public methods, which the engine takes afterwards."""
        read, write = pc.mmio_read, pc.mmio_write

        def noted_read(address: int, size: int) -> int:
            self.accesses.append((address, size, None))
            return read(address, size)

        def noted_write(address: int, size: int, value: int) -> None:
            self.accesses.append((address, size, value))
            write(address, size, value)

        pc.mmio_read, pc.mmio_write = noted_read, noted_write  # type: ignore[method-assign]

    def _supervise(self) -> None:
        while (message := protocol.receive(self.requests)) is not None:
            self.messages.append(message)
            match message:
                case protocol.DriverReady() | protocol.DeviceReset() | protocol.QueueReady() | protocol.QueueReset():
                    protocol.send(self.requests, protocol.Done())
                case PowerOff() | Reboot() | Died():
                    return

    def _end_supervisor(self) -> None:
        self.requests.shutdown(socket.SHUT_RDWR)
        self._supervisor.join()

    # What is done before the guest's first instruction

    def start_disk(self, *, msix: bool = True) -> None:
        """Brings the disk up, as a driver does: its vectors send 0x40, 0x41 and 0x42 to processor 0."""
        write = self.pc.mmio_write
        self.config_write(4, 2, 6)
        if msix:
            self.config_write(0x42, 2, 0x8000)
        for vector in range(3):
            for offset, word in ((0, 0xFEE0_0000), (4, 0), (8, CONFIG_VECTOR + vector), (12, 0)):
                write(MSIX_TABLE + 16 * vector + offset, 4, word)
        for offset, size, value in ((20, 1, 1), (20, 1, 3), (8, 4, 1), (12, 4, 1), (20, 1, 11), (16, 2, 0)):
            write(DISK + offset, size, value)
        for queue in (0, 1):
            for offset, value in ((22, queue), (26, queue + 1), (28, 1)):
                write(DISK + offset, 2, value)
        write(DISK + 20, 1, 15)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Writes the disk's configuration space."""
        self.pc.port_write(0xCF8, 4, 0x8000_0000 | SLOT << 11 | offset & 0xFC)
        self.pc.port_write(0xCFC + (offset & 3), size, value)

    def route(self, pin: int, entry: int) -> None:
        """Writes an entry of the I/O APIC's."""
        for half, word in ((1, entry >> 32), (0, entry & 0xFFFF_FFFF)):
            self.pc.mmio_write(IO_APIC_BASE, 4, 0x10 + pin * 2 + half)
            self.pc.mmio_write(IO_APIC_BASE + 0x10, 4, word)

    def set_gate(self, vector: int, handler: int) -> None:
        set_gate(self.memory, vector, handler)

    # The guest

    def run(self, code: bytes) -> Message:
        """Runs the guest to its end; the machine's last words. What it accesses from now on is remembered."""
        self.memory.write(CODE, code)
        self.accesses.clear()
        self.pc.run(self.engine, EntryState(CODE, 0, PAGE_TABLES, GDT, 0x47))
        self._supervisor.join()
        return self.messages[-1]

    def word(self, index: int = 0) -> int:
        """What the guest left at DATA, in words of 32 bits."""
        (value,) = struct.unpack("<I", self.memory.read(DATA + 4 * index, 4))
        return int(value)


def as_worker(body: Callable[[], None]) -> threading.Thread:
    """Does what a worker would, beside the guest."""
    thread = threading.Thread(target=body)
    thread.start()
    return thread
