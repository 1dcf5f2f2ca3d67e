"""Whether KVM is used: what the launcher's look at it finds, and what comes of that."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from lguest_mp import demo
from lguest_mp.config import GuestConfig
from lguest_mp.errors import LguestError
from lguest_mp.supervisor import kvm_probe, parts
from lguest_mp.supervisor.kvm_probe import Probe, Verdict

NONE = Path("/no/such/kernel")
SLOW = "it interprets guest kernels"


class FoundOut(Probe):
    """A look that is over."""

    def __init__(self, reason: str = "", *, there: bool = True) -> None:
        self.file = os.open(os.devnull, os.O_RDWR) if there else None
        super().__init__(self.file, reason)
        self.found = Verdict(self.file, reason)

    def verdict(self) -> Verdict:
        return self.found

    def is_open(self) -> bool:
        assert self.file is not None
        return Path(f"/proc/self/fd/{self.file}").exists()

    def close(self) -> None:
        self.found.discard()


def guest(kernel: Path = NONE, cpu: str = "auto", cpus: int = 1, machine: str | None = None) -> GuestConfig:
    return GuestConfig("test", 16 << 20, kernel, cpu=cpu, cpus=cpus, machine=machine)


def test_a_good_kvm_is_used() -> None:
    probe = FoundOut()
    made = parts.of(guest(cpus=4), probe)
    assert made.engine == "KVM"
    assert made.machine_files == (probe.file,)
    assert made.make_watches(None, 3) is None  # type: ignore[arg-type] # whatever there is to watch
    probe.close()


def test_a_kvm_that_interprets_is_passed_by_and_the_user_may_know() -> None:
    probe = FoundOut(SLOW)
    made = parts.of(guest(), probe)
    assert made.engine == f"the embedded CPU; KVM is not used: {SLOW}"
    assert made.machine_files == ()
    assert not probe.is_open()


def test_where_there_is_none_so_is_it() -> None:
    assert parts.of(guest(), FoundOut("there is no /dev/kvm", there=False)).engine.endswith("there is no /dev/kvm")


def test_whoever_asks_for_kvm_gets_it_and_a_warning(capfd: pytest.CaptureFixture[str]) -> None:
    probe = FoundOut(SLOW)
    assert parts.of(guest(cpu="kvm"), probe).engine == "KVM"
    assert capfd.readouterr().err == f"lguest: --cpu=kvm: {SLOW}; a stock kernel will not come up\n"
    probe.close()


@pytest.mark.parametrize(
    ("config", "reason", "line"),
    [
        (guest(cpu="kvm"), "there is no /dev/kvm", "--cpu=kvm: there is no /dev/kvm; leave it out"),
        (guest(cpus=2), "there is no /dev/kvm", "--cpus=2: the embedded CPU is one processor.*there is no /dev/kvm"),
        (guest(demo.kernel(), cpu="kvm"), "", "--cpu=kvm runs 64-bit kernels only"),
        (guest(demo.kernel(), cpus=2), "", "--cpus=2: a guest of lguest's own is one processor"),
    ],
)
def test_what_cannot_be_is_one_line(config: GuestConfig, reason: str, line: str) -> None:
    with pytest.raises(LguestError, match=line):
        parts.of(config, FoundOut(reason, there=False))


@pytest.mark.parametrize("cpu", ["unicorn", "lguest"])
def test_other_engines_are_one_processor(cpu: str) -> None:
    with pytest.raises(LguestError, match="--cpus=2"):
        parts.of(guest(cpu=cpu, cpus=2))


def test_a_guest_of_lguests_own_leaves_kvm_alone() -> None:
    probe = FoundOut()
    parts.of(guest(demo.kernel()), probe)
    assert not probe.is_open()


def test_a_look_at_this_hosts_kvm_ends_and_leaves_nothing() -> None:
    files = set(os.listdir("/proc/self/fd"))
    # Whoever runs the tests may have children of its own. Those that have ended and were not reaped are children, too.
    children = {child.pid for child in psutil.Process().children()}
    verdict = kvm_probe.start().verdict()
    assert verdict.file is not None or verdict.reason
    verdict.discard()
    assert set(os.listdir("/proc/self/fd")) == files
    assert {child.pid for child in psutil.Process().children()} <= children


@pytest.mark.parametrize(
    ("path", "reason"),
    [("/no/such/device", "there is no /no/such/device"), ("/dev/null", "/dev/kvm: asking for its version: Inapprop")],
)
def test_what_is_no_kvm_is_told(monkeypatch: pytest.MonkeyPatch, path: str, reason: str) -> None:
    monkeypatch.setattr(kvm_probe, "PATH", path)
    verdict = kvm_probe.start().verdict()
    verdict.discard()
    assert verdict.reason.startswith(reason)


def test_a_device_that_may_not_be_opened_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may open everything")
    device = tmp_path / "kvm"
    device.touch(0o000)
    monkeypatch.setattr(kvm_probe, "PATH", str(device))
    assert "is not for this user" in kvm_probe.start().verdict().reason


def test_a_child_that_dies_is_a_no(monkeypatch: pytest.MonkeyPatch) -> None:
    def die(_file: int) -> None:
        os._exit(1)

    monkeypatch.setattr(kvm_probe, "PATH", os.devnull)
    monkeypatch.setattr(kvm_probe, "_look", die)
    verdict = kvm_probe.start().verdict()
    verdict.discard()
    assert verdict.reason == "a look at it failed"
