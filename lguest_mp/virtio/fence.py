"""The memory fence between a worker and the guest's CPU, which may have none of its own.

Two handshakes of a virtqueue are "I store, then I look at what you store", on both sides: the driver moves the
available index and then looks whether the device wants a notification, while the device asks for notifications and
then looks at the available index (and the same again for the used index and interrupts). A processor may let the look
overtake the store. Then both sides look too early, each finds nothing to do, and a wake-up is lost for good. So each
side has to put a full fence between its store and its look.

The driver does: the standard obliges it (virtio 1.2, 2.7.13.4.1). But the embedded CPU drops the guest's fences and
lock prefixes when it translates, because it emulates one processor and knows of nobody else who looks at its memory.
A fence of our own does not mend that: it takes two. ``membarrier(2)`` does, because it makes *other* processes execute
one: every thread of every process that has registered, at whatever instruction it is. A store of the guest before that
instant is visible to us when the call returns, and a look after it sees what we stored before the call. That is all the
handshake needs, so the guest's half may go without. It costs about a microsecond (a lock-prefixed instruction a tenth),
paid on the way to sleep and where an interrupt is *not* sent, not for each request.

Where the kernel refuses (before Linux 4.16, or in a sandbox that filters system calls), :class:`LocalFence` orders our
own half only, and says so (``reaches_guest``): the queue then gives up what it cannot do safely. It interrupts at every
publication, which is always right if never optimal, and before it sleeps for good it sleeps shortly and looks again; a
store does not stay in a processor's buffer for a millisecond.

An engine that leaves the guest's fences alone (KVM, or any real CPU) needs no more than the local fence:
``LocalFence(guest_has_fences=True)``.
"""

from __future__ import annotations

import ctypes
from _thread import allocate_lock
from collections.abc import Callable

#: The number of membarrier(2) on x86-64 (arch/x86/entry/syscalls/syscall_64.tbl).
_SYS_MEMBARRIER = 324
#: include/uapi/linux/membarrier.h
_CMD_QUERY = 0
_CMD_GLOBAL_EXPEDITED = 1 << 1
_CMD_REGISTER_GLOBAL_EXPEDITED = 1 << 2


class Fence:
    """A full memory fence: :attr:`full` orders every access before the call before every access after it."""

    def __init__(self, full: Callable[[], object], *, reaches_guest: bool) -> None:
        #: The fence itself; a plain attribute, because it is called for every request.
        self.full = full
        #: Whether the handshake holds with it: either it fences the guest's CPU too, or that has fences of its own.
        self.reaches_guest = reaches_guest


class LocalFence(Fence):
    """Fences this thread only, by an uncontended lock (on x86 a lock-prefixed instruction, which is a full fence)."""

    def __init__(self, *, guest_has_fences: bool = False) -> None:
        lock = allocate_lock()
        acquire, release = lock.acquire, lock.release

        def full() -> None:
            acquire()
            release()

        super().__init__(full, reaches_guest=guest_has_fences)


class GlobalFence(Fence):
    """Fences this thread and every process that called :func:`register`. OSError where the kernel cannot."""

    def __init__(self) -> None:
        # PyDLL keeps the GIL: giving it up and taking it back would be a third of the price.
        call = ctypes.PyDLL(None).syscall
        call.restype = ctypes.c_long
        arguments = (ctypes.c_long(_SYS_MEMBARRIER), ctypes.c_int(_CMD_GLOBAL_EXPEDITED), ctypes.c_uint(0))

        def full() -> object:
            return call(*arguments)

        # Once supported it does not fail (membarrier(2), ERRORS), so one try here stands for all.
        if full() != 0:
            raise OSError("membarrier: GLOBAL_EXPEDITED is not available")
        super().__init__(full, reaches_guest=True)


def register() -> bool:
    """Has this process fenced by every :class:`GlobalFence` of others; False where the kernel cannot.

    To be called in the very process that runs the guest's CPU, once, before the guest runs: what is registered is
    an address space. Where it gives False, no worker gets a GlobalFence either.
    """
    call = ctypes.CDLL(None).syscall
    call.restype = ctypes.c_long
    return bool(
        call(ctypes.c_long(_SYS_MEMBARRIER), ctypes.c_int(_CMD_REGISTER_GLOBAL_EXPEDITED), ctypes.c_uint(0)) == 0
    )


def strongest() -> Fence:
    """The strongest fence that this kernel grants to this process."""
    try:
        return GlobalFence()
    except OSError:
        return LocalFence()
