# The hot half of a PC's board around the embedded CPU, part of the compiled core (_compiled.pyx).
#
# machine/{lock,lapic,eventloop}.py and cpu/unicorn/{core,engine}.py are the specification. What stands here does the
# same without the interpreter: interrupts from a worker's eventfd or from the timer into the CPU, notifications from the
# guest to a worker's eventfd, the end of an interrupt, the timer's next deadline, and the sleep in HLT. Whatever else a
# guest does goes to Python's code, and so does each of these where it is not usual: a function that answers STRANGE
# has changed nothing.
#
# **Who touches what.** All state is in one `Board`, which changes under its lock, as the specification has it. The lock
# is a mutex that both have: who waits for it does not hold the interpreter's, and who holds it here never asks for that.
# What is read without the lock is one word each: `pending`, `sleeping`, `page`, and the notifications' addresses.
#
# The CPU's thread and the events' thread run here at the same time as Python's code on other threads.

cdef extern from *:
    """
    #include <pthread.h>
    #include <sys/epoll.h>
    #include <sys/syscall.h>
    #include <sys/timerfd.h>

    #define MEMBARRIER_PRIVATE_EXPEDITED (1 << 3)
    /* Of a rate, in nanoseconds per count (clock.py). */
    #define RATE_BITS 48

    /* CLOCK_MONOTONIC at a value of the counter. A rate has less than 63 bits, so nothing can wrap. */
    static inline __int128 line_at(uint64_t tsc, uint64_t base, int64_t ns, int64_t rate) {
        return ns + (((__int128)tsc - base) * rate >> RATE_BITS);
    }

    /* Sets a timer for a time in the future, and gives it back; or 0 and sets nothing: it is past. */
    static inline int arm_timer(int timer, uint64_t tsc, uint64_t base, int64_t ns, int64_t rate, int64_t now) {
        __int128 when = line_at(tsc, base, ns, rate);
        struct itimerspec spec = {{0, 0}, {0, 0}};
        if (when <= now)
            return 0;
        if (when > INT64_MAX)
            when = INT64_MAX;
        spec.it_value.tv_sec = (int64_t)when / 1000000000;
        spec.it_value.tv_nsec = (int64_t)when % 1000000000;
        timerfd_settime(timer, TFD_TIMER_ABSTIME, &spec, NULL);
        return 1;
    }

    static inline void disarm_timer(int timer) {
        static const struct itimerspec never;
        timerfd_settime(timer, 0, &never, NULL);
    }

    static inline void drain_stores(void) {
        syscall(SYS_membarrier, MEMBARRIER_PRIVATE_EXPEDITED, 0, 0);
    }
    """
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes) noexcept nogil
    int pthread_mutex_destroy(pthread_mutex_t *mutex) noexcept nogil
    int pthread_mutex_lock(pthread_mutex_t *mutex) noexcept nogil
    int pthread_mutex_trylock(pthread_mutex_t *mutex) noexcept nogil
    int pthread_mutex_unlock(pthread_mutex_t *mutex) noexcept nogil
    uintptr_t pthread_self() noexcept nogil

    ctypedef union epoll_data_t:
        int fd
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    const uint32_t EPOLLIN
    const int EPOLL_CTL_MOD
    int epoll_wait(int epoll, epoll_event *events, int count, int milliseconds) noexcept nogil
    int epoll_ctl(int epoll, int operation, int file, epoll_event *event) noexcept nogil

    int arm_timer(int timer, uint64_t tsc, uint64_t base, int64_t ns, int64_t rate, int64_t now) noexcept nogil
    void disarm_timer(int timer) noexcept nogil
    void drain_stores() noexcept nogil
    int __builtin_clzll(unsigned long long) noexcept nogil

from libc.stdlib cimport calloc

# The specification's numbers; only who has a board imports it.
cdef uint32_t APIC_ENABLED, LVT_MASKED, MSI_LEVEL, MSI_ASSERT, TSC_DEADLINE_MSR
cdef uint64_t EOI
cdef int PERIODIC, TSC_DEADLINE
cdef object _lapic = None


