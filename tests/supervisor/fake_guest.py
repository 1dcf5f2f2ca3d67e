"""A launcher whose guest is a function: the real supervisor and real processes around a machine that acts a scenario.

Run as a program: ``python fake_guest.py <scenario> [options of lguest] <memory> <kernel>``. The scenario (a function
below, by its name) is the body of the machine process. Its devices are served by workers that obey their notifications:
the value that the scenario writes to a queue's kick says what its worker does (:class:`Order`). What the scenario
wants the test to know it prints, one line each.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, NoReturn

import psutil

from lguest_mp import cli, protocol
from lguest_mp.config import GuestConfig
from lguest_mp.cpu.engine import EntryState
from lguest_mp.errors import DeviceProtocolError, LguestError
from lguest_mp.jail import User
from lguest_mp.machine.wiring import DevicePort
from lguest_mp.memory import GuestMemory
from lguest_mp.protocol import DeviceReset, DriverReady, QueueReady, QueueReset
from lguest_mp.supervisor import children
from lguest_mp.supervisor.children import Child
from lguest_mp.supervisor.loop import is_readable
from lguest_mp.supervisor.parts import MachineBody, Parts
from lguest_mp.supervisor.run import run
from lguest_mp.virtio import ledger
from lguest_mp.virtio.device import Device, DeviceId, QueueLayout
from lguest_mp.virtio.ledger import Ledger
from lguest_mp.worker import WorkerContext

LAYOUT = QueueLayout(256, 0x1000, 0x2000, 0x3000)
#: A device's features that no other has, to be recognized.
FEATURES = 1 << 5
#: How long a worker may take to end, in seconds; short, for the sake of the workers that never would.
GRACE = 0.2
CONSOLE, BLOCK, STUBBORN = range(3)
PATTERN = b"what the last life left in memory"


class Order(IntEnum):
    """What a worker does on a kick of this value."""

    TELL_PID = 1
    BREAK_STANDARD = 2
    HAVE_A_BUG = 3
    CRASH = 4
    INTERRUPT_GUEST = 5
    LOG = 6
    EXIT = 7
    TELL_UID = 8
    BABBLE = 9
    CRASH_AT_WORK = 10
    SPIN = 11
    WAIT_FOR_HOST = 12
    FLOOD = 13


class FakeDevice(Device):
    """A device whose workers do as told; ``stubborn`` ones do not hear that they are to end."""

    device_id = DeviceId.BLOCK

    def __init__(self, name: str, queues: tuple[str, ...], *, stubborn: bool = False) -> None:
        super().__init__(name, bytes(4))
        self.queue_names = queues
        self._stubborn = stubborn

    @property
    def features(self) -> int:
        return FEATURES

    def serve(self, queue_index: int, queue: Any, context: WorkerContext) -> None:
        assert gc.isenabled()
        if self._stubborn:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        kick, call, account = queue
        while True:
            self._obey(Order(os.eventfd_read(kick)), call, context, account)

    def _obey(self, order: Order, call: int, context: WorkerContext, account: Ledger) -> None:  # noqa: PLR0912
        match order:
            case Order.TELL_PID:
                os.eventfd_write(call, os.getpid())
            case Order.TELL_UID:
                os.eventfd_write(call, os.getuid() + 1)
            case Order.BREAK_STANDARD:
                raise DeviceProtocolError("2.7.5", "a descriptor\33[2J beyond all")
            case Order.HAVE_A_BUG:
                raise RuntimeError("a bug of ours")
            case Order.CRASH:
                os.kill(os.getpid(), signal.SIGSEGV)
            case Order.INTERRUPT_GUEST:
                context.interrupt_guest()
            case Order.LOG:
                context.log(f"{self.name}: a word")
                os.eventfd_write(call, 1)
            case Order.BABBLE:
                context.log("x" * 100_000)
                os.eventfd_write(call, 1)
            case Order.CRASH_AT_WORK:
                account.fields[ledger.PHASE] = ledger.Phase.SERVING
                os.kill(os.getpid(), signal.SIGKILL)
            case Order.SPIN:
                account.fields[ledger.PHASE] = ledger.Phase.SERVING
                while True:
                    pass
            case Order.WAIT_FOR_HOST:
                account.fields[ledger.PHASE] = ledger.Phase.WAITING
                wait_for_the_end()
            case Order.FLOOD:
                for number in range(20_000):
                    context.config_changed(0, bytes([number & 255]))
                    context.log("x" * 900)
                os.eventfd_write(call, 1)
            case Order.EXIT:
                os._exit(9)


class FakeConsole(FakeDevice):
    """The one whose configuration space follows the terminal."""

    device_id = DeviceId.CONSOLE


class FakeKernel:
    """Leaves something in memory that a scenario can look for."""

    def load(self, memory: GuestMemory) -> EntryState:
        memory.write(0x5000, b"loaded")
        return EntryState(rip=0x100_0000, rsi=1, cr3=2, gdt_base=3, gdt_limit=4)


@dataclass(frozen=True)
class Machine:
    """What a scenario has."""

    config: GuestConfig
    memory: GuestMemory
    devices: Sequence[DevicePort]
    entry: EntryState
    requests: socket.socket
    events: socket.socket

    def tell(self, message: protocol.Message) -> None:
        protocol.send(self.requests, message)

    def ask(self, message: protocol.Message) -> None:
        self.tell(message)
        assert protocol.receive(self.requests) == protocol.Done()

    def make_ready(self, device: int) -> None:
        """Has all queues of a device served."""
        self.ask(DriverReady(device, FEATURES, (LAYOUT,) * len(self.devices[device].kicks)))

    def order(self, device: int, queue: int, order: Order) -> None:
        """Tells a worker what to do; not before the last order was read, since they would add up."""
        kick = self.devices[device].kicks[queue]
        while is_readable(kick):
            time.sleep(0.001)
        os.eventfd_write(kick, order)

    def answer(self, device: int, queue: int) -> int:
        return os.eventfd_read(self.devices[device].calls[queue])

    def pid(self, device: int, queue: int = 0) -> int:
        """The worker of a queue."""
        self.order(device, queue, Order.TELL_PID)
        return self.answer(device, queue)


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def is_gone(pid: int) -> bool:
    """Whether there is no such process, not even one that is waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def wait_for_the_end() -> NoReturn:
    while True:
        time.sleep(60)


