"""The directory of a user's own for sockets, and being another user for a moment."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from lguest_mp import jail, runtime
from lguest_mp.errors import LguestError

ME = os.geteuid()
root_only = pytest.mark.skipif(ME != 0, reason="only root may act as another user")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a host that has a /run and a /tmp; no variable says anything."""
    for name in ("run", "tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    monkeypatch.setattr(runtime, "_RUN", tmp_path / "run")
    monkeypatch.setattr(runtime, "_TMP", tmp_path / "tmp")
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    return tmp_path


@pytest.fixture
def nobody(host: Path) -> Iterator[jail.User]:
    """Another user, who may come as far as the host's directories."""
    user = jail.prepare("nobody", None).user
    assert user is not None
    # pytest's directories are root's alone.
    closed = [path for path in host.parents if path.stat().st_uid == ME and not path.stat().st_mode & stat.S_IXOTH]
    modes = [path.stat().st_mode for path in closed]
    host.chmod(0o755)
    for path, mode in zip(closed, modes, strict=True):
        path.chmod(mode | stat.S_IXOTH)
    yield user
    for path, mode in zip(closed, modes, strict=True):
        path.chmod(mode)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


class TestWhere:
    def test_the_variable_names_it(self, host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        named = host / "named"
        named.mkdir(mode=0o700)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(named))
        assert runtime.directory() == named / "lguest"

    def test_a_variable_that_is_no_use(self, host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Not set by whoever set up this user's session, so not meant for us."""
        default = runtime.directory()
        (host / "everybody").mkdir()
        (host / "everybody").chmod(0o1777)
        (host / "file").touch()
        (host / "relative").mkdir(mode=0o700)
        monkeypatch.chdir(host)
        for useless in ("", "relative", str(host / "missing"), str(host / "file"), str(host / "everybody")):
            monkeypatch.setenv("XDG_RUNTIME_DIR", useless)
            assert runtime.directory() == default

    def test_the_directory_of_a_login(self, host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 1234)
        monkeypatch.setattr(runtime, "_is_own", lambda path, uid: (path, uid) == (host / "run/user/1234", 1234))
        monkeypatch.setattr(runtime, "make_private", lambda path: None)
        assert runtime.directory() == host / "run/user/1234/lguest"

    def test_a_host_without_logins(self, host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 1234)
        monkeypatch.setattr(runtime, "make_private", lambda path: None)
        assert runtime.directory() == host / "tmp/lguest-1234"

    @root_only
    def test_roots_guests_meet_whatever_login_they_are_of(self, host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        login = host / "run/user/0"
        login.mkdir(mode=0o700, parents=True)
        assert runtime.directory() == host / "run/lguest"
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(login))
        assert runtime.directory() == host / "run/lguest"

    @root_only
    def test_another_user(self, host: Path, nobody: jail.User, monkeypatch: pytest.MonkeyPatch) -> None:
        """Root's variable is not theirs; what is made is theirs."""
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(host))
        path = runtime.directory(nobody)
        assert path == host / f"tmp/lguest-{nobody.uid}"
        assert (path.stat().st_uid, path.stat().st_gid, mode(path)) == (nobody.uid, nobody.gid, 0o700)
        login = host / "run/user" / str(nobody.uid)
        login.mkdir(parents=True)
        os.chown(login, nobody.uid, nobody.gid)
        assert runtime.directory(nobody) == login / "lguest"


class TestWhose:
    def test_it_is_made_once_for_its_owner_alone(self, host: Path) -> None:
        before = os.umask(0o277)
        try:
            path = runtime.directory()
        finally:
            os.umask(before)
        assert (path.stat().st_uid, mode(path)) == (ME, 0o700)
        assert runtime.directory() == path

    def test_others_may_enter_it(self, host: Path) -> None:
        path = runtime.directory()
        path.chmod(0o750)
        with pytest.raises(LguestError, match=f"{path} must be its owner's alone; chmod 700 {path}"):
            runtime.directory()

    def test_a_link_is_not_followed(self, host: Path) -> None:
        path = runtime.directory()
        path.rename(host / "elsewhere")
        path.symlink_to(host / "elsewhere")
        with pytest.raises(LguestError, match="is in the way: it is no directory; remove it"):
            runtime.directory()

    @root_only
    def test_somebody_else_was_first(self, host: Path, nobody: jail.User) -> None:
        path = runtime.directory(nobody)
        os.chown(path, ME, -1)
        with pytest.raises(LguestError, match="belongs to another user, who may mean harm; remove it"):
            runtime.directory(nobody)

    def test_it_cannot_be_made(self, host: Path) -> None:
        for name in ("run", "tmp"):
            (host / name).rename(host / f"no-{name}")
        with pytest.raises(LguestError, match=r"No such file or directory; \$XDG_RUNTIME_DIR may name another$"):
            runtime.directory()


class TestActingAs:
    @staticmethod
    def identity() -> tuple[object, ...]:
        return os.getresuid(), os.getresgid(), os.getgroups()

    def test_oneself(self) -> None:
        before = self.identity()
        with runtime.acting_as(None):
            assert self.identity() == before

    @root_only
    def test_another_and_back(self, nobody: jail.User) -> None:
        before = self.identity()
        with runtime.acting_as(nobody):
            assert (os.geteuid(), os.getegid(), os.getgroups()) == (nobody.uid, nobody.gid, [nobody.gid])
            assert os.getuid() == ME
        assert self.identity() == before

    @root_only
    def test_back_whatever_happens(self, nobody: jail.User) -> None:
        before = self.identity()
        with pytest.raises(ZeroDivisionError), runtime.acting_as(nobody):
            _ = 1 / 0
        assert self.identity() == before

    @root_only
    def test_one_whom_one_acts_as_already(self, nobody: jail.User) -> None:
        before = self.identity()
        with runtime.acting_as(nobody):
            acting = self.identity()
            with runtime.acting_as(nobody):
                assert self.identity() == acting
            assert self.identity() == acting
        assert self.identity() == before

    @root_only
    def test_one_that_the_host_does_not_let_us_be(self) -> None:
        before = self.identity()
        refused = (1 << 32) - 1
        with pytest.raises(LguestError, match="cannot act as user x: "), runtime.acting_as(jail.User("x", refused, 0)):
            pass
        assert self.identity() == before

    @root_only
    def test_roots_files_are_out_of_reach(self, nobody: jail.User, tmp_path: Path) -> None:
        """However one gets there."""
        secret = tmp_path / "secret"
        secret.write_text("root's")
        secret.chmod(0o600)
        with runtime.acting_as(nobody), pytest.raises(PermissionError):
            secret.read_text()
