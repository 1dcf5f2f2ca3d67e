"""A distribution's kernel and its modules, as unpacked from its package.

The order in which modules are loaded is usually worked out when the package is installed (``modules.dep``). Nothing is
installed here, so each module is asked itself: ``depends=`` in its ``.modinfo`` section.
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from guestkit.progress import SetupError

_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


@dataclass(frozen=True)
class Module:
    """A module of the kernel, uncompressed, and what it needs, in an order that can be loaded."""

    name: str
    data: bytes
    needs: tuple[str, ...]


class Kernel:
    """A kernel: its image, its version and its modules."""

    def __init__(self, tree: Path) -> None:
        images = sorted(tree.glob("boot/vmlinuz-*")) or sorted(tree.glob("usr/lib/modules/*/vmlinuz"))
        if not images:
            raise SetupError(f"there is no kernel in {tree}; delete it and try again")
        #: The bzImage.
        self.image = images[-1]
        trees = [*sorted(tree.glob("lib/modules/*")), *sorted(tree.glob("usr/lib/modules/*"))]
        if not trees:
            raise SetupError(f"the kernel in {tree} came without modules; delete it and try again")
        modules = trees[-1]
        self.version = modules.name
        self._files = {_module_name(path): path for path in modules.rglob("*.ko*")}
        builtin = (modules / "modules.builtin").read_text()
        self._builtin = {_module_name(Path(line)) for line in builtin.split()}

    def modules(self, names: Sequence[str]) -> list[Module]:
        """The modules ``names`` and all that they need, each after what it needs.

        What is built into the kernel is left out. SetupError for a module that does not exist.
        """
        ordered: dict[str, Module] = {}
        for name in names:
            self._add(name.replace("-", "_"), ordered)
        return list(ordered.values())

    def _add(self, name: str, ordered: dict[str, Module]) -> None:
        if name in ordered or name in self._builtin:
            return
        if name not in self._files:
            raise SetupError(f"the kernel {self.version} has no module {name}")
        data = _read(self._files[name])
        depends = _DEPENDS.search(data)
        needs: dict[str, None] = {}
        for other in depends[1].decode().replace("-", "_").split(",") if depends and depends[1] else ():
            self._add(other, ordered)
            if other in ordered:
                needs.update(dict.fromkeys([*ordered[other].needs, other]))
        ordered[name] = Module(name, data, tuple(needs))


def _module_name(path: Path) -> str:
    return path.name.partition(".")[0].replace("-", "_")


def _read(path: Path) -> bytes:
    if path.suffix == ".ko":
        return path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    raise SetupError(f"{path.name} is compressed in a way that is not known here")
