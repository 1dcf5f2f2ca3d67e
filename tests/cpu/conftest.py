"""What the tests of the embedded CPU share."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tinymachine import ALIAS, CODE, DATA, EXIT_PORT, IDT, STACK, Machine


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.engine.close()


@pytest.fixture
def assemble(tmp_path: Path) -> Callable[[str], bytes]:
    """GNU as, Intel syntax; symbols as in this file. The code is for address CODE."""
    if shutil.which("as") is None or shutil.which("objcopy") is None or shutil.which("ld") is None:
        pytest.skip("needs GNU binutils")
    symbols = {"CODE": CODE, "IDT": IDT, "STACK": STACK, "ALIAS": ALIAS, "EXIT_PORT": EXIT_PORT, "DATA": DATA}

    def run(source: str) -> bytes:
        text = ".intel_syntax noprefix\n.globl _start\n"
        text += "".join(f".set {name}, {value}\n" for name, value in symbols.items())
        text += """
        .macro exit
            mov dx, EXIT_PORT
            out dx, eax
            jmp .
        .endm
        .macro init
            mov rsp, STACK
            lidt [rip + 9f]
            mov ax, 0x38
            ltr ax
            jmp 8f
        9:  .word 0xfff
            .quad IDT
        8:
        .endm
        _start:
        """
        source_file, object_file = tmp_path / "guest.S", tmp_path / "guest.o"
        image, binary = tmp_path / "guest", tmp_path / "guest.bin"
        source_file.write_text(text + source)
        subprocess.run(["as", "--64", "-o", object_file, source_file], check=True)
        subprocess.run(["ld", f"-Ttext={CODE:#x}", "-o", image, object_file], check=True)
        subprocess.run(["objcopy", "-O", "binary", "-j", ".text", image, binary], check=True)
        return binary.read_bytes()

    return run


@pytest.fixture
def kicker(machine: Machine) -> Iterator[Callable[[], None]]:
    """Kicks the CPU from another thread as fast as it can, once it is called; ends with the test."""
    stop = threading.Event()

    def kick() -> None:
        while not stop.is_set():
            machine.kick()

    thread = threading.Thread(target=kick)
    yield thread.start
    stop.set()
    if thread.ident is not None:
        thread.join()