cdef int _know_the_specification() except ERROR:
    global APIC_ENABLED, LVT_MASKED, MSI_LEVEL, MSI_ASSERT, TSC_DEADLINE_MSR, EOI, PERIODIC, TSC_DEADLINE, _lapic
    if _lapic is None:
        from lguest_mp.machine import lapic
        APIC_ENABLED, LVT_MASKED = lapic.SVR_ENABLED, lapic.MASKED
        MSI_LEVEL, MSI_ASSERT = lapic.MSI_LEVEL, lapic.MSI_ASSERT
        TSC_DEADLINE_MSR, EOI = lapic.TSC_DEADLINE_MSR, lapic.Reg.EOI
        PERIODIC, TSC_DEADLINE = lapic.TimerMode.PERIODIC, lapic.TimerMode.TSC_DEADLINE
        _lapic = lapic
    return 0


cdef enum:
    INTERRUPT_HARD = 2  # CPU_INTERRUPT_HARD, core.py
    EXIT_CHAIN = 0xFFFF
    #: More queues than a bus has room for.
    MOST_QUEUES = 512
    #: Events that one look takes.
    EVENTS = 64
    #: The specification has a look at an expired timer so often (nanoseconds): the guest's clock depends on that.
    LOOK_INTERVAL = 1_000_000_000

ctypedef void (*MmioWriteFunction)(void *uc, uint64_t offset, unsigned int size, uint64_t value, void *data) noexcept nogil
ctypedef int (*WrmsrFunction)(uint32_t index, uint64_t value) noexcept nogil


cdef struct Line:
    # A queue: where a store notifies its worker (0: nowhere), and did when it was last told, and what its interrupt is,
    # if that is a message alone.
    uint64_t notify_at
    uint64_t last_notified_at
    int kick
    int call
    bint is_message
    uint64_t address
    uint32_t data
    uint64_t notified


cdef struct Hole:
    # A part of the guest's address space with no RAM.
    uint64_t base
    MmioWriteFunction write


cdef struct Board:
    pthread_mutex_t mutex
    bint kick_wanted
    bint kicks_cpu  # or calls whom its Lock knows
    PyObject *owner

    # The local APIC, under the specification's names; the registers of 256 bits lowest word first.
    uint64_t irr[4]
    uint64_t isr[4]
    uint64_t tmr[4]
    uint32_t tpr, ldr, dfr, svr
    uint32_t timer_entry
    int mode
    bint counting
    uint64_t deadline
    bint pending
    int64_t page

    # The timer's descriptor, or -1: the specification's own code sets it.
    int timer
    # Of the clock: a point and the rate, which is 0 while that is not known.
    uint64_t line_tsc
    int64_t line_ns
    int64_t rate
    uint64_t look_at

    # How to have the CPU's attention; the pointers lead into the library's structures.
    bint sleeping, is_settled
    uintptr_t thread
    int wake
    uint32_t *request
    uint16_t *exit_chain
    uint64_t *jobs_wanted
    WrmsrFunction wrmsr

    Line lines[MOST_QUEUES]
    int line_count

    # How often what happened without the specification.
    uint64_t taken[256]
    uint64_t ends, deadlines


# There is one CPU of the library in a process, and its callbacks know no other way to their board.
cdef Board *_the_board = NULL


# ---- The lock, and the CPU's attention ----

cdef inline void lock_(Board *b) noexcept nogil:
    pthread_mutex_lock(&b.mutex)


cdef inline void unlock_(Board *b) noexcept nogil:
    cdef bint wanted = b.kick_wanted
    b.kick_wanted = False
    pthread_mutex_unlock(&b.mutex)
    if wanted:
        if b.kicks_cpu:
            kick_(b)
        else:
            with gil:
                (<object>b.owner).kick()


cdef void kick_(Board *b) noexcept nogil:
    """``UnicornCore.kick``."""
    # What the CPU is to look at was stored before; whether it sleeps is read after that.
    __sync_synchronize()
    if b.sleeping:
        if pthread_self() != b.thread:
            write(b.wake, &ONE, sizeof(ONE))
        return
    store32(b.request, INTERRUPT_HARD)
    store16(b.exit_chain, EXIT_CHAIN)
    b.is_settled = False


cdef void settle_(Board *b) noexcept nogil:
    """``UnicornCore.settle``."""
    if b.is_settled:
        return
    b.is_settled = True
    if load32(b.request):
        drain_stores()
        store16(b.exit_chain, EXIT_CHAIN)


