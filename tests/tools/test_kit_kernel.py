"""Modules of a kernel that was unpacked and not installed: each comes after what it needs."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from guestkit.kernel import Kernel
from guestkit.progress import SetupError


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    """A kernel with modules net -> bus, ring -> bus (xz), and ``core`` built in."""
    (tmp_path / "boot").mkdir()
    (tmp_path / "boot" / "vmlinuz-9.9-test").write_bytes(b"")
    modules = tmp_path / "lib" / "modules" / "9.9-test"
    modules.mkdir(parents=True)
    (modules / "modules.builtin").write_text("kernel/core.ko\n")
    for name, needs, data in (("bus", "", b"B"), ("my-net", "ring,bus,core", b"N")):
        (modules / f"{name}.ko").write_bytes(data + b"\0license=GPL\0depends=" + needs.encode() + b"\0name=x\0")
    (modules / "ring.ko.xz").write_bytes(lzma.compress(b"R\0depends=bus\0"))
    return Kernel(tmp_path)


def test_modules_come_after_what_they_need(kernel: Kernel) -> None:
    assert kernel.version == "9.9-test"
    modules = kernel.modules(["my_net"])
    assert [module.name for module in modules] == ["bus", "ring", "my_net"]
    assert [module.data[:1] for module in modules] == [b"B", b"R", b"N"]
    assert modules[-1].needs == ("bus", "ring")


def test_what_is_built_in_is_left_out(kernel: Kernel) -> None:
    assert kernel.modules(["core"]) == []


def test_an_unknown_module_is_told(kernel: Kernel) -> None:
    with pytest.raises(SetupError, match="has no module wifi"):
        kernel.modules(["wifi"])
