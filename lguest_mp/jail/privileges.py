"""Privileges: none, and no way to any (capabilities(7), PR_SET_NO_NEW_PRIVS in prctl(2)).

Root without capabilities is the owner of root's files and no more, and those are behind two other walls. What a process
holds open it keeps: who may use a file was decided when that was opened.
"""

from __future__ import annotations

import ctypes
import errno
import struct

from lguest_mp import prctl
from lguest_mp.steps import Step

#: include/uapi/linux/prctl.h
_PR_CAPBSET_READ = 23
_PR_CAPBSET_DROP = 24
_PR_SET_SECUREBITS = 28
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
#: include/uapi/linux/securebits.h: NOROOT, NO_SETUID_FIXUP, KEEP_CAPS, NO_CAP_AMBIENT_RAISE. User 0 is nobody special,
#: no change of user or group gives or keeps a capability; and the lock of each, one bit further.
_NOROOT, _NO_SETUID_FIXUP, _KEEP_CAPS_LOCKED, _NO_AMBIENT_RAISE = 0b11 << 0, 0b11 << 2, 0b10 << 4, 0b11 << 6
_SECUREBITS = _NOROOT | _NO_SETUID_FIXUP | _KEEP_CAPS_LOCKED | _NO_AMBIENT_RAISE

#: include/uapi/linux/capability.h: struct __user_cap_header_struct (version 3, this process), and for the lower and the
#: upper 32 capabilities the effective, permitted and inheritable set.
_HEADER = ctypes.create_string_buffer(struct.pack("=Ii", 0x2008_0522, 0), 8)
_NONE = ctypes.create_string_buffer(24)
#: More than Linux has; the first that it does not have ends the list.
_MOST_CAPABILITIES = 64
_SYS_CAPSET = 126
#: Where it takes a right that we do not have: then there is nothing to give up either.
_IF_IT_IS_FOR_US = (errno.EPERM,)

#: No program that this process or its children execute gives it anything.
FORBID_NEW = (prctl.step(_PR_SET_NO_NEW_PRIVS, 1),)


def drop_all() -> tuple[Step, ...]:
    """The steps that give up every capability, and the right to get one again where that takes a right."""
    return (
        *(prctl.step(_PR_CAPBSET_DROP, each, _IF_IT_IS_FOR_US) for each in range(_MOST_CAPABILITIES) if _exists(each)),
        prctl.step(_PR_SET_SECUREBITS, _SECUREBITS, _IF_IT_IS_FOR_US),
        prctl.step(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL),
        Step("capset", (_SYS_CAPSET, ctypes.byref(_HEADER), ctypes.byref(_NONE))),
    )


def _exists(capability: int) -> bool:
    try:
        prctl.call(_PR_CAPBSET_READ, capability)
    except OSError:
        return False
    return True
