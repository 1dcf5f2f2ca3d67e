"""Trying to break out: what the attacker's code in a worker, or in the machine, can do is to be nothing of this.

Each attempt is made by a child that has entered the jail of a real device's worker, or of the embedded CPU's process.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from prisoner import fate

from lguest_mp.cpu import needs as engines
from lguest_mp.jail import Jail, Plan
from lguest_mp.jail.needs import Needs
from lguest_mp.memory import PAGE_SIZE
from lguest_mp.virtio.block import SECTOR, Block
from lguest_mp.virtio.console import RECEIVEQ, TRANSMITQ, Console
from lguest_mp.virtio.rng import Rng

_libc = ctypes.CDLL(None, use_errno=True)
SYS_PROCESS_VM_WRITEV, SYS_PIDFD_OPEN, SYS_IO_URING_SETUP, SYS_BPF, SYS_USERFAULTFD = 311, 434, 425, 321, 323
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
PTRACE_ATTACH, CLONE_NEWUSER = 16, 0x1000_0000


@pytest.fixture(scope="module")
def jail() -> Jail:
    jail = Jail()
    if jail.lacks:
        pytest.skip(jail.lacks)
    return jail


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Block]:
    path = tmp_path_factory.mktemp("disk") / "disk.img"
    path.write_bytes(bytes(8 * SECTOR))
    with closing(Block("block0", path)) as block:
        yield block


def needs_of(kind: str, disk: Block) -> Needs:
    match kind:
        case "block":
            return disk.needs(0)
        case "rng":
            return Rng("rng0").needs(0)
        case "console/receiveq":
            return Console().needs(RECEIVEQ)
        case "console/transmitq":
            return Console().needs(TRANSMITQ)
    return engines.EMBEDDED


WORKERS = ["block", "rng", "console/receiveq", "console/transmitq"]
EVERYBODY = [*WORKERS, "cpu"]


@pytest.fixture
def plan(request: pytest.FixtureRequest, jail: Jail, disk: Block) -> Plan:
    return jail.plan(needs_of(request.param, disk))


def syscall(number: int, *arguments: int) -> int:
    """OSError."""
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result


def open_a_file() -> None:
    os.open("/etc/passwd", os.O_RDONLY)


def make_a_file() -> None:
    os.open("/tmp/lguest-was-here", os.O_WRONLY | os.O_CREAT)


def list_a_directory() -> None:
    os.listdir("/")


def read_own_memory_by_name() -> None:
    os.open("/proc/self/mem", os.O_RDWR)


def execute_a_program() -> None:
    os.execv("/bin/sh", ["sh", "-c", "true"])


def fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def new_namespace() -> None:
    if _libc.unshare(CLONE_NEWUSER) != 0:
        raise OSError(ctypes.get_errno(), "")


def trace_the_parent() -> None:
    if _libc.ptrace(PTRACE_ATTACH, os.getppid(), None, None) != 0:
        raise OSError(ctypes.get_errno(), "")


def write_the_parents_memory() -> None:
    syscall(SYS_PROCESS_VM_WRITEV, os.getppid(), 0, 0, 0, 0, 0)


def kill_the_parent() -> None:
    os.kill(os.getppid(), signal.SIGWINCH)


def open_the_parents_pidfd() -> None:
    syscall(SYS_PIDFD_OPEN, os.getppid(), 0)


def connect_by_tcp() -> None:
    socket.socket(socket.AF_INET, socket.SOCK_STREAM)


def make_a_unix_socket() -> None:
    socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)


def make_a_packet_socket() -> None:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW)


def become_root_again() -> None:
    os.setresuid(0, 0, 0)


def change_the_root() -> None:
    os.chroot("/")


def mount() -> None:
    if _libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) != 0:
        raise OSError(ctypes.get_errno(), "")


def raise_a_limit() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (1 << 16, 1 << 16))


def type_into_the_terminal() -> None:
    import fcntl  # noqa: PLC0415 -- part of the attempt
    import termios  # noqa: PLC0415

    fcntl.ioctl(0, termios.TIOCSTI, b"x")


def use_io_uring() -> None:
    syscall(SYS_IO_URING_SETUP, 8, 0)


def load_a_bpf_program() -> None:
    syscall(SYS_BPF, 0, 0, 0)


def use_userfaultfd() -> None:
    syscall(SYS_USERFAULTFD, 0)


def call_as_32_bit_code_does() -> None:
    """A gate into the kernel with other numbers: exit(0) of i386, by machine code that was there before the jail."""
    _int_80()


#: Memory that is executed lives as long as what calls it.
_kept: list[mmap.mmap] = []


def _machine_code(code: bytes) -> Callable[[], int]:
    memory = mmap.mmap(-1, PAGE_SIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    function: Callable[[], int] = ctypes.CFUNCTYPE(ctypes.c_int)(address)
    _kept.append(memory)
    return function


#: mov eax, 1 (exit); xor ebx, ebx; int 0x80; ret
_int_80 = _machine_code(bytes.fromhex("b801000000 31db cd80 c3"))

FATAL = "SIGSYS"


@pytest.mark.parametrize("plan", EVERYBODY, indirect=True)
@pytest.mark.parametrize(
    ("attempt", "expected"),
    [
        (open_a_file, "EACCES"),
        (make_a_file, "EACCES"),
        (list_a_directory, "EACCES"),
        (read_own_memory_by_name, "EACCES"),
        (execute_a_program, FATAL),
        (fork, FATAL),
        (new_namespace, FATAL),
        (trace_the_parent, FATAL),
        (write_the_parents_memory, FATAL),
        (kill_the_parent, FATAL),
        (open_the_parents_pidfd, FATAL),
        (connect_by_tcp, FATAL),
        (make_a_unix_socket, FATAL),
        (make_a_packet_socket, FATAL),
        (become_root_again, FATAL),
        (change_the_root, FATAL),
        (mount, FATAL),
        (raise_a_limit, FATAL),
        (type_into_the_terminal, FATAL),
        (use_io_uring, FATAL),
        (load_a_bpf_program, FATAL),
        (use_userfaultfd, FATAL),
        (call_as_32_bit_code_does, FATAL),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_nobody_can(plan: Plan, attempt: Callable[[], None], expected: str) -> None:
    assert fate(plan, attempt) == expected


@pytest.mark.parametrize("plan", WORKERS, indirect=True)
def test_a_worker_cannot_have_new_code(plan: Plan) -> None:
    assert fate(plan, lambda: mmap.mmap(-1, PAGE_SIZE, PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC)) == FATAL


def test_the_machine_can_since_it_translates_the_guests(jail: Jail) -> None:
    plan = jail.plan(engines.EMBEDDED)
    assert fate(plan, lambda: mmap.mmap(-1, PAGE_SIZE, PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC)) == "did it"


@pytest.mark.parametrize("plan", WORKERS, indirect=True)
def test_a_worker_cannot_take_much_memory(plan: Plan) -> None:
    """Not even the attempt of it: what it has is counted against its limit."""

    def take() -> None:
        taken = [bytearray(16 << 20) for _ in range(64)]
        raise AssertionError(len(taken))

    def attempt() -> None:
        try:
            take()
        except MemoryError as error:
            raise OSError(errno.ENOMEM, "") from error

    assert fate(plan, attempt) == "ENOMEM"


@pytest.mark.parametrize("plan", EVERYBODY, indirect=True)
@pytest.mark.parametrize("flags", [mmap.MAP_SHARED, mmap.MAP_PRIVATE | 0x100], ids=["shared", "growing down"])
def test_nobody_can_take_memory_that_is_not_counted(plan: Plan, flags: int) -> None:
    assert fate(plan, lambda: mmap.mmap(-1, PAGE_SIZE, flags=flags | mmap.MAP_ANONYMOUS)) == FATAL


@pytest.mark.parametrize("plan", EVERYBODY, indirect=True)
def test_the_c_librarys_last_words_are_heard(plan: Plan) -> None:
    assert fate(plan, lambda: os.writev(2, [b"malloc(): corrupted top size"])) == "did it"


def test_a_disks_worker_cannot_write_beyond_the_disk(jail: Jail, disk: Block) -> None:
    (file,) = disk.files
    end = disk.capacity * SECTOR
    plan = jail.plan(disk.needs(0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python has it
    assert fate(plan, lambda: os.pwritev(file, [b"x" * SECTOR], end), [file]) == "EFBIG"
    assert fate(plan, lambda: os.pwritev(file, [b"x" * SECTOR], end - SECTOR), [file]) == "did it"
    assert os.fstat(file).st_size == end


def test_a_disks_worker_can_do_all_that_a_disk_needs(jail: Jail, disk: Block) -> None:
    (file,) = disk.files

    def work() -> None:
        os.pwritev(file, [b"x" * SECTOR], 0, 0)
        os.pwritev(file, [b"x" * SECTOR], 0, os.RWF_DSYNC)
        os.preadv(file, [bytearray(SECTOR)], 0, 0)
        os.fdatasync(file)
        os.getrandom(16)

    assert fate(jail.plan(disk.needs(0)), work, [file]) == "did it"


def test_a_disk_that_is_read_only_is_not_written(jail: Jail, tmp_path: Path) -> None:
    path = tmp_path / "readonly.img"
    path.write_bytes(bytes(SECTOR))
    path.chmod(0o444)
    with closing(Block("block0", path)) as block:
        (file,) = block.files
        assert fate(jail.plan(block.needs(0)), lambda: os.pwritev(file, [b"x"], 0, 0), [file]) == FATAL


def test_other_files_are_gone(jail: Jail, disk: Block) -> None:
    other, writer = os.pipe()
    try:
        assert fate(jail.plan(disk.needs(0)), lambda: os.write(writer, b"x"), list(disk.files)) == "EBADF"
    finally:
        os.close(other)
        os.close(writer)


def test_files_cannot_be_had_from_others(jail: Jail, disk: Block) -> None:
    """A socket of one's own is no way to get descriptors: recvmsg is not in any list."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        socket.send_fds(ours, [b"x"], [ours.fileno()])
        assert fate(jail.plan(disk.needs(0)), lambda: socket.recv_fds(theirs, 8, 1), [theirs.fileno()]) == FATAL


def test_no_privileges_are_left(jail: Jail, disk: Block) -> None:
    """As the process itself finds, by what is still allowed to ask: to bind a low port it would need a socket first."""
    read, write = os.pipe()
    status = os.open("/proc/self/status", os.O_RDONLY)

    def attempt() -> None:
        # The file says of whoever opened it, so the child looks at it in the parent.
        os.write(write, struct.pack("<i", os.getpid()))
        while True:
            signal.pause()

    os.close(status)
    pid = os.fork()
    if pid == 0:
        try:
            jail.plan(disk.needs(0)).enter()
            attempt()
        finally:
            os._exit(1)
    try:
        os.read(read, 4)
        found = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
        )
        assert [int(found[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")] == [0, 0, 0, 0]
        if os.geteuid() == 0:
            assert int(found["CapBnd"], 16) == 0
        assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
        os.close(write)


def test_without_a_jail_one_can(disk: Block) -> None:
    """So that the attempts above are ones."""
    plan = Jail(on=False).plan(disk.needs(0))
    for attempt in (open_a_file, list_a_directory, fork, kill_the_parent, connect_by_tcp, use_userfaultfd):
        assert fate(plan, attempt) in {"did it", "EPERM"}
