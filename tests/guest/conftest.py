"""Real guests for tests: a stock Debian kernel under the ``lguest`` command, with an agent in it that does as told.

The embedded CPU executes them, whatever the host has: ``$LGUEST_TEST_ENGINE`` is what the launcher is told instead, for
example ``--cpu=kvm --cpus=2``.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from guestkit.cache import cache_directory
from guestkit.disk import MIB, make_sparse
from guestkit.guest import Guest, Launch
from guestkit.kit import GuestKit
from guestkit.namespaces import Namespace, obstacle
from guestkit.unprivileged import launcher_of_nobody


@pytest.fixture(scope="session")
def kit() -> GuestKit:
    """The kernel and the programs."""
    return GuestKit(cache_directory())


@pytest.fixture(scope="session")
def initrd(kit: GuestKit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initramfs with the agent."""
    path = tmp_path_factory.mktemp("initrd") / "agent.img"
    path.write_bytes(kit.initramfs("agent", ["pvpanic_mmio", "virtio_net"]))
    return path


@pytest.fixture(scope="session")
def initrd_with_tools(initrd: Path, kit: GuestKit) -> Path:
    """The same with mke2fs and perl in ``/sysroot/bin``."""
    path = initrd.with_name("agent-tools.img")
    path.write_bytes(initrd.read_bytes() + kit.sysroot.archive())
    return path


@pytest.fixture(scope="session")
def engine() -> list[str]:
    """The launcher's options that say what executes the guests."""
    return os.environ.get("LGUEST_TEST_ENGINE", "--cpu=unicorn").split()


@pytest.fixture
def launch(
    kit: GuestKit, engine: list[str], runtime: dict[str, str], request: pytest.FixtureRequest
) -> Iterator[Launch]:
    """Starts guests, all of which are gone after the test. Their names are theirs in this test only."""
    with ExitStack() as guests:

        def start(*options: str, tools: bool = False, **others: Any) -> Guest:
            others.setdefault("kernel", kit.kernel.image)
            others["variables"] = {**runtime, **others.get("variables", {})}
            others.setdefault("initrd", request.getfixturevalue("initrd_with_tools" if tools else "initrd"))
            return guests.enter_context(Guest(options=(*engine, *options), **others))

        yield start


@pytest.fixture(scope="session")
def public() -> Iterator[Path]:
    """A directory in which every user of this machine can read and write."""
    with tempfile.TemporaryDirectory(prefix="lguest-test-") as name:
        directory = Path(name)
        directory.chmod(0o777)
        yield directory


@pytest.fixture(scope="session")
def unprivileged_launcher(public: Path) -> list[str]:
    """The command that runs ``lguest`` without any privileges."""
    return launcher_of_nobody(public) if os.geteuid() == 0 else [sys.executable, "-m", "lguest_mp"]


@pytest.fixture
def launch_unprivileged(
    launch: Launch, public: Path, kit: GuestKit, initrd: Path, unprivileged_launcher: list[str]
) -> Launch:
    """Starts guests as a user without any privileges (nobody, where the tests run as root)."""
    kernel = public / "vmlinuz"
    readable_initrd = public / "initrd.img"
    for source, target in ((kit.kernel.image, kernel), (initrd, readable_initrd)):
        if not target.exists():
            shutil.copy(source, target)
            target.chmod(0o444)

    def start(*options: str, tools: bool = False, **others: Any) -> Guest:
        assert not tools
        return launch(*options, kernel=kernel, initrd=readable_initrd, launcher=unprivileged_launcher, **others)

    return start


@pytest.fixture
def host() -> Iterator[Namespace]:
    """A host's network for this test alone: the test is in it, and so are its sockets and the guests it launches."""
    if reason := obstacle():
        pytest.skip(reason)
    with Namespace() as namespace, namespace.entered():
        yield namespace


@pytest.fixture
def runtime() -> Iterator[dict[str, str]]:
    """Environment variables that give launchers a runtime directory for this test alone."""
    with tempfile.TemporaryDirectory(prefix="lguest-run-") as name:
        yield {"XDG_RUNTIME_DIR": name}


@pytest.fixture(scope="session")
def with_slirp(kit: GuestKit, public: Path) -> dict[str, str]:
    """Environment variables with which launchers, everybody's, find slirp4netns: the host's, or Debian's."""
    path = os.environ.get("PATH", os.defpath)
    return {"PATH": path if shutil.which("slirp4netns") else f"{kit.slirp.put_into(public / 'slirp')}:{path}"}


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """An empty disk of 64 MiB."""
    return make_sparse(tmp_path / "disk.img", 64 * MIB)
