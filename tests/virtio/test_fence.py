"""The fence, and what is known of it. That it fences is for test_wakeups.py to show."""

from __future__ import annotations

import ctypes

import pytest

from lguest_mp.virtio import fence
from lguest_mp.virtio.fence import GlobalFence, LocalFence


def test_the_strongest_is_global_where_the_kernel_has_it() -> None:
    """Linux 4.16 and later has it; all that these tests run on."""
    assert fence.register()
    strongest = fence.strongest()
    assert isinstance(strongest, GlobalFence)
    assert strongest.reaches_guest
    strongest.full()


def test_the_local_fence_does_not_reach_the_guest() -> None:
    LocalFence().full()
    assert not LocalFence().reaches_guest


def test_the_local_fence_is_enough_for_a_guest_that_has_fences() -> None:
    assert LocalFence(guest_has_fences=True).reaches_guest


def test_a_kernel_that_refuses_leaves_the_local_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def __init__(self, name: None) -> None:
            self.syscall = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_long, ctypes.c_int, ctypes.c_uint)(lambda *_: -1)

    monkeypatch.setattr("ctypes.PyDLL", Refusing)
    assert isinstance(fence.strongest(), LocalFence)
