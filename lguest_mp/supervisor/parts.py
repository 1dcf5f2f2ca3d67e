"""What a guest is made of: its machine, its kernel's loader, its devices.

The supervisor knows the parts by what they do for it (:class:`Parts`), so that another machine, or a test's, is
another instance. :func:`pc` is the machine of a stock kernel, :func:`lguest` that of lguest's own guests, and
:func:`of` knows which one a guest wants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from lguest_mp import core
from lguest_mp.errors import LguestError
from lguest_mp.record import Value
from lguest_mp.supervisor.log import say

if TYPE_CHECKING:
    import socket

    from lguest_mp.boot.hashing import Hashing
    from lguest_mp.codemap import WriteWatch
    from lguest_mp.config import GuestConfig, NetConfig
    from lguest_mp.cpu.engine import EntryState
    from lguest_mp.jail import User
    from lguest_mp.jail.needs import Needs
    from lguest_mp.machine.wiring import DevicePort
    from lguest_mp.memory import GuestMemory
    from lguest_mp.supervisor.kvm_probe import Probe, Verdict
    from lguest_mp.virtio.device import Device, QueueLayout
    from lguest_mp.virtio.ledger import Ledger
    from lguest_mp.virtio.queue import Queue


class Kernel(Protocol):
    """A kernel and its initrd, read and found good."""

    def load(self, memory: GuestMemory) -> EntryState:
        """Writes them, and what they have to know of the machine, to guest memory. May be called again."""


class WriteWatches(Protocol):
    """Through which the workers tell the CPU what they write to guest memory. Made before anything is forked."""

    @property
    def files(self) -> Sequence[int]:
        """The file descriptors that the machine process keeps for it."""

    def worker_files(self, worker: int) -> Sequence[int]:
        """The file descriptors that worker ``worker`` keeps for it."""

    def writer(self, worker: int) -> WriteWatch | None:
        """For worker ``worker`` (0, 1, ...), in its process."""

    def close(self) -> None:
        """Closes the files."""


class MachineBody(Protocol):
    """What the machine process does; returns when the guest has ended and the supervisor was told how.

    It makes the machine, while the kernel is still being loaded, and then calls ``begin``: that waits until it is, and
    returns the registers to run it with.
    """

    def __call__(  # noqa: PLR0917 -- what a machine is made of
        self,
        config: GuestConfig,
        memory: GuestMemory,
        code_map: Any,  # what make_watches made
        devices: Sequence[DevicePort],
        begin: Callable[[], EntryState],
        requests: socket.socket,
        events: socket.socket,
    ) -> None: ...


class QueueMaker(Protocol):
    """Makes a worker's queue."""

    def __call__(  # noqa: PLR0917 -- what a queue is made of
        self,
        memory: GuestMemory,
        layout: QueueLayout,
        features: int,
        kick: int,
        call: int,
        watch: WriteWatch | None,
        account: Ledger,
    ) -> Queue: ...


class Parts(Value):
    """The parts of one kind of guest.

    ``load_machine`` imports *all* that the machine process will ever need and returns its body; LguestError if the
    host cannot run it. It is called in that process, so that nobody else pays for the CPU engine, while the kernel is
    being loaded; only when the guest is to be confined the supervisor calls it first. ``make_queue`` is called in a
    worker, everything else in the supervisor before anything is forked; LguestError when it cannot be done.

    ``open_devices`` is told who the workers will be (``--username``; None: who we are).

    ``device_memory``: how many bytes of guest memory behind the RAM are for devices. ``machine_files``: what the
    machine process keeps open for itself. ``machine_needs``: what it needs of the host besides; None: all there is.
    ``engine``: what executes the guest, and ``core``: what serves its queues, for a person, and why.
    ``machine`` is what ``--machine`` calls it.
    """

    read_kernel: Callable[[GuestConfig], Kernel]
    open_devices: Callable[[GuestConfig, User | None], list[Device]]
    make_watches: Callable[[GuestMemory, int], WriteWatches | None]
    make_queue: QueueMaker
    load_machine: Callable[[], MachineBody]
    machine_needs: Needs | None
    device_memory: int = 0
    machine_files: tuple[int, ...] = ()
    engine: str = "the embedded CPU"
    core: str = "Python"
    machine: str = "pc"


def of(config: GuestConfig, probe: Probe | None = None, hashing: Hashing | None = None) -> Parts:
    """The parts of the machine that ``config`` names, or its kernel is for. LguestError: there is no such guest.

    ``probe``: the look at the host's KVM, begun for a CPU that may be it; None: it is not used. ``hashing``: of the
    payload of a kernel for a PC, if that was begun.
    """
    split, of_core = core.queue(config.core), core.describe(config.core)
    make_queue: QueueMaker = split
    if config.rings == "packed":
        from lguest_mp.virtio import packed  # noqa: PLC0415 -- most guests have none

        make_queue, of_core = packed.queue_maker(split), f"Python for packed virtqueues; for others, {of_core}"
    return _machine_parts(config, probe, hashing).replace(make_queue=make_queue, core=of_core)