# ---- Scenarios: how a guest ends ----


def power_off(machine: Machine) -> None:
    """Has everything it needs, and ends."""
    assert machine.memory.read(0x5000, 6) == b"loaded"
    assert machine.entry == FakeKernel().load(machine.memory)
    assert gc.isenabled()
    machine.tell(protocol.PowerOff())


def die(machine: Machine) -> None:
    machine.tell(protocol.Died("triple\nfault"))


def vanish(machine: Machine) -> None:
    """Ends without a word."""


def crash(machine: Machine) -> None:
    raise RuntimeError("a bug in the machine")


def cannot(machine: Machine) -> None:
    raise LguestError("this host is no good")


def ctrl_c(machine: Machine) -> None:
    machine.tell(protocol.Interrupted())
    wait_for_the_end()


def hang(machine: Machine) -> None:
    """All devices are served, for ever."""
    for device in (CONSOLE, BLOCK):
        machine.make_ready(device)
    say("up", os.getpid(), machine.pid(CONSOLE, 0), machine.pid(CONSOLE, 1), machine.pid(BLOCK))
    wait_for_the_end()


def short_of_memory(machine: Machine) -> None:
    """The machine is forked when it turns out that the host has no memory for a queue's ledger."""
    wait_for_the_end()


def forked_only(machine: Machine) -> None:
    raise AssertionError("the guest began")


# ---- Scenarios: a machine that breaks the protocol ----


def babble(machine: Machine) -> None:
    machine.requests.send(b"[" * 10_000)
    wait_for_the_end()


def unknown_device(machine: Machine) -> None:
    machine.tell(DeviceReset(99))
    wait_for_the_end()


def unknown_queue(machine: Machine) -> None:
    machine.tell(QueueReset(BLOCK, 1))
    wait_for_the_end()


def wrong_queue_count(machine: Machine) -> None:
    machine.tell(DriverReady(CONSOLE, FEATURES, (LAYOUT,)))
    wait_for_the_end()


def ready_twice(machine: Machine) -> None:
    machine.make_ready(BLOCK)
    machine.tell(DriverReady(BLOCK, FEATURES, (LAYOUT,)))
    wait_for_the_end()


