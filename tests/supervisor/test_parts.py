"""Which parts a guest is made of: by its kernel, or as the user says."""

from __future__ import annotations

from pathlib import Path

import pytest

from lguest_mp import demo
from lguest_mp.config import BlockConfig, GuestConfig
from lguest_mp.errors import LguestError
from lguest_mp.memory import GuestMemory
from lguest_mp.supervisor import parts
from lguest_mp.virtio.device import Feature, QueueLayout
from lguest_mp.virtio.ledger import Ledger
from lguest_mp.virtio.packed import PackedQueue

DEMO = demo.kernel()
NONE = Path("/no/such/kernel")


def guest(kernel: Path, **others: str) -> GuestConfig:
    return GuestConfig("test", 16 << 20, kernel, **others)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "device_memory"),
    [
        (guest(DEMO), 1 << 20),
        (guest(NONE), 0),
        (guest(DEMO, machine="pc"), 0),
        (guest(NONE, machine="lguest"), 1 << 20),
    ],
)
def test_the_kernel_chooses_its_machine_unless_the_user_does(config: GuestConfig, device_memory: int) -> None:
    assert parts.of(config).device_memory == device_memory


def test_a_32_bit_kernel_for_a_pc_is_one_line() -> None:
    config = guest(DEMO, machine="pc")
    with pytest.raises(LguestError, match=r"is a 32-bit little-endian ELF file; give a 64-bit x86"):
        parts.of(config).read_kernel(config)


def test_too_many_devices_are_found_before_anything_is_forked(tmp_path: Path) -> None:
    disks = []
    for number in range(30):
        path = tmp_path / f"{number}.img"
        path.write_bytes(bytes(512))
        disks.append(BlockConfig(path))
    config = GuestConfig("test", 16 << 20, DEMO, devices=tuple(disks))
    with pytest.raises(LguestError, match=r"^too many devices: they have 32 queues"):
        parts.of(config).open_devices(config, None)
    # And nothing is left of them: they can be opened again.
    for device in parts.pc().open_devices(config, None):
        device.close()


def test_dev_lguest_is_opened_at_once() -> None:
    if Path("/dev/lguest").exists():
        pytest.skip("this host has it")
    with pytest.raises(LguestError, match="there is no /dev/lguest"):
        parts.of(guest(DEMO, cpu="lguest"))


def test_dev_lguest_runs_no_pc() -> None:
    with pytest.raises(LguestError, match="runs lguest's own guests only"):
        parts.of(guest(DEMO, cpu="lguest", machine="pc"))


def test_a_guest_of_lguests_own_has_split_rings() -> None:
    with pytest.raises(LguestError, match=r"^--rings=packed: "):
        parts.of(guest(DEMO, rings="packed"))


def test_a_driver_that_accepts_packed_rings_gets_them() -> None:
    memory, layout = GuestMemory(1 << 20), QueueLayout(16, 0x1000, 0x2000, 0x3000)
    for rings, features, is_packed in (
        ("packed", Feature.RING_PACKED, True),
        ("packed", 0, False),
        ("split", 0, False),
    ):
        make = parts.of(guest(NONE, rings=rings)).make_queue
        queue = make(memory, layout, features, 0, 0, None, Ledger())
        assert isinstance(queue, PackedQueue) is is_packed