def _machine_parts(config: GuestConfig, probe: Probe | None, hashing: Hashing | None) -> Parts:
    if config.cpu == "lguest":
        if config.machine == "pc":
            raise LguestError("--cpu=lguest runs lguest's own guests only; leave --machine=pc out, or --cpu=lguest")
        _require_one_cpu(config, "--cpu=lguest")
        _require_split_rings(config)
        return lguest_on_device()
    kvm = None if probe is None else probe.verdict()
    if _machine(config) == "pc":
        return _pc(config, kvm, hashing)
    if kvm is not None:
        kvm.discard()
    if config.cpu == "kvm":
        raise LguestError("--cpu=kvm runs 64-bit kernels only, and this is a guest of lguest's own; leave --cpu out")
    _require_one_cpu(config, "a guest of lguest's own")
    _require_split_rings(config)
    return lguest()


def _machine(config: GuestConfig) -> str:
    from lguest_mp.boot.kind import is_for_lguest  # noqa: PLC0415

    return config.machine or ("lguest" if is_for_lguest(config.kernel) else "pc")


def _pc(config: GuestConfig, kvm: Verdict | None, hashing: Hashing | None) -> Parts:
    """On KVM if that is good, or there and asked for; else on the embedded CPU."""
    if kvm is None:
        _require_one_cpu(config, "the embedded CPU")
        return pc(config.core, hashing)
    if config.cpu == "kvm":
        if kvm.file is None:
            raise LguestError(f"--cpu=kvm: {kvm.reason}; leave it out, and the embedded CPU runs the guest")
        if kvm.reason:
            say(f"--cpu=kvm: {kvm.reason}; a stock kernel will not come up")
        return pc_on_kvm(kvm.file, hashing)
    if kvm.file is not None and not kvm.reason:
        return pc_on_kvm(kvm.file, hashing)
    kvm.discard()
    _require_one_cpu(config, "the embedded CPU", f"; KVM is not used: {kvm.reason}")
    return pc(config.core, hashing).replace(engine=f"the embedded CPU; KVM is not used: {kvm.reason}")


def _require_one_cpu(config: GuestConfig, what: str, why: str = "") -> None:
    if config.cpus != 1:
        raise LguestError(f"--cpus={config.cpus}: {what} is one processor; leave --cpus out{why}")


def _require_split_rings(config: GuestConfig) -> None:
    if config.rings != "split":
        raise LguestError(
            f"--rings={config.rings}: the devices of a guest of lguest's own have split rings; leave it out"
        )


def pc(core_choice: str = "auto", hashing: Hashing | None = None) -> Parts:
    """A stock 64-bit Linux on a PC with virtio over PCI, its CPU embedded. ``core_choice``: as ``--core`` has it.

    What workers run is imported here, in the supervisor: they all share it, and the root directory that they are
    forked into may hold no Python.
    """
    from lguest_mp.boot.linux import prepare  # noqa: PLC0415
    from lguest_mp.codemap import CodeMap  # noqa: PLC0415
    from lguest_mp.cpu import needs  # noqa: PLC0415
    from lguest_mp.virtio.queue import Queue  # noqa: PLC0415

    return Parts(
        read_kernel=partial(prepare, hashing=hashing),
        open_devices=_open_virtio_devices,
        make_watches=CodeMap,
        make_queue=Queue,
        load_machine=partial(_load_pc, core_choice),
        machine_needs=needs.EMBEDDED,
    )


def pc_on_kvm(file: int, hashing: Hashing | None = None) -> Parts:
    """The same on the host's KVM, which ``file`` is; it sees every store to guest memory itself."""
    from lguest_mp.cpu.kvm.needs import KVM  # noqa: PLC0415

    return pc(hashing=hashing).replace(
        make_watches=lambda _memory, _workers: None,
        load_machine=partial(_load_kvm, file),
        machine_needs=KVM,
        machine_files=(file,),
        engine="KVM",
    )


def lguest() -> Parts:
    """A guest of lguest's own, its CPU embedded and its host in software."""
    from lguest_mp.codemap import CodeMap  # noqa: PLC0415
    from lguest_mp.cpu import needs  # noqa: PLC0415

    return _lguest(CodeMap, _load_softhost, needs.EMBEDDED)


