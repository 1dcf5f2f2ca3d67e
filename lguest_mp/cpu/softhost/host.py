"""The host half of lguest in software: what Linux 3.18's ``drivers/lguest`` did in the kernel.

The guest knows that it is one. Its kernel runs at privilege level 1, its programs at 3, and for what takes level 0 it
asks by hypercall. Its interrupt flag is a word of memory that both sides know (``struct lguest_data``); the CPU's own
is always set, so that the host gets its word in.

**Traps.** A system call goes through the CPU's own IDT straight to the guest's kernel, as does every other trap that
the guest gave a trap gate. All others come here first (:meth:`SoftHost.trap`): hypercalls, what the launcher emulates,
page faults (the guest reads CR2 from memory), and whatever has an interrupt gate, which has to clear that word of
memory. What is the guest's is put on its kernel's stack as the CPU would have, and the guest goes on in its handler.

**Interrupts** are delivered the same way, between two instructions, when the guest wants them: its flag, its mask, and
a range of its instructions in which it never does. When it does not want one now, the host has to see for itself when
that changes, because Linux's guest forgets to tell (its test of ``irq_pending`` compares with zero). So the CPU looks
at the flag at every indirect jump, of which a kernel that has just enabled interrupts makes one at once (it returns);
and for what that misses there is a timer.

**Death.** A guest that asks for nonsense dies, with the reason in the words of the host in Linux, and so does one whose
trap cannot be delivered. Death is an exception that comes out of :meth:`SoftHost.run`. Nothing a guest does raises any
other.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from threading import Lock
from typing import Protocol

from lguest_mp.codemap import CodeMap
from lguest_mp.cpu.lguest_host import NOTIFY, GuestDied, GuestRestarts, LguestHost, Pending, Register
from lguest_mp.cpu.softhost import abi
from lguest_mp.cpu.softhost.abi import Hypercall
from lguest_mp.cpu.softhost.cpu import EAX, EBX, ECX, EDX, EIP, ESI, ESP, GuestCpu
from lguest_mp.cpu.softhost.paging import PageTables
from lguest_mp.cpu.softhost.tables import Gate, HostPages
from lguest_mp.errors import LguestError
from lguest_mp.machine.clock import HostClock, HostCounter
from lguest_mp.machine.timer import HostTimer
from lguest_mp.memory import GuestMemory

_NS = 1_000_000_000
#: How often an interrupt that the guest does not want now is tried again at the latest, nanoseconds.
_RETRY = 1_000_000
_MASK = 0xFFFF_FFFF
#: A flat segment of code, and of data, for the guest's kernel: what it finds in its GDT.
_FLAT_CODE = (0x0000_FFFF, 0x00CF_BB00)
_FLAT_DATA = (0x0000_FFFF, 0x00CF_B300)
_RING_ENTRY = struct.Struct("<5I")
#: INT3 and INTO: one byte; any other INT n has two.
_SHORT_INTS = (0xCC, 0xCE)
_INSTRUCTION_BYTES = 7


class Events(Protocol):
    """Where the host's timers are waited for, and the CPU sleeps; see machine/eventloop.py."""

    def add_shared(self, fd: int, handler: Callable[[], None], /) -> None:
        """Calls ``handler`` when ``fd`` is readable, on whichever thread waits."""

    def help(self, wake: int, /) -> None:
        """Waits on the CPU's thread; see Platform.idle."""

    #: Called on the thread that waits for the timers, and raises interrupts, before it sleeps.
    before_sleep: Callable[[], None]


