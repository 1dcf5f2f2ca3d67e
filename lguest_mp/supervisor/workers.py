"""Workers: forking them, hearing them, stopping them, and noticing that they have ended.

The first worker of each queue is forked before there is anything to serve (:meth:`Workers.prepare`), since those that
are forked together share memory that later ones have each for itself. It waits to be told, as all do; if it ends
meanwhile, or could not be forked, the queue gets another when it needs one, as for all later ones.

What becomes of a device whose worker has ended is not decided here but in ``devices.py``.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING, Any

from lguest_mp import protocol, worker
from lguest_mp.errors import LguestError
from lguest_mp.protocol import Assignment, ProtocolError
from lguest_mp.record import Record, Value
from lguest_mp.supervisor import children
from lguest_mp.supervisor.children import Birth, Child, Ear
from lguest_mp.supervisor.log import Level
from lguest_mp.virtio import ledger
from lguest_mp.virtio.ledger import Ledger

if TYPE_CHECKING:
    from lguest_mp.jail import Plan
    from lguest_mp.supervisor.children import Name, Naming
    from lguest_mp.supervisor.loop import Loop, Timer
    from lguest_mp.supervisor.parts import WriteWatches
    from lguest_mp.supervisor.resources import Resources
    from lguest_mp.virtio.device import Device


class WorkerLife(Enum):
    """Where a worker is in its life."""

    #: Nobody has told it yet what to serve.
    WAITING = auto()
    STARTING = auto()
    SERVING = auto()
    #: It was told to end, and is not to be replaced.
    STOPPING = auto()
    #: It was told to end, and is to be replaced.
    LEAVING = auto()


class Post(Record):
    """One queue of one device: what its workers are given, one after the other.

    ``number`` counts over all queues of the guest. ``name`` is its workers', as in ``ps``.
    """

    device: Device
    queue: int
    number: int
    kick: int
    call: int
    account: Ledger

    @property
    def name(self) -> str:
        return f"{self.device.name}/{self.device.queue_names[self.queue]}"


class Worker(Record):
    """A process that serves one queue."""

    post: Post
    child: Child
    reports: socket.socket
    plan: Plan
    files: tuple[int, ...]
    #: How much the queue's workers had completed when this one began.
    requests_before: int = 0
    life: WorkerLife = WorkerLife.WAITING
    #: Kills it when it was told to end and does not.
    deadline: Timer | None = None
    #: What it said about the driver before it stopped.
    broken: str = "the driver broke the virtio standard"
    #: Why it was killed, if it was found stuck.
    verdict: str | None = None

    @property
    def jail(self) -> dict[str, Any]:
        """How it is jailed (``Plan.describe``)."""
        return self.plan.describe(self.files)

    @property
    def was_fruitful(self) -> bool:
        """Whether it has completed something, or had nothing to do when it ended."""
        account = self.post.account.account()
        return account.requests != self.requests_before or account.phase is not ledger.Phase.SERVING


class _Cradle(Value):
    """What a worker comes into: its channel's ends, and what is decided about it."""

    post: Post
    birth: Birth
    ours: socket.socket
    theirs: socket.socket
    plan: Plan
    files: tuple[int, ...]

    def fork(self) -> None:
        """Forks it."""
        with self.post.account.inherited():
            self.birth.fork()


class WorkerListener(Value):
    """Whom the workers' lives concern. ``ended`` gets the status as of wait(2)."""

    ended: Callable[[Worker, int], None]
    reconfigured: Callable[[Worker, int, bytes], None]
    interrupted: Callable[[], None]
    broke_protocol: Callable[[Worker], None]


