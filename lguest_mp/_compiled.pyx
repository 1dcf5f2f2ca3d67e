# cython: language_level=3, binding=False, embedsignature=False, cdivision=True
"""The compiled core: what is hot in serving a split virtqueue, written again in typed Cython. It is optional.

``virtio/queue.py`` is the specification. What stands here does the same, byte for byte, in guest memory and in the
ledger, and it does not do everything: **whatever is not usual goes back to Python.** A chain that breaks a rule, or only
looks as if it did, is not judged here but walked once more by the specification, which copies each descriptor anew and
raises. A request that is not one of the usual ones (``virtio/usual.py``), or whose system call failed or came up short,
is returned as a Chain, and the device serves it from its beginning, as a successor of a killed worker would.

**The state is the specification's.** :class:`Ring` holds the attributes of ``Queue`` that change (``_next_available``,
``_done``, ...) as C integers under the same names, and :class:`~lguest_mp.virtio.compiled.CompiledQueue` inherits from
both: whatever is not written again here is Python's own, and works on the same state.

**Whom not to trust.** The guest can change its memory at any time. Each field of a ring is read by one access, and each
descriptor is copied once, by two; the copies are checked, and nothing is read again. No sum can wrap: lengths have 32
bits, at most 32768 of them are added up in 64, and an address is compared with the room that is left behind it, never
added to anything before that. What the checks let pass are pointers into the mapping, which has an inaccessible page on
either side all the same.

**Killed at any instruction.** All that outlives this process is written by ``store*``, one access each, in the order in
which it is written here: neither the compiler (``volatile``, and a barrier) nor an x86 processor puts stores in another
order. Data is moved by system calls, which the compiler cannot reorder either. Everything else is this process's own.

**Signals.** The interpreter's lock is not held while requests are served. After ``LOOK`` of them, and whenever a system
call was interrupted, the interpreter gets to look for signals.
"""

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno
from libc.errno cimport EAGAIN, EINTR, EOPNOTSUPP, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memchr, memcpy

import os as _os

from lguest_mp import screen as _screen
from lguest_mp.memory import PAGE_SIZE as _PAGE_SIZE
from lguest_mp.virtio import fence as _fences
from lguest_mp.virtio import ledger as _ledger
from lguest_mp.virtio import queue as _queue
from lguest_mp.virtio import usual as _usual

cdef extern from *:
    """
    #if !defined(__x86_64__) || !defined(__linux__)
    #error "the compiled core relies on the memory order of x86-64, and on Linux"
    #endif
    #include <poll.h>
    #include <sys/random.h>
    #include <sys/uio.h>
    #include <time.h>
    #include <unistd.h>

    /* One machine access each, also where it is not aligned (an indirect table may lie anywhere), and no other access
       is moved across it by the compiler. */
    #define BARRIER() __asm__ __volatile__("" ::: "memory")
    #define ACCESS(bits) \\
        typedef uint##bits##_t __attribute__((aligned(1), may_alias)) access##bits; \\
        static inline uint##bits##_t load##bits(const void *place) { \\
            uint##bits##_t value = *(const volatile access##bits *)place; \\
            BARRIER(); \\
            return value; \\
        } \\
        static inline void store##bits(void *place, uint##bits##_t value) { \\
            BARRIER(); \\
            *(volatile access##bits *)place = value; \\
            BARRIER(); \\
        }
    ACCESS(8)
    ACCESS(16)
    ACCESS(32)
    ACCESS(64)

    static inline uint64_t monotonic_ns(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    }
    """
    struct iovec:
        void *iov_base
        size_t iov_len

    struct pollfd:
        int fd
        short events
    const short POLLOUT
    int poll(pollfd *files, unsigned long count, int milliseconds) noexcept nogil

    uint16_t load16(const void *place) noexcept nogil
    uint32_t load32(const void *place) noexcept nogil
    uint64_t load64(const void *place) noexcept nogil
    void store8(void *place, uint8_t value) noexcept nogil
    void store16(void *place, uint16_t value) noexcept nogil
    void store32(void *place, uint32_t value) noexcept nogil
    void store64(void *place, uint64_t value) noexcept nogil
    void __sync_synchronize() noexcept nogil
    uint64_t monotonic_ns() noexcept nogil

    const int RWF_NOWAIT
    ssize_t read(int file, void *place, size_t length) noexcept nogil
    ssize_t write(int file, const void *place, size_t length) noexcept nogil
    ssize_t readv(int file, const iovec *parts, int count) noexcept nogil
    ssize_t writev(int file, const iovec *parts, int count) noexcept nogil
    ssize_t preadv2(int file, const iovec *parts, int count, int64_t position, int flags) noexcept nogil
    ssize_t pwritev2(int file, const iovec *parts, int count, int64_t position, int flags) noexcept nogil
    ssize_t getrandom(void *place, size_t length, unsigned int flags) noexcept nogil

