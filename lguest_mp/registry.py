"""Which guests there are: a directory for each, below the runtime directory of the user who started it.

A launcher *claims* its guest's name, and until its end nobody else of this user has it. In ``guests/<name>/`` lie

- ``lock``, which the launcher holds locked (flock(2)) and in which its process ID is to be read. A lock ends with its
  process, however that ends, so it is the lock that tells the living from the dead;
- ``control``, the socket at which the launcher answers ``lguestctl`` (``control.py``).

Each of these is met in practice:

- *A launcher that was killed* leaves its directory. Whoever comes across it next and gets the lock, another launcher or
  lguestctl, takes it away. Files are taken away by whoever has their lock, and a lock counts only while its file still
  has its name: so nobody claims a directory that is just being removed.
- *A look at a lock that is free* is to have it for a moment. So a name counts as taken only after :data:`PATIENCE`.
- *A guest's reboot* is the launcher executing itself again. Lock and socket are handed on (:meth:`Claim.hand_on`), so
  that no other launcher gets the name in between, and whoever connects meanwhile only waits a little.
- *A launcher that became another user or went to another root directory* holds its directory open. As another user it
  may not remove anything there any more; then the next one does.
- *A path longer than a socket's address may be* (107 bytes): sockets are named relative to their directory.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from lguest_mp import legacy, runtime
from lguest_mp.errors import LguestError
from lguest_mp.record import Value

if TYPE_CHECKING:
    from pathlib import Path

#: A name is for people, for the command lines of other tools, and for a directory.
NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
NAME_LENGTH = 64
#: How long (seconds) a name has to be somebody else's to be taken.
PATIENCE = 0.5
#: How many may wait for the launcher to accept them.
BACKLOG = 16

_RETRY = 0.01
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_GUESTS, _LOCK, _SOCKET = "guests", "lock", "control"
#: Names the file descriptors of a claim that is handed on, in the order of the fields of :class:`_Held`.
_VARIABLE = "LGUEST_CLAIM"


class NameTakenError(LguestError):
    """Another guest has the name."""


class UnavailableError(LguestError):
    """There can be no directory for the guest. It can run without."""


def is_name(text: str) -> bool:
    """Whether a guest can be called that."""
    return 0 < len(text) <= NAME_LENGTH and set(text) <= NAME_CHARACTERS and text not in {".", ".."}


class _Held(Value):
    """File descriptors: the directory of all guests and this guest's, its lock, its listening socket."""

    guests: int
    directory: int
    lock: int
    listener: int

    def is_ours(self) -> bool:
        """Whether the lock still has its name; OSError if not even the descriptors are what they should be."""
        return _is_named(self.lock, self.directory)


class Claim:
    """A name, taken. ``listener`` is its socket, non-blocking; ``owner`` the user ID of whose guest it is."""

    def __init__(self, name: str, held: _Held) -> None:
        self.name = name
        self.owner = os.geteuid()
        self._held = held
        self.listener = socket.socket(fileno=held.listener)
        self.listener.setblocking(False)

    def hand_on(self) -> None:
        """Leaves everything as it is for the program that this process executes next."""
        legacy.leave(_VARIABLE, self._held.guests, self._held.directory, self._held.lock, self.listener.detach())

    def release(self) -> None:
        """Gives the name back. What cannot be removed (by another user than we were) is left to the next."""
        held = self._held
        self.listener.close()
        with suppress(OSError):
            if held.is_ours():
                _remove(held.guests, held.directory, self.name)
        for fd in (held.guests, held.directory, held.lock):
            os.close(fd)


def claim(name: str) -> Claim:
    """Takes the name ``name``, or takes over what :meth:`Claim.hand_on` left. NameTakenError, UnavailableError."""
    held = _inherited()
    if held is None:
        try:
            held = _claim_anew(name)
        except NameTakenError:
            raise
        except LguestError as error:
            raise UnavailableError(str(error)) from error
        except OSError as error:
            raise UnavailableError(f"cannot make the directory of guest {name}: {error.strerror}") from error
    return Claim(name, held)


def _inherited() -> _Held | None:
    """What this process's program before the last exec left, if it did and all is still as it was."""
    try:
        held = _Held(*legacy.take(_VARIABLE))
        return held if held.is_ours() else None
    except (TypeError, OSError):
        return None


def _claim_anew(name: str) -> _Held:
    """NameTakenError; other LguestErrors and OSErrors: there can be no directory."""
    guests = runtime.directory() / _GUESTS
    runtime.make_private(guests)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return _try_to_claim(guests, name)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise NameTakenError(_taken(guests, name)) from None
        except FileNotFoundError:  # a dead guest's directory was removed while we were about to use it
            if time.monotonic() > deadline:
                raise
        time.sleep(_RETRY)


