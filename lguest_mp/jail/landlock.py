"""What is left of the file system, TCP, signals and abstract sockets: nothing, by Landlock (landlock(7)).

The list of system calls (``seccomp.py``) does not let a process open a file either. This is the second wall, which
stands also where the first one has a hole.

Landlock grew: what this host's version (its *ABI*) does not know is left out. Files that were open before are not
concerned, except that they cannot be truncated or the like by name.

Source: include/uapi/linux/landlock.h; the kernel's Documentation/userspace-api/landlock.rst.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from lguest_mp import steps
from lguest_mp.steps import Step

_SYS_CLOSE = 3
_SYS_CREATE_RULESET = 444
_SYS_RESTRICT_SELF = 446
_CREATE_RULESET_VERSION = 1 << 0

#: By ABI, how many rights on files there are (LANDLOCK_ACCESS_FS_*, from EXECUTE on): with REFER, TRUNCATE, IOCTL_DEV.
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}
#: LANDLOCK_ACCESS_NET_BIND_TCP, _CONNECT_TCP
_TCP_ABI, _TCP = 4, 0b11
#: LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET, _SIGNAL
_SCOPES_ABI, _SCOPES = 6, 0b11
#: With this ABI everything is there that we ask for.
COMPLETE_ABI = 6

#: struct landlock_ruleset_attr: rights on files, rights on ports, scopes; older kernels know the beginning of it.
_RULESET = struct.Struct("=QQQ")


def abi() -> int:
    """The version of this host's Landlock. OSError: ENOSYS, it has none; EOPNOTSUPP, it was not enabled at boot."""
    found = ctypes.c_int()
    steps.make([Step("landlock", (_SYS_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION), into=found)])
    return found.value


def missing(error: OSError) -> str:
    """Why there is none, from what :func:`abi` raised."""
    match error.errno:
        case errno.ENOSYS:
            return "is not in this kernel, or this kernel is older than 5.13"
        case errno.EOPNOTSUPP:
            return "is not enabled in this kernel (lsm=landlock,...)"
    return f"is refused by this host: {os.strerror(error.errno or 0)}"


def restrict(abi: int) -> tuple[Step, ...]:
    """The steps after which nothing remains that this host's Landlock, of version ``abi``, knows of.

    They take effect in the thread that makes them, and whatever it starts, for good, and need no-new-privileges.
    """
    rights = (1 << max(count for since, count in _FILE_RIGHTS.items() if since <= abi)) - 1
    ports = _TCP if abi >= _TCP_ABI else 0
    scopes = _SCOPES if abi >= _SCOPES_ABI else 0
    known = 24 if scopes else 16 if ports else 8
    attribute = ctypes.create_string_buffer(_RULESET.pack(rights, ports, scopes)[:known], known)
    ruleset = ctypes.c_int()
    return (
        Step("landlock", (_SYS_CREATE_RULESET, ctypes.byref(attribute), known, 0), into=ruleset),
        Step("landlock", (_SYS_RESTRICT_SELF, ruleset, 0)),
        Step("landlock", (_SYS_CLOSE, ruleset)),
    )
