"""Forking a process of the guest, and hearing of its end.

A child ties its life to the supervisor's, lets go of the file descriptors that are not its own, and takes its name. To
the supervisor it is a pidfd, which becomes readable when the process ends and cannot come to mean another.

The less a child does before its own work, the better: all memory is shared until one side writes to it, and Python
writes to whatever it looks at. So what can be prepared is prepared before the fork (``steps.py``).
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NoReturn

from lguest_mp import prctl, steps, worker
from lguest_mp.errors import LguestError
from lguest_mp.record import Record, Value
from lguest_mp.steps import Step
from lguest_mp.supervisor import signals
from lguest_mp.supervisor.complaints import Complaints
from lguest_mp.supervisor.log import say
from lguest_mp.title import Title

if TYPE_CHECKING:
    from lguest_mp.supervisor.log import Log
    from lguest_mp.supervisor.loop import Loop

_SYS_DUP2 = 33
_SYS_CLOSE_RANGE = 436
#: No descriptor has a higher number.
_LAST_FD = 0x7FFF_FFFF


class Child(Record):
    """A process that this one forked. ``name`` as people call it: ``cpu``, ``block0/requestq``."""

    name: str
    pid: int
    pidfd: int
    #: What it writes to standard error; None: it has ours.
    complaints: Complaints | None = None
    is_reaped: bool = False

    def signal(self, signum: signal.Signals) -> None:
        """Sends it a signal; does nothing if it has ended."""
        if self.is_reaped:  # its pidfd may be another's by now
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signum)

    def end(self) -> None:
        """Tells it to end, also when it is stopped and does not hear."""
        self.signal(signal.SIGTERM)
        self.signal(signal.SIGCONT)

    def has_ended(self, timeout: float = 0) -> bool:
        """Whether it ends within ``timeout`` seconds."""
        poller = select.poll()
        poller.register(self.pidfd, select.POLLIN)
        return bool(poller.poll(max(0, timeout) * 1000))

    def reap(self) -> int:
        """Waits for its end, takes its last words, and forgets it; the status as of wait(2)."""
        _, status = os.waitpid(self.pid, 0)
        self._forget(crashed=not _is_ordinary(status))
        return status

    def leave_behind(self) -> None:
        """Takes its last words, and forgets it although it has not ended."""
        self._forget(crashed=False)

    def _forget(self, *, crashed: bool) -> None:
        self.is_reaped = True
        os.close(self.pidfd)
        if self.complaints is not None:
            self.complaints.finish(crashed=crashed)


class Ear(Value):
    """Where what children write to their standard error is waited for, and where it goes."""

    loop: Loop
    log: Log


class Naming:
    """How the processes of one guest are called in ``ps`` and ``top``."""

    def __init__(self, guest: str) -> None:
        self._guest = guest
        self._title = Title()

    def of(self, child: str | None, comm: str) -> Name:
        """The name of a child, or of the supervisor (None)."""
        title = f"lguest[{self._guest}]" if child is None else f"lguest[{self._guest}] {child}"
        return Name(self._title.setter(title), (prctl.comm(comm),))


class Name(Value):
    """What a process is called."""

    set_title: Callable[[], None]
    steps: tuple[Step, ...]

    def take(self) -> None:
        """Names this process. The comm comes second: a title sets it too, to its own beginning."""
        self.set_title()
        steps.make(self.steps)


def fork(name: str, body: Callable[[], int], ear: Ear | None = None, first: Sequence[Step] = ()) -> Child:
    """Forks a child, as a :class:`Birth` says. LguestError if the host cannot."""
    birth = Birth(name, body, ear, first)
    birth.fork()
    return birth.child()


class Birth:
    """All that a child takes besides the fork: it runs ``body`` and exits with what that returns.

    It makes the ``first`` steps, which are to be those of :func:`keeping`; or the body is to call :func:`keep_only`
    soon. With an ``ear`` its standard error goes there; without, it is ours. LguestError if the host cannot.

    Of several children the births are best prepared first, and then all of them forked, before anybody asks for the
    first :meth:`child`: a page that this process writes after one fork and before the next is the first one's alone.
    """

    def __init__(self, name: str, body: Callable[[], int], ear: Ear | None = None, first: Sequence[Step] = ()) -> None:
        self._name = name
        self._body = body
        self._parent = os.getpid()
        self._pid = 0
        self._error: OSError | None = None
        self._complaints: Complaints | None = None
        self._writing = -1
        to_standard_error: tuple[Step, ...] = ()
        if ear is not None:
            try:
                self._complaints, self._writing = _listen(name, ear)
            except OSError as error:
                raise _cannot_fork(name, error) from error
            to_standard_error = (_dup2(self._writing, 2),)
        self._begin = (signals.UNBLOCK_IN_CHILD, *to_standard_error, *first, prctl.DIE_WITH_PARENT)

    def fork(self) -> None:
        """Forks it; whether that could be done, :meth:`child` tells."""
        try:
            self._pid = os.fork()
        except OSError as error:
            self._error = error
            return
        if self._pid == 0:
            _be_child(self._parent, self._begin, self._body)

    def child(self) -> Child:
        """The child that was forked. LguestError if the host could not."""
        try:
            if self._error is not None:
                raise self._error
            pidfd = os.pidfd_open(self._pid)
        except OSError as error:
            self.abandon()
            raise _cannot_fork(self._name, error) from error
        self._close()
        return Child(self._name, self._pid, pidfd, self._complaints)

    def abandon(self) -> None:
        """It is not to be: who was forked is killed."""
        self._close()
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        if self._complaints is not None:
            self._complaints.finish()

    def _close(self) -> None:
        if self._writing >= 0:
            os.close(self._writing)


def _listen(name: str, ear: Ear) -> tuple[Complaints, int]:
    """What listens to a child's standard error, and the end of the pipe that is to be that. OSError."""
    errors, writing = os.pipe2(os.O_CLOEXEC)
    try:
        return Complaints(name, errors, ear.loop, ear.log), writing
    except BaseException:
        os.close(errors)
        os.close(writing)
        raise


