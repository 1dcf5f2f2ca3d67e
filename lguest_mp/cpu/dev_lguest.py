"""``/dev/lguest``, the host half of lguest in the kernel of the hosts that have it, as the original launcher used it.

Everything is a read or a write of that file. A write is a request: *longs* of the host's, which has 32 bits, the first
of them the request's number. A read runs the guest, and gives 12 bytes (``struct lguest_pending``) when the launcher is
needed; it fails with ENOENT when the guest is dead, and the next read gives the reason, or with ERESTART when the guest
wants to be started afresh. Reads and writes that concern one CPU have its number as their offset.

The host reads guest memory where the launcher has it, so it is told that address, as a long. lguest's host was never
anything but a 32-bit x86 kernel, and its launchers 32-bit programs: :meth:`DevLguest.initialize` refuses memory that a
long cannot tell of.

The calls are the original's, one by one, down to which of them is told the CPU's number. That they are repeated after a
signal is Python's doing (PEP 475).

Source: the original launcher; Linux's include/linux/lguest_launcher.h.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from lguest_mp.cpu.lguest_host import GuestDied, GuestRestarts, LguestHost, Pending, Register
from lguest_mp.errors import LguestError
from lguest_mp.memory import PAGE_SIZE

PATH = "/dev/lguest"

#: Requests (LHREQ_*).
INITIALIZE = 0
IRQ = 2
EVENTFD = 4
GETREG = 5
SETREG = 6
TRAP = 7

#: The only CPU there is.
_CPU = 0
#: struct lguest_pending: trap, instruction, address.
_PENDING = struct.Struct("<B7sI")
_LONG = struct.Struct("<I")
#: As much as is read of the reason of a death.
_LONGEST_REASON = 1023


def open_device(path: str = PATH) -> int:
    """Opens the device: its file descriptor, not inherited across exec. LguestError."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise LguestError(
            f"there is no {path}: this host's kernel has no lguest (Linux 4.14 removed it); leave --cpu=lguest out, and"
            " the embedded CPU runs the guest"
        ) from error
    except OSError as error:
        raise LguestError(f"Failed to open {path}: {error.strerror}") from error


class DevLguest(LguestHost):
    """The guest behind ``file``, which is open and has had none yet.

    ``base``: where in this process guest memory is (``GuestMemory.address``).
    """

    def __init__(self, file: int, base: int) -> None:
        self._file = file
        self._base = base

    def initialize(self, pfn_limit: int, start: int, device_limit: int) -> None:
        """See LguestHost; LguestError, too, for memory that is not below 4 GiB in this process."""
        if self._base + device_limit * PAGE_SIZE > 1 << 32:
            raise LguestError(
                f"{PATH} takes addresses of 32 bits, and guest memory is at {self._base:#x}: it needs a 32-bit Python"
                " (and a 32-bit host)"
            )
        with _told(f"Writing to {PATH}"):
            try:
                os.write(self._file, _longs(INITIALIZE, self._base, pfn_limit, start, device_limit))
            except OSError as error:
                if error.errno == errno.EBUSY:
                    raise LguestError(
                        f"{PATH} has had a guest already, and with --chroot or --username it cannot be opened again;"
                        " start lguest again"
                    ) from error
                raise

    def run(self) -> Pending:
        """See LguestHost."""
        with _told("Running guest failed"):
            try:
                pending = os.pread(self._file, _PENDING.size, _CPU)
            except OSError as error:
                match error.errno:
                    case errno.ENOENT:
                        raise GuestDied(self._reason()) from None
                    case errno.ERESTART:
                        raise GuestRestarts from None
                raise
        if len(pending) != _PENDING.size:
            raise LguestError(
                f"Running guest failed: {PATH} gave {len(pending)} bytes, not {_PENDING.size}; it is another lguest's"
            )
        return Pending(*_PENDING.unpack(pending))

    def _reason(self) -> str:
        with _told("Running guest failed"):
            reason = os.pread(self._file, _LONGEST_REASON, _CPU)
        return reason.partition(b"\0")[0].decode(errors="replace")

    def get_register(self, register: Register) -> int:
        """See LguestHost."""
        with _told(f"Getting register {register:d}"):
            os.pwrite(self._file, _longs(GETREG, register), _CPU)
        with _told(f"Reading register {register:d}"):
            value = os.pread(self._file, _LONG.size, _CPU)
            if len(value) != _LONG.size:
                raise OSError(errno.EIO, f"{len(value)} bytes")
        (number,) = _LONG.unpack(value)
        return int(number)

    def set_register(self, register: Register, value: int) -> None:
        """See LguestHost."""
        with _told(f"Setting register {register:d}"):
            os.pwrite(self._file, _longs(SETREG, register, value), _CPU)

    def inject(self, trap: int) -> None:
        """See LguestHost."""
        try:
            os.write(self._file, _longs(TRAP, trap))
        except OSError as error:
            eip = self.get_register(Register.EIP)
            raise LguestError(f"Reinjecting trap {trap} for fault at {eip:#x}: {error.strerror}") from error

    def interrupt(self, irq: int) -> None:
        """See LguestHost; a dead guest is not interrupted."""
        with _told(f"Triggering irq {irq}"):
            try:
                _expect_zero(os.write(self._file, _longs(IRQ, irq)))
            except FileNotFoundError:  # run() is about to say so
                return

    def attach(self, address: int, eventfd: int) -> None:
        """See LguestHost."""
        with _told("Attaching eventfd"):
            _expect_zero(os.write(self._file, _longs(EVENTFD, address, eventfd)))

    def close(self) -> None:
        """See LguestHost."""
        os.close(self._file)


def _longs(*values: int) -> bytes:
    return b"".join(map(_LONG.pack, values))


def _expect_zero(answer: int) -> None:
    """What the host answers when it has done as it was asked."""
    if answer:
        raise OSError(errno.EIO, f"answered {answer}")


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Turns an OSError into an LguestError that begins with ``what``."""
    try:
        yield
    except OSError as error:
        raise LguestError(f"{what}: {error.strerror}") from error
