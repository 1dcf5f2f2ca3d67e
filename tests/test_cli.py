"""The command line, as getopt_long(3) reads it, and what the program says when it is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lguest_mp import __version__, cli, core
from lguest_mp.config import (
    STUCK_AFTER,
    BlockConfig,
    CrashPolicy,
    GuestConfig,
    LinkConfig,
    NetConfig,
    OnCrash,
    RngConfig,
    TapConfig,
)
from lguest_mp.errors import LguestError


def test_a_guest_of_memory_and_kernel() -> None:
    assert cli.parse(["256", "vmlinuz"]) == GuestConfig(str(os.getpid()), 256 << 20, Path("vmlinuz"))


def test_everything_at_once() -> None:
    config = cli.parse(
        [
            *("-v", "--name=demo", "--block=a.img", "--rng", "--block", "b.img", "--initrd=first", "--initrd=i.img"),
            *("--username=nobody", "--chroot=/srv", "--cpu=lguest", "--machine=lguest"),
            *("64", "vmlinux", "root=/dev/vda", "quiet"),
        ]
    )
    assert config == GuestConfig(
        name="demo",
        memory=64 << 20,
        kernel=Path("vmlinux"),
        initrd=Path("i.img"),
        arguments=("root=/dev/vda", "quiet"),
        devices=(BlockConfig(Path("a.img")), RngConfig(), BlockConfig(Path("b.img"))),
        username="nobody",
        chroot=Path("/srv"),
        verbose=True,
        cpu="lguest",
        machine="lguest",
    )


def test_the_engine_is_the_hosts_choice_unless_it_is_named() -> None:
    assert cli.parse(["256", "vmlinuz"]).cpu == "auto"
    assert [cli.parse([f"--cpu={cpu}", "256", "vmlinuz"]).cpu for cpu in ("kvm", "unicorn")] == ["kvm", "unicorn"]


def test_how_many_processors() -> None:
    assert cli.parse(["256", "vmlinuz"]).cpus == 1
    assert cli.parse(["--cpus=255", "256", "vmlinuz"]).cpus == 255
    for nonsense in ("0", "256", "-1", "two", "", "2.5", "99999999999999999999"):
        with pytest.raises(LguestError, match="a guest has 1 to 255 processors"):
            cli.parse([f"--cpus={nonsense}", "256", "vmlinuz"])


def test_which_rings() -> None:
    assert cli.parse(["256", "vmlinuz"]).rings == "split"
    assert cli.parse(["--rings=packed", "256", "vmlinuz"]).rings == "packed"
    with pytest.raises(cli.UsageError, match="--rings=round is unknown"):
        cli.parse(["--rings=round", "256", "vmlinuz"])


def test_whether_memory_may_be_in_huge_pages() -> None:
    assert cli.parse(["256", "vmlinuz"]).huge_pages
    assert cli.parse(["--huge-pages=on", "256", "vmlinuz"]).huge_pages
    assert not cli.parse(["--huge-pages=off", "256", "vmlinuz"]).huge_pages
    with pytest.raises(cli.UsageError, match="--huge-pages=never is unknown; there is on, off"):
        cli.parse(["--huge-pages=never", "256", "vmlinuz"])


def test_the_machine_is_the_kernels_choice_unless_it_is_named() -> None:
    assert cli.parse(["256", "vmlinuz"]).machine is None
    assert cli.parse(["256", "vmlinuz", "--machine=pc"]).machine == "pc"


@pytest.mark.parametrize(
    ("arguments", "memory", "rest"),
    [([], 16, ()), (["32"], 32, ()), (["32", "64"], 32, ("64",)), (["hello", "64"], 16, ("hello", "64"))],
)
def test_the_demo_is_a_kernel_that_is_there(arguments: list[str], memory: int, rest: tuple[str, ...]) -> None:
    config = cli.parse(["--demo", *arguments])
    assert config.kernel.exists()
    assert (config.memory, config.arguments) == (memory << 20, rest)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rng", "256", "vmlinuz", "quiet"],
        ["256", "--rng", "vmlinuz", "quiet"],
        ["256", "vmlinuz", "--rng", "quiet"],
        ["256", "vmlinuz", "quiet", "--rng"],
        ["256", "vmlinuz", "quiet", "--rn"],
        ["--rng", "--", "256", "vmlinuz", "quiet"],
    ],
)
def test_options_stand_anywhere(arguments: list[str]) -> None:
    config = cli.parse(arguments)
    assert config.devices == (RngConfig(),)
    assert config.arguments == ("quiet",)


def test_the_core_is_the_compiled_one_if_there_is_one_unless_it_is_named() -> None:
    assert cli.parse(["256", "vmlinuz"]).core == "auto"
    assert cli.parse(["--core=python", "256", "vmlinuz"]).core == "python"


def test_behind_two_dashes_everything_is_the_kernels() -> None:
    config = cli.parse(["256", "vmlinuz", "root=/dev/vda", "--", "--rng", "-v", "--", "-b"])
    assert config.arguments == ("root=/dev/vda", "--rng", "-v", "--", "-b")
    assert not config.devices
    assert not config.verbose


def test_one_dash_is_an_argument() -> None:
    assert cli.parse(["256", "vmlinuz", "-"]).arguments == ("-",)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the memory is missing"),
        (["256"], "the kernel is missing"),
        (["--nonsense", "256", "vmlinuz"], "--nonsense not recognized"),
        (["-x", "256", "vmlinuz"], "-x not recognized"),
        (["--ver", "256", "vmlinuz"], "--ver not a unique prefix"),
        (["256", "vmlinuz", "--block"], "--block requires argument"),
        (["--rng=yes", "256", "vmlinuz"], "--rng must not have an argument"),
        (["--cpu=xen", "256", "vmlinuz"], "--cpu=xen is unknown; there is auto, kvm, unicorn, lguest"),
        (["--machine=vax", "256", "vmlinuz"], "--machine=vax is unknown; there is pc, lguest"),
        (["--core=apple", "256", "vmlinuz"], "--core=apple is unknown; there is auto, compiled, python"),
    ],
)
def test_what_is_no_command_line(arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    output, errors = capfd.readouterr()
    assert not output
    assert words in errors
    assert errors.startswith("lguest: ")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("size", ["many", "0x100", "-0", "25.6", "256M", " 256", "²", "9" * 10, ""])
def test_what_is_no_memory_size(size: str) -> None:
    with pytest.raises(LguestError, match="is no memory size; give whole MiB"):
        cli.parse(["--", size, "vmlinuz"])


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a]", "ä", "x" * 65, ".", ".."])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(LguestError, match="a name has 1 to 64 letters, digits"):
        cli.parse([f"--name={name}", "256", "vmlinuz"])


@pytest.mark.parametrize("option", ["--block=", "--initrd=", "--chroot="])
def test_a_file_without_a_name(option: str) -> None:
    with pytest.raises(LguestError, match="give a file"):
        cli.parse([option, "256", "vmlinuz"])


def test_crash_policies() -> None:
    config = cli.parse(
        ["--on-crash=net0:restart,intensity=7,period=1.5", "--on-crash=reset", "--on-crash=block0:stop", "1", "k"]
    )
    assert config.crash_policy_of("net0") == CrashPolicy(OnCrash.RESTART, 7, 1.5)
    assert config.crash_policy_of("block0").action is OnCrash.STOP
    assert config.crash_policy_of("console").action is OnCrash.RESET
    assert cli.parse(["1", "k"]).crash_policy_of("console") == CrashPolicy(OnCrash.RESTART, 5, 30)


@pytest.mark.parametrize(
    "value",
    [
        *("", "explode", "block0:", "restart,speed=3", "restart,intensity", "restart,period=0", "stop,intensity=1"),
        *("restart,intensity=-1", "restart,period=soon", "restart,period=.5", "restart,intensity=9999999999"),
    ],
)
def test_what_is_no_crash_policy_is_one_line(value: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main([f"--on-crash={value}", "256", "vmlinuz"]) == 1
    error = capfd.readouterr().err
    assert "--on-crash" in error
    assert error.count("\n") == 1


def test_when_a_worker_is_stuck() -> None:
    assert cli.parse(["1", "k"]).stuck_after == STUCK_AFTER
    assert cli.parse(["--stuck-after=0", "1", "k"]).stuck_after == 0
    assert cli.parse(["--stuck-after=2.5", "1", "k"]).stuck_after == 2.5
    with pytest.raises(LguestError, match="give seconds"):
        cli.parse(["--stuck-after=soon", "1", "k"])


def test_networks_are_devices_among_the_others() -> None:
    config = cli.parse(
        ["--net=link:lab", "--rng", "--tunnet=10.0.0.1:02:00:00:00:00:01", "--net", "tap,bridge=br0", "256", "vmlinuz"]
    )
    assert config.devices == (
        NetConfig(LinkConfig("lab")),
        RngConfig(),
        NetConfig(TapConfig(address="10.0.0.1"), mac=bytes.fromhex("020000000001")),
        NetConfig(TapConfig(bridge="br0")),
    )


def test_a_network_that_is_none_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--net=token-ring", "256", "vmlinuz"]) == 1
    error = capfd.readouterr().err
    assert error.startswith("lguest: --net=token-ring: ")
    assert error.count("\n") == 1


def test_help_names_every_option(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    output, errors = capfd.readouterr()
    assert not errors
    for option in (
        "verbose",
        "net",
        "tunnet",
        "block",
        "rng",
        "initrd",
        "username",
        "chroot",
        "name",
        "cpu",
        "machine",
        "on-crash",
        "stuck-after",
        "demo",
    ):
        assert f"--{option.rstrip('=')}" in output
    assert all(len(line) <= 120 for line in output.splitlines())


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capfd.readouterr().out == f"lguest {__version__}\ncore: {core.describe()}\n"
    assert cli.main(["--version", "--core=python"]) == 0
    assert capfd.readouterr().out == f"lguest {__version__}\ncore: Python\n"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lguest_mp", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def test_a_kernel_that_does_not_exist_is_one_line() -> None:
    result = run("256", "/no/such/kernel")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == "lguest: cannot open kernel /no/such/kernel: No such file or directory\n"


def test_a_disk_that_does_not_exist_is_one_line() -> None:
    result = run("--block=/no/such/disk", "256", "/no/such/kernel")
    assert result.returncode == 1
    assert result.stderr.startswith("lguest: ")
    assert "/no/such/disk" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("size", ["0", "1", "999999999"])
def test_a_memory_size_that_makes_no_sense_is_one_line(size: str) -> None:
    result = run(size, "/no/such/kernel")
    assert result.returncode == 1
    assert result.stderr.startswith("lguest: ")
    assert "memory" in result.stderr
    assert result.stderr.count("\n") == 1


def test_one_line_where_there_is_no_dev_lguest() -> None:
    if os.path.exists("/dev/lguest"):
        pytest.skip("this host has it")
    result = run("--cpu=lguest", "256", "/no/such/kernel")
    assert result.returncode == 1
    assert result.stderr.startswith("lguest: there is no /dev/lguest")
    assert result.stderr.count("\n") == 1


def test_dev_lguest_runs_no_pc() -> None:
    result = run("--cpu=lguest", "--machine=pc", "256", "/no/such/kernel")
    assert result.returncode == 1
    assert result.stderr.startswith("lguest: --cpu=lguest runs lguest's own guests only")


def test_help_imports_no_more_than_the_command_line() -> None:
    """Its time is the start-up time of everything."""
    code = "import sys; from lguest_mp import cli; cli.parse(['1', 'k']); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"unicorn", "psutil", "elftools", "lz4", "zstandard", "setproctitle", "logging", "threading", "ctypes"}
    assert not heavy & set(modules)