def two_requests_at_once(machine: Machine) -> None:
    machine.make_ready(STUBBORN)
    machine.pid(STUBBORN)
    machine.tell(DeviceReset(STUBBORN))
    machine.tell(DeviceReset(BLOCK))
    wait_for_the_end()


def queue_of_a_reset_device(machine: Machine) -> None:
    machine.tell(QueueReady(BLOCK, 0, FEATURES, LAYOUT))
    wait_for_the_end()


def an_answer_of_its_own(machine: Machine) -> None:
    machine.tell(protocol.Done())
    wait_for_the_end()


def ready_again(machine: Machine) -> None:
    machine.tell(protocol.Ready())
    wait_for_the_end()


# ---- Scenarios: workers ----


def _order_block(order: Order) -> Callable[[Machine], None]:
    def scenario(machine: Machine) -> None:
        machine.make_ready(CONSOLE)
        machine.make_ready(BLOCK)
        machine.order(BLOCK, 0, order)
        wait_for_the_end()

    return scenario


def log(machine: Machine) -> None:
    """Words of workers, long ones cut."""
    machine.make_ready(BLOCK)
    for order in (Order.LOG, Order.BABBLE):
        machine.order(BLOCK, 0, order)
        machine.answer(BLOCK, 0)
    machine.tell(protocol.PowerOff())


def resets(machine: Machine) -> None:
    """When a reset is done the workers are gone, and what they had not read is gone too."""
    for _ in range(10):
        machine.make_ready(CONSOLE)
        pids = [machine.pid(CONSOLE, queue) for queue in (0, 1)]
        os.kill(pids[0], signal.SIGSTOP)
        machine.order(CONSOLE, 0, Order.CRASH)
        machine.ask(DeviceReset(CONSOLE))
        assert all(map(is_gone, pids))
    machine.tell(protocol.PowerOff())


def resets_under_load(machine: Machine) -> None:
    """A reset finds its worker busy."""
    for _ in range(20):
        machine.make_ready(BLOCK)
        pid = machine.pid(BLOCK)
        for _ in range(50):
            machine.order(BLOCK, 0, Order.TELL_PID)
            machine.answer(BLOCK, 0)
        machine.order(BLOCK, 0, Order.TELL_PID)
        machine.ask(DeviceReset(BLOCK))
        assert is_gone(pid)
        os.set_blocking(machine.devices[BLOCK].calls[0], False)
        with suppress(BlockingIOError):
            machine.answer(BLOCK, 0)
        os.set_blocking(machine.devices[BLOCK].calls[0], True)
    machine.tell(protocol.PowerOff())


def resets_of_nothing(machine: Machine) -> None:
    """A driver resets a device before it uses it, as all do."""
    machine.ask(DeviceReset(BLOCK))
    machine.ask(DriverReady(CONSOLE, FEATURES, (LAYOUT, None)))
    machine.ask(QueueReset(CONSOLE, 1))
    machine.ask(DeviceReset(CONSOLE))
    machine.ask(DeviceReset(CONSOLE))
    machine.tell(protocol.PowerOff())


def queue_resets(machine: Machine) -> None:
    """One queue is reset and served again; the other's worker stays."""
    machine.make_ready(CONSOLE)
    first, second = machine.pid(CONSOLE, 0), machine.pid(CONSOLE, 1)
    machine.ask(QueueReset(CONSOLE, 1))
    assert is_gone(second)
    assert machine.pid(CONSOLE, 0) == first
    machine.ask(QueueReady(CONSOLE, 1, FEATURES, LAYOUT))
    assert machine.pid(CONSOLE, 1) not in (first, second)
    machine.tell(protocol.PowerOff())


def stubborn_worker(machine: Machine) -> None:
    """A worker that does not end when it is told to is killed."""
    machine.make_ready(STUBBORN)
    pid = machine.pid(STUBBORN)
    machine.ask(DeviceReset(STUBBORN))
    assert is_gone(pid)
    machine.tell(protocol.PowerOff())


def stubborn_worker_at_the_end(machine: Machine) -> None:
    machine.make_ready(STUBBORN)
    machine.pid(STUBBORN)
    machine.tell(protocol.PowerOff())