cdef extern from "Python.h":
    ctypedef struct PyObject:
        pass
    ssize_t PyList_GET_SIZE(PyObject *of) noexcept nogil

# The specification's numbers, as C's.
cdef uint16_t NEXT = _queue.DESC_F_NEXT
cdef uint16_t WRITE = _queue.DESC_F_WRITE
cdef uint16_t INDIRECT = _queue.DESC_F_INDIRECT
cdef uint16_t NO_INTERRUPT = _queue.AVAIL_F_NO_INTERRUPT
cdef uint16_t NO_NOTIFY = _queue.USED_F_NO_NOTIFY
cdef uint16_t BATCH = _queue.BATCH
cdef uint64_t MAX_CHAIN_BYTES = _queue.MAX_CHAIN_BYTES
cdef int PROGRESS = _ledger.PROGRESS
cdef int PHASE = _ledger.PHASE
cdef int REQUESTS = _ledger.REQUESTS
cdef int BYTES = _ledger.BYTES
cdef int MOMENT = _ledger.MOMENT
cdef uint64_t VALID = _ledger.VALID
cdef int TAKEN_SHIFT = _ledger.TAKEN_SHIFT
cdef int MARK_SHIFT = _ledger.MARK_SHIFT
cdef uint64_t IDLE = _ledger.Phase.IDLE
cdef uint64_t SERVING = _ledger.Phase.SERVING
cdef uint64_t WAITING = _ledger.Phase.WAITING
cdef uint64_t RING = _screen.RING
cdef uint64_t PIECE = _screen.PIECE
cdef uint64_t MARKS = _screen.MARKS
cdef uint64_t PAGE_SIZE = _PAGE_SIZE
cdef object _Chain = _queue.Chain
cdef object _full_fence = _fences.full

#: The most pieces one system call takes (Linux's UIO_MAXIOV).
cdef enum:
    IOV_MAX = 1024
#: The interpreter looks for signals after so many requests at the latest.
cdef enum:
    LOOK = 64
#: RAM is one region or two (memory.py).
cdef enum:
    REGIONS = 2

# What became of looking for the next buffer, or of serving some.
cdef enum:
    ERROR = -1  # an exception is set
    EMPTY  # nothing is available
    FOUND  # a buffer was taken
    STRANGE  # it breaks a rule, or seems to: the specification has to look
    UNUSUAL  # a buffer was taken that the device has to serve
    BUSY  # there may be more
    FAILED  # a read failed, errno says how
    LONG  # a frame was read that is longer than its buffer

cdef uint64_t ONE = 1


cdef struct Region:
    # As RamRegion.
    uint64_t base
    uint64_t size
    uint8_t *place


cdef void *_address(object view) except NULL:
    """Where the memory of a writable view is. Whoever asks keeps the view."""
    cdef Py_buffer buffer
    PyObject_GetBuffer(view, &buffer, PyBUF_WRITABLE)
    cdef void *place = buffer.buf
    PyBuffer_Release(&buffer)
    return place


