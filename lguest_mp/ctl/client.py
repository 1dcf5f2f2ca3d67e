"""Finding a guest, and asking its supervisor.

A guest may end or reboot between any two of our steps, and its launcher may be stopped (by ^Z) or busy. So each step
either gets its answer, or finds the guest gone (:class:`GuestGone`), or gives up after :data:`PATIENCE` with one line.

Guests are found in the runtime directory of whoever asks. Root may look into another user's: then lguestctl acts as
that user while it does, so that nothing that lies there can lead it where that user could not go.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from lguest_mp import control, runtime
from lguest_mp.control import (
    Answer,
    Describe,
    Done,
    Goodbye,
    GuestFacts,
    ProcessFacts,
    Refused,
    Request,
    Welcome,
)
from lguest_mp.errors import LguestError
from lguest_mp.record import Value
from lguest_mp.registry import Guests

if TYPE_CHECKING:
    from pathlib import Path

    from lguest_mp.jail import User

#: How long (seconds) a supervisor may take to answer.
PATIENCE = 5.0
#: How long (seconds) a guest's next life may take to begin: its launcher is being executed again.
REBOOT_PATIENCE = 30.0
_RETRY = 0.05

_Row = TypeVar("_Row")


class GuestGone(LguestError):
    """The guest ended, or began its next life (``reboots``), while we spoke with it."""

    def __init__(self, name: str, *, reboots: bool, reason: str | None = None) -> None:
        how = "reboots" if reboots else "has ended" if reason is None else f"has ended: {reason}"
        super().__init__(f"guest {name} {how}")
        self.reboots = reboots


class NoGuestError(LguestError):
    """There is no guest of that name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"there is no guest {name}; lguestctl list shows those that run")


class NoAnswer(LguestError):
    """The guest's supervisor does not answer."""

    def __init__(self, name: str, pid: int | None) -> None:
        who = "its launcher" if pid is None else f"its launcher (process {pid})"
        super().__init__(f"guest {name} does not answer; is {who} stopped?")


class Description(Value):
    """A guest and its processes, as its supervisor has it."""

    guest: GuestFacts
    processes: tuple[ProcessFacts, ...]


