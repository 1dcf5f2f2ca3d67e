"""Whether this host has a KVM to test with; where it has none, the tests of it are skipped."""

from __future__ import annotations

import os

import pytest

from lguest_mp.cpu.kvm.api import PATH, Kvm, open_device
from lguest_mp.errors import LguestError


def open_or_skip() -> int:
    """The device, of a KVM that can make a machine (if not run a stock kernel); whoever asked closes it."""
    try:
        fd = open_device()
    except OSError as error:
        pytest.skip(f"{PATH}: {error.strerror}")
    try:
        Kvm(fd).create_vm().close()
    except LguestError as error:
        os.close(fd)
        pytest.skip(str(error))
    return fd
