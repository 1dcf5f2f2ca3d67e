"""A network of the user's own, made without any privilege: slirp4netns (``--target-type=bess``) is the rest of it.

slirp4netns holds libslirp: a router, a DHCP and a DNS server that take the guest's connections apart and open them
again as the host user's own sockets. It is a process of the guest's family, and a frame to or from it is a packet on
a Unix socket (SOCK_SEQPACKET), a system call each.

::

    guest 10.0.2.15 --- frames --- slirp4netns, 10.0.2.2 (router), 10.0.2.3 (DNS) --- sockets of the user's --- host

**Two steps**, so that the launcher can do other work while the program loads: the constructor starts it,
:meth:`UserNetwork.connect` waits for it, connects, and has it open the forwarded ports. Both sockets that this takes
have names in a directory that is gone when ``connect`` returns.

**It must not outlive us**, and it would: when its peer goes it reads the end of file for ever, and while it waits for
us to connect it is two processes, of which PR_SET_PDEATHSIG ends one. So it is on a *leash*, a pipe of which the
supervisor alone has the end for writing. When that is closed, by whatever end of the supervisor, Linux sends SIGKILL to
the program's process group (F_SETOWN, F_SETSIG and O_ASYNC, fcntl(2)). A process group of its own also keeps it out
of what the terminal sends.

**It must not wait for us** when it has something to say. What it says while it starts is for our error messages, and
goes to a pipe that refuses what it has no room for. Later nobody reads there, and it does not mind.

**Who may do what.** The program takes apart whatever a guest sends, and it is C. libslirp 4.7.0 is known to crash on
IPv4 fragments, so it gets none (``fragments.py``), and what was looked at is what it gets: a copy, since the guest may
change its memory meanwhile. A guest that has broken into the program nevertheless can do what seccomp leaves of its
user's rights: execute nothing, trace and mount nothing, but connect to whatever that user can, and read and write all
of that user's files, outside of ``--chroot`` too. Only root's program (no ``--username``) has given up root's
capabilities as well and sees just /etc and /run, read-only.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from lguest_mp import jail, prctl, runtime
from lguest_mp.errors import LguestError
from lguest_mp.network import fragments
from lguest_mp.network.wire import Wire, WireGone
from lguest_mp.supervisor import children
from lguest_mp.supervisor.log import say
from lguest_mp.supervisor.notify import environment_of_others
from lguest_mp.virtio import vectors

if TYPE_CHECKING:
    from lguest_mp.config import Forward, UserConfig
    from lguest_mp.jail import User
    from lguest_mp.supervisor.children import Child

PROGRAM = "slirp4netns"
#: What its DHCP server gives to the first who asks, and nobody else is on that wire.
GUEST_ADDRESS = "10.0.2.15"
#: What libslirp takes (IF_MTU_MIN, IF_MTU_MAX), in bytes.
MTU_RANGE = range(68, 65521 + 1)
#: What a frame has besides its IP packet: Ethernet's header, one VLAN tag.
_ETHERNET = 14 + 4

#: How long (seconds) the program may take to start, and then to answer.
START_PATIENCE = 10.0
#: How long (seconds) a frame waits for room, unless the last one did in vain. The program takes frames within
#: microseconds, unless it is stopped or waits itself, for a guest that takes none of its own; a cable would not wait.
WRITE_PATIENCE = 0.5
#: How long (seconds) it may take to end.
GRACE = 2.0

#: Neither mounts, nor execve(2), nor ptrace(2) and the like (--enable-seccomp, for everybody). Root's also gives up all
#: capabilities but CAP_NET_BIND_SERVICE, and sees nothing but /etc and /run, read-only; others may not do that.
_SECCOMP, _SANDBOX = "--enable-seccomp", "--enable-sandbox"
#: What it says when the host does not allow that: a mount in a container, seccomp.
_UNPROTECTED = ("enable_seccomp failed", "create_sandbox failed")
#: What it says when all is well.
_CHATTER = ("Waiting for connection", "sent ", "received ", "apifd event", "api_handler: got", "seccomp: WARNING")
_LONGEST_COMPLAINT = 300
#: Its sockets.
_FRAMES, _API = "frames", "api"
#: Why a forward's port cannot be had, and what to do.
_HINTS = {
    errno.EADDRINUSE: "that port of the host is taken; choose another one",
    errno.EACCES: "that port of the host is for root; choose one above 1023",
    errno.EADDRNOTAVAIL: "that is no address of this host; leave it out, or choose one that is",
}


class _NotStarted(Exception):
    """The program ended, or did not answer in time; the text tells how."""


class UserNetwork(Wire):
    """One guest's wire to slirp4netns."""

    has_header = False
    #: The MTU to tell the guest (VIRTIO_NET_F_MTU) unless the user chose one. A frame costs about the same whatever its
    #: length, and connections end in the program, so no other network ever sees packets of this size. Frames made in
    #: Python: 246 and 605 MB/s (from and to the guest), instead of 86 and 113 with 1500.
    default_mtu = 65520

    def __init__(self, config: UserConfig, mtu: int | None, guest: str, name: str, user: User | None = None) -> None:
        """Starts the program; ``connect`` comes next, or ``close``.

        ``mtu``: None is the default. ``guest`` and ``name`` (``net0``) are for its title. ``user`` is who it runs as;
        None: who we are. LguestError when it is not installed, or the host is short of something.
        """
        self._config = config
        #: What the guest is to be told.
        self.mtu = self.default_mtu if mtu is None else mtu
        if self.mtu not in MTU_RANGE:
            raise LguestError(f"--net=user,mtu={mtu}: give {MTU_RANGE[0]} to {MTU_RANGE[-1]}")
        for forward in config.forwards:
            if forward.protocol == "udp" and forward.host_address.startswith("127.") and not config.host_loopback:
                # libslirp takes such an answer for a connection to the host's loopback. TCP's come through.
                raise LguestError(
                    f"{_option(forward)}: answers to this host's own {forward.host_address} need loopback=on; "
                    "add it, or forward from another address of this host"
                )
        self._name = f"{name}/{PROGRAM}"
        self._title = f"lguest[{guest}] {self._name}"
        self._user = user
        self._program = _find_program()
        self._is_protected = True
        self._helper: Child | None = None
        self._fragments = fragments.Fragments()
        #: Whether the program took nothing for too long, and nothing since.
        self.is_stuck = False
        self._start()

    @property
    def description(self) -> str:
        """Such as ``user network, tcp port 2222 leads to 22``."""
        forwards = [
            f"{each.protocol} port {each.host_port} leads to {each.guest_port}" for each in self._config.forwards
        ]
        return ", ".join(["user network", *forwards])

    @property
    def files(self) -> tuple[int, ...]:
        """The socket."""
        return (self._fd,)

    @property
    def helper(self) -> Child | None:
        """The program, until it has ended.

        Whoever sees its pidfd readable calls ``helper.reap()`` and then :meth:`helper_ended`; else ``close`` reaps it.
        """
        return self._helper

    # ---- In the supervisor ----

    def connect(self) -> None:
        """Waits until the network works and its forwards are open. LguestError, and then everything is closed."""
        try:
            try:
                self._connect()
            except _NotStarted:
                has_ended = self._helper is None
                said = self._said.decode(errors="replace")
                if not (has_ended and self._is_protected and any(each in said for each in _UNPROTECTED)):
                    raise
                say(f"--net=user: {PROGRAM} runs without seccomp and sandbox: {self._complaint()}")
                self.close()
                self._is_protected = False
                self._start()
                self._connect()
        except _NotStarted as error:
            self.close()
            raise LguestError(f"--net=user: {PROGRAM} {error}") from None
        except BaseException:
            self.close()
            raise
        self._starting.close()

    def helper_ended(self) -> None:
        """The program has ended and was reaped. The wire is gone from now on."""
        self._helper = None

    def close(self) -> None:
        """Ends the program, unless it was reaped; may be called again."""
        helper, self._helper = self._helper, None
        self._starting.close()
        self._opened.close()  # with the leash
        if helper is not None:
            children.end_all([helper], GRACE)

    def _start(self) -> None:
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
            # Linux would reap the program behind our back, and the program's own child behind its back.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._said = bytearray()
        self._starting, self._opened = ExitStack(), ExitStack()
        try:
            self._place = _Place(self._user)
            self._starting.callback(self._place.remove)
            self._socket = self._opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            self._socket.setblocking(False)
            self._fd = self._socket.fileno()
            with ExitStack() as theirs:
                null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
                theirs.callback(os.close, null)
                self._words, words = self._pipe(theirs)
                self._ready, ready = self._pipe(theirs)
                leash, holder = os.pipe2(os.O_CLOEXEC)
                theirs.callback(os.close, leash)
                self._opened.callback(os.close, holder)
                self._helper = children.fork(self._name, lambda: self._be_program(null, leash, words, ready))
        except OSError as error:
            self.close()
            raise LguestError(f"--net=user: cannot start {PROGRAM}: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    def _pipe(self, theirs: ExitStack) -> tuple[int, int]:
        """A pipe from the program to us that neither side waits for: our end, and the one of ``theirs``."""
        ours, end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._starting.callback(os.close, ours)
        theirs.callback(os.close, end)
        return ours, end

    # ---- The program ----

    def _be_program(self, null: int, leash: int, words: int, ready: int) -> int:
        """The body of the child: becomes the program."""
        parent = os.getppid()
        os.dup2(words, 2)
        try:
            children.keep_only([leash, ready, self._place.fd], null)
            # A socket's name has 107 bytes at most, which is too short for some directories.
            os.fchdir(self._place.fd)
            os.close(self._place.fd)
            if self._user is not None:
                jail.Confinement(user=self._user).enter()
            _put_on_leash(leash)
            if prctl.die_with_parent(parent):
                os.set_inheritable(ready, True)
                os.execve(self._program, [self._title, *self._arguments(ready)], environment_of_others())
        except OSError as error:
            os.write(2, f"{self._program}: {error.strerror}\n".encode())
        return os.EX_UNAVAILABLE

    def _arguments(self, ready: int) -> list[str]:
        arguments = ["--target-type=bess", f"--mtu={self.mtu}", f"--ready-fd={ready}"]
        if not self._config.host_loopback:
            arguments.append("--disable-host-loopback")
        if self._is_protected:
            arguments.append(_SECCOMP)
            if os.geteuid() == 0:
                arguments.append(_SANDBOX)
        if self._config.forwards:
            arguments.append(f"--api-socket={_API}")
        return [*arguments, _FRAMES]

    # ---- Connecting to it ----

    def _connect(self) -> None:
        deadline = time.monotonic() + START_PATIENCE
        while not self._try_to_connect():
            # It says that it waits for a connection, among its complaints. Whatever it says, try again.
            self._await(self._words, deadline)
            self._said += os.read(self._words, 4096)
        self._await(self._ready, deadline)
        for forward in self._config.forwards:
            self._open_forward(forward, deadline)

    def _try_to_connect(self) -> bool:
        try:
            self._socket.connect(self._place.path_of(_FRAMES))
        except (FileNotFoundError, ConnectionRefusedError):  # it has not come as far as bind, as listen
            return False
        except OSError as error:
            raise _NotStarted(f"cannot be connected to: {error.strerror}") from error
        return True

    def _await(self, fd: int, deadline: float) -> None:
        """Waits until ``fd`` can be read, or raises _NotStarted."""
        assert self._helper is not None
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        poller.register(self._helper.pidfd, select.POLLIN)
        events = dict(poller.poll(max(0, deadline - time.monotonic()) * 1000))
        if not events.get(fd, 0) & select.POLLIN:
            raise self._failure(deadline)

    def _failure(self, deadline: float) -> _NotStarted:
        """What to raise when the program does not do its part: how it ended, if it ends until ``deadline``."""
        assert self._helper is not None
        if not self._helper.has_ended(deadline - time.monotonic()):
            return _NotStarted(": ".join(filter(None, ["does not answer", self._complaint()])))
        how = children.how_it_ended(self._helper.reap())
        self._helper = None
        return _NotStarted(": ".join(filter(None, [how, self._complaint()])))

    def _complaint(self) -> str:
        """What the program has said that is not said every time, on one line."""
        with suppress(OSError):
            self._said += os.read(self._words, 65536)
        lines = [line.strip() for line in self._said.decode(errors="replace").splitlines()]
        return "; ".join(line for line in lines if line and not line.startswith(_CHATTER))[:_LONGEST_COMPLAINT]

    def _open_forward(self, forward: Forward, deadline: float) -> None:
        request = {
            "execute": "add_hostfwd",
            "arguments": {
                "proto": forward.protocol,
                "host_addr": forward.host_address,
                "host_port": forward.host_port,
                "guest_addr": GUEST_ADDRESS,
                "guest_port": forward.guest_port,
            },
        }
        try:
            answer = self._ask(json.dumps(request).encode(), deadline)
        except OSError:
            raise self._failure(deadline) from None
        # {"return": {"id": 1}} or {"error": {"desc": "..."}}, which does not tell why.
        if b'"return"' not in answer:
            raise LguestError(f"{_option(forward)}: {self._why_not(forward)}")

    def _ask(self, request: bytes, deadline: float) -> bytes:
        """The program's answer to one request over its API socket, where each has a connection of its own."""
        answer = bytearray()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
            channel.settimeout(max(0.001, deadline - time.monotonic()))
            channel.connect(self._place.path_of(_API))
            channel.sendall(request)
            while data := channel.recv(4096):
                answer += data
        return bytes(answer)

    def _why_not(self, forward: Forward) -> str:
        """Why the program could not listen there: we try it ourselves."""
        is_tcp = forward.protocol == "tcp"
        try:
            kind = socket.SOCK_STREAM if is_tcp else socket.SOCK_DGRAM
            with runtime.acting_as(self._user), socket.socket(socket.AF_INET, kind) as probe:
                if is_tcp:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((forward.host_address, forward.host_port))
                if is_tcp:
                    probe.listen()
        except OSError as error:
            return _HINTS.get(error.errno or 0, error.strerror or "the host refuses it")
        return f"{PROGRAM} could not open that port; choose another one"

    # ---- In the workers ----

    def read(self, views: Sequence[memoryview]) -> int:
        """The next frame."""
        try:
            length = os.readv(self._fd, views)
        except ConnectionResetError:
            raise WireGone(f"{PROGRAM} is gone") from None
        if not length and not self.is_up():
            raise WireGone(f"{PROGRAM} is gone")
        return length

    def wait(self, status: Callable[[bool], None]) -> None:
        """Sleeps until there is a frame or the program is gone, which ``read`` tells. The link never goes down."""
        self._poll(select.POLLIN, None)

    def is_up(self) -> bool:
        """Whether the program lives."""
        return not self._poll(0, 0)

    def write(self, views: Sequence[memoryview]) -> None:
        """Puts one frame on the wire; an IPv4 packet that comes in fragments when its last one has come.

        EMSGSIZE: it is longer than the MTU; EINVAL: a fragment without those before it; ENOBUFS: there was no room for
        too long.
        """
        length = vectors.total(views)
        if length > self.mtu + _ETHERNET:
            raise OSError(errno.EMSGSIZE, f"a frame of {length} bytes with an MTU of {self.mtu}")
        beginning = _copy(views, fragments.LOOKED_AT)
        pieces: list[bytes | memoryview] = [beginning, *vectors.advance(views, len(beginning))]
        if fragments.is_fragment(beginning):
            whole = self._fragments.add(b"".join(pieces))
            if whole is None:
                return
            pieces = [whole]
        try:
            if not (self._write(pieces) or self._write_late(pieces)):
                self.is_stuck = True
                raise OSError(errno.ENOBUFS, f"{PROGRAM} takes no frames")
        except (BrokenPipeError, ConnectionResetError):
            raise WireGone(f"{PROGRAM} is gone") from None
        self.is_stuck = False

    def _write(self, pieces: list[bytes | memoryview]) -> bool:
        """False if there is no room."""
        try:
            os.writev(self._fd, pieces)
        except BlockingIOError:
            return False
        return True

    def _write_late(self, pieces: list[bytes | memoryview]) -> bool:
        """The same after there was no room: waits for it once, and then no more until the program takes frames."""
        return not self.is_stuck and self._poll(select.POLLOUT, WRITE_PATIENCE) and self._write(pieces)

    def _poll(self, events: int, seconds: float | None) -> bool:
        """Whether one of ``events``, or the program's end, comes within ``seconds``."""
        poller = select.poll()
        poller.register(self._fd, events)
        return bool(poller.poll(None if seconds is None else seconds * 1000))


class _Place:
    """A private directory of ``user``'s for the program's sockets. LguestError, OSError. ``fd``: the open directory."""

    def __init__(self, user: User | None) -> None:
        self._user = user
        self._path = runtime.directory(user) / f"user-{os.getpid()}-{os.urandom(4).hex()}"
        with runtime.acting_as(user):
            self._path.mkdir(0o700)
            try:
                self.fd = os.open(self._path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError:
                self._path.rmdir()
                raise

    def path_of(self, name: str) -> str:
        """A path of ``name`` in it that is short, as a socket's address has to be."""
        return f"/proc/self/fd/{self.fd}/{name}"

    def remove(self) -> None:
        """Removes it, and closes ``fd``."""
        with runtime.acting_as(self._user), suppress(OSError):
            for name in (_FRAMES, _API):
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=self.fd)
            self._path.rmdir()
        os.close(self.fd)


def _copy(views: Sequence[memoryview], length: int) -> bytes:
    """The first ``length`` bytes that are in ``views``, or all of them."""
    beginning = b""
    for view in views:
        beginning += view[: length - len(beginning)]
        if len(beginning) == length:
            break
    return beginning


def _option(forward: Forward) -> str:
    """As on the command line, with all its parts."""
    parts = (forward.protocol, forward.host_address, forward.host_port, forward.guest_port)
    return f"--net=user,forward={':'.join(map(str, parts))}"


def _find_program() -> str:
    for folder in os.get_exec_path():
        path = os.path.join(folder, PROGRAM)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    raise LguestError(
        f"--net=user needs {PROGRAM}, which is not installed: apt install {PROGRAM}, or take --net=tap or --net=link"
    )


def _put_on_leash(fd: int) -> None:
    """Has Linux kill this process's new group when the last writer of the pipe ``fd`` closes it; survives exec."""
    os.setpgid(0, 0)
    os.set_inheritable(fd, True)
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(fd, fcntl.F_SETOWN, -os.getpid())
    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_ASYNC)