cdef class Ring:
    """The hot half of a queue; see ``virtio/compiled.py`` for the whole."""

    # What changes, under the specification's names.
    cdef public uint16_t _used_index, _signalled, _next_available, _seen_available, _done
    cdef public uint64_t _requests, _bytes
    cdef public list _written
    cdef object _hook
    cdef bint _is_hooked

    # What does not, once the queue is set up.
    cdef Region regions[REGIONS]
    cdef int region_count
    cdef uint8_t *base
    cdef uint32_t entries
    cdef uint8_t *table
    cdef uint16_t *available
    cdef uint16_t *used
    cdef uint8_t *used_ring
    cdef uint16_t *avail_event
    cdef uint64_t *fields
    cdef bint event_idx, indirect
    cdef int kick, call
    cdef bint is_watched, sleeps_as_ever
    cdef uint8_t *marks

    # The chain that was taken last: copies, checked. Readable parts first.
    cdef uint16_t head
    cdef int readable, writable
    cdef iovec *parts

    def __dealloc__(self):
        free(self.parts)

    @property
    def _fence(self):
        return self._hook

    @_fence.setter
    def _fence(self, full):
        self._hook = full
        self._is_hooked = full is not _full_fence

    def _begin(self):
        """Finds in memory what the specification has checked."""
        memory = self._memory
        self.base = <uint8_t *><uintptr_t>memory.address
        if len(memory.regions) > REGIONS:
            raise ValueError("guest memory of more than two regions")
        for region in memory.regions:
            self.regions[self.region_count] = Region(region.base, region.size, self.base + <uint64_t>region.offset)
            self.region_count += 1
        self.entries = self.size
        self.table = self.base + <uint64_t>self._descriptors
        self.available = <uint16_t *>_address(self._available)
        self.used = <uint16_t *>_address(self._used)
        self.used_ring = <uint8_t *>_address(self._used_ring)
        self.avail_event = <uint16_t *>_address(self._avail_event)
        self.fields = <uint64_t *>_address(self._fields)
        self.event_idx, self.indirect = self._event_idx, self._indirect
        self.kick, self.call = self._kick, self._call
        self.is_watched = self._watch is not None
        marks = getattr(self._watch, "marks", None)
        self.marks = NULL if marks is None else <uint8_t *>_address(marks)
        self.parts = <iovec *>malloc(self.entries * sizeof(iovec))
        if self.parts == NULL:
            raise MemoryError
        self.sleeps_as_ever = type(self)._sleep is Ring._sleep and type(self)._take_kick is Ring._take_kick
        super(Ring, self)._begin()

    # ---- Taking ----

    def pop(self):
        """The next buffer, if there is one now."""
        cdef int found = self.next_()
        if found == FOUND:
            return self.chain_()
        return None if found == EMPTY else super(Ring, self).pop()

    cdef int next_(self) noexcept nogil:
        """Takes the next buffer: EMPTY, FOUND (it is in ``parts``), or STRANGE (nothing was taken)."""
        cdef uint16_t index = self._next_available
        cdef uint16_t seen
        if index == self._seen_available:
            seen = load16(&self.available[1])
            if seen == index:
                return EMPTY
            if <uint16_t>(seen - index) > self.entries:
                return STRANGE
            self._seen_available = seen
        if not self.walk_(load16(&self.available[2 + (index & (self.entries - 1))])):
            return STRANGE
        self._next_available = index + 1
        return FOUND

    cdef bint walk_(self, uint16_t head) noexcept nogil:
        """Copies a chain into ``parts`` (``Queue._chain``); False: the specification is to have a look at it."""
        cdef uint8_t *table = self.table
        cdef uint64_t entries = self.entries
        cdef uint64_t index = head
        cdef uint64_t total = 0
        cdef bint is_indirect = False
        cdef uint64_t address, rest
        cdef uint32_t length
        cdef uint16_t flags
        cdef int count
        self.head = head
        self.readable = self.writable = 0
        while index < entries:
            address = load64(table + 16 * index)
            rest = load64(table + 16 * index + 8)
            length = <uint32_t>rest
            flags = <uint16_t>(rest >> 32)
            if flags & INDIRECT:
                if is_indirect or not self.indirect or flags & NEXT or not length or length % 16:
                    return False
                table = self.locate_(address, length)
                if table == NULL:
                    return False
                entries, index, is_indirect = length // 16, 0, True
                continue
            count = self.readable + self.writable
            if <uint32_t>count == self.entries:
                return False
            total += length
            self.parts[count].iov_base = self.locate_(address, length)
            if self.parts[count].iov_base == NULL:
                return False
            self.parts[count].iov_len = length
            if flags & WRITE:
                self.writable += 1
            elif self.writable:
                return False
            else:
                self.readable += 1
            if not flags & NEXT:
                return total <= MAX_CHAIN_BYTES
            index = rest >> 48
        return False

    cdef uint8_t *locate_(self, uint64_t address, uint64_t length) noexcept nogil:
        """Where ``length`` bytes of RAM are (``GuestMemory.offset``); NULL: they are not all in one region."""
        cdef int number
        cdef uint64_t inside
        for number in range(self.region_count):
            if address >= self.regions[number].base:
                inside = address - self.regions[number].base
                if inside <= self.regions[number].size and length <= self.regions[number].size - inside:
                    return self.regions[number].place + inside
        return NULL

    cdef object chain_(self):
        """The chain in ``parts``, for Python."""
        cdef int readable = self.readable
        ranges = [
            (<uint8_t *>self.parts[each].iov_base - self.base, self.parts[each].iov_len)
            for each in range(readable + self.writable)
        ]
        return _Chain(self._view, self.head, ranges[:readable], ranges[readable:])

    # ---- Completing ----

    def push(self, chain, written, data=None):
        """The device is done with ``chain``; see the specification."""
        self._complete(chain, written)
        self.account_(written if data is None else data)
        if self.unpublished_() >= BATCH:
            self.flush()

    def _complete(self, chain, written):
        """Writes the used ring's entry, and notes what was written."""
        self.enter_(chain.head, written)
        if self.is_watched:
            self._note(chain.writable_ranges, written)

    cdef int push_(self, uint64_t written, uint64_t data) except ERROR nogil:
        """The same for the chain in ``parts``."""
        self.complete_(written)
        self.account_(data)
        if self.unpublished_() >= BATCH:
            self.publish_()
            self.signal_()
        return 0

    cdef int complete_(self, uint64_t written) except ERROR nogil:
        self.enter_(self.head, written)
        if self.is_watched:
            self.note_(written)
        return 0

    cdef void enter_(self, uint64_t head, uint64_t written) noexcept nogil:
        cdef uint16_t done = self._done
        store64(self.used_ring + 8 * (done & (self.entries - 1)), head | min(written, <uint64_t>0xFFFFFFFF) << 32)
        self._done = done + 1

    cdef void account_(self, uint64_t data) noexcept nogil:
        """From here on a successor does not serve it again."""
        store64(&self.fields[PROGRESS], self._done | VALID)
        self._requests += 1
        self._bytes += data

    cdef int note_(self, uint64_t written) except ERROR nogil:
        """Notes what was written into the chain in ``parts`` (``Queue._note``).

        Where the watch has a map of marks it is looked at here, and what has no mark need not be noted. That this is
        earlier than at publishing makes no difference: the data is there, and a mark that matters was made before the
        driver made the buffer available (codemap.py).
        """
        cdef int number
        cdef uint64_t offset, length, first, last
        for number in range(self.readable, self.readable + self.writable):
            offset = <uint8_t *>self.parts[number].iov_base - self.base
            length = min(self.parts[number].iov_len, written)
            written -= length
            if self.marks != NULL:
                if not length:
                    continue
                first, last = offset // PAGE_SIZE, (offset + length - 1) // PAGE_SIZE
                if memchr(self.marks + first, 1, last - first + 1) == NULL:
                    continue
            with gil:
                self._written.append((offset, length))
        return 0

    cdef uint16_t unpublished_(self) noexcept nogil:
        return self._done - self._used_index

    # ---- Publishing ----

    def flush(self):
        """Publishes what was pushed, and interrupts the driver if it wants that."""
        self.publish()
        self.signal_()

    def publish(self):
        """Has the driver find what was pushed, when it looks."""
        self.publish_()

    def _signal(self):
        """Interrupts the driver if it wants to be told of what was published since the last time."""
        self.signal_()

    cdef int publish_(self) except ERROR nogil:
        cdef uint16_t index = self._done
        if index == self._used_index:
            return 0
        if PyList_GET_SIZE(<PyObject *>self._written):
            with gil:
                self._watch.written(self._written)
                self._written.clear()
        self._used_index = index
        store16(&self.used[1], index)
        store64(&self.fields[REQUESTS], self._requests)
        store64(&self.fields[BYTES], self._bytes)
        store64(&self.fields[MOMENT], monotonic_ns())
        if <uint16_t>(index - self._signalled) >= self.entries:
            self.signal_()
        return 0

    cdef int signal_(self) except ERROR nogil:
        cdef uint16_t index = self._used_index
        cdef uint16_t news = index - self._signalled
        if not news:
            return 0
        self._signalled = index
        if not self.wants_interrupt_(index, news):
            self.fence_()
            if not self.wants_interrupt_(index, news):
                return 0
        if write(self.call, &ONE, sizeof(ONE)) != sizeof(ONE):
            with gil:
                PyErr_SetFromErrno(OSError)
        return 0

    cdef bint wants_interrupt_(self, uint16_t index, uint16_t news) noexcept nogil:
        if self.event_idx:
            return <uint16_t>(index - load16(&self.available[2 + self.entries]) - 1) < news
        return not load16(&self.available[0]) & NO_INTERRUPT

    cdef int fence_(self) except ERROR nogil:
        __sync_synchronize()
        if self._is_hooked:
            with gil:
                self._hook()
        return 0

    # ---- Sleeping ----

    def _sleep(self, seconds=None):
        """Returns when the available index has moved, or when it may have, or after ``seconds``."""
        self.sleep_(seconds)

    cdef int sleep_(self, object seconds) except ERROR:
        cdef uint16_t index = self._next_available
        if self.event_idx:
            store16(self.avail_event, index)
        else:
            store16(&self.used[0], 0)
        self.fence_()
        if load16(&self.available[1]) == index:
            store64(&self.fields[PHASE], IDLE)
            if seconds is None or self._is_kicked_within(seconds):
                if self.sleeps_as_ever:
                    self.take_kick_()
                else:
                    self._take_kick()
            store64(&self.fields[PHASE], SERVING)
        if not self.event_idx:
            store16(&self.used[0], NO_NOTIFY)
        return 0

    def _take_kick(self):
        """Waits for a notification, and takes all that have come."""
        self.take_kick_()

    cdef int take_kick_(self) except ERROR:
        cdef uint64_t count = 0
        cdef ssize_t length
        while True:
            with nogil:
                length = read(self.kick, &count, sizeof(count))
            if length >= 0:
                return 0
            if errno != EINTR:
                PyErr_SetFromErrno(OSError)
            PyErr_CheckSignals()

    cdef int rest_(self) except ERROR:
        """There is nothing to do: publishes, and sleeps until there may be something."""
        self.publish_()
        self.signal_()
        PyErr_CheckSignals()
        if self.sleeps_as_ever:
            return self.sleep_(None)
        self._sleep()
        return 0

    # ---- Serving ----

    def waiter(self, requests):
        """See the specification: ``wait``, but what is usual is served."""
        if type(requests) is _usual.DiskRequests:
            return DiskServer(self, requests).wait
        if type(requests) is _usual.Frames:
            return FrameSender(self, requests).wait
        if type(requests) is _usual.RandomBuffers:
            return RandomServer(self, requests).wait
        if type(requests) is _usual.Output:
            return OutputServer(self, requests).wait
        return super(Ring, self).waiter(requests)

    def receiver(self, frames):
        """See the specification."""
        return FrameReceiver(self, frames).receive


