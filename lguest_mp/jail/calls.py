"""Which system calls a process needs, and with which arguments: what an allow-list is made of.

A :class:`Call` may be made when all its checks hold. Of several for the same system call one has to hold. What is in no
list is the end of the process (``seccomp.py``).

Checks are of numbers only: a filter cannot follow a pointer, so it cannot see a path. What would have to be told apart
by its path is therefore refused as a whole. The kernel takes most arguments as 32 bits and ignores what is above them,
and so do the checks, unless their mask says otherwise.

**Refused, not killed** (:data:`REFUSED`): what Python does on its own when something *else* went wrong. Showing a
traceback looks for the source files; importing a module late looks for that; a C library of another version tries a
newer call first. Each of them can do without, and to be killed for it would hide what had happened.

Numbers: arch/x86/entry/syscalls/syscall_64.tbl. Constants: the header that is named with each.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import termios
from collections.abc import Iterable

from lguest_mp.record import Value

#: Of x86-64, those that are in a list.
NUMBERS = {
    "read": 0,
    "write": 1,
    "open": 2,
    "close": 3,
    "stat": 4,
    "fstat": 5,
    "lstat": 6,
    "poll": 7,
    "mmap": 9,
    "mprotect": 10,
    "munmap": 11,
    "brk": 12,
    "rt_sigaction": 13,
    "rt_sigprocmask": 14,
    "rt_sigreturn": 15,
    "ioctl": 16,
    "pread64": 17,
    "pwrite64": 18,
    "readv": 19,
    "writev": 20,
    "access": 21,
    "sched_yield": 24,
    "mremap": 25,
    "madvise": 28,
    "pause": 34,
    "nanosleep": 35,
    "getpid": 39,
    "sendto": 44,
    "recvfrom": 45,
    "recvmsg": 47,
    "clone": 56,
    "exit": 60,
    "kill": 62,
    "fcntl": 72,
    "fdatasync": 75,
    "getcwd": 79,
    "readlink": 89,
    "gettimeofday": 96,
    "sysinfo": 99,
    "getuid": 102,
    "getgid": 104,
    "geteuid": 107,
    "getegid": 108,
    "getppid": 110,
    "getpgrp": 111,
    "sigaltstack": 131,
    "statfs": 137,
    "prctl": 157,
    "gettid": 186,
    "time": 201,
    "futex": 202,
    "sched_getaffinity": 204,
    "restart_syscall": 219,
    "clock_gettime": 228,
    "clock_getres": 229,
    "clock_nanosleep": 230,
    "exit_group": 231,
    "epoll_wait": 232,
    "epoll_ctl": 233,
    "tgkill": 234,
    "openat": 257,
    "newfstatat": 262,
    "readlinkat": 267,
    "faccessat": 269,
    "set_robust_list": 273,
    "epoll_pwait": 281,
    "timerfd_create": 283,
    "fallocate": 285,
    "timerfd_settime": 286,
    "eventfd2": 290,
    "epoll_create1": 291,
    "preadv": 295,
    "pwritev": 296,
    "prlimit64": 302,
    "getrandom": 318,
    "membarrier": 324,
    "preadv2": 327,
    "pwritev2": 328,
    "statx": 332,
    "rseq": 334,
    "clone3": 435,
    "openat2": 437,
    "faccessat2": 439,
}

#: An argument that the kernel takes as 32 bits, and one that it takes whole.
_INT = 0xFFFF_FFFF
_LONG = 0xFFFF_FFFF_FFFF_FFFF


class Check(Value):
    """``argument`` (0 to 5), of which the bits of ``mask`` count, is ``value``; None: this process's ID.

    ``words`` say so to a person.
    """

    argument: int
    value: int | None
    words: str
    mask: int = _INT


class Call(Value):
    """A system call that may be made when all ``checks`` hold."""

    name: str
    checks: tuple[Check, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}({', '.join(check.words for check in self.checks)})" if self.checks else self.name


def plain(*names: str) -> tuple[Call, ...]:
    """Calls that may be made with any arguments."""
    return tuple(Call(name) for name in names)


def one_of(name: str, argument: int, values: Iterable[tuple[int, str]], *checks: Check) -> tuple[Call, ...]:
    """A call that may be made with one of the ``values`` (each with its name) as its ``argument``, and the checks."""
    return tuple(Call(name, (Check(argument, value, words), *checks)) for value, words in values)


def ioctls(*requests: tuple[int, str]) -> tuple[Call, ...]:
    """ioctl(2) with these requests, each with its name."""
    return one_of("ioctl", 1, requests)


_NOT_EXECUTABLE = Check(2, 0, "not PROT_EXEC", mmap.PROT_EXEC)
#: Shared and stack memory is not counted against RLIMIT_DATA, and so could be had without end.
_MAP_GROWSDOWN = 0x100
_COUNTED = Check(3, 0, "private", mmap.MAP_SHARED | _MAP_GROWSDOWN)
_OF_A_FILE = Check(3, mmap.MAP_SHARED, "of a file", mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _MAP_GROWSDOWN)
_OURSELVES = Check(0, None, "itself")
#: include/uapi/linux/futex.h: the commands without FUTEX_PRIVATE_FLAG and FUTEX_CLOCK_REALTIME.
_FUTEX_COMMAND = ~(128 | 256) & _INT
_FUTEXES = ((0, "FUTEX_WAIT"), (1, "FUTEX_WAKE"), (9, "FUTEX_WAIT_BITSET"), (10, "FUTEX_WAKE_BITSET"))
#: include/uapi/asm-generic/ioctls.h; what isatty(3) asks, in newer C libraries the second one.
_TCGETS2 = 0x802C542A

#: The interpreter's and the C library's own, in a process of one thread, at any moment, and what every process of a
#: guest does with the files that it holds: wait, notify, send and receive messages. Nothing here opens, makes, names or
#: reaches anything that the process does not have; nothing makes memory executable.
COMMON = (
    *plain("read", "write", "poll", "close", "fstat"),
    # The C library's last words, as of a heap that was written over.
    Call("writev", (Check(0, 2, "standard error"),)),
    # To whom a socket is connected, and nobody else; without a message's control part, that is, without files in it.
    Call("sendto", (Check(4, 0, "no address", _LONG),)),
    *plain("recvfrom"),
    Call("mmap", (_NOT_EXECUTABLE, _COUNTED)),
    Call("mprotect", (_NOT_EXECUTABLE,)),
    *plain("munmap", "mremap", "madvise", "brk"),
    *(Call("futex", (Check(1, value, words, _FUTEX_COMMAND),)) for value, words in _FUTEXES),
    *plain("clock_gettime", "clock_getres", "gettimeofday", "time", "clock_nanosleep", "nanosleep"),
    *plain("getrandom", "sched_yield", "sched_getaffinity"),
    *plain("getpid", "getppid", "gettid", "getuid", "geteuid", "getgid", "getegid"),
    *plain("pause", "restart_syscall", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack"),
    # abort(3), and whoever else ends by a signal.
    Call("kill", (_OURSELVES,)),
    Call("tgkill", (_OURSELVES,)),
    # To read one's own limits, which the C library does to find the end of a stack.
    Call("prlimit64", (Check(0, 0, "itself"), Check(2, 0, "no new limit", _LONG))),
    *ioctls((termios.TCGETS, "TCGETS"), (_TCGETS2, "TCGETS2")),
    *plain("exit", "exit_group"),
)

#: What pthread_create(3) asks for (glibc, nptl/createthread.c): a thread, which shares everything with the others.
_THREAD_FLAGS = 0x3D0F00
#: include/uapi/linux/prctl.h
_PR_SET_NAME = 15

#: Threads of one process. A filter does not see the flags of clone3, and with ENOSYS the C library takes clone.
THREADS = (
    Call("clone", (Check(0, _THREAD_FLAGS, "a thread"),)),
    *plain("set_robust_list", "rseq"),
    *one_of("prctl", 0, [(_PR_SET_NAME, "PR_SET_NAME")]),
)
#: For who maps a file that it holds: Python keeps a copy of the descriptor.
MAPPING = (
    Call("mmap", (_NOT_EXECUTABLE, _OF_A_FILE)),
    *one_of("fcntl", 1, [(fcntl.F_DUPFD_CLOEXEC, "F_DUPFD_CLOEXEC")]),
)
#: The machine's event loop, which makes its descriptors itself, and its end of the serial port.
EVENTS = (
    *plain("epoll_create1", "epoll_ctl", "epoll_wait", "epoll_pwait"),
    *plain("eventfd2", "timerfd_create", "timerfd_settime"),
    *MAPPING,
)
#: Memory that can be executed: for who translates the guest's code, or is called back by C (libffi).
CODE = (Call("mmap", (_COUNTED,)), *plain("mprotect"))

#: include/uapi/linux/prctl.h, "VMA": names for memory, which newer allocators give where the kernel has such.
_PR_SET_VMA = 0x53564D41


class Refusal(Value):
    """A call that fails with ``errno`` where no list allows it."""

    call: Call
    errno: int


#: See above.
REFUSED = (
    *(Refusal(call, errno.EACCES) for call in plain("open", "openat", "openat2", "readlink", "readlinkat", "getcwd")),
    *(Refusal(call, errno.EACCES) for call in plain("stat", "lstat", "newfstatat", "statx", "statfs")),
    *(Refusal(call, errno.EACCES) for call in plain("access", "faccessat", "faccessat2")),
    *(Refusal(call, errno.ENOSYS) for call in plain("clone3")),
    *(Refusal(call, errno.EINVAL) for call in one_of("prctl", 0, [(_PR_SET_VMA, "PR_SET_VMA")])),
)

#: For who waits in the shell's background (virtio/console.py).
JOB_CONTROL = (*plain("getpgrp"), *ioctls((termios.TIOCGPGRP, "TIOCGPGRP")))