def broken_device(machine: Machine) -> None:
    """Its workers are ended, the machine is told, nobody else notices, and a reset mends it."""
    for device in (CONSOLE, BLOCK):
        machine.make_ready(device)
    block = machine.pid(BLOCK)
    other = machine.pid(CONSOLE, 1)
    machine.order(CONSOLE, 0, Order.BREAK_STANDARD)
    assert protocol.receive(machine.events) == protocol.DeviceBroken(CONSOLE)
    # What a driver may do before it has noticed.
    machine.ask(QueueReset(CONSOLE, 1))
    assert is_gone(other)
    machine.ask(QueueReady(CONSOLE, 1, FEATURES, LAYOUT))
    machine.ask(DeviceReset(CONSOLE))
    machine.make_ready(CONSOLE)
    machine.pid(CONSOLE, 0)
    machine.pid(CONSOLE, 1)
    assert machine.pid(BLOCK) == block
    machine.tell(protocol.PowerOff())


def flood(machine: Machine) -> None:
    """A worker that is no longer itself says what it can, while the machine does not listen."""
    machine.make_ready(BLOCK)
    machine.make_ready(CONSOLE)
    machine.order(BLOCK, 0, Order.FLOOD)
    assert machine.answer(BLOCK, 0) == 1
    assert machine.pid(CONSOLE, 0)
    machine.tell(protocol.PowerOff())


def breaks_the_standard_for_ever(machine: Machine) -> None:
    for _ in range(int(machine.config.arguments[0])):
        machine.make_ready(BLOCK)
        machine.order(BLOCK, 0, Order.BREAK_STANDARD)
        assert protocol.receive(machine.events) == protocol.DeviceBroken(BLOCK)
        machine.ask(DeviceReset(BLOCK))
    machine.tell(protocol.PowerOff())


# ---- Scenarios: workers that crash ----


def _crash(machine: Machine, order: Order, device: int = BLOCK, queue: int = 0) -> None:
    """Has a worker crash, and waits for the next one."""
    before = machine.pid(device, queue)
    machine.order(device, queue, order)
    while not is_gone(before):
        time.sleep(0.001)
    assert machine.pid(device, queue) != before


def crashes(machine: Machine) -> None:
    """Three workers of one queue, one after the other; nobody else ends, and the machine is not told."""
    for device in (CONSOLE, BLOCK):
        machine.make_ready(device)
    others = machine.pid(CONSOLE, 0), machine.pid(CONSOLE, 1)
    for order in (Order.CRASH, Order.HAVE_A_BUG, Order.EXIT):
        _crash(machine, order)
    assert (machine.pid(CONSOLE, 0), machine.pid(CONSOLE, 1)) == others
    machine.events.setblocking(False)
    with suppress(BlockingIOError):
        raise AssertionError(protocol.receive(machine.events))
    machine.tell(protocol.PowerOff())


def crashes_too_often(machine: Machine) -> None:
    """Until the device is stopped; a reset by its driver brings it back."""
    for device in (CONSOLE, BLOCK):
        machine.make_ready(device)
    for _ in range(int(machine.config.arguments[0])):
        _crash(machine, Order.CRASH, CONSOLE, 1)
    other = machine.pid(CONSOLE, 0)
    machine.order(CONSOLE, 1, Order.CRASH)
    assert protocol.receive(machine.events) == protocol.DeviceBroken(CONSOLE)
    machine.ask(DeviceReset(CONSOLE))
    assert is_gone(other)
    machine.make_ready(CONSOLE)
    machine.pid(CONSOLE, 1)
    machine.pid(BLOCK)
    machine.tell(protocol.PowerOff())


def crashes_in_a_loop(machine: Machine) -> None:
    """A worker that completes nothing; a reset comes while its next successor is waited for."""
    machine.make_ready(BLOCK)
    for _ in range(3):
        _crash(machine, Order.CRASH_AT_WORK)
    last = machine.pid(BLOCK)
    machine.order(BLOCK, 0, Order.CRASH_AT_WORK)
    while not is_gone(last):
        time.sleep(0.001)
    machine.ask(DeviceReset(BLOCK))
    machine.ask(DeviceReset(BLOCK))
    machine.make_ready(BLOCK)
    machine.pid(BLOCK)
    machine.tell(protocol.PowerOff())


