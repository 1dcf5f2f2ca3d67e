"""Where what lives as long as a guest lies: sockets and the like, in a directory of the user's own.

Guests of one user find each other there, so it must not depend on how each of them was started; and nobody else may
have a say in it, since whoever can put a socket there is trusted as far as that user is.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lguest_mp.errors import LguestError

if TYPE_CHECKING:
    from lguest_mp.jail import User

_RUN = Path("/run")
_TMP = Path("/tmp")


def directory(user: User | None = None) -> Path:
    """The runtime directory of ``user`` (None: of this process's own), which exists, is theirs and nobody else's.

    It is the first of these: ``$XDG_RUNTIME_DIR/lguest``, unless somebody else can write there too, or does not want
    us to (``su`` leaves the variable of whoever called it); ``/run/lguest`` for root; ``/run/user/<uid>/lguest``;
    ``/tmp/lguest-<uid>``. That variable says nothing of another user than this process's own. And a login of root's
    does not count: ``/run/user/0`` comes and goes with it, and root's guests are as often started by a service.

    LguestError if it cannot be made, or is there and not what it should be.
    """
    uid = os.geteuid() if user is None else user.uid
    with acting_as(user):
        path = _place(uid)
        try:
            make_private(path)
        except OSError as error:
            raise LguestError(
                f"runtime directory {path}: {error.strerror}; $XDG_RUNTIME_DIR may name another"
            ) from error
    return path


def existing(user: User | None = None) -> Path:
    """Where that is, made or not. LguestError if it is there and not what it should be."""
    with acting_as(user):
        path = _place(os.geteuid() if user is None else user.uid)
        try:
            _check_private(path)
        except FileNotFoundError:
            return path
        except OSError as error:
            raise LguestError(f"runtime directory {path}: {error.strerror}") from error
    return path


def make_private(path: Path) -> None:
    """Makes the directory ``path``, if it is not there, for nobody but the user whom this process is or acts as.

    LguestError if it is there and is somebody else's, or others may enter it. OSError.
    """
    try:
        path.mkdir(mode=0o700)
        path.chmod(0o700)  # whatever the umask
    except FileExistsError:
        pass
    _check_private(path)


def _check_private(path: Path) -> None:
    """OSError, LguestError."""
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise LguestError(f"{path} is in the way: it is no directory; remove it")
    if found.st_uid != os.geteuid():
        raise LguestError(f"{path} belongs to another user, who may mean harm; remove it")
    if stat.S_IMODE(found.st_mode) != 0o700:
        raise LguestError(f"{path} must be its owner's alone; chmod 700 {path}")


@contextmanager
def acting_as(user: User | None) -> Iterator[None]:
    """Within it, files are made, found and refused as for ``user``; None: as for this process's own.

    A process that became that user for good, or acts as it already, stays as it is.

    So no link in a directory of that user's leads root astray. For a process of one thread. LguestError if the host
    does not let it be that user.
    """
    if user is None or user.uid == os.geteuid():
        yield
        return
    uid, gid, groups = os.geteuid(), os.getegid(), os.getgroups()
    try:
        try:
            os.initgroups(user.name, user.gid)
            os.setegid(user.gid)
            os.seteuid(user.uid)
        except OSError as error:
            raise LguestError(f"cannot act as user {user.name}: {error.strerror}") from error
        yield
    finally:
        os.seteuid(uid)
        os.setegid(gid)
        os.setgroups(groups)


def _place(uid: int) -> Path:
    """Which directory it is; this process acts as ``uid``."""
    login = _RUN / "user" / str(uid)
    if uid == os.getuid():
        named = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
        if named.is_absolute() and _is_own(named, uid) and not (uid == 0 and named == login):
            return named / "lguest"
    if uid == 0:
        return _RUN / "lguest"
    if _is_own(login, uid):
        return login / "lguest"
    return _TMP / f"lguest-{uid}"


def _is_own(path: Path, uid: int) -> bool:
    """Whether ``path`` is a directory of ``uid``'s and nobody else can write to it."""
    try:
        found = path.stat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == uid and not found.st_mode & 0o022