def _cannot_fork(name: str, error: OSError) -> LguestError:
    return LguestError(f"cannot fork {name}: {error.strerror}; the host is short of processes, memory or files")


def _be_child(parent: int, begin: Sequence[Step], body: Callable[[], int]) -> NoReturn:
    status = worker.BUG
    try:
        _make(begin)
        if os.getppid() == parent:  # or it has ended before we asked to be told
            status = body()
    except LguestError as error:
        say(str(error))
    except BaseException:  # nothing of the supervisor's own may run in here
        os.write(2, traceback.format_exc().encode(errors="replace"))
    finally:
        os._exit(status)


def keeping(wanted: Iterable[int], null: int) -> tuple[Step, ...]:
    """The steps that close every file descriptor of a process but ``wanted`` and standard error.

    Standard input and output, when they are not wanted, become ``null`` (/dev/null).
    """
    kept = {0, 1, 2, *wanted}
    return (
        *(_dup2(null, standard) for standard in (0, 1) if standard not in wanted),
        *(
            Step("close_range", (_SYS_CLOSE_RANGE, before + 1, after - 1, 0))
            for before, after in pairwise((*sorted(kept), _LAST_FD + 1))
            if after - before > 1
        ),
    )


def keep_only(wanted: Iterable[int], null: int) -> None:
    """The same, at once."""
    _make(keeping(wanted, null))


def _make(begin: Sequence[Step]) -> None:
    try:
        steps.make(begin)
    except OSError as error:
        if error.errno not in {errno.ENOSYS, errno.EPERM}:
            raise
        # Linux before 5.9 has no close_range, and some containers do not let us have it.
        for each in begin:
            match each.call:
                case (number, int(start), int(last), 0) if number == _SYS_CLOSE_RANGE:
                    os.closerange(start, min(last, os.sysconf("SC_OPEN_MAX")) + 1)
                case _:
                    steps.make((each,))


def _dup2(fd: int, other: int) -> Step:
    return Step("dup2", (_SYS_DUP2, fd, other))


def end_all(children: Sequence[Child], grace: float) -> list[str]:
    """Ends the children, those that do not hear within ``grace`` seconds by force, and reaps them.

    One that does not even hear that, since it waits for a disk that does not answer, is left to Linux: it never runs
    again, and its parent need not wait for the disk, too. But what it has begun may still be done to guest memory and
    to the disk. Returns the names of those.
    """
    deadline = time.monotonic() + grace
    for child in children:
        child.end()
    for child in children:
        if not child.has_ended(deadline - time.monotonic()):
            child.signal(signal.SIGKILL)
    deadline = time.monotonic() + grace
    left_behind = []
    for child in children:
        if child.has_ended(deadline - time.monotonic()):
            child.reap()
        else:
            say(f"{child.name} waits for the host and cannot be ended; it is left behind")
            child.leave_behind()
            left_behind.append(child.name)
    return left_behind


def _is_ordinary(status: int) -> bool:
    """Whether a guest can bring a process to this end as often as it likes, by resets or by breaking the standard."""
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status) == signal.SIGTERM
    return os.WEXITSTATUS(status) in {0, worker.DRIVER_BROKE_STANDARD}


def how_it_ended(status: int) -> str:
    """A wait status in words: ``was killed by SIGSEGV``, ``exited with status 70``."""
    if not os.WIFSIGNALED(status):
        return f"exited with status {os.WEXITSTATUS(status)}"
    signum = os.WTERMSIG(status)
    try:
        return f"was killed by {signal.Signals(signum).name}"
    except ValueError:
        return f"was killed by signal {signum}"