class SoftHost(LguestHost):
    """One guest, on the embedded CPU."""

    def __init__(self, memory: GuestMemory, code_map: CodeMap, events: Events) -> None:
        # First of all, because the frequency of the time stamp counter is the better known the longer ago this was.
        self._clock = HostClock(HostCounter())
        self._memory = memory
        self._view = memory.view
        self._words = memory.view.cast("I")
        self._marks = code_map.marks
        self._idle = events.help
        self._pages = HostPages()
        self._cpu = GuestCpu(memory, self._pages, code_map, self)
        self._tables = PageTables(memory, self._pages, self._cpu)
        #: Where the guest's memory ends, bytes.
        self._size = 0
        #: The guest-physical address of struct lguest_data, and the index of its first word; 0: before LGUEST_INIT.
        self._data = 0
        self._data_word = 0
        self._initialized = False
        self._noirq = range(0)
        self._cursor = 0
        self._halted = False
        #: A hypercall that has to wait until the launcher has done something else.
        self._waiting: tuple[int, int, int, int, int] | None = None
        self._outcome: Pending | None = None
        self._end: Exception | None = None
        self._attached: dict[int, int] = {}
        self._fault = (0, 0)

        self._lock = Lock()
        self._irqs = 0
        self._retrying = False
        self._timer = HostTimer()
        self._retry_timer = HostTimer()
        events.add_shared(self._timer.fd, self._timer_expired)
        events.add_shared(self._retry_timer.fd, self._retry)
        events.before_sleep = self._cpu.settle
        self._hypercalls: dict[int, Callable[[int, int, int, int], None]] = {
            Hypercall.FLUSH_ASYNC: self._nothing,
            Hypercall.LGUEST_INIT: self._init_again,
            Hypercall.SHUTDOWN: self._shutdown,
            Hypercall.NEW_PGTABLE: self._new_pgtable,
            Hypercall.FLUSH_TLB: self._flush_tlb,
            Hypercall.LOAD_IDT_ENTRY: self._load_idt_entry,
            Hypercall.SET_STACK: self._set_stack,
            Hypercall.TS: self._ts,
            Hypercall.SET_CLOCKEVENT: self._set_clockevent,
            Hypercall.HALT: self._halt,
            Hypercall.SET_PTE: self._set_pte,
            Hypercall.SET_PGD: self._set_pgd,
            Hypercall.LOAD_TLS: self._load_tls,
            Hypercall.NOTIFY: self._notify,
            Hypercall.LOAD_GDT_ENTRY: self._load_gdt_entry,
            Hypercall.SEND_INTERRUPTS: self._nothing,
        }

    # --- the launcher's verbs ---

    def initialize(self, pfn_limit: int, start: int, device_limit: int) -> None:
        """Makes the guest; see LguestHost."""
        if not 0 < pfn_limit <= min(device_limit, self._memory.size >> abi.PAGE_SHIFT):
            raise LguestError(f"a guest of {pfn_limit} pages does not fit its memory, nor devices up to {device_limit}")
        self._size = pfn_limit << abi.PAGE_SHIFT
        self._cpu.set_memory_size(self._size)
        self._tables.set_limits(pfn_limit, device_limit)
        self._pages.map_linear()
        self._pages.set_descriptor(abi.KERNEL_CS >> 3, *_FLAT_CODE)
        self._pages.set_descriptor(abi.KERNEL_DS >> 3, *_FLAT_DATA)
        code, data = self._pages.segment(abi.KERNEL_CS), self._pages.segment(abi.KERNEL_DS)
        assert code is not None
        assert data is not None
        self._cpu.enter(start, code, data)

    def run(self) -> Pending:
        """Runs the guest until the launcher is needed; see LguestHost."""
        try:
            if self._end is None:
                self._go_on()
                if self._outcome is None:
                    self._cpu.run()
        except (GuestDied, GuestRestarts) as end:
            self._end = end
        if self._end is not None:
            raise self._end
        outcome, self._outcome = self._outcome, None
        assert outcome is not None
        return outcome

    def _go_on(self) -> None:
        """What is left of a hypercall that was interrupted by another one."""
        if self._waiting is not None:
            self._hypercall()
        if self._outcome is None and (self._irqs or self._halted):
            self._settle()

    def get_register(self, register: Register) -> int:
        """A register of the stopped guest."""
        return self._cpu.get_register(register)

    def set_register(self, register: Register, value: int) -> None:
        """Changes a register of the stopped guest. ValueError: a segment, or the flags."""
        self._cpu.set_register(register, value)

    def inject(self, trap: int) -> None:
        """Has the guest take a trap; if it cannot, run() says that it died."""
        try:
            if trap == abi.PAGE_FAULT and self._initialized:
                self._words[self._data_word + abi.DATA_CR2 // 4] = self._fault[0]
            self._reflect(trap, self._fault[1], self._cpu.read_flags())
        except GuestDied as end:
            self._end = end

    def attach(self, address: int, eventfd: int) -> None:
        """A NOTIFY of ``address`` adds 1 to ``eventfd``."""
        self._attached[address] = eventfd

    def detach(self, address: int) -> None:
        """Forgets :meth:`attach`."""
        self._attached.pop(address, None)

    def interrupt(self, irq: int) -> None:
        """Raises an interrupt, from any thread. ValueError: there is no such one."""
        if not 0 <= irq < abi.IRQS:
            raise ValueError(f"no interrupt {irq}")
        with self._lock:
            self._irqs |= 1 << irq
        self._cpu.kick()

    def call(self, job: Callable[[], None]) -> None:
        """Runs ``job`` on the CPU's thread between two instructions, soon; returns at once. From any thread."""
        self._cpu.call(job)

    def forget_code(self, first_page: int, last_page: int) -> None:
        """Pages of guest memory were written behind the CPU's back. On the CPU's thread only (see :meth:`call`)."""
        self._cpu.forget_code(first_page, last_page)

    def close(self) -> None:
        """Ends the guest."""
        self._cpu.close()
        self._timer.close()
        self._retry_timer.close()

    # --- traps, on the CPU's thread ---

    def trap(self, vector: int) -> None:
        """An exception or INT n of the guest."""
        cpu = self._cpu
        if vector == abi.HYPERCALL_VECTOR and cpu.level == abi.KERNEL_LEVEL:
            self._hypercall()
        elif cpu.is_int:
            self._software_interrupt(vector)
        else:
            self._exception(vector)
        if self._outcome is not None:
            cpu.stop()
        elif self._irqs or self._halted:
            self._settle()

    def _software_interrupt(self, vector: int) -> None:
        """INT n that is not the guest's to take directly."""
        if self._cpu.level > self._pages.software_level(vector):
            self._refuse_int(vector)
        elif (gate := self._pages.gate(vector)) is not None:
            self._deliver(gate, None, self._cpu.trap_flags)
        else:
            self._died_of(vector, 0)

    def _refuse_int(self, vector: int) -> None:
        """INT n from a level that may not: a general protection fault at that instruction."""
        words = self._cpu.words
        before = self._peek(words[EIP] - 1 & _MASK, 1)
        words[EIP] = words[EIP] - (1 if vector in (3, 4) and before[0] in _SHORT_INTS else 2) & _MASK
        self._exception_with(abi.GENERAL_PROTECTION, vector << 3 | 2)

    def _exception(self, vector: int) -> None:
        cpu = self._cpu
        error = cpu.error_code
        beyond = cpu.take_beyond()
        delivering = cpu.take_delivering()
        if delivering is not None:
            if vector == abi.GENERAL_PROTECTION and error == delivering << 3 | 2:
                self._refuse_int(delivering)
                return
            if vector == abi.PAGE_FAULT:
                raise GuestDied(f"bad stack page {cpu.fault_address:#x}")
            self._died_of(vector, error)
        if vector == abi.PAGE_FAULT:
            self._page_fault(error, beyond)
        else:
            self._exception_with(vector, error)

    def _exception_with(self, vector: int, error: int) -> None:
        self._fault = (0, error)
        if vector == abi.GENERAL_PROTECTION and error == 0:
            self._outcome = Pending(vector, self._instruction())
        else:
            self._reflect(vector, error, self._cpu.trap_flags)

    def _page_fault(self, error: int, beyond: int) -> None:
        address = self._cpu.fault_address
        self._fault = (address, error)
        if beyond:
            self._tables.check_device(beyond)
            self._outcome = Pending(abi.PAGE_FAULT, self._instruction(), beyond)
            return
        if not error & 1 and self._tables.find(address):
            return
        if self._initialized:
            self._words[self._data_word + abi.DATA_CR2 // 4] = address
        self._reflect(abi.PAGE_FAULT, error, self._cpu.trap_flags)

    def _reflect(self, vector: int, error: int, flags: int) -> None:
        gate = self._pages.gate(vector)
        if gate is None:
            self._died_of(vector, error)
        else:
            self._deliver(gate, error if vector in abi.WITH_ERROR_CODE else None, flags)

    def _died_of(self, vector: int, error: int) -> None:
        detail = self._fault[0] if vector == abi.PAGE_FAULT else error
        raise GuestDied(f"unhandled trap {vector} at {self._cpu.words[EIP]:#x} ({detail:#x})")

    def _instruction(self) -> bytes:
        return self._peek(self._cpu.code_base + self._cpu.words[EIP] & _MASK, _INSTRUCTION_BYTES)

    def _peek(self, virtual: int, length: int) -> bytes:
        """Bytes of the guest as it sees them; zeros where there are none."""
        data = b""
        while length:
            part = min(length, abi.PAGE_SIZE - virtual % abi.PAGE_SIZE)
            physical = self._tables.physical(virtual)
            data += bytes(part) if physical is None else bytes(self._view[physical : physical + part])
            virtual = virtual + part & _MASK
            length -= part
        return data

    # --- delivery ---

    def _deliver(self, gate: Gate, error: int | None, flags: int) -> None:
        """Has the guest enter a handler, with the frame on its kernel's stack as the CPU would have put it there."""
        cpu, pages = self._cpu, self._pages
        words = cpu.words
        code = pages.kernel_code
        if code is None:
            raise GuestDied(f"bad code segment {abi.KERNEL_CS}")
        enabled = self._words[self._data_word + abi.DATA_IRQ_ENABLED // 4] if self._initialized else abi.FLAG_IF
        if not enabled & abi.FLAG_IF:
            flags &= ~abi.FLAG_IF
        frame = [words[EIP], cpu.code_selector, flags]
        if error is not None:
            frame.insert(0, error)
        stack = None
        if cpu.level == abi.KERNEL_LEVEL:
            top, base = words[ESP], cpu.stack_base
        else:
            stack = pages.kernel_stack
            if stack is None:
                raise GuestDied(f"bad stack segment {pages.stack_selector}")
            frame += (words[ESP], cpu.stack_selector)
            top, base = pages.stack_pointer, stack.base
        pointer = top - 4 * len(frame) & _MASK
        self._push(base + pointer & _MASK, struct.pack(f"<{len(frame)}I", *frame))
        cpu.enter_handler(gate.offset, code, stack, pointer)
        if gate.disables and self._initialized:
            self._words[self._data_word + abi.DATA_IRQ_ENABLED // 4] = 0

    def _push(self, virtual: int, frame: bytes) -> None:
        start = 0
        while start < len(frame):
            physical = self._tables.physical(virtual)
            if physical is None:
                raise GuestDied(f"Bad address {virtual:#x}")
            part = min(len(frame) - start, abi.PAGE_SIZE - physical % abi.PAGE_SIZE)
            self._view[physical : physical + part] = frame[start : start + part]
            page = physical >> abi.PAGE_SHIFT
            if self._marks[page]:
                self._cpu.forget_code(page, page)
            virtual = virtual + part & _MASK
            start += part

    # --- interrupts ---

    def attend(self) -> bool:
        """Delivers an interrupt if there is one that the guest wants now."""
        if self._outcome is not None:
            return False  # the launcher comes first: it will look at the instruction where the guest stands
        wanted = self._wanted()
        if not wanted:
            self._cpu.ask_no_more()
            # interrupt() leaves its mark first: what came meanwhile is seen now, or asks again.
            wanted = self._wanted()
        gate = None
        if wanted and self._takes_interrupts():
            irq = (wanted & -wanted).bit_length() - 1
            gate = self._pages.gate(abi.FIRST_IRQ_VECTOR + irq)
            if gate is None:
                self._cpu.ask_no_more()
        if gate is None:
            if self._irqs:
                self._try_later()
            return False
        self._take(irq, gate)
        return True

    def _wanted(self) -> int:
        """The pending interrupts that the guest does not block."""
        return self._irqs & ~self._words[self._data_word + abi.DATA_BLOCKED // 4] if self._initialized else 0

    def _takes_interrupts(self) -> bool:
        """Whether the guest lets itself be interrupted here; if not, has the CPU ask again."""
        cpu, words, base = self._cpu, self._words, self._data_word
        if self._halted:
            words[base + abi.DATA_IRQ_ENABLED // 4] = abi.FLAG_IF
            self._halted = False
            return True
        if cpu.words[EIP] in self._noirq:
            cpu.ask_again(None)
            return False
        if not words[base + abi.DATA_IRQ_ENABLED // 4]:
            words[base + abi.DATA_IRQ_PENDING // 4] = abi.FLAG_IF
            cpu.ask_again(self._enabled_address())
            return False
        return True

    def _take(self, irq: int, gate: Gate) -> None:
        cpu = self._cpu
        with self._lock:
            self._irqs &= ~(1 << irq)
        self._deliver(gate, None, cpu.read_flags())
        self._write_time()
        cpu.ask_no_more()
        if self._wanted():
            cpu.ask_again(self._enabled_address())
        else:
            self._words[self._data_word + abi.DATA_IRQ_PENDING // 4] = 0

    def _enabled_address(self) -> int:
        return self._memory.address + self._data + abi.DATA_IRQ_ENABLED

    def _settle(self) -> None:
        """Before the guest goes on: the interrupt that is to be delivered first; a halted guest waits for one."""
        self.attend()
        while self._halted:
            self._cpu.sleep(self._awake, self._idle)
            self.attend()

    def _awake(self) -> bool:
        return bool(self._wanted())

    def _try_later(self) -> None:
        with self._lock:
            if not self._retrying:
                self._retrying = True
                self._retry_timer.arm(time.monotonic_ns() + _RETRY, _RETRY)

    def _retry(self) -> None:
        """The retry timer expired; on either thread."""
        self._retry_timer.take_expiry()
        with self._lock:
            if not self._irqs or self._cpu.sleeping:
                self._retrying = False
                self._retry_timer.disarm()
                return
        self._cpu.kick()

    def _timer_expired(self) -> None:
        """The guest's clock event; on either thread."""
        with self._lock:
            if not self._timer.take_expiry():
                return
            self._irqs |= 1
        self._cpu.kick()

    def _write_time(self) -> None:
        seconds, nanoseconds = divmod(time.time_ns(), _NS)
        place = self._data_word + abi.DATA_TIME // 4
        self._words[place] = seconds & _MASK
        self._words[place + 1] = nanoseconds

    # --- hypercalls ---

    def _hypercall(self) -> None:
        """One of the guest's, after those that it left in the ring."""
        if self._waiting is None:
            words = self._cpu.words
            call = (words[EAX], words[EBX], words[ECX], words[EDX], words[ESI])
        else:
            call, self._waiting = self._waiting, None
        if not self._initialized:
            self._initialize_data(call)
            return
        if self._view[self._data + abi.DATA_STATUS + self._cursor] != abi.RING_FREE:
            self._drain_ring()
            if self._outcome is not None:
                self._waiting = call
                return
        self._do(*call)

    def _do(self, number: int, arg1: int, arg2: int, arg3: int, arg4: int) -> None:
        function = self._hypercalls.get(number)
        if function is None:
            raise GuestDied(f"Bad hypercall {_signed(number)}")
        function(arg1, arg2, arg3, arg4)

    def _drain_ring(self) -> None:
        view, status, calls = self._view, self._data + abi.DATA_STATUS, self._data + abi.DATA_HCALLS
        for _ in range(abi.RING_SIZE):
            cursor = self._cursor
            if view[status + cursor] == abi.RING_FREE:
                return
            self._cursor = (cursor + 1) % abi.RING_SIZE
            self._do(*_RING_ENTRY.unpack_from(view, calls + cursor * abi.HCALL_SIZE))
            view[status + cursor] = abi.RING_FREE
            if self._outcome is not None:
                return

    def _initialize_data(self, call: tuple[int, int, int, int, int]) -> None:
        number, address = call[:2]
        if number != Hypercall.LGUEST_INIT:
            raise GuestDied(f"hypercall {_signed(number)} before INIT")
        if address % 4 or address + abi.DATA_SIZE > self._size:
            raise GuestDied(f"bad guest page {address:#x}")
        words, base = self._words, address // 4
        if words[base + abi.DATA_SYSCALL_VEC // 4] != abi.SYSCALL_VECTOR:
            raise GuestDied("bad syscall vector")
        kernel_address = words[base + abi.DATA_KERNEL_ADDRESS // 4]
        if kernel_address >= abi.RESERVED_BASE:
            raise GuestDied(f"bad kernel address {kernel_address:#x}")
        self._tables.kernel_address = kernel_address
        self._noirq = range(words[base + abi.DATA_NOIRQ_START // 4], words[base + abi.DATA_NOIRQ_END // 4])
        words[base + abi.DATA_TSC_KHZ // 4] = self._clock.tsc_khz
        words[base + abi.DATA_RESERVE_MEM // 4] = abi.RESERVED_BYTES
        self._data, self._data_word = address, base
        self._initialized = True
        self._write_time()

    def _nothing(self, _1: int, _2: int, _3: int, _4: int) -> None:
        """That it came here is all that was wanted: the ring is empty, interrupts are looked at."""

    def _init_again(self, _address: int, _2: int, _3: int, _4: int) -> None:
        raise GuestDied("already have lguest_data")

    def _shutdown(self, address: int, how: int, _3: int, _4: int) -> None:
        if how == abi.SHUTDOWN_RESTART:
            raise GuestRestarts  # whatever the reason: Linux gives none
        text = self._read(address, abi.SHUTDOWN_TEXT).split(b"\0")[0]
        raise GuestDied(f"CRASH: {text.decode(errors='replace')}")

    def _new_pgtable(self, directory: int, _2: int, _3: int, _4: int) -> None:
        self._tables.new_directory(directory)

    def _flush_tlb(self, _everything: int, _2: int, _3: int, _4: int) -> None:
        self._tables.flush()

    def _load_idt_entry(self, vector: int, low: int, high: int, _4: int) -> None:
        direct = self._pages.set_gate(vector, low, high)
        if vector < abi.IDT_ENTRIES:
            self._cpu.set_direct(vector, direct)

    def _set_stack(self, selector: int, pointer: int, pages: int, _4: int) -> None:
        if pages > 2:
            raise GuestDied(f"bad stack pages {pages}")
        self._pages.set_stack(selector, pointer)
        for page in range(pages):
            address = pointer - 1 - page * abi.PAGE_SIZE & _MASK
            if self._tables.physical(address, writable=True) is None:
                raise GuestDied(f"bad stack page {address:#x}")

    def _ts(self, wanted: int, _2: int, _3: int, _4: int) -> None:
        self._cpu.set_task_switched(bool(wanted))

    def _set_clockevent(self, delta: int, _2: int, _3: int, _4: int) -> None:
        with self._lock:
            if delta:
                self._timer.arm(time.monotonic_ns() + delta)
            else:
                self._timer.disarm()

    def _halt(self, _1: int, _2: int, _3: int, _4: int) -> None:
        self._halted = True

    def _set_pte(self, directory: int, virtual: int, entry: int, _4: int) -> None:
        self._tables.set_entry(directory, virtual, entry)

    def _set_pgd(self, directory: int, index: int, _3: int, _4: int) -> None:
        self._tables.set_directory_entry(directory, index)

    def _load_tls(self, address: int, _cpu: int, _3: int, _4: int) -> None:
        self._pages.set_tls(self._read(address, abi.TLS_ENTRIES * 8))

    def _notify(self, address: int, _2: int, _3: int, _4: int) -> None:
        eventfd = self._attached.get(address)
        if eventfd is None:
            self._outcome = Pending(NOTIFY, address=address)
        else:
            os.eventfd_write(eventfd, 1)

    def _load_gdt_entry(self, index: int, low: int, high: int, _4: int) -> None:
        self._pages.set_descriptor(index, low, high)

    def _read(self, address: int, length: int) -> bytes:
        """Guest memory. GuestDied: it has no such."""
        if address + length > self._size:
            raise GuestDied(f"bad read address {address:#x} len {length}")
        return bytes(self._view[address : address + length])


def _signed(number: int) -> int:
    """A register as the host in Linux prints it."""
    return number - (1 << 32) if number >> 31 else number
