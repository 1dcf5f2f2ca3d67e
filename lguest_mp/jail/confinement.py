"""What a process of a guest may still do: its root directory and its user.

Both are the user's choice (``--chroot``, ``--username``) and are taken by every process before the guest executes its
first instruction. They are looked up and checked while an error is still one line and nothing else, and entered later,
when every file is open: a :class:`Confinement` holds the directory open, so that what was checked is what is entered.

Afterwards there is no way back, and much that one is used to is gone: no module can be imported, no image opened by
its path, no program executed (see ``supervisor/reboot.py`` for what that means to a guest's reboot).
"""

from __future__ import annotations

import os
from pathlib import Path

from lguest_mp.errors import LguestError
from lguest_mp.record import Value

#: Capability numbers, include/uapi/linux/capability.h.
CAP_SETGID = 6
CAP_SETUID = 7
CAP_SYS_CHROOT = 18


class User(Value):
    """A user of the host and the group of its own."""

    name: str
    uid: int
    gid: int


class Confinement(Value):
    """What to enter. ``root``: a directory's file descriptor, ``user``: whom to become; None: stay."""

    root: int | None = None
    user: User | None = None

    @property
    def is_empty(self) -> bool:
        """Whether entering changes nothing."""
        return self.root is None and self.user is None

    def enter(self) -> None:
        """Takes effect in this process, for good. OSError if the host refuses after all.

        Groups go first: a process that is no longer root may not change them.
        """
        if self.root is not None:
            os.fchdir(self.root)
            os.chroot(".")
            os.close(self.root)
        if self.user is not None:
            os.initgroups(self.user.name, self.user.gid)
            os.setresgid(self.user.gid, self.user.gid, self.user.gid)
            os.setresuid(self.user.uid, self.user.uid, self.user.uid)


def prepare(username: str | None, chroot: Path | None) -> Confinement:
    """Looks up the user and opens the directory, or raises LguestError; nothing is entered yet."""
    user = None if username is None else _find_user(username)
    return Confinement(None if chroot is None else _open_root(chroot), user)


def _find_user(name: str) -> User:
    import pwd  # noqa: PLC0415 -- most guests run as who started them

    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise LguestError(f"--username={name}: this host has no such user") from None
    if not _has_capabilities(CAP_SETUID, CAP_SETGID):
        raise LguestError(f"--username={name}: only root may become another user; start lguest as root")
    return User(entry.pw_name, entry.pw_uid, entry.pw_gid)


def _open_root(directory: Path) -> int:
    if not _has_capabilities(CAP_SYS_CHROOT):
        raise LguestError(f"--chroot={directory}: only root may change its root directory; start lguest as root")
    try:
        return os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise LguestError(f"--chroot={directory}: {error.strerror}") from error


def _has_capabilities(*capabilities: int) -> bool:
    """Whether each is in this process's effective set (proc(5), CapEff)."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return os.geteuid() == 0
    effective = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:"))
    return all(effective >> capability & 1 for capability in capabilities)