# ---- The local APIC; the lock is held ----

cdef inline int highest_(const uint64_t *bits) noexcept nogil:
    """The number of the highest bit of 256, or -1."""
    cdef int word
    for word in range(3, -1, -1):
        if bits[word]:
            return 64 * word + 63 - __builtin_clzll(bits[word])
    return -1


cdef inline void flip_(uint64_t *bits, int number) noexcept nogil:
    bits[number >> 6] ^= ONE << (number & 63)


cdef inline bint has_(const uint64_t *bits, int number) noexcept nogil:
    return bits[number >> 6] >> (number & 63) & 1


cdef void update_(Board *b) noexcept nogil:
    cdef bint was_pending = b.pending
    cdef int requested = highest_(b.irr)
    cdef int in_service = max(highest_(b.isr), 0)
    cdef int priority = max(<int>b.tpr >> 4, in_service >> 4)
    b.pending = requested >= 0 and requested >> 4 > priority
    if b.pending and not was_pending:
        b.kick_wanted = True


cdef bint is_for_me_(Board *b, uint32_t destination, bint logical) noexcept nogil:
    cdef uint32_t mine
    if not logical:
        return destination == 0 or destination == 0xFF
    mine = b.ldr >> 24
    if b.dfr >> 28 == 0xF:
        return destination & mine != 0
    return (destination >> 4 == 0xF or destination >> 4 == mine >> 4) and destination & mine & 0xF != 0


cdef int accept_(Board *b, int vector, bint level) noexcept nogil:
    """FOUND: accepted, EMPTY: not, or STRANGE."""
    if not b.svr & APIC_ENABLED or b.page < 0:
        return EMPTY
    if vector < 16:
        return STRANGE
    if not has_(b.irr, vector):
        flip_(b.irr, vector)
    if has_(b.tmr, vector) != level:
        flip_(b.tmr, vector)
    update_(b)
    return FOUND


cdef int message_(Board *b, uint64_t address, uint32_t data) noexcept nogil:
    """The same for ``LocalApic.message``."""
    if address >> 20 != 0xFEE or data & (MSI_LEVEL | MSI_ASSERT) == MSI_LEVEL:
        return EMPTY
    # Fixed and lowest priority.
    if data >> 8 & 7 > 1 or not is_for_me_(b, address >> 12 & 0xFF, address >> 2 & 1):
        return EMPTY
    return accept_(b, data & 0xFF, data & MSI_LEVEL != 0)


cdef inline bint has_strange_entry_(Board *b) noexcept nogil:
    """Whether the timer's interrupt would be an error."""
    return not b.timer_entry & LVT_MASKED and b.timer_entry & 0xFF < 16


cdef inline void ring_(Board *b) noexcept nogil:
    """The timer's interrupt, whose entry is not strange."""
    if not b.timer_entry & LVT_MASKED:
        accept_(b, b.timer_entry & 0xFF, False)


cdef int take_(Board *b) noexcept nogil:
    """``LocalApic.take``; -1: nothing."""
    cdef int vector = -1
    lock_(b)
    if b.pending:
        vector = highest_(b.irr)
        flip_(b.irr, vector)
        flip_(b.isr, vector)
        b.pending = False
        b.taken[vector] += 1
    unlock_(b)
    return vector


cdef bint end_(Board *b) noexcept nogil:
    """The end of an interrupt; False: it is one whose end is told to the I/O APIC, and the specification's."""
    cdef int vector
    lock_(b)
    vector = highest_(b.isr)
    if vector >= 0:
        if has_(b.tmr, vector):
            unlock_(b)
            return False
        flip_(b.isr, vector)
        update_(b)
    b.ends += 1
    unlock_(b)
    return True


cdef bint set_deadline_(Board *b, uint64_t tsc) noexcept nogil:
    """``LocalApic.write_deadline``; False: it is the specification's."""
    cdef int64_t now
    lock_(b)
    if b.mode == TSC_DEADLINE:
        if b.timer < 0 or not b.rate or has_strange_entry_(b):
            unlock_(b)
            return False
        b.deadline = tsc
        now = monotonic_ns()
        if not tsc:
            disarm_timer(b.timer)
        elif not arm_timer(b.timer, tsc, b.line_tsc, b.line_ns, b.rate, now):
            disarm_timer(b.timer)
            b.deadline = 0
            ring_(b)
    b.deadlines += 1
    unlock_(b)
    return True