def _taken(guests: Path, name: str) -> str:
    pid = _pid_of(guests / name / _LOCK)
    process = "" if pid is None else f" (process {pid})"
    return f"a guest named {name} runs already{process}; give this one another name with --name"


def _try_to_claim(guests: Path, name: str) -> _Held:
    """BlockingIOError: somebody has the lock. FileNotFoundError: the directory vanishes."""
    with ExitStack() as opened:
        runtime.make_private(guests / name)
        all_guests = _opened(opened, os.open(guests, _DIRECTORY))
        directory = _opened(opened, os.open(guests / name, _DIRECTORY))
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = _opened(opened, os.open(_LOCK, flags, 0o600, dir_fd=directory))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_named(lock, directory):
            raise FileNotFoundError(errno.ENOENT, "the lock is gone")
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        listener = _listen(directory)
        opened.pop_all()
    return _Held(all_guests, directory, lock, listener.detach())


def _opened(stack: ExitStack, fd: int) -> int:
    stack.callback(os.close, fd)
    return fd


def _is_named(lock: int, directory: int) -> bool:
    """Whether that lock's file is the one in the directory. OSError: there is none, or no such file descriptor."""
    return os.path.samestat(os.fstat(lock), os.stat(_LOCK, dir_fd=directory, follow_symlinks=False))


def _listen(directory: int) -> socket.socket:
    """A socket there that listens; nobody can connect before it is its owner's alone."""
    with suppress(FileNotFoundError):
        os.unlink(_SOCKET, dir_fd=directory)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(_short_path(directory))
        os.chmod(_SOCKET, 0o600, dir_fd=directory)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _short_path(directory: int) -> str:
    """The socket's path, short enough for an address."""
    return f"/proc/self/fd/{directory}/{_SOCKET}"


def _remove(guests: int, directory: int, name: str) -> None:
    """Removes a guest's directory, whose lock the caller has. OSError."""
    with suppress(FileNotFoundError):
        os.unlink(_SOCKET, dir_fd=directory)
    os.unlink(_LOCK, dir_fd=directory)
    os.rmdir(name, dir_fd=guests)


def _pid_of(lock: Path) -> int | None:
    """The process whose lock it is, as far as the file says."""
    try:
        return int(lock.read_bytes()[:20])
    except (OSError, ValueError):
        return None


# ---- For those who look for guests ----


class Guests:
    """The guests that were started with the runtime directory ``directory``, which need not exist."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / _GUESTS

    def names(self) -> list[str]:
        """Of those who live, or seem to; the remains of the others are removed. LguestError."""
        try:
            found = sorted(os.listdir(self._path))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise LguestError(f"{self._path}: {error.strerror}") from error
        return [name for name in found if is_name(name) and self._lives(name)]

    def connect(self, name: str, timeout: float) -> socket.socket:
        """Connects to a guest's launcher, within ``timeout`` seconds, which are also the socket's from then on.

        FileNotFoundError, ConnectionRefusedError: there is no such guest. BlockingIOError: it accepts nobody for so
        long. Other OSErrors.
        """
        if not is_name(name):
            raise FileNotFoundError(errno.ENOENT, "no guest has such a name")
        with ExitStack() as opened:
            directory = _opened(opened, os.open(self._path / name, _DIRECTORY))
            channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            opened.callback(channel.close)
            # A socket that does not wait at all is refused when others wait to be accepted.
            seconds, rest = divmod(timeout, 1)
            channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(seconds), int(rest * 1e6)))
            channel.connect(_short_path(directory))
            channel.settimeout(timeout)
            opened.pop_all()
            os.close(directory)
        return channel

    def pid(self, name: str) -> int | None:
        """The process ID of a guest's launcher, as far as it is known."""
        return _pid_of(self._path / name / _LOCK)

    def _lives(self, name: str) -> bool:
        """Whether somebody has the lock of a guest's directory. If nobody has, it is removed."""
        with ExitStack() as opened:
            try:
                guests = _opened(opened, os.open(self._path, _DIRECTORY))
                directory = _opened(opened, os.open(name, _DIRECTORY, dir_fd=guests))
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
                lock = _opened(opened, os.open(_LOCK, flags, dir_fd=directory))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_named(lock, directory):
                    _remove(guests, directory, name)
            except BlockingIOError:
                return True
            except FileNotFoundError:  # a launcher was killed before it had a lock, or somebody else removes it now
                with suppress(OSError):
                    os.rmdir(self._path / name)
            except OSError:
                return False
            return False
