"""The `pc` machine: a 64-bit PC without a past, and the process that is it.

This is all of it but the processors with what belongs to each: local APIC, timer, clock. An engine may have those
(``cpu/kvm``), or else the machine does (``embedded.py``).

There are local APICs and an I/O APIC, ACPI says so, and nothing of what a PC had before them: no 8259, no 8254, no
keyboard controller, no CMOS clock. There is a serial port, a PCI bus with the virtio devices, and a few ports that end
the guest.

Two threads share this process. The *CPU's*, the main one, is inside the engine, or in one of the methods of :class:`Pc`
which the guest's accesses call. The *events'* (``eventloop.py``) waits for what comes from outside: the workers'
interrupts, the guest's timer, the terminal, the supervisor's news. What both touch, interrupts above all, is
guarded by one lock that is held for a few microseconds at most; nothing is waited for with it held.

The workers' `call` eventfds are never read. The loop watches them edge-triggered: every write is an edge, whatever the
counter says, and there is nothing to drain when a device is reset. Where the engine has direct ways from workers to
guest and back, it is the engine that they are given to (``shortcuts.py``).

How the guest ends comes out of the engine as an exception, and goes to the supervisor as the machine's last message.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Sequence

from lguest_mp import protocol
from lguest_mp.bus.pci import ALL_ONES, WINDOW_SHIFT, IntxLines, PciBus
from lguest_mp.bus.virtio_pci import VirtioPciFunction
from lguest_mp.cpu.engine import Engine, EntryState, GuestFault, GuestHalted, LocalApics
from lguest_mp.errors import LguestError
from lguest_mp.machine import clock, exits, lapic, power
from lguest_mp.machine.control import Control, News, Supervisor, SupervisorGone, bug, live
from lguest_mp.machine.eventloop import EventLoop
from lguest_mp.machine.exits import ExitCount
from lguest_mp.machine.ioapic import IoApic
from lguest_mp.machine.layout import (
    IO_APIC_BASE,
    PCI_CONFIG_ADDRESS,
    PCI_CONFIG_DATA,
    PCI_INTX_PIN,
    PCI_WINDOW_FIRST,
    PCI_WINDOW_LAST,
    SERIAL_IRQ,
    SERIAL_PORT,
)
from lguest_mp.machine.lock import BoardLock
from lguest_mp.machine.power import GuestEnd
from lguest_mp.machine.serial import SerialPort
from lguest_mp.machine.shortcuts import MachineShortcuts, MakeShortcuts
from lguest_mp.machine.stdio import StandardInput, StandardOutput
from lguest_mp.machine.wiring import DevicePort, console_line
from lguest_mp.protocol import Died, Message, PowerOff
from lguest_mp.screen import Track
from lguest_mp.virtio.device import DeviceId

_IO_APIC_PAGE = IO_APIC_BASE >> 12
#: What the table of exits calls ports and registers.
_PORTS = {
    **dict.fromkeys(range(SERIAL_PORT, SERIAL_PORT + 8), "serial port"),
    **dict.fromkeys([PCI_CONFIG_ADDRESS, *range(PCI_CONFIG_DATA, PCI_CONFIG_DATA + 4)], "PCI configuration"),
}
_MSRS = {
    lapic.TSC_DEADLINE_MSR: "TSC deadline",
    lapic.APIC_BASE_MSR: "APIC base",
    clock.SYSTEM_TIME_MSR: "clock, system time",
    clock.WALL_CLOCK_MSR: "clock, wall time",
}
_PAGE_SHIFT = 12
_PAGE_MASK = 0xFFF
_WINDOW_MASK = (1 << WINDOW_SHIFT) - 1

#: Linux's console driver reads the terminal's size when it hears that the configuration changed, and not before; so we
#: tell it, so many seconds after it started. Not just at once: while its probe is under way it has no port yet.
_SIZE_NEWS = (0.02, 0.1, 0.5)


class _Wires:
    """The interrupts of one slot."""

    def __init__(self, slot: int, local_apics: LocalApics, lines: IntxLines) -> None:
        self._slot = slot
        self._lines = lines
        self.message: Callable[[int, int], object] = local_apics.message

    def set_intx(self, asserted: bool) -> None:
        self._lines.set(self._slot, asserted)


class Pc:
    """The machine around the CPU; a :class:`lguest_mp.cpu.engine.Hardware`."""

    def __init__(  # noqa: PLR0917 -- what a machine is connected to
        self,
        devices: Sequence[DevicePort],
        requests: socket.socket,
        events: socket.socket,
        input_fd: int | None,
        output_fd: int,
        lock: BoardLock,
        local_apics: LocalApics,
        loop: EventLoop,
        make_shortcuts: MakeShortcuts | None = None,
        count_unseen: Callable[[ExitCount], None] | None = None,
    ) -> None:
        """``input_fd`` and ``output_fd`` are the terminal; over the console's line others are attached to it.

        ``make_shortcuts``: what knows ways between guest and workers past this code, if there are any.
        ``count_unseen``: adds the exits that come by such ways.
        """
        self._supervisor = Supervisor(requests)
        self._engine: Engine | None = None
        self._exits: ExitCount | None = None
        self._count_unseen = count_unseen
        self._loop = loop

        self._lock = lock
        self._local_apics = local_apics
        self._io_apic = IoApic(lock, local_apics)
        attached = console_line(devices)
        self._output = StandardOutput(
            output_fd, self._loop, None if attached is None else attached.writer(Track.SERIAL)
        )
        self._serial = SerialPort(lock, self._output, lambda line: self._io_apic.set_line(SERIAL_IRQ, line))
        self._output.on_idle = self._serial.idle
        inputs = [input_fd, None if attached is None else attached.keys]
        self._inputs = [self._input(fd) for fd in inputs if fd is not None]
        self._serial.on_room = self._resume_input

        lines = IntxLines(lambda line, asserted: self._io_apic.set_line(PCI_INTX_PIN + line, asserted))
        self._functions: list[VirtioPciFunction] = []
        line = 0
        for index, port in enumerate(devices):
            wires = _Wires(index + 1, local_apics, lines)
            shortcuts = None if make_shortcuts is None else make_shortcuts(port, line)
            self._functions.append(self._connect_device(index, port, wires, shortcuts))
            line += len(port.kicks)
        self._news = News(events, self._functions, self._take_input, self._release_input)
        self._bus = PciBus(
            self._functions,
            window_first=PCI_WINDOW_FIRST,
            window_last=PCI_WINDOW_LAST,
            interrupt_pin=PCI_INTX_PIN,
        )
        self._port_readers: dict[int, Callable[[int, int], int]] = {}
        self._port_writers: dict[int, Callable[[int, int, int], None]] = {}
        self._connect_ports()
        self._loop.add(events.fileno(), self._news.hear)

    def _connect_device(
        self, index: int, port: DevicePort, wires: _Wires, shortcuts: MachineShortcuts | None
    ) -> VirtioPciFunction:
        function = VirtioPciFunction(
            port.device,
            port.kicks,
            lock=self._lock,
            interrupts=wires,
            control=self._control(index, port),
            shortcuts=shortcuts,
            packed=port.packed,
        )
        if shortcuts is not None:
            shortcuts.connect(function.queue_interrupt)
        else:
            for queue, call in enumerate(port.calls):
                self._watch_call(call, function, queue)
        return function

    def _control(self, index: int, port: DevicePort) -> Control:
        is_console = port.device.device_id is DeviceId.CONSOLE

        def before_start() -> None:
            if is_console:
                self._release_input()

        def after_start() -> None:
            if is_console:
                for delay in _SIZE_NEWS:
                    self._loop.call_later(delay, lambda: self._functions[index].config_changed(0, b""))

        def after_reset() -> None:
            # News of the life that has just ended must not reach the next one: what the supervisor said before it
            # answered is there by now.
            self._news.hear()
            if is_console:
                self._take_input()

        return Control(
            index,
            port.device.name,
            self._supervisor,
            before_start=before_start,
            after_start=after_start,
            after_reset=after_reset,
        )

    def _connect_ports(self) -> None:
        serial, bus = self._serial, self._bus
        self._port_readers.update(power.readers())
        self._port_writers.update(power.writers())
        for port in range(SERIAL_PORT, SERIAL_PORT + 8):
            self._port_readers[port] = serial.read
            self._port_writers[port] = serial.write
        self._port_readers[SERIAL_PORT + 5] = serial.read_lsr
        self._port_writers[SERIAL_PORT] = serial.write_data
        self._port_readers[PCI_CONFIG_ADDRESS] = bus.read_address
        self._port_writers[PCI_CONFIG_ADDRESS] = bus.write_address
        for port in range(PCI_CONFIG_DATA, PCI_CONFIG_DATA + 4):
            self._port_readers[port] = bus.read_data
            self._port_writers[port] = bus.write_data

    def _watch_call(self, call: int, function: VirtioPciFunction, queue: int) -> None:
        self._loop.add_shared(call, lambda: function.queue_interrupt(queue), select.EPOLLIN | select.EPOLLET)

    def add_reader(self, fd: int, handler: Callable[[], None]) -> None:
        """Has the events' thread call ``handler`` whenever ``fd`` is readable."""
        self._loop.add(fd, handler)

    def count_exits(self) -> ExitCount:
        """Has the supervisor told at the guest's end what was counted here."""
        self._exits = ExitCount()
        return self._exits

    # The guest's accesses, on the CPU's thread

    def port_read(self, port: int, size: int) -> int:
        """IN."""
        reader = self._port_readers.get(port)
        return ALL_ONES[size] if reader is None else reader(port, size)

    def port_write(self, port: int, size: int, value: int) -> None:
        """OUT."""
        writer = self._port_writers.get(port)
        if writer is not None:
            writer(port, size, value)

    def mmio_read(self, address: int, size: int) -> int:
        """A load from where there is no RAM."""
        if address >> _PAGE_SHIFT == self._local_apics.page:
            return self._local_apics.read(address & _PAGE_MASK, size)
        function = self._bus.windows.get(address >> WINDOW_SHIFT)
        if function is not None:
            return function.read(address & _WINDOW_MASK, size)
        if address >> _PAGE_SHIFT == _IO_APIC_PAGE:
            return self._io_apic.read(address & _PAGE_MASK, size)
        return ALL_ONES[size]

    def mmio_write(self, address: int, size: int, value: int) -> None:
        """A store to where there is no RAM."""
        if address >> _PAGE_SHIFT == self._local_apics.page:
            self._local_apics.write(address & _PAGE_MASK, size, value)
            return
        function = self._bus.windows.get(address >> WINDOW_SHIFT)
        if function is not None:
            function.write(address & _WINDOW_MASK, size, value)
        elif address >> _PAGE_SHIFT == _IO_APIC_PAGE:
            self._io_apic.write(address & _PAGE_MASK, size, value)

    # The events, on their thread (or on the CPU's while that sleeps)

    def _interrupted(self) -> None:
        self._supervisor.tell(protocol.Interrupted())

    def _events_failed(self, error: Exception) -> None:
        """The events' thread has ended: the CPU's, which alone says how the guest ends, has to know why."""

        def fail() -> None:
            raise error

        assert self._engine is not None
        self._engine.call(fail)

    def _input(self, fd: int) -> StandardInput:
        return StandardInput(
            fd,
            self._loop,
            receive=self._serial.receive,
            wanted=lambda: self._serial.wants_input,
            interrupt=self._interrupted,
        )

    def _take_input(self) -> None:
        for each in self._inputs:
            each.take()

    def _release_input(self) -> None:
        for each in self._inputs:
            each.release()

    def _resume_input(self) -> None:
        for each in self._inputs:
            each.resume()

    # The life of the machine

    def run(self, engine: Engine, entry: EntryState) -> None:
        """Runs the guest on this thread until it ends, and tells the supervisor how it did."""
        self._engine = engine
        self._lock.kick = engine.kick
        self._loop.before_sleep = engine.settle
        engine.enter(entry)
        self._take_input()
        live(
            lambda: self._run_and_count(engine),
            supervisor=self._supervisor,
            loop=self._loop,
            events_failed=self._events_failed,
            output=self._output,
        )

    def _run_and_count(self, engine: Engine) -> Message:
        end = self._run_to_the_end(engine)
        if self._exits is not None:
            if self._count_unseen is not None:
                self._count_unseen(self._exits)
            for line in self._exits.table(self._cause):
                self._supervisor.tell(protocol.Log(line, verbose=True))
        return end

    def _cause(self, cause: exits.Cause) -> str:
        """What a person calls it."""
        kind, where = cause
        match kind:
            case exits.PORT_READ | exits.PORT_WRITE:
                what = _PORTS.get(where)
                return f"{kind}: {what}" if what else f"{kind}: {where:#x}{self._unless_known(where)}"
            case exits.LOAD | exits.STORE:
                return f"{kind}: {self._place(where)}"
            case exits.CPUID | exits.RDMSR | exits.WRMSR:
                return f"{kind}: {_MSRS.get(where, f'{where:#x}') if kind != exits.CPUID else f'{where:#x}'}"
            case exits.INTERRUPT:
                return f"{kind}: vector {where:#x}"
        return kind

    def _unless_known(self, port: int) -> str:
        return "" if port in self._port_readers or port in self._port_writers else ", where nothing is"

    def _place(self, page: int) -> str:
        if page == self._local_apics.page:
            return "local APIC"
        if page == _IO_APIC_PAGE:
            return "I/O APIC"
        address = page << _PAGE_SHIFT
        for function in self._functions:
            if self._bus.windows.get(address >> WINDOW_SHIFT) is function:
                return function.device.name
        return f"{address:#x}, where nothing is"

    def _run_to_the_end(self, engine: Engine) -> Message:
        try:
            engine.run()
        except GuestEnd as end:
            return end.message
        except GuestHalted:
            self._supervisor.tell(protocol.Log("the guest halted", verbose=True))
            return PowerOff()
        except GuestFault as fault:
            for line in fault.details.splitlines():
                self._supervisor.tell(protocol.Log(line, verbose=True))
            return Died(str(fault))
        except LguestError as error:
            return Died(str(error))
        except SupervisorGone:
            raise
        except Exception as error:  # Whatever it is, it is a bug of ours, and the guest's end
            return bug(error)
        return Died("internal error: the CPU stopped without a reason")

    def close(self) -> None:
        """Gives back what the machine holds of the host; it must not run any more."""
        self._output.close()
        self._loop.close()