cdef bint expire_(Board *b) noexcept nogil:
    """``LocalApic.timer_expired``; False: it is the specification's, or that wants to have a look."""
    cdef uint64_t count, now
    cdef bint is_looked_at
    lock_(b)
    if has_strange_entry_(b):
        unlock_(b)
        return False
    if read(b.timer, &count, sizeof(count)) == sizeof(count):
        b.deadline = 0
        if b.mode != PERIODIC:
            b.counting = False
        ring_(b)
    now = monotonic_ns()
    is_looked_at = now >= b.look_at
    if is_looked_at:
        b.look_at = now + LOOK_INTERVAL
    unlock_(b)
    return not is_looked_at


cdef bint called_(Board *b, int call) noexcept nogil:
    """A worker's interrupt, if it is a message and no more; False: the device has to see it."""
    cdef int number
    cdef int outcome = STRANGE
    cdef Line *line
    for number in range(b.line_count):
        line = &b.lines[number]
        if line.call == call:
            lock_(b)
            if line.is_message:
                outcome = message_(b, line.address, line.data)
            unlock_(b)
            break
    return outcome != STRANGE


# ---- What native.S and the library call ----

cdef int take_callback() noexcept nogil:
    """``python_take``, see ``UnicornEngine``."""
    cdef Board *b = _the_board
    cdef int vector
    store32(b.request, 0)
    vector = take_(b)
    if vector >= 0:
        # What came since the library looked left its mark before ours was cleared.
        __sync_synchronize()
        if b.pending or load64(b.jobs_wanted):
            store32(b.request, INTERRUPT_HARD)
    return vector


cdef int wrmsr_callback(uint32_t index, uint64_t value) noexcept nogil:
    cdef Board *b = _the_board
    if index == TSC_DEADLINE_MSR and set_deadline_(b, value):
        return 1
    return b.wrmsr(index, value)


cdef void mmio_write_callback(void *uc, uint64_t offset, unsigned int size, uint64_t value, void *data) noexcept nogil:
    cdef Board *b = _the_board
    cdef Hole *hole = <Hole *>data
    cdef uint64_t address = hole.base + offset
    cdef int number
    if <int64_t>(address >> 12) == b.page:
        if address & 0xFFF == EOI and size == 4 and end_(b):
            return
    else:
        for number in range(b.line_count):
            if load64(&b.lines[number].notify_at) == address and address:
                if write(b.lines[number].kick, &ONE, sizeof(ONE)) == sizeof(ONE):
                    b.lines[number].notified += 1
                    return
                break
    hole.write(uc, offset, size, value, NULL)


# ---- The same, for Python ----

cdef object number_(const uint64_t *bits):
    return bits[0] | <object>bits[1] << 64 | <object>bits[2] << 128 | <object>bits[3] << 192


cdef int set_bits_(uint64_t *bits, object number) except ERROR:
    cdef int word
    for word in range(4):
        bits[word] = number >> 64 * word & 0xFFFF_FFFF_FFFF_FFFF
    return 0


