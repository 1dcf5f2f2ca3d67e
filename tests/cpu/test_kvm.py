"""KVM's own side: what CPUID says, what its registers are called, which hosts it is good on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from kvmhost import open_or_skip

from lguest_mp.cpu.kvm import api, probe
from lguest_mp.cpu.kvm.api import KVM_CPUID_FLAG_SIGNIFCANT_INDEX, Cap, CpuidEntry, Kvm, KvmError
from lguest_mp.cpu.kvm.cpuid import entries
from lguest_mp.cpu.kvm.engine import KvmEngine
from lguest_mp.cpu.kvm.interrupts import KvmInterrupts
from lguest_mp.errors import LguestError
from lguest_mp.memory import GuestMemory


@pytest.fixture
def device() -> Iterator[int]:
    file = open_or_skip()
    yield file
    os.close(file)


# Numbers (from the table in the kernel's Documentation/virt/kvm/api.rst, worked out by hand)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("KVM_CREATE_VM", 0xAE01),
        ("KVM_GET_SUPPORTED_CPUID", 0xC008AE05),
        ("KVM_SET_USER_MEMORY_REGION", 0x4020AE46),
        ("KVM_SET_IDENTITY_MAP_ADDR", 0x4008AE48),
        ("KVM_SET_GSI_ROUTING", 0x4008AE6A),
        ("KVM_IRQFD", 0x4020AE76),
        ("KVM_IOEVENTFD", 0x4040AE79),
        ("KVM_ENABLE_CAP", 0x4068AEA3),
        ("KVM_SIGNAL_MSI", 0x4020AEA5),
        ("KVM_GET_REGS", 0x8090AE81),
        ("KVM_SET_REGS", 0x4090AE82),
        ("KVM_GET_SREGS", 0x8138AE83),
        ("KVM_SET_SREGS", 0x4138AE84),
        ("KVM_GET_MSRS", 0xC008AE88),
        ("KVM_SET_MSRS", 0x4008AE89),
        ("KVM_SET_CPUID2", 0x4008AE90),
        ("KVM_GET_MP_STATE", 0x8004AE98),
    ],
)
def test_the_numbers_of_requests(name: str, number: int) -> None:
    assert getattr(api, name) == number


def test_a_request_that_fails_says_which_and_why(device: int) -> None:
    vm = Kvm(device).create_vm()
    try:
        with pytest.raises(KvmError, match=r"^/dev/kvm: joining an eventfd to an interrupt: Invalid argument$"):
            vm.irqfd(12345, 24, assign=True)
    finally:
        vm.close()


# CPUID

HOST = [
    CpuidEntry(0, eax=0xD, ebx=0x6874_7541, ecx=0x444D_4163, edx=0x6974_6E65),
    CpuidEntry(1, ebx=0x1704_0800, ecx=1, edx=1 << 28),
    CpuidEntry(4, 0, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, eax=0x1C00_4121),
    CpuidEntry(4, 3, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, eax=0x1C03_C163),
    CpuidEntry(0xB, 0, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, 1, 2, 0x100, 17),
    CpuidEntry(0x1F, 0, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, 1, 2, 0x100, 17),
    CpuidEntry(0x4000_0000, eax=0x4000_0001),
    CpuidEntry(0x4000_0001, eax=0x0100_7EFB),
    CpuidEntry(0x8000_0007, edx=0x100),
    CpuidEntry(0x8000_0008, ecx=0x7001),
    CpuidEntry(0x8000_001D, 3, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, eax=0x4163),
    CpuidEntry(0x8000_001E, eax=17, ebx=0x0111, ecx=3),
]


def ask(leaf: int, index: int = 0, *, number: int = 2, count: int = 4) -> tuple[int, int, int, int]:
    found = [each for each in entries(HOST, number, count, 2_400_000) if (each.function, each.index) == (leaf, index)]
    assert len(found) == 1
    return found[0].eax, found[0].ebx, found[0].ecx, found[0].edx


def test_each_processor_says_who_it_is_and_how_many_there_are() -> None:
    assert ask(1)[1] == 2 << 24 | 4 << 16 | 0x800
    assert ask(0xB, 0) == (0, 1, 0x100, 2)
    assert ask(0xB, 1) == (2, 4, 0x201, 2)
    assert ask(0x8000_001E)[:3] == (2, 2, 0)
    assert ask(0x8000_0008)[2] == 2 << 12 | 3
    assert not [each for each in entries(HOST, 0, 4, 0) if each.function == 0x1F]


def test_the_last_caches_are_everybodys_the_others_are_each_ones_own() -> None:
    sharing = {index: (ask(4, index)[0] >> 14 & 0xFFF) + 1 for index in (0, 3)}
    assert sharing == {0: 1, 3: 4}
    assert ask(4, 3)[0] >> 26 == 3  # cores in the package, less one
    assert (ask(0x8000_001D, 3)[0] >> 14 & 0xFFF) + 1 == 4


@pytest.mark.parametrize(("count", "htt"), [(1, 0), (2, 1)])
def test_one_processor_is_no_multiprocessor(count: int, htt: int) -> None:
    _, _, ecx, edx = ask(1, number=0, count=count)
    assert edx >> 28 & 1 == htt
    assert (ecx >> 24 & 1, ecx >> 31, edx >> 9 & 1) == (1, 1, 1)  # TSC deadline, hypervisor, APIC


def test_the_hypervisor_is_kvm_and_tells_the_frequencies() -> None:
    assert ask(0x4000_0000)[0] == 0x4000_0010
    assert ask(0x4000_0001)[0] == 0x0100_7EFB
    assert ask(0x4000_0010)[:2] == (2_400_000, 1_000_000)
    assert ask(0x8000_0007)[3] == 0


def test_what_the_host_says_is_left_as_it_was() -> None:
    before = [bytes(each) for each in HOST]
    entries(HOST, 1, 2, 0)
    assert [bytes(each) for each in HOST] == before


# Interrupts


@dataclass
class FakeVm:
    """Remembers what it was asked for; ``refused`` is what it says no to."""

    asked: list[object] = field(default_factory=list)
    refused: bool = False

    def set_gsi_routing(self, routes: list[tuple[int, int, int]]) -> None:
        self.asked.append(routes)

    def signal_msi(self, address: int, data: int) -> bool:
        self.asked.append((address, data))
        return True

    def irqfd(self, eventfd: int, gsi: int, *, assign: bool) -> None:
        if self.refused:
            raise KvmError("no", 16)
        self.asked.append((eventfd, gsi, assign))


def interrupts(vm: FakeVm) -> KvmInterrupts:
    return KvmInterrupts(vm, 24)  # type: ignore[arg-type] # as much of one as it needs


def test_a_level_is_routed_before_it_is_sent_so_that_its_end_is_told() -> None:
    vm = FakeVm()
    apics = interrupts(vm)
    for pin, level in ((18, True), (18, True), (4, False)):
        assert apics.deliver(pin=pin, destination=3, logical=True, mode=1, vector=0x55, level=level)
    message = (0xFEE0_3004, 0xC155)
    assert vm.asked == [[(18, *message)], message, message, (0xFEE0_3004, 0x155)]


def test_a_line_is_routed_attached_changed_and_detached() -> None:
    vm = FakeVm()
    apics = interrupts(vm)
    assert apics.attach_interrupt(1, 7, (0xFEE0_0000, 0x41))
    assert apics.change_interrupt(1, (0xFEE0_1000, 0x42))
    apics.detach_interrupt(1, 7)
    assert apics.attach_interrupt(1, 7, (0xFEE0_1000, 0x42))
    first, second = [(25, 0xFEE0_0000, 0x41)], [(25, 0xFEE0_1000, 0x42)]
    assert vm.asked == [first, (7, 25, True), second, (7, 25, False), (7, 25, True)]


def test_a_message_to_memory_is_no_interrupt() -> None:
    vm = FakeVm()
    apics = interrupts(vm)
    assert not apics.message(0x1000, 0x41)
    assert not apics.attach_interrupt(0, 7, (0x1000, 0x41))
    assert not apics.change_interrupt(0, (0x1_FEE0_0000, 0x41))
    assert vm.asked == []


def test_a_line_that_the_host_refuses_is_not_attached() -> None:
    assert not interrupts(FakeVm(refused=True)).attach_interrupt(0, 7, (0xFEE0_0000, 0x41))


# The host


def test_more_processors_than_the_host_has_for_a_guest_are_one_line(device: int) -> None:
    limit = Kvm(device).check(Cap.MAX_VCPUS)
    with pytest.raises(LguestError, match=rf"^--cpus={limit + 1}: this host's KVM has at most {limit} for a guest$"):
        KvmEngine(device, GuestMemory(1 << 20), limit + 1)


def test_a_look_finds_out(device: int) -> None:
    """Whatever this host's is: a reason, or none; and the same each time."""
    assert probe.judge(device) == probe.judge(device)


def test_a_guest_that_lacks_the_last_word_is_not_good_enough(device: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_GUEST", bytes.fromhex("e6 11"))  # out 0x11, al
    reason = probe.judge(device)
    assert reason is not None
    assert "exit 2 at" in reason


def test_a_guest_that_takes_for_ever_is_not_waited_for(device: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_GUEST", bytes.fromhex("eb fe"))  # jmp to itself
    assert probe.judge(device) == "it interprets guest kernels instead of running them, which takes too long"


def test_a_guest_that_does_as_it_should_is_good(device: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_GUEST", bytes.fromhex("e6 10"))  # out 0x10, al
    assert probe.judge(device) is None


def test_what_is_missing_is_named(device: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kvm, "check", lambda _kvm, capability: capability != Cap.SPLIT_IRQCHIP)
    assert probe.judge(device) == "it has no SPLIT_IRQCHIP; Linux 4.12 has"
