"""KVM as an Engine: a thread of the host for each of the guest's processors, and what they leave the guest for.

The host's processor executes the guest; its interrupts, timers and clock are KVM's. A thread comes back from KVM when
the guest touches a port or a register that is the machine's, which happens hundreds of times while it boots and then
hardly ever, since what there is much of goes past this process (``interrupts.py``). The machine knows of one CPU, so it
is asked by one thread at a time.

**How a thread is reached.** It may be executing the guest, or asleep in it: HLT is KVM's. Whoever wants its attention
sets a byte that KVM looks at on the way in, and sends the thread a signal, which gets it out. Either way KVM_RUN
returns; the thread clears the byte *before* it looks what is wanted, so a wish is never missed.

**When it is over without a word.** A processor that executes HLT with interrupts off sleeps in KVM for ever, and KVM
does not tell. So somebody looks every few seconds (:meth:`KvmEngine.look_for_halt`): when no thread has used any time
since the last look, each is fetched out of KVM and asked what its processor does.

The first processor is the caller's thread, which is the process's main one, ``cpu``; the others are ``cpu1``,
``cpu2`` … The first failure of any of them, the end of the guest included, ends them all.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable
from threading import Lock, Thread, get_ident
from types import FrameType

from lguest_mp import prctl
from lguest_mp.cpu.engine import Engine, EntryState, GuestFault, GuestHalted, Hardware
from lguest_mp.cpu.kvm import registers
from lguest_mp.cpu.kvm.api import (
    KVM_EXIT_IO_OUT,
    KVM_INTERNAL_ERROR_EMULATION,
    KVM_MP_STATE_HALTED,
    KVM_MP_STATE_UNINITIALIZED,
    Cap,
    Exit,
    Kvm,
    Run,
    Vcpu,
)
from lguest_mp.cpu.kvm.cpuid import entries
from lguest_mp.cpu.kvm.interrupts import KvmInterrupts
from lguest_mp.errors import LguestError
from lguest_mp.machine.layout import IO_APIC_PINS, KVM_PAGES
from lguest_mp.memory import PAGE_SIZE, GuestMemory

#: Gets a thread out of KVM. No real-time signal: those queue up, and there is an end to how many.
KICK = signal.SIGUSR2
_SIZES = frozenset({1, 2, 4, 8})
#: Where a processor is after a reset (SDM 3A, 9.1.1).
_RESET_RIP = 0xFFF0
_FULL = 0xFFFF_FFFF_FFFF_FFFF


class KvmEngine(Engine):
    """``cpus`` processors over ``memory``, of the KVM behind ``fd``. LguestError: the host cannot."""

    def __init__(self, fd: int, memory: GuestMemory, cpus: int = 1) -> None:
        kvm = Kvm(fd)
        if cpus > (limit := kvm.check(Cap.MAX_VCPUS)):
            raise LguestError(f"--cpus={cpus}: this host's KVM has at most {limit} for a guest")
        self._vm = vm = kvm.create_vm()
        self._vcpus: list[Vcpu] = []
        try:
            vm.split_irqchip(IO_APIC_PINS)
            vm.set_identity_map_addr(KVM_PAGES)
            vm.set_tss_addr(KVM_PAGES + PAGE_SIZE)
            for slot, region in enumerate(memory.regions):
                vm.set_memory(slot, region.base, region.size, memory.address + region.offset)
            supported = kvm.supported_cpuid()
            for number in range(cpus):
                vcpu = vm.create_vcpu(number)
                self._vcpus.append(vcpu)
                vcpu.set_cpuid(entries(supported, number, cpus, vcpu.tsc_khz()))
                registers.set_msrs(vcpu)
        except BaseException:
            self.close()
            raise
        #: The way to the local APICs, for the machine.
        self.interrupts = KvmInterrupts(vm, IO_APIC_PINS)
        self._hardware: Hardware | None = None
        self._one_access = Lock()
        self._failure: BaseException | None = None
        self._jobs: deque[Callable[[], None]] = deque()
        self._threads: dict[int, int] = {}
        self._threads_lock = Lock()
        #: While there is a look whether all processors are halted: those that are; None: there is none.
        self._halted: set[int] | None = None
        self._times: list[float] = []

    def connect(self, hardware: Hardware) -> None:
        """What the guest's accesses reach."""
        self._hardware = hardware

    def enter(self, state: EntryState) -> None:
        """See Engine. The other processors wait for the first one to start them, as they do on a PC."""
        registers.enter(self._vcpus[0], state)

    # ---- Running ----

    def run(self) -> None:
        """Runs the guest; see Engine."""
        before = signal.signal(KICK, _only_interrupt)
        others = [
            Thread(target=self._live, args=(number,), name=f"cpu{number}", daemon=True)
            for number in range(1, len(self._vcpus))
        ]
        for thread in others:
            thread.start()
        try:
            self._live(0)
        finally:
            for thread in others:
                thread.join()
            signal.signal(KICK, before)
        assert self._failure is not None
        raise self._failure

    def _live(self, number: int) -> None:
        """The life of one processor's thread."""
        vcpu = self._vcpus[number]
        with self._threads_lock:
            self._threads[number] = get_ident()
        try:
            if number:
                prctl.set_comm(f"lguest/cpu{number}")
            while self._failure is None:
                if vcpu.run():
                    with self._one_access:
                        if self._failure is None:
                            self._serve(vcpu)
                else:
                    vcpu.leave_soon(wanted=False)
                    self._note_halt(number)
                    if number == 0:
                        self._run_jobs()
        except BaseException as error:
            self._fail(error)
        finally:
            with self._threads_lock:
                del self._threads[number]

    def _fail(self, error: BaseException) -> None:
        """Ends the run with an exception; the first one counts."""
        with self._threads_lock:
            if self._failure is None:
                self._failure = error
        for number in range(len(self._vcpus)):
            self._kick(number)

    def _run_jobs(self) -> None:
        while self._jobs:
            self._jobs.popleft()()

    def _kick(self, number: int) -> None:
        self._vcpus[number].leave_soon(wanted=True)
        with self._threads_lock:
            if (thread := self._threads.get(number)) is not None:
                signal.pthread_kill(thread, KICK)

    def kick(self) -> None:
        """See Engine."""
        self._kick(0)

    def call(self, job: Callable[[], None]) -> None:
        """See Engine."""
        self._jobs.append(job)
        self._kick(0)

    # ---- Whether anything will ever happen again ----

    def look_for_halt(self) -> None:
        """Ends the run if no processor can wake again. To be called every few seconds, by one thread."""
        with self._threads_lock:
            times = [time.clock_gettime(time.pthread_getcpuclockid(thread)) for thread in self._threads.values()]
            have_slept, self._times = times == self._times, times
            self._halted = set() if have_slept else None
        if have_slept:
            for number in range(len(self._vcpus)):
                self._kick(number)

    def _note_halt(self, number: int) -> None:
        """On a processor's thread, out of KVM: says what it does to whoever looks for that."""
        if self._halted is None:
            return
        vcpu = self._vcpus[number]
        state = vcpu.mp_state()
        sleeps = state == KVM_MP_STATE_HALTED and not vcpu.state[Run.IF_FLAG]
        with self._threads_lock:
            if self._halted is None:
                return
            if not sleeps and state != KVM_MP_STATE_UNINITIALIZED:
                self._halted = None
                return
            self._halted.add(number)
            is_over = len(self._halted) == len(self._vcpus)
        if is_over:
            raise GuestHalted

    # ---- What the guest is left for ----

    def _serve(self, vcpu: Vcpu) -> None:
        state = vcpu.state
        (reason,) = Run.EXIT_REASON.unpack_from(state)
        match reason:
            case Exit.MMIO:
                self._memory_access(vcpu)
            case Exit.IO:
                self._port_access(vcpu)
            case Exit.IOAPIC_EOI:
                self.interrupts.end_of_interrupt(state[Run.UNION])
            case Exit.INTR | Exit.IRQ_WINDOW_OPEN:
                pass
            case _:
                raise GuestFault(_why(vcpu, reason), registers.describe(vcpu))

    def _port_access(self, vcpu: Vcpu) -> None:
        """IN, OUT, or as many of them as a string instruction asks for at once."""
        assert self._hardware is not None
        state = vcpu.state
        direction, size, port, count, start = Run.PORT.unpack_from(state, Run.UNION)
        for offset in range(start, start + count * size, size):
            if direction == KVM_EXIT_IO_OUT:
                self._hardware.port_write(port, size, int.from_bytes(state[offset : offset + size], "little"))
            else:
                state[offset : offset + size] = self._hardware.port_read(port, size).to_bytes(size, "little")

    def _memory_access(self, vcpu: Vcpu) -> None:
        """A load or store to no RAM. What crosses a page comes in parts of any size, which no register has."""
        assert self._hardware is not None
        address, data, size, is_write = Run.MMIO.unpack_from(vcpu.state, Run.UNION)
        if not is_write:
            value = self._hardware.mmio_read(address, size) if size in _SIZES else _FULL
            vcpu.state[Run.MMIO_DATA : Run.MMIO_DATA + 8] = value.to_bytes(8, "little")
        elif size in _SIZES:
            self._hardware.mmio_write(address, size, int.from_bytes(data[:size], "little"))

    def close(self) -> None:
        """Gives everything back to the host; it must not run."""
        for vcpu in self._vcpus:
            vcpu.close()
        self._vm.close()


def _why(vcpu: Vcpu, reason: int) -> str:
    """Why the guest cannot go on, in one line."""
    rip = vcpu.get_registers().rip
    place = f"at RIP {rip:#x}"
    match reason:
        case Exit.SHUTDOWN:
            # On processors of AMD's KVM resets it before it tells, and nobody knows where it was.
            return "triple fault" if rip == _RESET_RIP else f"triple fault {place}"
        case Exit.FAIL_ENTRY:
            (code,) = Run.HARDWARE.unpack_from(vcpu.state, Run.UNION)
            return f"the host's processor does not enter the guest ({code:#x}) {place}"
        case Exit.INTERNAL_ERROR:
            suberror, _ = Run.INTERNAL.unpack_from(vcpu.state, Run.UNION)
            if suberror == KVM_INTERNAL_ERROR_EMULATION:
                return f"KVM cannot execute the instruction {place}"
            return f"KVM has failed (internal error {suberror}) {place}"
    try:
        return f"KVM stopped with {Exit(reason).name}, which nothing here asked for, {place}"
    except ValueError:
        return f"KVM stopped with exit reason {reason}, which is unknown here, {place}"


def _only_interrupt(_number: int, _frame: FrameType | None) -> None:
    """A kick has done its work when the system call returns."""