cdef class Lock:
    """The hot half of ``BoardLock``, and the owner of all of the board's state here."""

    cdef Board *board
    cdef object kicked

    def __cinit__(self):
        _know_the_specification()
        self.board = <Board *>calloc(1, sizeof(Board))
        if self.board == NULL:
            raise MemoryError
        pthread_mutex_init(&self.board.mutex, NULL)
        self.board.timer = self.board.wake = -1
        self.board.is_settled = True
        self.board.owner = <PyObject *>self

    def __dealloc__(self):
        global _the_board
        if _the_board == self.board:
            _the_board = NULL
        if self.board != NULL:
            pthread_mutex_destroy(&self.board.mutex)
            free(self.board)

    @property
    def kick(self):
        return self.kicked

    @kick.setter
    def kick(self, kick):
        """From here, if it is a CPU's; else that is called."""
        self.kicked = kick
        cpu = getattr(kick, "__self__", None)
        self.board.kicks_cpu = isinstance(cpu, Cpu) and (<Cpu>cpu).lock is self

    @property
    def kick_wanted(self):
        return bool(self.board.kick_wanted)

    @kick_wanted.setter
    def kick_wanted(self, wanted):
        self.board.kick_wanted = wanted

    def __enter__(self):
        if pthread_mutex_trylock(&self.board.mutex):
            with nogil:
                pthread_mutex_lock(&self.board.mutex)

    def __exit__(self, *_):
        cdef Board *b = self.board
        cdef bint wanted = b.kick_wanted
        b.kick_wanted = False
        pthread_mutex_unlock(&b.mutex)
        if wanted:
            self.kick()

    def locked(self):
        if pthread_mutex_trylock(&self.board.mutex):
            return True
        pthread_mutex_unlock(&self.board.mutex)
        return False

    def counts(self):
        """What happened here, of which the specification does not know: interrupts by vector, ends, deadlines, and
        notifications by address."""
        cdef Board *b = self.board
        vectors = {vector: b.taken[vector] for vector in range(256) if b.taken[vector]}
        notified = {
            b.lines[line].last_notified_at: b.lines[line].notified for line in range(b.line_count) if b.lines[line].notified
        }
        return vectors, b.ends, b.deadlines, notified


cdef class Apic:
    """The hot half of ``LocalApic``, whose state it has."""

    cdef Lock lock
    cdef Board *b

    def __cinit__(self, Lock lock, *_, **__):
        self.lock = lock
        self.b = lock.board

    def use_timer(self, fd):
        """Sets the timer itself, which is ``fd``, of CLOCK_MONOTONIC."""
        self.b.timer = fd

    def line_drawn(self, tsc, ns, rate):
        """The counter's relation to CLOCK_MONOTONIC from now on; on the CPU's thread (``HostClock``)."""
        usable = 0 <= tsc < 1 << 64 and abs(ns) < 1 << 62 and 0 < rate < 1 << 62
        self.b.rate = 0
        if usable:
            self.b.line_tsc, self.b.line_ns, self.b.rate = tsc, ns, rate

    # The specification's state.

    @property
    def pending(self):
        return bool(self.b.pending)

    @pending.setter
    def pending(self, pending):
        self.b.pending = pending

    @property
    def page(self):
        return self.b.page

    @page.setter
    def page(self, page):
        self.b.page = page

    @property
    def _irr(self):
        return number_(self.b.irr)

    @_irr.setter
    def _irr(self, number):
        set_bits_(self.b.irr, number)

    @property
    def _isr(self):
        return number_(self.b.isr)

    @_isr.setter
    def _isr(self, number):
        set_bits_(self.b.isr, number)

    @property
    def _tmr(self):
        return number_(self.b.tmr)

    @_tmr.setter
    def _tmr(self, number):
        # ~bit is negative, of which these are the last bits.
        set_bits_(self.b.tmr, number)

    @property
    def _tpr(self):
        return self.b.tpr

    @_tpr.setter
    def _tpr(self, value):
        self.b.tpr = value

    @property
    def _ldr(self):
        return self.b.ldr

    @_ldr.setter
    def _ldr(self, value):
        self.b.ldr = value

    @property
    def _dfr(self):
        return self.b.dfr

    @_dfr.setter
    def _dfr(self, value):
        self.b.dfr = value

    @property
    def _svr(self):
        return self.b.svr

    @_svr.setter
    def _svr(self, value):
        self.b.svr = value

    @property
    def _mode(self):
        return _lapic.TimerMode(self.b.mode)

    @_mode.setter
    def _mode(self, mode):
        self.b.mode = mode

    @property
    def _counting(self):
        return bool(self.b.counting)

    @_counting.setter
    def _counting(self, counting):
        self.b.counting = counting

    @property
    def _deadline(self):
        return self.b.deadline

    @_deadline.setter
    def _deadline(self, tsc):
        self.b.deadline = tsc

    def _reset(self):
        super(Apic, self)._reset()
        self.b.timer_entry = self._lvt[_lapic.Reg.LVT_TIMER]

    def _write(self, offset, value):
        super(Apic, self)._write(offset, value)
        self.b.timer_entry = self._lvt[_lapic.Reg.LVT_TIMER]

    # What is usual.

    def take(self):
        """See the specification."""
        cdef int vector = take_(self.b)
        return None if vector < 0 else vector

    def write(self, offset, size, value):
        """See the specification."""
        if offset != EOI or size != 4 or not end_(self.b):
            super(Apic, self).write(offset, size, value)

    def message(self, address, data):
        """See the specification."""
        cdef int outcome = message_(self.b, address, data)
        return super(Apic, self).message(address, data) if outcome == STRANGE else outcome == FOUND

    def write_deadline(self, tsc):
        """See the specification."""
        if not set_deadline_(self.b, tsc):
            super(Apic, self).write_deadline(tsc)

    def timer_expired(self):
        """See the specification."""
        if self.b.timer < 0 or not expire_(self.b):
            super(Apic, self).timer_expired()