class Workers:
    """Those of one guest."""

    def __init__(  # noqa: PLR0917 -- what workers are made of
        self,
        owned: Resources,
        watches: WriteWatches | None,
        naming: Naming,
        loop: Loop,
        listener: WorkerListener,
        grace: float,
    ) -> None:
        """``grace``: how many seconds a worker has to end before it is killed."""
        self._resources = owned
        self._watches = watches
        self._naming = naming
        self._loop = loop
        self._listener = listener
        self._grace = grace
        self._all: dict[Post, Worker] = {}
        self._waiting: dict[Post, Worker] = {}

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._all.values())

    def waiting(self, post: Post) -> Worker | None:
        """Who was forked for ``post`` and has nothing to serve yet."""
        return self._waiting.get(post)

    def prepare(self, posts: Iterable[Post]) -> None:
        """Forks a worker for each, to wait until its queue is to be served. If the host cannot, that is done then.

        All of them at once: they share with each other what this process writes to from then on. Of a worker that is
        forked alone, each page that is written to before the next fork becomes its own.
        """
        cradles = []
        with suppress(LguestError):
            for post in posts:
                cradles.append(self._prepare(post))
        for each in cradles:
            each.fork()
        for each in cradles:
            with suppress(LguestError):
                self._waiting[each.post] = self._adopt(each)

    def serve(self, post: Post, assignment: Assignment) -> Worker:
        """Has ``post``'s queue served. LguestError if the host cannot."""
        each = self._waiting.pop(post, None) or self._fork(post)
        self._all[post] = each
        each.requests_before = post.account.account().requests
        each.life = WorkerLife.STARTING
        post.account.fields[ledger.PHASE] = ledger.Phase.SERVING
        with suppress(OSError):  # it has ended, which will be heard
            protocol.assign(each.reports, assignment)
        self._verbose(f"{each.child.name} is process {each.child.pid}")
        return each

    def _fork(self, post: Post) -> Worker:
        cradle = self._prepare(post)
        cradle.fork()
        return self._adopt(cradle)

    def _prepare(self, post: Post) -> _Cradle:
        """All that ``post``'s worker takes but the fork."""
        name = post.name
        try:
            ours, theirs = protocol.channel_pair()
        except OSError as error:
            raise LguestError(f"cannot make a channel for {name}: {error.strerror}") from error
        try:
            plan = self._resources.jail.plan(post.device.needs(post.queue))
            files = self._files(post, theirs.fileno())
            body = partial(self._be_worker, post, theirs, plan, self._naming.of(name, name))
            first = children.keeping(files, self._resources.null)
            birth = Birth(name, body, Ear(self._loop, self._resources.log), first)
        except BaseException:
            ours.close()
            theirs.close()
            raise
        return _Cradle(post, birth, ours, theirs, plan, files)

    def _adopt(self, cradle: _Cradle) -> Worker:
        """The worker that was forked. LguestError if it could not."""
        name, ours = cradle.post.name, cradle.ours
        cradle.theirs.close()
        try:
            child = cradle.birth.child()
        except LguestError:
            ours.close()
            raise
        each = Worker(cradle.post, child, ours, cradle.plan, cradle.files)
        try:
            self._loop.watch(ours.fileno(), lambda: self._on_report(each))
            self._loop.watch(child.pidfd, lambda: self._on_exit(each))
        except OSError as error:
            self._loop.forget(ours.fileno())
            ours.close()
            child.signal(signal.SIGKILL)
            child.reap()
            raise LguestError(f"cannot watch {name}: {error.strerror}") from error
        return each

    def _files(self, post: Post, channel: int) -> tuple[int, ...]:
        """What a worker keeps open."""
        watched = () if self._watches is None else tuple(self._watches.worker_files(post.number))
        return (post.kick, post.call, channel, *post.device.files_of(post.queue), *watched)

    def _be_worker(self, post: Post, channel: socket.socket, plan: Plan, name: Name) -> int:
        """The body of a worker process; its exit status."""
        watches, memory, make_queue = self._watches, self._resources.memory, self._resources.parts.make_queue
        name.take()
        plan.enter()
        watch = None if watches is None else watches.writer(post.number)
        return worker.run(
            post.device,
            post.queue,
            lambda todo: make_queue(memory, todo.layout, todo.features, post.kick, post.call, watch, post.account),
            channel,
        )

    def stop(self, each: Worker, life: WorkerLife = WorkerLife.STOPPING) -> None:
        """Tells a worker to end: for good, or (LEAVING) to be replaced. Its end is heard of like any other."""
        if each.life not in {WorkerLife.STOPPING, WorkerLife.LEAVING}:
            self._set_deadline(each, lambda: each.child.signal(signal.SIGKILL))
            each.child.end()
        if each.life is not WorkerLife.STOPPING:
            each.life = life

    def kill(self, each: Worker, verdict: str) -> None:
        """Kills one that is stuck; ``verdict`` is how it is told to have ended."""
        if each.verdict is None:
            each.verdict = verdict
            each.child.signal(signal.SIGKILL)
            self._set_deadline(each, lambda: self._on_undead(each))

    def _set_deadline(self, each: Worker, react: Callable[[], None]) -> None:
        """What is done if a worker has not ended in time; instead of what was to be done before."""
        if each.deadline is not None:
            each.deadline.cancel()
        each.deadline = self._loop.later(self._grace, react)

    def _on_undead(self, each: Worker) -> None:
        text = f"{each.child.name} does not even die; its queue waits for the host"
        self._resources.log.tell(text, Level.WARNING, each.child.name)

    def end_all(self) -> list[str]:
        """Ends every worker, waits for it, and hears what it still had to say; the names of those left behind."""
        everybody = [*self, *self._waiting.values()]
        left_behind = children.end_all([each.child for each in everybody], self._grace)
        for each in everybody:
            self._forget(each)
        return left_behind

    def _forget(self, each: Worker) -> None:
        self._loop.finish(each.reports.fileno(), lambda: self._on_report(each))
        each.reports.close()
        if each.deadline is not None:
            each.deadline.cancel()
        self._loop.forget(each.child.pidfd)
        del (self._waiting if each.life is WorkerLife.WAITING else self._all)[each.post]

    def _on_exit(self, each: Worker) -> None:
        self._forget(each)
        status = each.child.reap()
        if each.life is WorkerLife.WAITING:
            self._verbose(f"{each.child.name}, which nobody had needed yet, {children.how_it_ended(status)}")
        else:
            self._listener.ended(each, status)

    def _on_report(self, each: Worker) -> None:
        try:
            message = protocol.receive(each.reports, socket.MSG_DONTWAIT)
            if message is None:
                self._loop.forget(each.reports.fileno())
            else:
                self._hear(each, message)
        except BlockingIOError:
            return
        except (ProtocolError, ValueError):
            self._loop.forget(each.reports.fileno())
            self._listener.broke_protocol(each)

    def _hear(self, each: Worker, message: protocol.Message) -> None:
        match message:
            case protocol.Serving():
                if each.life is WorkerLife.STARTING:
                    each.life = WorkerLife.SERVING
            case protocol.Log(text, verbose):
                self._resources.log.say(text, Level.INFO if verbose else Level.NOTICE, each.child.name)
            case protocol.Interrupted():
                self._listener.interrupted()
            case protocol.Reconfigured(offset, data):
                self._listener.reconfigured(each, offset, bytes.fromhex(data))
            case protocol.Broken(text):
                each.broken = text
            case _:
                raise ProtocolError(f"{type(message).__name__} comes from a worker")

    def _verbose(self, text: str) -> None:
        self._resources.log.say(text, Level.INFO)