def gets_stuck(machine: Machine) -> None:
    """In each way in which a worker can; the last one only waits."""
    machine.make_ready(BLOCK)
    for wait_first in (False, True):
        pid = machine.pid(BLOCK)
        if wait_first:
            machine.order(BLOCK, 0, Order.WAIT_FOR_HOST)
            time.sleep(1)
            assert not is_gone(pid), "waiting is not being stuck"
        os.kill(pid, signal.SIGSTOP)
        while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)
        machine.order(BLOCK, 0, Order.TELL_PID)
        while not is_gone(pid):
            time.sleep(0.01)
        assert machine.answer(BLOCK, 0) != pid
    machine.order(BLOCK, 0, Order.SPIN)
    machine.pid(BLOCK)
    machine.tell(protocol.PowerOff())


# ---- Scenarios: what processes hold ----


def files(machine: Machine) -> None:
    """Prints what it has open, and whoever it is."""
    inherited = {0, 1, 2, machine.requests.fileno(), machine.events.fileno()}
    inherited.update(fd for port in machine.devices for fd in (*port.kicks, *port.calls))
    opened = {int(name) for name in os.listdir("/proc/self/fd")}
    say("more", *sorted(fd for fd in opened - inherited if os.path.exists(f"/proc/self/fd/{fd}")))
    say("less", *sorted(inherited - opened))
    hang(machine)


def who(machine: Machine) -> None:
    """Prints who it is, where it is, and who its worker is."""
    machine.make_ready(BLOCK)
    machine.order(BLOCK, 0, Order.TELL_UID)
    worker = machine.answer(BLOCK, 0) - 1
    say("root", *sorted(os.listdir("/")))
    say("uid", os.getuid(), "gid", os.getgid(), "groups", *os.getgroups(), "worker", worker)
    wait_for_the_end()


def sizes(machine: Machine) -> None:
    """Prints the console's sizes as they come."""
    say("up")
    for _ in range(2):
        event = protocol.receive(machine.events)
        assert isinstance(event, protocol.ConfigChanged)
        assert (event.device, event.offset) == (CONSOLE, 0)
        data = bytes.fromhex(event.data)
        say("size", int.from_bytes(data[:2], "little"), int.from_bytes(data[2:], "little"))
    wait_for_the_end()


def echo(machine: Machine) -> None:
    """Prints each byte that is typed, whenever the terminal is its own; three ^C are somebody else's concern."""
    signal.signal(signal.SIGTTIN, signal.SIG_IGN)
    say("up")
    while True:
        try:
            say("typed", os.read(0, 1).hex())
        except OSError:
            time.sleep(0.01)


def by_keys(machine: Machine) -> None:
    """Does as typed: the next device's driver comes up, or the first disk's worker crashes, or an end."""
    say("up")
    drivers = iter((CONSOLE, BLOCK, STUBBORN))
    while True:
        match os.read(0, 1):
            case b"d":
                device = next(drivers)
                machine.make_ready(device)
                say("served by", *(machine.pid(device, queue) for queue in range(len(machine.devices[device].kicks))))
            case b"c":
                _crash(machine, Order.CRASH)
            case b"b":
                machine.order(BLOCK, 0, Order.BREAK_STANDARD)
            case b"r":
                machine.tell(protocol.Reboot())
            case b"q":
                machine.tell(protocol.PowerOff())


# ---- Scenarios: reboots ----


def reboots(machine: Machine) -> None:
    """Reboots as often as the kernel's first argument says; a file beside the kernel counts."""
    counter = Path(f"{machine.config.kernel}.lives")
    lives = int(counter.read_text()) if counter.exists() else 0
    counter.write_text(str(lives + 1))
    supervisor = os.getppid()
    machine.make_ready(BLOCK)
    machine.pid(BLOCK)
    if lives == 0:
        _crash(machine, Order.CRASH)
    opened = len(os.listdir(f"/proc/{supervisor}/fd"))
    say("life", lives, "pid", supervisor, "files", opened, "reboots", os.environ.get("LGUEST_REBOOTS", "0"))
    say("restarts", os.environ.get("LGUEST_RESTARTS", ""))
    machine.tell(protocol.PowerOff() if lives == int(machine.config.arguments[0]) else protocol.Reboot())


def reboots_with_one_left_behind(machine: Machine) -> None:
    """A worker waits for a disk that does not answer, and the guest wants to start afresh."""
    machine.make_ready(STUBBORN)
    machine.tell(protocol.Reboot())