cdef class Lines:
    """The shortcuts of one device's queues; see :class:`lguest_mp.bus.virtio_pci.Shortcuts`. The lock is held."""

    cdef Lock lock
    cdef Line *lines
    cdef int count

    def __init__(self, Lock lock not None, kicks, calls):
        cdef Board *b = lock.board
        cdef int number
        self.lock = lock
        self.count = len(kicks)
        if b.line_count + self.count > MOST_QUEUES:
            raise ValueError(f"more than {MOST_QUEUES} queues")
        self.lines = &b.lines[b.line_count]
        for number in range(self.count):
            self.lines[number].kick, self.lines[number].call = kicks[number], calls[number]
        b.line_count += self.count

    cdef Line *line(self, int queue) except NULL:
        if not 0 <= queue < self.count:
            raise IndexError(queue)
        return &self.lines[queue]

    def notify_at(self, queue, address):
        """See Shortcuts."""
        cdef Line *line = self.line(queue)
        if address is not None:
            line.last_notified_at = address
        store64(&line.notify_at, 0 if address is None else address)

    def interrupt_by(self, queue, message):
        """See Shortcuts."""
        cdef Line *line = self.line(queue)
        line.is_message = False
        if message is not None:
            line.address, line.data = message
            line.is_message = True


cdef class Cpu:
    """The hot half of ``UnicornEngine``: how the CPU and the other threads meet, and what it calls most."""

    cdef Lock lock
    cdef Board *b
    cdef Hole holes[REGIONS]
    cdef int hole_count

    def __cinit__(self, *_, Lock lock not None, **__):
        self.lock = lock
        self.b = lock.board

    # The specification's state.

    @property
    def _sleeping(self):
        return bool(self.b.sleeping)

    @_sleeping.setter
    def _sleeping(self, sleeping):
        self.b.sleeping = sleeping
        # Before whoever sleeps looks whether there is something to do.
        __sync_synchronize()

    @property
    def _is_settled(self):
        return bool(self.b.is_settled)

    @_is_settled.setter
    def _is_settled(self, is_settled):
        self.b.is_settled = is_settled

    @property
    def _thread(self):
        return self.b.thread

    @_thread.setter
    def _thread(self, thread):
        self.b.thread = thread

    @property
    def _wake(self):
        return self.b.wake

    @_wake.setter
    def _wake(self, fd):
        self.b.wake = fd

    # What is usual.

    def kick(self):
        """See the specification."""
        kick_(self.b)

    def settle(self):
        """See the specification."""
        settle_(self.b)

    def _connect_board(self, request, exit_chain, jobs_wanted, wrmsr):
        """Takes over from the specification's callbacks, of which ``wrmsr`` is one, all of them addresses.

        Gives the addresses of ``python_take`` and ``python_wrmsr`` for native.S.
        """
        global _the_board
        self.b.request = <uint32_t *><uintptr_t>request
        self.b.exit_chain = <uint16_t *><uintptr_t>exit_chain
        self.b.jobs_wanted = <uint64_t *><uintptr_t>jobs_wanted
        self.b.wrmsr = <WrmsrFunction><uintptr_t>wrmsr
        _the_board = self.b
        return <uintptr_t>&take_callback, <uintptr_t>&wrmsr_callback

    def _connect_hole(self, base, write):
        """The same for stores from ``base`` on, where no RAM is: the address to be called, and what to give it."""
        if self.hole_count == REGIONS:
            raise ValueError(f"more than {REGIONS} holes")
        cdef Hole *hole = &self.holes[self.hole_count]
        self.hole_count += 1
        hole.base = base
        hole.write = <MmioWriteFunction><uintptr_t>write
        return <uintptr_t>&mmio_write_callback, <uintptr_t>hole


