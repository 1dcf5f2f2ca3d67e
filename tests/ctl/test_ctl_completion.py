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


#: For each shell a script that completes ``lguestctl ps o``, and prints what it found.
SHELLS = {
    "bash": """
        . <(lguestctl completion bash)
        COMP_WORDS=(lguestctl ps o) COMP_CWORD=2
        _lguestctl
        echo "${COMPREPLY[@]}"
    """,
    "zsh": """
        compdef() { :; }
        compadd() { shift 2; print -l -- "$@"; }
        eval "$(lguestctl completion zsh)"
        words=(lguestctl ps o) CURRENT=3
        _lguestctl
    """,
    "fish": """
        lguestctl completion fish | source
        complete -C "lguestctl ps o"
    """,
}


@pytest.mark.parametrize("name", sorted(SHELLS))
def test_in_the_shells(tmp_path: Path, name: str) -> None:
    if (shell := shutil.which(name)) is None:
        pytest.skip(f"this host has no {name}")
    program = tmp_path / "lguestctl"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m lguest_mp.ctl "$@"\n')
    program.chmod(0o755)
    variables = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    with running("one"):
        done = subprocess.run([shell, "-c", SHELLS[name]], check=True, env=variables, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["one"]
