"""The machine process of a `pc` guest on KVM: its body, in the forked child. It joins KVM to the PC around it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence

from lguest_mp.config import GuestConfig
from lguest_mp.cpu.engine import EntryState
from lguest_mp.cpu.kvm.engine import KvmEngine
from lguest_mp.cpu.kvm.needs import STACK
from lguest_mp.machine.eventloop import EventLoop
from lguest_mp.machine.exits import CountedHardware
from lguest_mp.machine.lock import BoardLock
from lguest_mp.machine.pc import Pc
from lguest_mp.machine.shortcuts import DeviceShortcuts
from lguest_mp.machine.wiring import DevicePort
from lguest_mp.memory import GuestMemory

#: How often one looks whether the guest has stopped its processors for good, seconds.
_HALT_LOOK = 1.0


def run_machine(  # noqa: PLR0917 -- what a machine consists of
    file: int,
    config: GuestConfig,
    memory: GuestMemory,
    _watches: None,
    devices: Sequence[DevicePort],
    begin: Callable[[], EntryState],
    requests: socket.socket,
    events: socket.socket,
) -> None:
    """Runs the guest on the KVM behind ``file``, and tells the supervisor how it ended. LguestError."""
    threading.stack_size(STACK)
    engine = KvmEngine(file, memory, config.cpus)
    pc = KvmPc(engine, devices, requests, events, input_fd=0, output_fd=1)
    if config.verbose:
        engine.connect(CountedHardware(pc, pc.count_exits()))
    pc.run(engine, begin())


class KvmPc(Pc):
    """The machine around KVM."""

    def __init__(  # noqa: PLR0917 -- what a machine is connected to
        self,
        engine: KvmEngine,
        devices: Sequence[DevicePort],
        requests: socket.socket,
        events: socket.socket,
        input_fd: int | None,
        output_fd: int,
    ) -> None:
        lock, loop = BoardLock(), EventLoop()
        interrupts = engine.interrupts

        def make_shortcuts(port: DevicePort, first_line: int) -> DeviceShortcuts:
            return DeviceShortcuts(interrupts, port, first_line, lock, loop)

        super().__init__(devices, requests, events, input_fd, output_fd, lock, interrupts, loop, make_shortcuts)
        interrupts.connect(self._end_of_interrupt)
        engine.connect(self)
        self._look_for_halt = engine.look_for_halt
        self._loop.call_later(_HALT_LOOK, self._look)

    def _look(self) -> None:
        self._look_for_halt()
        self._loop.call_later(_HALT_LOOK, self._look)

    def _end_of_interrupt(self, vector: int) -> None:
        with self._lock:
            self._io_apic.end_of_interrupt(vector)
