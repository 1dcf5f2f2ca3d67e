"""The machine's second thread: it waits for everything that does not come from the guest.

One handler per descriptor. The thread sleeps until something happens: there is no tick. What a handler does has to be
short, since the interpreter runs one thread at a time and the guest's next exit would wait for it.

**What wakes a sleeping CPU** (interrupts, its timer) is *shared*: while the CPU's thread has nothing to do, it waits
for that itself (:meth:`EventLoop.help`), which spares waking two threads one after the other, half of the time that an
interrupt takes. So there are three epolls. The loop's own has everything that is not shared, and the shared one inside
it, as one descriptor; that is switched off while the CPU's thread waits on the third, with the shared one and the CPU's
own wake-up in it. An event of the shared ones is taken by one thread or the other, and it does not matter by which.

To wake a thread takes the host 20 to 40 us, of the 200 that a disk's answer takes in all. So the CPU's thread looks for
a moment before it sleeps, while its last sleeps were so short that it would have been worth it: :class:`Patience`.

An exception in a handler is a bug and must not be lost with the thread: it is handed to whoever started the loop.
"""

from __future__ import annotations

import heapq
import os
import select
import threading
import time
from collections.abc import Callable

Handler = Callable[[], None]

#: How long (nanoseconds) somebody looks who has begun to, and at most.
_FIRST_PATIENCE = 20_000
_MOST_PATIENCE = 200_000


class Patience:
    """How long to look before one sleeps, as KVM has it (the kernel's Documentation/virt/kvm/halt-polling.rst).

    Longer while what was waited for came so soon that to look for it would have spared the sleep, and not at all once
    it did not: an idle guest costs nothing. On a host with one of its ``processors`` for us nobody looks, since whoever
    is waited for needs it.
    """

    def __init__(self, processors: int) -> None:
        self._limit = _MOST_PATIENCE if processors > 1 else 0
        #: How long to look now, nanoseconds.
        self.now = 0

    def slept(self, waited: int) -> None:
        """Looking was in vain, and what was waited for came after so many nanoseconds in all."""
        self.now = min(max(2 * self.now, _FIRST_PATIENCE), self._limit) if waited < _MOST_PATIENCE else 0


class EventLoop:
    """Waits for descriptors, on a thread of its own once started. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._shared = select.epoll()
        self._helpers = select.epoll()
        self._epoll.register(self._shared, select.EPOLLIN)
        self._helpers.register(self._shared, select.EPOLLIN)
        self._handlers: dict[int, Handler] = {self._shared.fileno(): self._take_shared}
        self._shared_handlers: dict[int, Handler] = {}
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        #: What call_later() asked for: (time.monotonic, number, what), a heap.
        self._later: list[tuple[float, int, Handler]] = []
        self._number = 0
        self._helper_wake: int | None = None
        self._patience = Patience(len(os.sched_getaffinity(0)))
        self._lock = threading.Lock()
        self._stopping = False
        #: Called on the loop's thread whenever it is about to sleep.
        self.before_sleep: Handler = _nothing
        self._thread: threading.Thread | None = None

    def add_shared(self, fd: int, handler: Handler, events: int = select.EPOLLIN) -> None:
        """The same as :meth:`add` for what may wake the CPU; ``handler`` is also called by :meth:`help`'s caller.

        Both threads may call it at the same time, and find nothing to do.
        """
        self._shared_handlers[fd] = handler
        self._shared.register(fd, events)

    def help(self, wake: int) -> None:
        """Waits for shared events and calls their handlers, on this thread, which has nothing else to do.

        Returns when some have been called, or when ``wake`` was readable, an eventfd that is read here. It is always
        the same one, and so is the thread.
        """
        self._become_helper(wake)
        self._epoll.modify(self._shared, 0)
        try:
            for fd, _ in self._wait_helping():
                if fd == wake:
                    os.eventfd_read(wake)
                else:
                    self._take_shared()
        finally:
            self._epoll.modify(self._shared, select.EPOLLIN)

    def _become_helper(self, wake: int) -> None:
        if self._helper_wake is None:
            self._helper_wake = wake
            self._helpers.register(wake, select.EPOLLIN)

    def _wait_helping(self) -> list[tuple[int, int]]:
        """What :meth:`help` waits for: looked for again and again for a moment, if that is worth it, then slept for."""
        poll, now = self._helpers.poll, time.monotonic_ns
        begin = now()
        deadline = begin + self._patience.now
        while now() < deadline:
            if events := poll(0):
                return events
        events = poll()
        self._patience.slept(now() - begin)
        return events

    def _take_shared(self) -> None:
        for fd, _ in self._shared.poll(0):
            self._shared_handlers[fd]()

    def add(self, fd: int, handler: Handler, events: int = select.EPOLLIN) -> None:
        """Calls ``handler`` whenever one of ``events`` holds. PermissionError: the file is always ready."""
        self._handlers[fd] = handler
        try:
            self._epoll.register(fd, events)
        except OSError:
            del self._handlers[fd]
            raise

    def remove(self, fd: int) -> None:
        """Forgets a descriptor. A call of its handler may be under way, and end later."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def call_later(self, seconds: float, handler: Handler) -> None:
        """Calls ``handler`` on the loop's thread in so many seconds."""
        with self._lock:
            self._number += 1
            heapq.heappush(self._later, (time.monotonic() + seconds, self._number, handler))
        os.eventfd_write(self._wake, 1)

    def start(self, failed: Callable[[Exception], None]) -> None:
        """Starts the thread; ``failed`` gets the exception that ends it, if one does."""
        self._thread = threading.Thread(target=self._run, args=(failed,), name="events", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread and waits for its end."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Gives the loop's own descriptors back; it has to be stopped."""
        for epoll in (self._epoll, self._helpers, self._shared):
            epoll.close()
        os.close(self._wake)

    def _run(self, failed: Callable[[Exception], None]) -> None:
        try:
            while not self._stopping:
                self.before_sleep()
                self.step(self._timeout())
        except Exception as error:  # Whoever started the loop decides what a bug means
            failed(error)

    def step(self, timeout: float | None = 0) -> None:
        """Waits once and calls the handlers of all that is ready; ``timeout`` in seconds, None: as long as it takes."""
        for fd, _ in self._wait(timeout):
            if (handler := self._handlers.get(fd)) is not None:
                handler()
            elif fd == self._wake:
                os.eventfd_read(self._wake)
        if self._later:
            self._call_due()

    def _wait(self, timeout: float | None) -> list[tuple[int, int]]:
        """What is ready, as epoll says it."""
        return self._epoll.poll(timeout)

    def _timeout(self) -> float | None:
        with self._lock:
            return max(0.0, self._later[0][0] - time.monotonic()) if self._later else None

    def _call_due(self) -> None:
        while True:
            with self._lock:
                if not self._later or self._later[0][0] > time.monotonic():
                    return
                handler = heapq.heappop(self._later)[2]
            handler()


def _nothing() -> None:
    """What is to be done before sleeping, unless somebody says otherwise."""
