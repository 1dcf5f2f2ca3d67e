"""The guest as ``lguestctl`` sees it (``control.py``): its processes and queues in numbers, and what one may do to it.

Nothing is kept here. Each answer is made, when somebody asks, of what the supervisor goes by itself: the lives of
devices and workers, and the queues' ledgers. A ledger is its worker's to write, so what stands there may be nonsense;
it is a number all the same, and passed on as such.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from lguest_mp.config import CrashPolicy, OnCrash
from lguest_mp.control import GuestFacts, ProcessFacts, ProcessJail
from lguest_mp.errors import LguestError
from lguest_mp.record import Value
from lguest_mp.supervisor import ending
from lguest_mp.supervisor.devices import DeviceLife

if TYPE_CHECKING:
    from lguest_mp.supervisor.children import Child
    from lguest_mp.supervisor.control import Attachment, Entry
    from lguest_mp.supervisor.devices import Devices, QueueService, ServedDevice
    from lguest_mp.supervisor.ending import Ending
    from lguest_mp.supervisor.resources import Resources
    from lguest_mp.supervisor.workers import Worker


class Whole(Protocol):
    """The guest, as far as it is not in its devices (see :class:`lguest_mp.supervisor.guest.Guest`)."""

    @property
    def stage(self) -> str: ...
    @property
    def cpu(self) -> Child | None: ...
    def end(self, how: Ending) -> None: ...
    def attach(self) -> Attachment: ...
    def resize(self, columns: int, rows: int) -> None: ...
    def jails(self) -> list[tuple[str, int, dict[str, Any]]]:
        """How its processes were to be jailed: the fields of a ProcessJail each."""


class Facts(Value):
    """One life of a guest, after ``reboots`` others. The Subject of ``supervisor/control.py``."""

    owned: Resources
    devices: Devices
    whole: Whole
    reboots: int
    started: float

    # ---- What there is ----

    def guest(self) -> GuestFacts:
        """The guest as a whole."""
        config = self.owned.config
        return GuestFacts(
            name=config.name,
            pid=os.getpid(),
            life=self.whole.stage,
            started=self.started,
            reboots=self.reboots,
            machine=self.owned.parts.machine,
            cpu=self.owned.parts.engine.partition(";")[0],
            memory=config.memory,
            kernel=str(config.kernel),
        )

    def processes(self) -> Iterator[ProcessFacts]:
        """The supervisor, the machine, then device by device its queues and its helper."""
        yield ProcessFacts("supervisor", None, None, os.getpid(), "running")
        if (cpu := self.whole.cpu) is not None:
            yield ProcessFacts(cpu.name, None, None, cpu.pid, self.whole.stage)
        for served in self.devices.served:
            device = served.port.device
            for queue, name in zip(served.queues, device.queue_names, strict=True):
                yield _queue(served, queue, name, self.devices.worker_of(queue), self.devices.restarted)
            if (helper := device.helper) is not None:
                yield ProcessFacts(helper.name, served.name, None, helper.pid, "running")

    def jail(self) -> list[ProcessJail]:
        """How the guest's processes were to be jailed; whether they are, lguestctl finds out."""
        return [ProcessJail(*jail) for jail in self.whole.jails()]

    # ---- What one may do to it ----

    def stop(self) -> None:
        """As SIGTERM does, of which the launcher dies then: whoever waits for it learns that the guest was stopped."""
        self.whole.end(ending.Signalled(signal.SIGTERM))

    def reboot(self) -> None:
        """As the guest's own reboot."""
        self.whole.end(ending.Rebooting())

    def restart(self, device: str) -> None:
        """``block0`` or ``net0/receiveq``. LguestError: there is none, or it cannot be now."""
        for served in self.devices.served:
            if served.name == device:
                return self.devices.restart(served)
            for queue in served.queues:
                if queue.post.name == device:
                    return self.devices.restart(served, queue)
        raise self._unknown(device)

    def reset(self, device: str) -> None:
        """LguestError: there is no such device, or it is not served now."""
        for served in self.devices.served:
            if served.name == device:
                return self.devices.reset(served)
        raise self._unknown(device)

    def _unknown(self, device: str) -> LguestError:
        known = ", ".join(served.name for served in self.devices.served)
        return LguestError(f"it has no device {device}; there is {known}")

    # ---- The console and the log ----

    def attach(self) -> Attachment:
        """LguestError: this guest has none that is shared."""
        return self.whole.attach()

    def resize(self, columns: int, rows: int) -> None:
        """Tells the guest."""
        self.whole.resize(columns, rows)

    def entries(self, source: str | None, last: int) -> Sequence[Entry]:
        """What is kept of the log."""
        return self.owned.log.entries(source, last)

    def subscribe(self, callback: Callable[[Entry], None]) -> Callable[[], None]:
        """Has ``callback`` called with what is said from now on."""
        return self.owned.log.subscribe(callback)


def _queue(
    served: ServedDevice, queue: QueueService, name: str, worker: Worker | None, restarted: Mapping[str, int]
) -> ProcessFacts:
    account = queue.post.account.account()
    return ProcessFacts(
        name=queue.post.name,
        device=served.name,
        queue=name,
        pid=None if worker is None else worker.child.pid,
        life=_life(served, queue),
        requests=account.requests,
        bytes=account.bytes,
        age=None if account.moment is None else max(0.0, time.monotonic() - account.moment),
        restarts=restarted.get(queue.post.name, 0),
        last_end=queue.last_end,
        policy=_policy(served.policy),
    )


def _life(served: ServedDevice, queue: QueueService) -> str:
    """Where the queue's worker is in its life, or why there is none that serves it."""
    if queue.worker is not None:
        return queue.worker.life.name.lower()
    if served.life in {DeviceLife.BROKEN, DeviceLife.FAILED}:
        return served.life.name.lower()
    return "unused" if queue.assignment is None else "waiting"


def _policy(policy: CrashPolicy) -> str:
    """As on the command line."""
    if policy.action is OnCrash.RESTART:
        return f"restart,intensity={policy.intensity},period={policy.period:g}"
    return str(policy.action.value)
