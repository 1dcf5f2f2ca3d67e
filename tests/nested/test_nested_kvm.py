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

ONE_CPU = (
    "test_guest_kvm.py",
    "test_guest_boot.py::test_a_guest_without_message_signalled_interrupts_works",
    "test_guest_rng.py",
    "test_guest_drivers.py::test_the_block_driver",
    "test_guest_life.py::test_many_reboots_in_a_row",
)
#: A boot takes twice as long with two.
TWO_CPUS = (
    "test_guest_kvm.py::test_a_guest_has_the_processors_that_it_was_given",
    "test_guest_kvm.py::test_a_disk_read_leaves_the_guest_for_nobody",
    "test_guest_kvm.py::test_a_processor_that_goes_takes_no_interrupt_with_it",
    "test_guest_kvm.py::test_a_guest_that_only_halts_has_switched_itself_off",
    "test_guest_boot.py::test_a_guest_without_message_signalled_interrupts_works",
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
        ("--cpu=kvm", ONE_CPU),
        ("--cpu=kvm --cpus=2", TWO_CPUS),
    ],
)
def test_guests_on_kvm(machine: NestedMachine, engine: str, tests: tuple[str, ...]) -> None:
    if sys.implementation.name != "cpython":
        pytest.skip("the machine has the Python that runs the tests, and that is not CPython")
    names = " ".join(f"'tests/guest/{name}'" for name in tests)
    variables = f"LGUEST_TEST_ENGINE='{engine}' LGUEST_TEST_TIMES=2"
    try:
        shown = machine.python(
            "-m pytest -q -p no:cacheprovider --color=no", names, variables=variables, seconds=PATIENCE
        )
    except CommandFailed as failure:
        pytest.fail(str(failure), pytrace=False)
    assert re.search(r"\d+ passed", shown)