cdef class Server:
    """Serves the usual requests of a queue, one batch after the other."""

    cdef Ring queue
    # What a served request has written, and how much data was in it.
    cdef uint64_t written, data

    cdef int serve(self, Ring queue) except ERROR nogil:
        """Serves the chain that was taken; False: the device has to, from its beginning."""
        return False

    cdef int push(self, Ring queue) except ERROR nogil:
        return queue.push_(self.written, self.data)

    def wait(self):
        """The next buffer that is not usual. Publishes and sleeps until there is one, as ``Queue.wait`` does."""
        cdef Ring queue = self.queue
        cdef int outcome
        while True:
            with nogil:
                outcome = self.batch(queue)
            if outcome == EMPTY:
                queue.rest_()
            elif outcome == UNUSUAL:
                return queue.chain_()
            elif outcome == STRANGE:
                chain = queue.pop()
                if chain is not None:
                    return chain
            PyErr_CheckSignals()

    cdef int batch(self, Ring queue) except ERROR nogil:
        cdef int found
        for _ in range(LOOK):
            found = queue.next_()
            if found != FOUND:
                return found
            if not self.serve(queue):
                return UNUSUAL
            self.push(queue)
        return BUSY


cdef uint64_t _size(const iovec *parts, int count) noexcept nogil:
    """How many bytes there are: no more than a chain may have."""
    cdef uint64_t size = 0
    cdef int number
    for number in range(count):
        size += parts[number].iov_len
    return size


