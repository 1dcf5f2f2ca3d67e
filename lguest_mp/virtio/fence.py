"""The memory fence between a worker and the guest's CPU.

Two handshakes of a virtqueue are "I store, then I look at what you store", on both sides: the driver moves the
available index and then looks whether the device wants a notification, while the device asks for notifications and
then looks at the available index (and the same again for the used index and interrupts). A processor may let the look
overtake the store. Then both sides look too early, each finds nothing to do, and a wake-up is lost for good. So each
side has to put a full fence between its store and its look.

The driver does: the standard obliges it (virtio 1.2, 2.7.13.4.1), and every engine has to execute its fences as such
(the embedded CPU's translator would drop them; see ``cpu/unicorn/internals.py``). This is ours.
"""

from __future__ import annotations

from _thread import allocate_lock

_lock = allocate_lock()
_acquire, _release = _lock.acquire, _lock.release


def full() -> None:
    """Orders every access before the call before every access after it.

    An uncontended lock is a lock-prefixed instruction on x86, which is a full fence, and costs a tenth of a
    microsecond. In a process of one thread it stays uncontended.
    """
    _acquire()
    _release()
