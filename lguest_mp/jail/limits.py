"""How much of the host a process may use (setrlimit(2)).

Each limit is lowered for good. Where a process has less already, that stays.

- *No core dump*: it would hold all of guest memory. A limit of 0 does not keep one from a program that takes dumps
  (``|`` in core_pattern); 1 does (the kernel's fs/coredump.c), and no dump is that short.
- *Files*: with a limit of three, which every process has, none can be opened; those that are open stay, whatever their
  numbers. poll(2) takes as many descriptors as the limit allows to have. Who opens some itself gets room for all that
  it may have inherited, too.
- *A file's length*: no write reaches beyond it. A disk's worker could otherwise make the image grow until the host's
  disk is full.
- *Memory*: what is private to the process and can be written, beyond what its supervisor had.
"""

from __future__ import annotations

import ctypes
import resource
import struct
from pathlib import Path

from lguest_mp.jail.needs import Needs
from lguest_mp.memory import PAGE_SIZE
from lguest_mp.record import Value
from lguest_mp.steps import Step

_SYS_PRLIMIT64 = 302
#: struct rlimit64: the soft limit, and the hard one.
_RLIMIT = struct.Struct("=QQ")
#: Standard input, output and error; and the most that a process of a guest has open when it is forked.
_STANDARD_FILES = 3
_INHERITED_FILES = 1024


class Limit(Value):
    """``value`` of the resource that /proc/<pid>/limits calls ``name``."""

    name: str
    resource: int
    value: int


def of(needs: Needs, memory: int | None) -> tuple[Limit, ...]:
    """The limits of a process with these needs, that is forked from one with ``memory`` bytes.

    See :func:`memory`.
    """
    files = _INHERITED_FILES + needs.more_files if needs.more_files else _STANDARD_FILES
    wanted = [
        ("Max core file size", resource.RLIMIT_CORE, 1),
        ("Max open files", resource.RLIMIT_NOFILE, files),
        ("Max locked memory", resource.RLIMIT_MEMLOCK, 0),
        ("Max msgqueue size", resource.RLIMIT_MSGQUEUE, 0),
        ("Max nice priority", resource.RLIMIT_NICE, 0),
        ("Max realtime priority", resource.RLIMIT_RTPRIO, 0),
    ]
    if memory is not None:
        wanted.append(("Max data size", resource.RLIMIT_DATA, memory + needs.memory))
    if not needs.threads:  # they count as processes, and so do all others of the same user
        wanted.append(("Max processes", resource.RLIMIT_NPROC, 0))
    if needs.longest_file is not None:
        wanted.append(("Max file size", resource.RLIMIT_FSIZE, needs.longest_file))
    return tuple(Limit(name, kind, _at_most(kind, value)) for name, kind, value in wanted)


def lower(limits: tuple[Limit, ...]) -> tuple[Step, ...]:
    """The steps by which they take effect, for good."""
    return tuple(
        Step(f"setrlimit ({limit.name})", (_SYS_PRLIMIT64, 0, limit.resource, _rlimit(limit.value), 0))
        for limit in limits
    )


def _rlimit(value: int) -> object:
    return ctypes.byref(ctypes.create_string_buffer(_RLIMIT.pack(value, value), _RLIMIT.size))


def memory() -> int | None:
    """How many bytes of memory this process has that are its own and can be written (proc(5), statm); None: unknown."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[5]) * PAGE_SIZE
    except OSError:
        return None


def _at_most(kind: int, value: int) -> int:
    _, hard = resource.getrlimit(kind)
    return value if hard == resource.RLIM_INFINITY else min(value, hard)