class Connection:
    """A connection to a guest's supervisor; a context manager."""

    def __init__(self, name: str, channel: socket.socket) -> None:
        self.name = name
        self.channel = channel
        #: The supervisor's process ID (0: it is in a PID namespace that cannot be seen from here).
        self.pid, _, _ = struct.unpack("=iII", channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.channel.close()

    def greet(self) -> None:
        """Hears the supervisor's first word. LguestError: it will not speak with us, or not our language."""
        try:
            answer = self.receive()
        except control.ControlError:
            answer = None
        if not isinstance(answer, Welcome) or answer.protocol != control.PROTOCOL:
            raise LguestError(f"guest {self.name} was started by another version of lguest; use its lguestctl")

    def send(self, request: Request) -> None:
        """Asks for something. NoAnswer; that the guest is gone shows when its answer is to be received."""
        try:
            self.channel.send(control.encode(request))
        except TimeoutError:
            raise NoAnswer(self.name, self.pid or None) from None
        except OSError:
            return  # and it may have said why

    def receive(self) -> Answer:
        """The next message, none of the bad news. GuestGone, NoAnswer, LguestError (refused), ControlError."""
        answer, _ = self.receive_with_files(0)
        return answer

    def receive_with_files(self, count: int) -> tuple[Answer, list[int]]:
        """The next message and up to ``count`` file descriptors that come with it, close-on-exec."""
        try:
            datagram, files = self._receive(count)
        except TimeoutError:
            raise NoAnswer(self.name, self.pid or None) from None
        except ConnectionResetError:
            datagram, files = b"", []
        try:
            return self._good_news(datagram), files
        except BaseException:
            for fd in files:
                os.close(fd)
            raise

    def _receive(self, count: int) -> tuple[bytes, list[int]]:
        size, flags = control.MAX_ANSWER + 1, socket.MSG_CMSG_CLOEXEC
        try:
            datagram, files, _, _ = socket.recv_fds(self.channel, size, count, flags)
        except ConnectionResetError:  # it went without having read all that we said: its last words come after this
            datagram, files, _, _ = socket.recv_fds(self.channel, size, count, flags)
        return datagram, files

    def _good_news(self, datagram: bytes) -> Answer:
        if not datagram:
            raise GuestGone(self.name, reboots=False)
        match answer := control.decode_answer(datagram):
            case Goodbye(reboots, reason):
                raise GuestGone(self.name, reboots=reboots, reason=reason)
            case Refused(reason):
                raise LguestError(f"guest {self.name}: {reason}")
        return answer

    def answers(self) -> Iterator[Answer]:
        """What comes up to Done. GuestGone, NoAnswer, LguestError: it was refused."""
        try:
            while not isinstance(answer := self.receive(), Done):
                yield answer
        except control.ControlError as error:
            raise LguestError(f"guest {self.name} says what makes no sense: {error}") from error

    def ask(self, request: Request, kind: type[_Row]) -> list[_Row]:
        """Asks, and gives those messages of the answer that are of one kind."""
        self.send(request)
        return [answer for answer in self.answers() if isinstance(answer, kind)]

    def describe(self) -> Description:
        """The guest and its processes."""
        self.send(Describe())
        return self.hear_description()

    def hear_description(self) -> Description:
        """The answer to Describe."""
        answers = list(self.answers())
        for answer in answers:
            if isinstance(answer, GuestFacts):
                return Description(answer, tuple(each for each in answers if isinstance(each, ProcessFacts)))
        raise LguestError(f"guest {self.name} does not say what it is")


class Place:
    """Where guests are looked for: the runtime directory ``directory``, as the user whose it is (None: as we are)."""

    def __init__(self, directory: Path, user: User | None = None) -> None:
        self._guests = Guests(directory)
        self._user = user

    def names(self) -> list[str]:
        """The guests that there are. LguestError."""
        with runtime.acting_as(self._user):
            return self._guests.names()

    def connect(self, name: str, patience: float = PATIENCE) -> Connection:
        """Connects to a guest. LguestError: there is none of that name, or it does not answer."""
        connection = self._open(name, patience)
        try:
            connection.greet()
        except BaseException:
            connection.channel.close()
            raise
        return connection

    def reconnect(self, name: str) -> Connection:
        """Connects to the next life of a guest that reboots. GuestGone if there is none."""
        deadline = time.monotonic() + REBOOT_PATIENCE
        while True:
            try:
                return self.connect(name, REBOOT_PATIENCE)
            except GuestGone:
                if time.monotonic() > deadline:
                    raise
            except NoGuestError:
                raise GuestGone(name, reboots=False) from None
            time.sleep(_RETRY)

    def _open(self, name: str, patience: float) -> Connection:
        with runtime.acting_as(self._user):
            try:
                return Connection(name, self._guests.connect(name, patience))
            except (FileNotFoundError, ConnectionRefusedError):
                raise NoGuestError(name) from None
            except BlockingIOError:
                raise NoAnswer(name, self._guests.pid(name)) from None
            except OSError as error:
                raise LguestError(f"guest {name}: {error.strerror}") from error

    def describe_all(self, names: Sequence[str], patience: float = PATIENCE) -> dict[str, Description | LguestError]:
        """All of these guests, or why one cannot be described. Those who went meanwhile are left out.

        They are asked all at once, so that those who do not answer cost ``patience`` (seconds) once.
        """
        deadline = time.monotonic() + patience
        found: dict[str, Description | LguestError] = {}
        with ExitStack() as opened:
            connected: list[Connection] = []
            asked: list[Connection] = []
            for name in names:
                with _noted(found, name):
                    connected.append(opened.enter_context(self._open(name, _RETRY)))
            for each in connected:
                with _noted(found, each.name):
                    each.channel.settimeout(max(_RETRY, deadline - time.monotonic()))
                    each.greet()
                    each.send(Describe())
                    asked.append(each)
            for each in asked:  # who greets us is there to answer
                with _noted(found, each.name):
                    each.channel.settimeout(patience)
                    found[each.name] = each.hear_description()
        return dict(sorted(found.items()))

    def pid(self, name: str) -> int | None:
        """The process ID of a guest's launcher, as far as it is known."""
        with runtime.acting_as(self._user):
            return self._guests.pid(name)

    def choose(self, name: str | None) -> str:
        """The guest that is meant: the named one, or the only one. LguestError: that is not clear."""
        if name is not None:
            return name
        names = self.names()
        if len(names) == 1:
            return names[0]
        if not names:
            raise LguestError("no guest runs")
        raise LguestError(f"which guest? There are {', '.join(names)}")


@contextmanager
def _noted(found: dict[str, Description | LguestError], name: str) -> Iterator[None]:
    """Notes why a guest cannot be described, unless it is gone."""
    try:
        yield
    except (NoGuestError, GuestGone):
        found.pop(name, None)
    except LguestError as error:
        found[name] = error
