"""The launcher on the kernel's own KVM, wherever the tests run: in a machine with KVM that QEMU's translator makes.

What is run in it are the tests of real guests (``tests/guest``), those that take the least time and meet the most. Each
instruction of the guest's is translated and each of its exits is several of the machine's, so patience is needed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestkit.cache import cache_directory
from guestkit.guest import CommandFailed
from guestkit.kit import GuestKit
from guestkit.nested import NestedMachine

CHECKOUT = Path(__file__).resolve().parents[2]
#: How long all tests may take in there, seconds.
PATIENCE = 1500.0

#: With two processors, where a boot takes thrice as long.
TWICE = (
    "test_guest_kvm.py",
    "test_guest_boot.py::test_each_virtqueue_has_a_message_signalled_interrupt_of_its_own",
    "test_guest_boot.py::test_a_guest_without_message_signalled_interrupts_works",
    "test_guest_life.py::test_a_panic_that_the_kernel_answers_with_a_reboot",
)
ONCE = (
    "test_guest_kvm.py",
    "test_guest_boot.py::test_each_virtqueue_is_served_by_a_process_that_says_so",
    "test_guest_boot.py::test_each_virtqueue_has_a_message_signalled_interrupt_of_its_own",
    "test_guest_boot.py::test_a_guest_without_message_signalled_interrupts_works",
    "test_guest_disk.py::test_the_whole_disk_holds_what_is_written",
    "test_guest_rng.py",
    "test_guest_life.py::test_power_off",
    "test_guest_life.py::test_many_reboots_in_a_row",
    "test_guest_drivers.py::test_the_block_driver",
    "test_guest_drivers.py::test_the_pci_driver_of_every_device",
    "test_guest_life.py::test_a_panic_that_the_launcher_hears_of",
    "test_guest_life.py::test_the_machines_death_is_the_guests",
    "test_guest_life.py::test_a_workers_death_ends_the_guest_if_the_user_wants_it[block0/requestq]",
)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NestedMachine]:
    kit = GuestKit(cache_directory())
    initrd = tmp_path_factory.mktemp("nested") / "initrd.img"
    initrd.write_bytes(kit.nested_initramfs(CHECKOUT))
    with NestedMachine(kit.qemu, kit.kernel, initrd) as machine:
        machine.boot()
        yield machine


@pytest.mark.parametrize(
    ("engine", "tests"),
    [
        ("--cpu=kvm", ONCE),
        ("--cpu=kvm --cpus=2", TWICE),
    ],
)
def test_guests_on_kvm(machine: NestedMachine, engine: str, tests: tuple[str, ...]) -> None:
    if sys.implementation.name != "cpython":
        pytest.skip("the machine has the Python that runs the tests, and that is not CPython")
    names = " ".join(f"'tests/guest/{name}'" for name in tests)
    variables = f"LGUEST_TEST_ENGINE='{engine}' LGUEST_TEST_TIMES=3"
    try:
        shown = machine.python(
            "-m pytest -q -p no:cacheprovider --color=no", names, variables=variables, seconds=PATIENCE
        )
    except CommandFailed as failure:
        pytest.fail(str(failure), pytrace=False)
    assert re.search(r"\d+ passed", shown)