cdef class DiskServer(Server):
    """``virtio/block.py``: reads and writes in the usual frame."""

    cdef int file
    cdef uint64_t bytes_
    cdef bint is_read_only
    cdef int write_flags
    cdef bint knows_nowait

    def __init__(self, Ring queue, requests):
        self.queue = queue
        self.file = requests.file
        self.bytes_ = requests.size
        self.is_read_only = requests.read_only
        self.write_flags = requests.write_flags
        self.knows_nowait = True

    cdef int serve(self, Ring queue) except ERROR nogil:
        cdef iovec *parts = queue.parts
        cdef int outgoing = queue.readable - 1
        cdef int incoming = queue.writable - 1
        # The usual frame, in which the header and the status have a descriptor each.
        if outgoing < 0 or incoming < 0:
            return False
        cdef iovec *status = &parts[queue.readable + incoming]
        if parts[0].iov_len != 16 or status.iov_len != 1:
            return False
        cdef uint8_t *header = <uint8_t *>parts[0].iov_base
        cdef uint32_t kind = <uint32_t>load64(header)
        cdef uint64_t sector = load64(header + 8)
        if kind == 0 and not outgoing:
            if not self.transfer(queue, &parts[1], incoming, sector, True):
                return False
            self.written = self.data + 1
        elif kind == 1 and not incoming and not self.is_read_only:
            if not self.transfer(queue, &parts[1], outgoing, sector, False):
                return False
            self.written = 1
        else:
            # A flush, too: one that failed must not be made again, since Linux tells of lost data once only.
            return False
        store8(status.iov_base, 0)
        return True

    cdef bint transfer(
        self, Ring queue, const iovec *parts, int count, uint64_t sector, bint is_in
    ) noexcept nogil:
        """All of the data; what came up short, or not at all, is done anew by the device."""
        cdef uint64_t size = _size(parts, count)
        cdef int flags
        cdef ssize_t moved
        if not size or size % 512 or size > self.bytes_ or count > IOV_MAX:
            return False
        # The disk has less than 2**63 bytes, so the product cannot wrap.
        if sector > (self.bytes_ - size) // 512:
            return False
        if is_in:
            # Whoever waits for an earlier request need not wait for the disk as well.
            flags = RWF_NOWAIT if self.knows_nowait and queue.unpublished_() else 0
            moved = preadv2(self.file, parts, count, sector * 512, flags)
            if moved < 0 and errno == EOPNOTSUPP:
                self.knows_nowait = False
        else:
            moved = pwritev2(self.file, parts, count, sector * 512, self.write_flags)
        self.data = size
        return moved >= 0 and <uint64_t>moved == size


