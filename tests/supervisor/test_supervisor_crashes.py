"""What becomes of a device whose worker crashes, policy by policy, and of workers that get stuck."""

from __future__ import annotations

import getpass

import pytest
from launching import Launch, Launched


def said(launcher: Launched, text: str) -> list[str]:
    return [line for line in launcher.lines if text in line]


class TestRestart:
    """The default."""

    def test_another_worker_goes_on(self, launch: Launch) -> None:
        launcher = launch("crashes")
        assert launcher.finish() == 0
        ways = ("was killed by SIGSEGV", "exited with status 70", "exited with status 9")
        assert said(launcher, "restarted") == [f"block0/requestq {way}; it is restarted" for way in ways]

    def test_too_often(self, launch: Launch) -> None:
        launcher = launch("crashes_too_often", arguments=("5",))
        assert launcher.finish() == 0
        line = "console/transmitq was killed by SIGSEGV, after 5 restarts within 30 s; the device is stopped"
        assert said(launcher, "too often") == []
        assert said(launcher, "stopped") == [f"{line} and needs a reset"]

    def test_as_often_as_the_user_says(self, launch: Launch) -> None:
        option = "--on-crash=console:restart,intensity=2,period=60.5"
        launcher = launch("crashes_too_often", option, arguments=("2",))
        assert launcher.finish() == 0
        assert said(launcher, "after 2 restarts within 60.5 s")

    def test_one_that_completes_nothing_is_replaced_later_and_later(self, launch: Launch) -> None:
        launcher = launch("crashes_in_a_loop")
        assert launcher.finish() == 0
        ends = [line.partition("; ")[2] for line in said(launcher, "block0/requestq was killed")]
        assert ends[:3] == ["it is restarted", "it is restarted in 0.05 s", "it is restarted in 0.1 s"]


class TestReset:
    """The guest is told that the device needs a reset."""

    @pytest.mark.parametrize("option", ["reset", "console:reset"])
    def test_at_the_first_crash(self, launch: Launch, option: str) -> None:
        launcher = launch("crashes_too_often", f"--on-crash={option}", arguments=("0",))
        assert launcher.finish() == 0
        assert said(launcher, "needs a reset") == ["console/transmitq was killed by SIGSEGV; the device needs a reset"]


class TestStop:
    """The guest is stopped, with exit status 4."""

    def test_for_all_devices(self, launch: Launch) -> None:
        launcher = launch("worker_crash", "--on-crash=stop")
        assert launcher.finish() == 4
        assert launcher.lines[-1] == "the worker block0/requestq was killed by SIGSEGV; the guest is stopped"

    def test_for_one(self, launch: Launch) -> None:
        """What is said of a device goes before what is said of all, in whatever order."""
        launcher = launch("worker_crash", "--on-crash=block0:stop", "--on-crash=restart")
        assert launcher.finish() == 4

    def test_for_another_one(self, launch: Launch) -> None:
        launcher = launch("crashes", "--on-crash=console:stop")
        assert launcher.finish() == 0

    def test_for_one_that_is_not_there(self, launch: Launch) -> None:
        launcher = launch("crashes", "--on-crash=block7:stop")
        assert launcher.finish() == 1
        assert launcher.lines == ["--on-crash=block7:...: there is no device block7; there is console, block0, mule0"]


class TestStuck:
    """A worker that has work and does none of it is killed, and has crashed."""

    def test_in_each_way(self, launch: Launch) -> None:
        launcher = launch("gets_stuck", "--stuck-after=0.4")
        assert launcher.finish() == 0
        name = "block0/requestq"
        stopped = f"{name} is stopped by a signal, and has done nothing of its work for 0.4 s; it is killed"
        assert said(launcher, "nothing of its work")[:2] == [stopped, stopped]
        assert said(launcher, "restarted")[:2] == [f"{name} was stuck (is stopped by a signal); it is restarted"] * 2
        [spins] = said(launcher, "spins")[:1]
        assert spins.startswith(f"{name} spins, with ")

    def test_a_policy_holds_for_it_too(self, launch: Launch) -> None:
        launcher = launch("worker_spin", "--stuck-after=0.4", "--on-crash=stop")
        assert launcher.finish() == 4
        assert said(launcher, "the worker block0/requestq was stuck (spins, with ")


@pytest.mark.parametrize("options", [(), (f"--username={getpass.getuser()}",)], ids=["by exec", "in place"])
def test_nobody_reboots_while_somebody_may_still_write(launch: Launch, options: tuple[str, ...]) -> None:
    launcher = launch("reboots_with_one_left_behind", *options)
    assert launcher.finish() == 1
    assert launcher.lines == [
        "mule0/requestq waits for the host and cannot be ended; it is left behind",
        "the guest cannot reboot: mule0/requestq cannot be ended, and may still write",
    ]


def test_restarts_are_counted_across_reboots(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> None:
    kernel = tmp_path_factory.mktemp("kernel") / "kernel"
    launcher = launch("reboots", kernel=str(kernel), arguments=("2",))
    assert launcher.finish() == 0
    assert [line for line in launcher.output.splitlines() if "restarts" in line] == [
        f"restarts {restarts}" for restarts in ("", "block0/requestq=1", "block0/requestq=1")
    ]
