"""Which guests there are: names that are taken and given back, and what the dead leave."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lguest_mp import registry
from lguest_mp.registry import Claim, Guests, NameTakenError, UnavailableError

#: Claims a name and says so; then it does what the next argument says.
HOLDER = """
import os, sys
from lguest_mp import registry
claim = registry.claim(sys.argv[1])
print(os.getpid(), claim.listener.fileno(), flush=True)
if "exec" in sys.argv[2:]:
    sys.stdin.readline()
    claim.hand_on()
    os.execv(sys.executable, sys.orig_argv[:-1])
sys.stdin.readline()
claim.release()
"""


@pytest.fixture(autouse=True)
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of all guests, which is not there yet."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(registry, "PATIENCE", 0.05)
    return tmp_path / "lguest" / "guests"


@pytest.fixture
def guests(run: Path) -> Guests:
    """All guests, as somebody who looks for them sees them."""
    return Guests(run.parent)


@pytest.fixture
def claim() -> Iterator[Claim]:
    """The name ``one``, taken."""
    claim = registry.claim("one")
    yield claim
    claim.release()


class Holder(subprocess.Popen[str]):
    """Another launcher."""

    def __init__(self, name: str, *more: str) -> None:
        super().__init__(
            [sys.executable, "-c", HOLDER, name, *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.hear()

    def hear(self) -> None:
        assert self.stdout is not None
        assert self.stdout.readline().split()[0] == str(self.pid)

    def type(self) -> None:
        assert self.stdin is not None
        self.stdin.write("\n")
        self.stdin.flush()


@pytest.fixture
def holder() -> Iterator[Holder]:
    """One that holds the name ``one``."""
    with Holder("one") as other:
        yield other
        other.kill()


def test_a_claim_can_be_found_and_is_its_owners_alone(claim: Claim, guests: Guests, run: Path) -> None:
    assert guests.names() == ["one"]
    assert guests.pid("one") == os.getpid()
    for path in (run, run / "one", run / "one" / "control", run / "one" / "lock"):
        assert not path.lstat().st_mode & 0o077, path
    assert stat.S_ISSOCK((run / "one" / "control").lstat().st_mode)


def test_somebody_connects(claim: Claim, guests: Guests) -> None:
    with guests.connect("one", 1.0) as ours:
        theirs, _ = claim.listener.accept()
        with theirs:
            ours.send(b"hello")
            assert theirs.recv(100) == b"hello"


def test_nobody_waits_to_be_accepted_for_longer_than_they_want(claim: Claim, guests: Guests) -> None:
    waiting = [guests.connect("one", 1.0) for _ in range(registry.BACKLOG + 1)]
    with pytest.raises(BlockingIOError):
        guests.connect("one", 0.01)
    for each in waiting:
        each.close()


def test_a_claim_that_is_released_leaves_nothing(guests: Guests, run: Path) -> None:
    registry.claim("one").release()
    assert guests.names() == []
    assert os.listdir(run) == []
    with pytest.raises(FileNotFoundError):
        guests.connect("one", 1.0)


def test_a_name_is_one_guests_at_a_time(holder: Holder) -> None:
    with pytest.raises(NameTakenError) as caught:
        registry.claim("one")
    assert str(caught.value) == (
        f"a guest named one runs already (process {holder.pid}); give this one another name with --name"
    )
    registry.claim("two").release()


def test_a_name_that_is_given_back_can_be_had(holder: Holder) -> None:
    holder.type()
    assert holder.wait() == 0
    registry.claim("one").release()


def test_what_a_killed_launcher_left_is_taken_over(holder: Holder, run: Path) -> None:
    holder.kill()
    holder.wait()
    assert os.listdir(run) == ["one"]
    claim = registry.claim("one")
    assert (run / "one" / "lock").read_text() == f"{os.getpid()}\n"
    claim.release()


def test_what_a_killed_launcher_left_is_removed_by_who_looks(holder: Holder, guests: Guests, run: Path) -> None:
    holder.kill()
    holder.wait()
    with pytest.raises(ConnectionRefusedError):
        guests.connect("one", 1.0)
    assert guests.names() == []
    assert os.listdir(run) == []


def test_a_launcher_that_is_stopped_lives(holder: Holder, guests: Guests) -> None:
    os.kill(holder.pid, signal.SIGSTOP)
    assert guests.names() == ["one"]


def test_a_directory_without_a_lock_is_nobodys(guests: Guests, run: Path) -> None:
    (run / "half").mkdir(parents=True)
    assert guests.names() == []
    assert os.listdir(run) == []


def test_other_things_there_are_no_guests_and_stay(guests: Guests, run: Path) -> None:
    run.mkdir(parents=True)
    (run / "a file").touch()
    (run / "file").touch()
    (run / "full").mkdir()
    (run / "full" / "precious").touch()
    assert guests.names() == []
    assert sorted(os.listdir(run)) == ["a file", "file", "full"]


def test_an_executed_launcher_keeps_the_name_and_who_waits_for_it(guests: Guests, run: Path) -> None:
    with Holder("one", "exec") as other:
        before = (run / "one" / "control").stat().st_ino
        other.type()
        with guests.connect("one", 1.0):
            other.hear()
            assert guests.names() == ["one"]
            assert guests.pid("one") == other.pid
            assert (run / "one" / "control").stat().st_ino == before
        other.type()
        assert other.wait() == 0
    assert os.listdir(run) == []


@pytest.mark.parametrize("left", ["", "1,2,3", "7,8,9,10,11", "a,b,c,d", "900,901,902,903", "0,0,0,0"])
def test_what_is_handed_on_wrongly_counts_for_nothing(left: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LGUEST_CLAIM", left)
    claim = registry.claim("one")
    assert "LGUEST_CLAIM" not in os.environ
    claim.release()


def test_a_release_leaves_what_has_become_another_guests(run: Path) -> None:
    first = registry.claim("one")
    for path in (run / "one" / "lock", run / "one" / "control"):
        path.unlink()
    (run / "one").rmdir()
    second = registry.claim("one")
    first.release()
    assert sorted(os.listdir(run / "one")) == ["control", "lock"]
    second.release()


def test_a_directory_that_others_may_enter_is_not_used(run: Path) -> None:
    run.mkdir(parents=True)
    run.parent.chmod(0o755)
    with pytest.raises(UnavailableError, match="must be its owner's alone; chmod 700"):
        registry.claim("one")


def test_a_link_in_a_guests_place_is_not_followed(run: Path, tmp_path: Path) -> None:
    runtime = run.parent
    runtime.mkdir(mode=0o700)
    run.mkdir(mode=0o700)
    (tmp_path / "elsewhere").mkdir()
    (run / "one").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnavailableError, match="is in the way"):
        registry.claim("one")
    assert os.listdir(tmp_path / "elsewhere") == []


def test_a_host_without_room_has_no_registry(run: Path) -> None:
    run.parent.mkdir(mode=0o700)
    run.touch(mode=0o600)
    with pytest.raises(UnavailableError, match="is in the way: it is no directory"):
        registry.claim("one")


def test_paths_may_be_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("x" * 100) / ("y" * 100)
    deep.mkdir(parents=True, mode=0o700)
    deep.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    claim = registry.claim("n" * registry.NAME_LENGTH)
    with Guests(deep / "lguest").connect(claim.name, 1.0) as channel:
        assert channel.type == socket.SOCK_SEQPACKET
    claim.release()


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("one", True), ("a.b_c-D9", True), ("..", False), (".", False), ("", False), ("a/b", False), ("x" * 65, False)],
)
def test_names(name: str, is_one: bool, guests: Guests) -> None:
    assert registry.is_name(name) is is_one
    with pytest.raises(FileNotFoundError):
        guests.connect(name, 1.0)