cdef class FrameSender(Server):
    """``virtio/net.py``, transmitq: frames to a file that takes each by one writev."""

    cdef int file
    cdef uint64_t header_size, longest

    def __init__(self, Ring queue, frames):
        self.queue = queue
        self.file = frames.file
        self.header_size = frames.header_size
        self.longest = frames.longest

    cdef int serve(self, Ring queue) except ERROR nogil:
        cdef uint64_t size = _size(queue.parts, queue.readable)
        if queue.writable or queue.readable > IOV_MAX or not self.header_size <= size <= self.longest:
            return False
        self.written, self.data = 0, size
        return writev(self.file, queue.parts, queue.readable) >= 0


cdef class RandomServer(Server):
    """``virtio/rng.py``: buffers with no large pieces."""

    cdef uint64_t longest

    def __init__(self, Ring queue, buffers):
        self.queue = queue
        self.longest = buffers.longest

    cdef int serve(self, Ring queue) except ERROR nogil:
        cdef uint64_t length
        cdef int number
        if queue.readable:
            return False
        for number in range(queue.writable):
            if queue.parts[number].iov_len > self.longest:
                return False
        for number in range(queue.writable):
            length = queue.parts[number].iov_len
            if <uint64_t>getrandom(queue.parts[number].iov_base, length, 0) != length:
                return False
        self.written = self.data = _size(queue.parts, queue.writable)
        return True


