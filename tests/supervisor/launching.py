"""Starting launchers whose guest is a scenario of ``fake_guest``, each on a terminal of its own."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from guestkit.session import Session

FAKE_GUEST = Path(__file__).with_name("fake_guest.py")
JOB_SHELL = FAKE_GUEST.with_name("job_shell.py")
#: Generous: what is waited for takes milliseconds, on a machine that may be busy.
PATIENCE = 30.0


class Launched(Session):
    """A launcher in a session of its own. Its ``kernel`` need not exist."""

    def __init__(
        self,
        scenario: str,
        *options: str,
        kernel: str = "kernel",
        arguments: tuple[str, ...] = (),
        launcher: tuple[str, ...] = (sys.executable, str(FAKE_GUEST)),
        runtime: str,
    ) -> None:
        """``runtime``: the runtime directory of the launcher's user."""
        command = [*launcher, scenario, *options, "--name=test", "16", kernel, *arguments]
        super().__init__(command, variables={"XDG_RUNTIME_DIR": runtime})
        self.runtime = Path(runtime) / "lguest"

    def finish(self) -> int:
        """Waits for its end and for the end of all its processes; the exit status."""
        status = self.wait(PATIENCE)
        self.wait_until_gone(PATIENCE)
        assert self.current_settings() == self.settings, "the terminal is the user's again"
        return status

    def wait_until_up(self) -> dict[str, int]:
        """Waits for the scenario ``hang`` to have everything running; the PIDs of its processes."""
        cpu, receiveq, transmitq, block = map(int, self.wait_for(r"^up (\d+) (\d+) (\d+) (\d+)", PATIENCE).groups)
        return {"cpu": cpu, "console/receiveq": receiveq, "console/transmitq": transmitq, "block0/requestq": block}

    def waiting(self, name: str = "mule0/requestq") -> dict[str, int]:
        """The PID of a worker that waits for its device's driver, as that which has none in ``hang``, by its name."""
        deadline = time.monotonic() + PATIENCE
        while not (found := [pid for pid, title in self.processes().items() if title == f"lguest[test] {name}"]):
            assert time.monotonic() < deadline, "nobody waits for the driver"
            time.sleep(0.01)
        (pid,) = found
        return {name: pid}

    def wait_until_raw(self) -> None:
        """Waits until the terminal is the guest's."""
        deadline = time.monotonic() + PATIENCE
        while self.current_settings() == self.settings:
            assert time.monotonic() < deadline, "the launcher does not take the terminal"
            time.sleep(0.01)

    @property
    def lines(self) -> list[str]:
        """What the launcher itself said, without its name in front."""
        prefix = "lguest: "
        return [line.removeprefix(prefix) for line in self.output.splitlines() if line.startswith(prefix)]


class Launch(Protocol):
    """Starts a launcher that is gone after the test."""

    def __call__(
        self,
        scenario: str,
        *options: str,
        kernel: str = ...,
        arguments: tuple[str, ...] = ...,
        launcher: tuple[str, ...] = ...,
        runtime: str = ...,
    ) -> Launched: ...


def open_files(pid: int) -> dict[int, str]:
    """What a process has open: what each file descriptor refers to."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # what the directory was listed with
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
    return found
