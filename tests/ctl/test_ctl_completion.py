"""What a shell offers where the cursor is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fakelaunchers import running

from lguest_mp.ctl import cli
from lguest_mp.ctl.completion import SCRIPTS


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["re"], ["reboot", "reset", "restart"]),
        (["-"], ["--help", "--runtime-dir", "--user"]),
        (["--user", ""], []),
        (["--runtime-dir=/nowhere", "ps", ""], []),
        (["list", ""], []),
        (["ps", ""], ["one", "two"]),
        (["ps", "t"], ["two"]),
        (["ps", "one", ""], []),
        (["ps", "--l"], ["--long"]),
        (["top", "-s", ""], []),
        (["stop", ""], ["one", "two"]),
        (["restart", "one", ""], ["block0", "block0/requestq"]),
        (["restart", "one", "block0", ""], []),
        (["reset", "nobody", ""], []),
        (["log", "one", "--source", "su"], ["supervisor"]),
        (["completion", ""], sorted(SCRIPTS)),
        (["no-such-command", ""], []),
    ],
)
def test_candidates(capsys: pytest.CaptureFixture[str], words: list[str], found: list[str]) -> None:
    with running("one"), running("two"):
        assert cli.main(["complete", "--", *words]) == 0
    assert capsys.readouterr().out.split() == found


def test_devices_come_without_a_name_where_just_one_guest_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with running("one"):
        cli.main(["complete", "--", "restart", ""])
    assert capsys.readouterr().out.split() == ["block0", "block0/requestq", "one"]


def test_bash_completes(tmp_path: Path) -> None:
    if (bash := shutil.which("bash")) is None:
        pytest.skip("this host has no bash")
    program = tmp_path / "lguestctl"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m lguest_mp.ctl "$@"\n')
    program.chmod(0o755)
    script = """
        . <(lguestctl completion bash)
        COMP_WORDS=(lguestctl ps o) COMP_CWORD=2
        _lguestctl
        echo "${COMPREPLY[@]}"
        complete -p lguestctl
    """
    variables = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with running("one"):
        done = subprocess.run([bash, "-c", script], check=True, env=variables, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["one", "complete -F _lguestctl lguestctl"]