cdef class Track:
    """``ScreenWriter`` of ``screen.py``, whose state it takes along. What the screen is for, and why, is told there."""

    cdef object writer
    cdef uint64_t *fields
    cdef uint64_t *marks
    cdef uint8_t *ring
    cdef int news, mine, marked, others
    cdef uint64_t position, seen

    def __init__(self, writer):
        self.writer = writer
        self.fields = <uint64_t *>_address(writer._fields)
        self.marks = <uint64_t *>_address(writer._marks)
        self.ring = <uint8_t *>_address(writer._ring)
        self.news = writer._news
        self.mine, self.marked, self.others = writer._mine, writer._marked, writer._others
        self.position, self.seen = writer._position, writer._seen

    cdef int append(self, const iovec *parts, int count) except ERROR nogil:
        """Puts bytes on the screen. Never waits."""
        cdef uint64_t others = load64(&self.fields[self.others])
        cdef uint8_t *place
        cdef uint64_t left, length
        cdef int number
        if others != self.seen:
            self.seen = others
            self.mark(others)
        for number in range(count):
            place, left = <uint8_t *>parts[number].iov_base, parts[number].iov_len
            while left:
                length = min(left, PIECE)
                self.put(place, length)
                place += length
                left -= length
        if write(self.news, &ONE, sizeof(ONE)) != sizeof(ONE) and errno != EAGAIN:
            with gil:
                PyErr_SetFromErrno(OSError)
        return 0

    cdef void mark(self, uint64_t others) noexcept nogil:
        cdef uint64_t number = load64(&self.fields[self.marked])
        cdef uint64_t *slot = self.marks + 2 * (number % MARKS)
        store64(&slot[0], self.position)
        store64(&slot[1], others)
        store64(&self.fields[self.marked], number + 1)

    cdef void put(self, const uint8_t *piece, uint64_t length) noexcept nogil:
        cdef uint64_t start = self.position % RING
        cdef uint64_t fitting = min(length, RING - start)
        memcpy(self.ring + start, piece, fitting)
        memcpy(self.ring, piece + fitting, length - fitting)
        self.position += length
        store64(&self.fields[self.mine], self.position)