def lguest_on_device() -> Parts:
    """A guest of lguest's own on the host's ``/dev/lguest``, which is opened here. LguestError if there is none."""
    from lguest_mp.cpu import needs  # noqa: PLC0415
    from lguest_mp.cpu.dev_lguest import PATH, open_device  # noqa: PLC0415

    file = open_device()
    parts = _lguest(lambda _memory, _workers: None, partial(_load_device, file), needs.DEV_LGUEST)
    return parts.replace(machine_files=(file,), engine=PATH)


def _lguest(
    make_watches: Callable[[GuestMemory, int], WriteWatches | None],
    load_machine: Callable[[], MachineBody],
    machine_needs: Needs,
) -> Parts:
    from lguest_mp.boot.lguest_kernel import prepare  # noqa: PLC0415
    from lguest_mp.bus.lguest_page import DEVICE_PAGES  # noqa: PLC0415
    from lguest_mp.memory import PAGE_SIZE  # noqa: PLC0415
    from lguest_mp.virtio.queue import Queue  # noqa: PLC0415

    return Parts(
        read_kernel=prepare,
        open_devices=_open_lguest_devices,
        make_watches=make_watches,
        make_queue=Queue,
        load_machine=load_machine,
        machine_needs=machine_needs,
        device_memory=DEVICE_PAGES * PAGE_SIZE,
        machine="lguest",
    )


def _open_lguest_devices(config: GuestConfig, user: User | None) -> list[Device]:
    """The same devices, if the descriptor page has room for them."""
    from lguest_mp.bus.lguest_page import plan  # noqa: PLC0415

    devices = _open_virtio_devices(config, user)
    try:
        plan(devices, config.memory)
    except BaseException:
        for device in devices:
            device.close()
        raise
    return devices


def _open_virtio_devices(config: GuestConfig, user: User | None) -> list[Device]:
    """The console, which every guest has, and then the command line's devices in its order."""
    from lguest_mp import terminal  # noqa: PLC0415
    from lguest_mp.config import BlockConfig, NetConfig, RngConfig  # noqa: PLC0415
    from lguest_mp.line import Line  # noqa: PLC0415
    from lguest_mp.virtio.block import Block  # noqa: PLC0415
    from lguest_mp.virtio.console import Console  # noqa: PLC0415
    from lguest_mp.virtio.rng import Rng  # noqa: PLC0415

    columns, rows = terminal.size() or (80, 25)
    devices: list[Device] = [Console(columns=columns, rows=rows, line=Line())]
    counts = {BlockConfig: 0, RngConfig: 0, NetConfig: 0}
    try:
        for wanted in config.devices:
            number = counts[type(wanted)]
            counts[type(wanted)] += 1
            match wanted:
                case BlockConfig(path):
                    devices.append(Block(f"block{number}", path))
                case RngConfig():
                    devices.append(Rng(f"rng{number}"))
                case NetConfig():
                    devices.append(_open_net(config, wanted, number, user))
    except BaseException:
        for device in devices:
            device.close()
        raise
    return devices


def _open_net(config: GuestConfig, wanted: NetConfig, number: int, user: User | None) -> Device:
    from lguest_mp.network import mac  # noqa: PLC0415 -- most guests have no network
    from lguest_mp.network.opening import open_wire  # noqa: PLC0415
    from lguest_mp.virtio.net import Net  # noqa: PLC0415

    name = f"net{number}"
    address = wanted.mac or mac.default(config.name, number)
    wire, mtu = open_wire(wanted, config.name, name, address, user)
    return Net(name, wire, address, mtu, offload=wanted.offload)


def _load_pc(core_choice: str) -> MachineBody:
    from lguest_mp.cpu.unicorn.internals import repaired_library  # noqa: PLC0415
    from lguest_mp.machine.process import of_core, run_machine  # noqa: PLC0415

    repaired_library()  # while there still is a file system to load it from
    return partial(run_machine, of_core(core_choice))


def _load_kvm(file: int) -> MachineBody:
    from lguest_mp.machine.kvm_process import run_machine  # noqa: PLC0415

    return partial(run_machine, file)


def _load_softhost() -> MachineBody:
    from lguest_mp.cpu.unicorn.internals import repaired_library  # noqa: PLC0415
    from lguest_mp.machine.lguest_process import run_machine  # noqa: PLC0415
    from lguest_mp.machine.lguest_softhost import make_softhost  # noqa: PLC0415

    repaired_library()
    return partial(run_machine, make_softhost)


def _load_device(file: int) -> MachineBody:
    from lguest_mp.cpu.dev_lguest import DevLguest  # noqa: PLC0415
    from lguest_mp.machine.lguest_process import run_machine  # noqa: PLC0415

    return partial(run_machine, lambda memory, _watches, _machine: DevLguest(file, memory.address))
