"""A guest of ours under the ``lguest`` command, with the agent (``init/agent.sh``) in it doing what it is told."""

from __future__ import annotations

import itertools
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from guestkit.session import PATIENCE, Session, SessionError, Terminal

#: How much of what a guest has shown is told, in characters.
_EXCERPT = 2000


class CommandFailed(AssertionError):
    """A command in the guest ended with another status than 0."""


class Agent:
    """The agent in a guest, spoken to through a session's terminal."""

    def __init__(self, session: Terminal) -> None:
        self._session = session
        self._commands = itertools.count(1)

    def wait_until_ready(self, tty: str = "hvc0", seconds: float = PATIENCE) -> None:
        """Waits until it listens on ``tty``."""
        self._session.wait_for(rf"agent: ready on {tty}\r*\n", seconds)

    def run(self, command: str, seconds: float = PATIENCE) -> str:
        """Runs a shell command (one line) in the guest; its output. CommandFailed when its status is not 0."""
        number = self.start(command)
        return self.finish(number, command, seconds)

    def start(self, command: str) -> int:
        """Begins with a command; :meth:`finish` takes the number."""
        if "\n" in command or len(command) > 4000:
            raise ValueError("a command is one line that a terminal takes")
        number = next(self._commands)
        self._session.type(f"run {number} {command}\n")
        return number

    def has_finished(self, number: int) -> bool:
        """Whether a command that was begun has ended, as far as the terminal was read."""
        return self._session.shows(_end_of(number))

    def finish(self, number: int, command: str = "", seconds: float = PATIENCE) -> str:
        """Waits for the end of a command that was begun; its output."""
        found = self._session.wait_for(_end_of(number), seconds)
        output = found.before.removesuffix("\n")
        if found.groups != ("0",):
            raise CommandFailed(f"{command!r} ended with {found.groups[0]}: {excerpt(output)}")
        return output


def excerpt(output: str) -> str:
    """The end of what a guest has shown, for a person: misused devices show anything, and much of it."""
    end = output[-_EXCERPT:]
    return "".join(each if each.isprintable() or each == "\n" else "?" for each in end)


def _end_of(number: int) -> str:
    """What the agent shows at the end of a command."""
    return rf"^@{number} (\d+)\r*\n"


class Guest(Session):
    """The launcher with one guest, and its agent."""

    def __init__(
        self,
        *,
        kernel: Path,
        initrd: Path,
        launcher: Sequence[str] = (sys.executable, "-m", "lguest_mp"),
        name: str | None = None,
        options: Sequence[str] = (),
        memory: int = 256,
        arguments: Sequence[str] = ("quiet",),
        variables: Mapping[str, str] | None = None,
        columns: int = 100,
        rows: int = 30,
        errors: Path | None = None,
    ) -> None:
        """Starts the launcher; ``memory`` in MiB, ``arguments`` are the kernel's; a ``name`` nobody else has."""
        self.name = f"guest-{secrets.token_hex(4)}" if name is None else name
        command = [*launcher, f"--name={self.name}", *options, f"--initrd={initrd}", str(memory), str(kernel)]
        super().__init__([*command, *arguments], variables=variables, columns=columns, rows=rows, errors=errors)
        self.agent = Agent(self)

    def boot(self, tty: str = "hvc0") -> Agent:
        """Waits until the agent is ready; the agent."""
        self.agent.wait_until_ready(tty)
        return self.agent

    def run(self, command: str, seconds: float = PATIENCE) -> str:
        """Runs a shell command in the guest; its output."""
        return self.agent.run(command, seconds)

    def power_off(self) -> None:
        """Has the guest switch itself off, and checks that the launcher ends well with nothing left of it."""
        self.agent.start("poweroff -f")
        if (status := self.wait()) != 0:
            raise SessionError(f"exit status {status} after power-off:\n{self.ending()}")
        self.wait_until_gone(1.0)

    def members(self) -> dict[str, int]:
        """Who serves what: ``cpu``, ``block0/requestq``, ... and the process ID of each; the supervisor is ``""``.

        Helpers (``net0/slirp4netns``) are among them, without their arguments.
        """
        return by_what_they_serve(self.name, self.processes())


def by_what_they_serve(name: str, processes: Mapping[int, str]) -> dict[str, int]:
    """The processes of the guest ``name`` among all those with their titles; see :meth:`Guest.members`."""
    pattern = re.compile(re.escape(f"lguest[{name}]") + r"(?: (\S+).*)?")
    found = {}
    for pid, title in processes.items():
        if match := pattern.fullmatch(title.rstrip()):
            found[match[1] or ""] = pid
    return found


class Launch(Protocol):
    """Starts a guest with these options of ``lguest``; ``tools`` gives it mke2fs and perl, too."""

    def __call__(self, *options: str, tools: bool = False, **others: Any) -> Guest:
        """The guest; ``others`` are arguments of :class:`Guest`."""