cdef class OutputServer(Server):
    """``virtio/console.py``, transmitq: all of it, so that nothing is shown twice."""

    cdef int file
    cdef Track track
    cdef object lost

    def __init__(self, Ring queue, output):
        self.queue = queue
        self.file = output.file
        self.lost = output.lost
        self.track = None if output.screen is None else Track(output.screen)

    cdef int serve(self, Ring queue) except ERROR nogil:
        cdef int error
        if queue.writable:
            return False
        self.written, self.data = 0, _size(queue.parts, queue.readable)
        if self.track is not None:
            self.track.append(queue.parts, queue.readable)
        store64(&queue.fields[PHASE], WAITING)
        error = self.write_all(queue.parts, queue.readable)
        store64(&queue.fields[PHASE], SERVING)
        if error:
            with gil:
                self.lost(error)
        return True

    cdef int push(self, Ring queue) except ERROR nogil:
        queue.push_(self.written, self.data)
        # Linux polls for the completion of every buffer; the next write may take long.
        queue.publish_()
        return queue.signal_()

    cdef int write_all(self, iovec *parts, int count) except ERROR nogil:
        """0, or the error number for which the rest was dropped."""
        cdef pollfd room
        cdef ssize_t written
        while True:
            while count and not parts.iov_len:
                parts += 1
                count -= 1
            if not count:
                return 0
            written = writev(self.file, parts, min(count, <int>IOV_MAX))
            if written < 0 and errno == EAGAIN:
                room.fd, room.events = self.file, POLLOUT
                if poll(&room, 1, -1) >= 0:
                    continue
                written = -1
            if written < 0:
                if errno != EINTR:
                    return errno
                with gil:
                    PyErr_CheckSignals()
                continue
            while written and <size_t>written >= parts.iov_len:
                written -= parts.iov_len
                parts += 1
                count -= 1
            if written:
                parts.iov_base = <uint8_t *>parts.iov_base + written
                parts.iov_len -= written


cdef class FrameReceiver:
    """``virtio/net.py``, receiveq: frames that fit into one buffer, from a file that gives each by one readv."""

    cdef Ring queue
    cdef int file
    cdef uint64_t header_size
    cdef iovec spill
    cdef object _spill
    cdef iovec views[IOV_MAX]
    cdef ssize_t length
    cdef int error

    def __init__(self, Ring queue, frames):
        self.queue = queue
        self.file = frames.file
        self.header_size = frames.header_size
        self._spill = queue.scratch[: frames.longest]
        self.spill = iovec(_address(self._spill), len(self._spill))

    def receive(self):
        """See ``Queue.receiver``."""
        cdef Ring queue = self.queue
        cdef int outcome
        while True:
            with nogil:
                outcome = self.batch(queue)
            if outcome == EMPTY:
                queue.rest_()
            elif outcome == UNUSUAL:
                return queue.chain_(), None
            elif outcome == LONG:
                return queue.chain_(), self.length
            elif outcome == STRANGE:
                chain = queue.pop()
                if chain is not None:
                    return chain, None
            elif outcome == FAILED and self.error != EINTR:
                raise OSError(self.error, _os.strerror(self.error))
            PyErr_CheckSignals()

    cdef int batch(self, Ring queue) except ERROR nogil:
        cdef int found
        for _ in range(LOOK):
            found = queue.next_()
            if found != FOUND:
                return found
            found = self.take(queue)
            if found != FOUND:
                return found
            # num_buffers (5.1.6.4), which a legacy driver's header does not have.
            if self.header_size == 12:
                store16(<uint8_t *>queue.parts[0].iov_base + 10, 1)
            queue.complete_(self.length)
            queue.account_(self.length)
            if queue.unpublished_() >= BATCH:
                queue.publish_()
        return BUSY

    cdef int take(self, Ring queue) noexcept nogil:
        """Reads a frame into the buffer that was taken: FOUND, LONG, UNUSUAL, or FAILED (nothing was taken)."""
        cdef int count = queue.writable
        cdef int number
        cdef uint64_t so_far
        if queue.readable or not count or count > IOV_MAX - 2 or queue.parts[0].iov_len < self.header_size:
            return UNUSUAL
        for number in range(count):
            self.views[number] = queue.parts[number]
        self.views[count] = self.spill
        so_far = queue._done | VALID | <uint64_t>1 << MARK_SHIFT
        self.length = readv(self.file, self.views, count + 1)
        if self.length < 0:
            self.error = errno
            queue._next_available -= 1
            return FAILED
        store64(&queue.fields[PROGRESS], so_far | <uint64_t>self.length << TAKEN_SHIFT)
        return FOUND if <uint64_t>self.length <= _size(queue.parts, count) else LONG


include "_board.pxi"