cdef class Events:
    """The hot half of ``EventLoop``: what wakes the CPU is done here, by either thread, if it is usual."""

    cdef Lock lock
    cdef Board *b
    cdef int all_, shared, helpers

    def _begin(self, Lock lock not None):
        """Finds the specification's descriptors."""
        self.lock = lock
        self.b = lock.board
        self.all_, self.shared, self.helpers = (each.fileno() for each in (self._epoll, self._shared, self._helpers))

    cdef int take_shared_(self, int *strange) noexcept nogil:
        """Looks after the shared ones; how many of them, which are put at ``strange``, have to be handled."""
        cdef epoll_event found[EVENTS]
        cdef int count = epoll_wait(self.shared, found, EVENTS, 0)
        cdef int number, file
        cdef int left = 0
        for number in range(count):
            file = found[number].data.fd
            if not (expire_(self.b) if file == self.b.timer else called_(self.b, file)):
                strange[left] = file
                left += 1
        return left

    def _handle(self, list strange):
        for file in strange:
            self._shared_handlers[file]()

    def _wait(self, timeout):
        """See the specification. Not before something has happened that is not usual."""
        cdef epoll_event found[EVENTS]
        cdef int strange[EVENTS]
        cdef int count, number, left, milliseconds
        cdef int64_t until = -1
        cdef list others
        if timeout is not None:
            until = monotonic_ns() + <int64_t>(timeout * 1e9)
        while True:
            with nogil:
                left = 0
                if self.b.request != NULL:
                    settle_(self.b)
                milliseconds = -1
                if until >= 0:
                    milliseconds = min(max(until - <int64_t>monotonic_ns() + 999_999, 0) // 1_000_000, 1_000_000)
                count = epoll_wait(self.all_, found, EVENTS, milliseconds)
                for number in range(count):
                    if found[number].data.fd == self.shared:
                        left = self.take_shared_(strange)
                if count == 1 and found[0].data.fd == self.shared and not left and milliseconds:
                    continue
            if count < 0:
                if errno != EINTR:
                    PyErr_SetFromErrno(OSError)
                PyErr_CheckSignals()
                continue
            self._handle([strange[number] for number in range(left)])
            others = [
                (found[number].data.fd, found[number].events)
                for number in range(count)
                if found[number].data.fd != self.shared
            ]
            if others or left or not milliseconds:
                return others

    def help(self, wake):
        """See the specification."""
        cdef int strange[EVENTS]
        cdef int left
        cdef int64_t waited = -1
        cdef int file = wake
        cdef int64_t patience = self._patience.now
        self._become_helper(wake)
        self.share_(0)
        try:
            with nogil:
                left = self.help_(file, patience, &waited, strange)
            PyErr_CheckSignals()
            if waited >= 0:
                self._patience.slept(waited)
            self._handle([strange[number] for number in range(left)])
        finally:
            self.share_(EPOLLIN)

    cdef int share_(self, uint32_t events) except ERROR:
        """Whether the other thread hears of the shared ones."""
        cdef epoll_event event
        event.events, event.data.fd = events, self.shared
        if epoll_ctl(self.all_, EPOLL_CTL_MOD, self.shared, &event):
            PyErr_SetFromErrno(OSError)
        return 0

    cdef int help_(self, int wake, int64_t patience, int64_t *waited, int *strange) noexcept nogil:
        cdef epoll_event found[2]
        cdef int64_t begin = monotonic_ns()
        cdef int count = 0
        cdef int left = 0
        cdef int number
        cdef uint64_t kicks
        while not count and <int64_t>monotonic_ns() - begin < patience:
            count = epoll_wait(self.helpers, found, 2, 0)
        if not count:
            count = epoll_wait(self.helpers, found, 2, -1)
            waited[0] = monotonic_ns() - begin
        for number in range(count):
            if found[number].data.fd == wake:
                read(wake, &kicks, sizeof(kicks))
            else:
                left = self.take_shared_(strange)
        return left
