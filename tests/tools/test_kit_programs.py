"""The programs by which stale code is found do on the host's CPU what is expected of them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from guestkit.programs import make_program


def test_programs_print_what_was_computed(tmp_path: Path) -> None:
    lines = set()
    for seed in range(40):
        program = make_program(seed)
        path = tmp_path / f"p{seed}"
        path.write_bytes(program.image)
        path.chmod(0o755)
        printed = subprocess.run([path], check=True, capture_output=True, text=True).stdout
        assert printed == program.line + "\n"
        lines.add(printed)
    assert len(lines) == 40


def test_programs_have_the_same_addresses_and_other_code() -> None:
    one, other = make_program(1, pages=16), make_program(2, pages=16)
    assert len(one.image) == len(other.image) == 17 * 4096
    for at in range(4096, 17 * 4096, 4096):
        page, another = one.image[at : at + 4096], other.image[at : at + 4096]
        assert any(page)
        assert page != another
