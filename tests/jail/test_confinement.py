"""Who a process becomes, and where: what is checked before anything is done."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lguest_mp import jail
from lguest_mp.errors import LguestError

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root may change its root directory and its user")


def test_nothing_wanted_is_nothing_done() -> None:
    confinement = jail.prepare(None, None)
    assert confinement.is_empty
    confinement.enter()


def test_a_user_that_does_not_exist() -> None:
    with pytest.raises(LguestError, match="--username=no-such-user: this host has no such user"):
        jail.prepare("no-such-user", None)


@root_only
def test_a_directory_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(LguestError, match="Not a directory"):
        jail.prepare(None, file)
    with pytest.raises(LguestError, match="No such file or directory"):
        jail.prepare(None, tmp_path / "nowhere")


def test_without_privileges() -> None:
    def body() -> str:
        if os.geteuid() == 0:
            os.setresuid(65534, 65534, 65534)
        said = []
        for username, chroot in (("root", None), (None, Path("/"))):
            try:
                jail.prepare(username, chroot)
            except LguestError as error:
                said.append(str(error))
        return "\n".join(said)

    assert _in_child(body).splitlines() == [
        "--username=root: only root may become another user; start lguest as root",
        "--chroot=/: only root may change its root directory; start lguest as root",
    ]


@root_only
def test_what_is_entered_is_what_was_checked(tmp_path: Path) -> None:
    """Whatever the name means by then. And there is no way back."""
    directory = tmp_path / "jail"
    directory.mkdir(mode=0o755)
    (directory / "here").touch()

    def body() -> str:
        confinement = jail.prepare("nobody", directory)
        directory.rename(tmp_path / "moved")
        confinement.enter()
        try:
            os.setuid(0)
        except PermissionError:
            return f"{os.getcwd()} {os.path.exists('/here')} {os.getresuid() == (os.getuid(),) * 3} {os.getuid() != 0}"
        return "root again"

    assert _in_child(body) == "/ True True True"


def _in_child(body: Callable[[], str]) -> str:
    """What ``body`` gives in a forked child."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, body().encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with os.fdopen(reader) as text:
        return text.read()