def reboots_in_place(machine: Machine) -> None:
    """Reboots when an ``r`` is typed, and finds memory as it should be at every start."""
    assert machine.memory.read(0x6000, len(PATTERN)) == bytes(len(PATTERN)), "memory is cleared"
    assert machine.memory.read(0x5000, 6) == b"loaded"
    machine.memory.write(0x6000, PATTERN)
    machine.make_ready(BLOCK)
    say("life of", os.getppid(), "served by", machine.pid(BLOCK) != 0)
    again = os.read(0, 1) == b"r"
    machine.tell(protocol.Reboot() if again else protocol.PowerOff())


SCENARIOS: dict[str, Callable[[Machine], None]] = {
    scenario.__name__: scenario
    for scenario in (
        *(power_off, die, vanish, crash, cannot, ctrl_c, hang, forked_only),
        *(babble, unknown_device, unknown_queue, wrong_queue_count, ready_twice, two_requests_at_once),
        *(queue_of_a_reset_device, an_answer_of_its_own, ready_again),
        *(crashes, crashes_too_often, crashes_in_a_loop, gets_stuck),
        *(log, resets, resets_under_load, resets_of_nothing, queue_resets, stubborn_worker),
        *(
            stubborn_worker_at_the_end,
            broken_device,
            flood,
            breaks_the_standard_for_ever,
            files,
            who,
            sizes,
            echo,
            by_keys,
            reboots,
            reboots_in_place,
        ),
        *(reboots_with_one_left_behind, short_of_memory),
    )
} | {f"worker_{order.name.lower()}": _order_block(order) for order in Order}


def parts(scenario: str) -> Parts:
    """The parts of a guest that acts this scenario."""

    def open_devices(config: GuestConfig, user: User | None) -> list[Device]:
        return [
            FakeConsole("console", ("receiveq", "transmitq")),
            FakeDevice("block0", ("requestq",)),
            FakeDevice("mule0", ("requestq",), stubborn=True),
        ]

    def load_machine() -> MachineBody:
        if scenario == "no_engine":
            raise LguestError("unicorn 2.1.4 is needed")
        if scenario == "broken_engine":
            raise ImportError("libunicorn.so.2")
        act = SCENARIOS[scenario]

        def body(  # noqa: PLR0917 -- as the supervisor calls it
            config: GuestConfig,
            memory: GuestMemory,
            code_map: Any,
            devices: Sequence[DevicePort],
            begin: Callable[[], EntryState],
            requests: socket.socket,
            events: socket.socket,
        ) -> None:
            assert code_map is None
            act(Machine(config, memory, devices, begin(), requests, events))

        return body

    def make_queue(  # noqa: PLR0917 -- as a worker calls it
        memory: GuestMemory, layout: QueueLayout, features: int, kick: int, call: int, watch: object, account: Ledger
    ) -> Any:
        assert (layout, features, watch) == (LAYOUT, FEATURES, None)
        # Nobody but the kicks knows what there is to do.
        account.fields[ledger.PHASE] = ledger.Phase.IDLE
        return kick, call, account

    return Parts(
        read_kernel=lambda config: FakeKernel(),
        open_devices=open_devices,
        make_watches=lambda memory, workers: None,
        make_queue=make_queue,
        load_machine=load_machine,
        machine_needs=None,
    )


class UndyingChild(Child):
    """To whom only a disk that answers could bring an end."""

    def has_ended(self, timeout: float = 0) -> bool:
        return super().has_ended(timeout) and not self.name.startswith("mule0")


def refuse_memory(_ledger: Ledger) -> NoReturn:
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def main() -> int:
    scenario, *arguments = sys.argv[1:]
    if scenario == reboots_with_one_left_behind.__name__:
        children.Child = UndyingChild  # type: ignore[misc]
    if scenario == short_of_memory.__name__:
        Ledger.__init__ = refuse_memory  # type: ignore[assignment, method-assign]
    gc.disable()  # as the command does
    try:
        return cli.conclude(run(cli.parse(arguments), parts(scenario), GRACE))
    except LguestError as error:
        os.write(2, f"lguest: {error}\n".encode())
        return 1


if __name__ == "__main__":
    sys.exit(main())
