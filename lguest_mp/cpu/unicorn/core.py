"""What every machine does with the embedded CPU: run it, have its attention, sleep with it, give it back.

The library executes translated blocks without looking up. Whoever wants its attention (an interrupt, a job) sets
CPU_INTERRUPT_HARD and then ends the chain of blocks; between two blocks the library calls ``exec_interrupt``
(native.S), which runs jobs and asks for an interrupt. There is no polling, and ``uc_emu_stop`` is used only to leave
for good.

The library clears the end-of-chain flag and then reads the request, with no fence between: its read may overtake its
own store, and a kick that falls in between is lost. So :meth:`settle`, a moment later, looks whether the request was
taken. If not, it drains the CPU's stores by ``membarrier`` and raises the flag once more: now it cannot be lost.

A callback into Python must not be left by an exception (there is C below it): the exception is kept, the library told
to stop, and whoever runs the CPU raises it.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable
from threading import get_ident
from typing import Any

from lguest_mp.codemap import CodeMap
from lguest_mp.cpu.unicorn.internals import Internals
from lguest_mp.memory import BLOCK_SIZE, GuestMemory

#: Bytes of translated code that are kept; when they are full, all is dropped and translated anew.
TRANSLATION_BYTES = 256 << 20
CPU_INTERRUPT_HARD = 2

_SYS_MEMBARRIER = 324
_MEMBARRIER_CMD_PRIVATE_EXPEDITED = 1 << 3
_MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED = 1 << 4


class UnicornCore:
    """One CPU of the library, and how its thread and the others meet."""

    def __init__(self, internals: Internals, memory: GuestMemory, code_map: CodeMap) -> None:
        self._internals = internals
        self._library = internals.library
        self._failure: BaseException | None = None
        self._jobs: deque[Callable[[], None]] = deque()
        self._sleeping = False
        self._is_settled = True
        self._thread = 0
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall
        self._fence(_MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED)
        self._callbacks: list[Any] = []  # ctypes must be kept from collecting them
        # The library numbers RAM in the order of mapping, without holes: its "ram address" is our offset.
        slot = internals.native.slot
        slot("ram").value = memory.address
        slot("code_map").value = ctypes.addressof(ctypes.c_char.from_buffer(code_map.marks))
        slot("code_pages").value = code_map.pages
        self._connect("python_jobs", ctypes.CFUNCTYPE(None), self._jobs_callback())
        if memory.huge_pages:
            self._watch_blocks(memory)

    def _connect(self, slot: str, prototype: Any, function: Callable[..., Any]) -> None:
        """Has native.S call ``function``, which must not raise."""
        callback = prototype(function)
        self._callbacks.append(callback)
        address = ctypes.cast(callback, ctypes.c_void_p).value
        assert address is not None
        self._internals.native.slot(slot).value = address

    def _jobs_callback(self) -> Callable[[], None]:
        run_jobs, fail = self._run_jobs, self._fail

        def jobs() -> None:
            try:
                run_jobs()
            except BaseException as error:
                fail(error)

        return jobs

    def _watch_blocks(self, memory: GuestMemory) -> None:
        """Has each block of RAM become a huge page when the guest's CPU first comes there, and not before.

        Nobody knows better which ones will be used, and a guest that uses few is to cost little.
        """
        end = memory.regions[-1].base + memory.regions[-1].size
        # 1: it was, or is no RAM, or not the whole block is.
        touched = bytearray(b"\1" * -(-end // BLOCK_SIZE))
        for region in memory.regions:
            first, last = region.base // BLOCK_SIZE, (region.base + region.size) // BLOCK_SIZE
            touched[first:last] = bytes(last - first)
        blocks = self._internals.native.slot("blocks")
        make_huge, fail = memory.make_huge, self._fail

        def on_touched(address: int) -> None:
            try:
                make_huge(address & -BLOCK_SIZE, BLOCK_SIZE)
                if not memory.huge_pages:
                    blocks.value = 0  # the host has none, and there is nothing more to look for
            except BaseException as error:
                fail(error)

        self._touched = touched
        self._internals.native.slot("touched").value = ctypes.addressof(ctypes.c_char.from_buffer(touched))
        self._connect("python_touched", ctypes.CFUNCTYPE(None, ctypes.c_uint64), on_touched)
        blocks.value = len(touched)

    def close(self) -> None:
        """Gives everything back that the CPU holds."""
        self._internals.close()
        os.close(self._wake)

    def kick(self) -> None:
        """An interrupt may be pending: have the CPU look, also when it sleeps. From any thread.

        Who kicks from another thread calls :meth:`settle` before it sleeps.
        """
        if self._sleeping:
            if get_ident() != self._thread:  # which looks of its own accord when it is done
                os.eventfd_write(self._wake, 1)
            return
        internals = self._internals
        internals.interrupt_request.value = CPU_INTERRUPT_HARD
        internals.exit_chain.value = 0xFFFF
        self._is_settled = False

    def settle(self) -> None:
        """Kicks once more if the CPU may have missed it. From the thread that kicked, before it sleeps.

        Nearly always it has looked by now, and the fence, which interrupts its processor, is spared.
        """
        if self._is_settled:
            return
        self._is_settled = True
        internals = self._internals
        if internals.interrupt_request.value:
            self._fence(_MEMBARRIER_CMD_PRIVATE_EXPEDITED)
            internals.exit_chain.value = 0xFFFF

    def call(self, job: Callable[[], None]) -> None:
        """Runs ``job`` on the CPU's thread between two instructions, soon; returns at once. From any thread."""
        self._jobs.append(job)
        self._internals.jobs_wanted.value = 1
        self.kick()

    def _run_jobs(self) -> None:
        self._internals.jobs_wanted.value = 0
        while self._jobs:
            self._jobs.popleft()()

    def forget_code(self, first_page: int, last_page: int) -> None:
        """Pages of guest memory (offset / 4096) were written behind the CPU's back: drop what was translated.

        On the CPU's thread only (see :meth:`call`).
        """
        self._internals.forget_code(first_page, last_page)

    def _sleep(self, awake: Callable[[], bool], idle: Callable[[int], None]) -> None:
        """Sleeps on the CPU's thread until ``awake()``, in ``idle(wake)`` (see Platform.idle); runs jobs meanwhile."""
        # kick() and call() look at _sleeping after they have left their mark, so a mark that is not seen here
        # makes them write the eventfd.
        self._sleeping = True
        try:
            while True:
                if self._jobs:
                    self._run_jobs()
                if awake():
                    break
                idle(self._wake)
        finally:
            self._sleeping = False

    def _fail(self, error: BaseException) -> None:
        """Ends the run with an exception."""
        if self._failure is None:
            self._failure = error
        self._stop()

    def _stop(self) -> None:
        self._library.dll.uc_emu_stop(self._internals.uc)

    def _fence(self, command: int) -> None:
        self._syscall(_SYS_MEMBARRIER, command, 0, 0)
