"""A stock kernel on the kernel's own KVM, wherever the tests run: in a machine that QEMU's translator makes.

One machine, and as few boots as can be, since each takes ten seconds there: tests share a guest where they leave it
as they found it, in whichever order they run. What is as it is on the embedded CPU is tested on that (``tests/guest``).

A machine that hangs altogether, its kernel and all, is QEMU's matter; the test is then repeated in another one. A
guest that hangs, or dies, is ours.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

import lguest_mp
from guestkit.cache import cache_directory
from guestkit.kit import GuestKit
from guestkit.nested import NestedGuest, NestedMachine
from guestkit.session import SessionError
from lguest_mp.machine.layout import MAX_CPUS

pytestmark = pytest.mark.flaky(reruns=2, only_rerun="MachineHung")

DISK = "/disk.img"
MIB = 1 << 20
#: The tap's address in the machine, and the guest's.
HOST, GUEST = "10.9.8.1", "10.9.8.2"
READS = 300
DEVICES = (f"--block={DISK}", "--rng", f"--net=tap,ip={HOST}")

#: The shell of the guest reads all of the disk, past its page cache.
SUM = "dd if=/dev/vda bs=64k iflag=direct 2>/dev/null | sha256sum"


class Machine:
    """The machine, and the guest that runs in it, if one does; one that hangs is replaced by another."""

    def __init__(self, start: Callable[[], NestedMachine]) -> None:
        self._start = start
        self._machine: NestedMachine | None = None
        self._guest: NestedGuest | None = None
        self._cpus = 0

    def run(self, command: str) -> str:
        """Runs a shell command in the machine; its output."""
        return self.running().run(command)

    def running(self) -> NestedMachine:
        """The machine, booted, with an image for a disk."""
        if self._machine is None or self._machine.is_hung:
            self.close()
            self._machine = machine = self._start()
            machine.boot()
            machine.run(f"head -c {2 * MIB} /dev/urandom >{DISK}")
        return self._machine

    def launch(self, cpus: int, *options: str, arguments: str = "quiet") -> NestedGuest:
        """A guest of its own for a test, which ends it."""
        machine = self.running()
        self.end()
        self._guest = guest = machine.launch("--cpu=kvm", f"--cpus={cpus}", *options, arguments=arguments)
        self._cpus = 0
        return guest

    def guest(self, cpus: int) -> NestedGuest:
        """A booted guest with all devices, the same as before if it still does what it is told."""
        self.running()
        if self._guest is None or self._cpus != cpus or not self._guest.is_idle():
            boot_with_network(self.launch(cpus, *DEVICES))
            self._cpus = cpus
        assert self._guest is not None
        return self._guest

    def end(self) -> None:
        """Ends the guest, if one runs."""
        if self._guest is not None and not self._guest.has_ended():
            self._guest.kill("", signal.SIGTERM)
            assert self._guest.wait() == 128 + signal.SIGTERM
        self._guest = None

    def close(self) -> None:
        """Ends the machine."""
        if self._machine is not None:
            self._machine.close()
        self._machine = self._guest = None

    def sum_of_disk(self) -> str:
        """What sha256sum says of the disk's image."""
        return self.run(f"sha256sum <{DISK}")


def boot_with_network(guest: NestedGuest) -> None:
    """Waits until it is up, and has its network driver loaded and its address set."""
    guest.boot()
    guest.run(f"modprobe virtio_net; ip addr add {GUEST}/24 dev eth0; ip link set eth0 up")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    if sys.implementation.name != "cpython":
        pytest.skip("the machine has the Python that runs the tests, and that is not CPython")
    kit = GuestKit(cache_directory())
    initrd = tmp_path_factory.mktemp("nested") / "initrd.img"
    initrd.write_bytes(kit.nested_initramfs(Path(lguest_mp.__file__).parent))
    with closing(Machine(lambda: NestedMachine(kit.qemu, kit.kernel, initrd))) as machine:
        yield machine


@pytest.fixture(scope="module", params=[1, 2], ids=["one CPU", "two CPUs"])
def cpus(request: pytest.FixtureRequest) -> int:
    """How many processors the guests have."""
    count: int = request.param
    return count


@pytest.fixture
def guest(machine: Machine, cpus: int) -> Iterator[NestedGuest]:
    """A guest that runs and is left as it is found. No process of it dies of what its jail does not allow."""
    guest = machine.guest(cpus)
    yield guest
    assert "SIGSYS" not in guest.output


def test_it_has_the_processors_that_it_was_given(machine: Machine, guest: NestedGuest, cpus: int) -> None:
    assert guest.run("nproc") == f"{cpus}\n"
    threads = machine.run(f"cat /proc/{guest.members()['cpu']}/task/*/comm").split()
    assert {"lguest/cpu", *(f"lguest/cpu{number}" for number in range(1, cpus))} <= set(threads)
    assert guest.run("cat /sys/devices/system/clocksource/clocksource0/current_clocksource") == "kvm-clock\n"


def test_each_queue_has_a_process(guest: NestedGuest) -> None:
    queues = {"console/receiveq", "console/transmitq", "block0/requestq", "rng0/requestq", "net0/receiveq"}
    assert set(guest.members()) == {"", "cpu", *queues, "net0/transmitq"}


def test_the_disk_has_what_is_read_and_keeps_what_is_written(machine: Machine, guest: NestedGuest) -> None:
    assert guest.run(SUM) == machine.sum_of_disk()
    guest.run("dd if=/dev/urandom of=/tmp/new bs=64k count=4 && dd if=/tmp/new of=/dev/vda bs=64k seek=5 conv=fsync")
    written = guest.run("sha256sum </tmp/new; rm /tmp/new")
    assert machine.run(f"dd if={DISK} bs=64k skip=5 count=4 2>/dev/null | sha256sum") == written
    assert guest.run(SUM) == machine.sum_of_disk()


def test_a_disk_read_leaves_the_guest_for_nobody(guest: NestedGuest) -> None:
    """Not the read's notification, not its interrupt: exits to the machine process are what else the guest does."""
    read = f"dd if=/dev/vda of=/dev/null bs=4k count={READS} iflag=direct"
    guest.run(read)
    interrupts = interrupts_of_disk(guest)
    exits = {name: guest.count(name) for name in ("mmio_exits", "io_exits")}
    guest.run(read)
    assert interrupts_of_disk(guest) - interrupts >= READS
    for name, before in exits.items():
        assert guest.count(name) - before < READS / 10, name


def interrupts_of_disk(guest: NestedGuest) -> int:
    """How often the disk's queue interrupted the guest so far."""
    line = guest.run("grep req.0 /proc/interrupts").split()
    return sum(int(word) for word in line[1:] if word.isdecimal())


def test_random_numbers_are_random(guest: NestedGuest) -> None:
    count = guest.run("head -c 4096 /dev/hwrng | od -An -v -tx1 | sort -u | wc -l")
    assert int(count) == 4096 // 16, "no 16 bytes come twice"


def test_a_network_takes_every_byte_both_ways(machine: Machine, guest: NestedGuest) -> None:
    """One after the other, since busybox's nc ends when the other side has sent all; or when its own input ends."""
    idle = "[ -p /tmp/idle ] || mkfifo /tmp/idle"
    agent = machine.running().agent
    sending = agent.start(f"nc -l -p 5000 <{DISK}")
    receive = f"until nc {HOST} 5000 <>/tmp/idle >/tmp/got; do usleep 50000; done"
    received = guest.run(f"{idle}; {receive}; sha256sum </tmp/got; rm /tmp/got")
    agent.finish(sending)
    assert received == machine.sum_of_disk()
    receiving = agent.start(f"{idle}; nc -l -p 5001 <>/tmp/idle | sha256sum")
    send = f"until nc {HOST} 5001 </tmp/sent; do usleep 50000; done"
    sent = guest.run(f"head -c {MIB} /dev/urandom >/tmp/sent; {send}; sha256sum </tmp/sent; rm /tmp/sent")
    assert agent.finish(receiving) == sent


def test_a_driver_comes_and_goes_while_its_device_is_used(machine: Machine, guest: NestedGuest) -> None:
    rebind = "for act in unbind bind; do echo $d >/sys/bus/virtio/drivers/virtio_blk/$act || exit 1; done"
    shown = guest.run(
        "d=$(basename /sys/bus/virtio/drivers/virtio_blk/virtio*); "
        "(while [ ! -e /tmp/stop ]; do cat /dev/vda >/dev/null 2>&1; done) & "
        f"for i in 1 2 3; do {rebind}; sha256sum </dev/vda; done; touch /tmp/stop; wait; rm /tmp/stop"
    )
    assert shown == machine.sum_of_disk() * 3


def test_a_killed_worker_is_replaced_and_the_guest_does_not_notice(machine: Machine, guest: NestedGuest) -> None:
    """The new one takes over the eventfds, which are KVM's, with whatever was in them."""
    rounds, already = 12, len(guest.output)
    number = guest.agent.start(f"for i in $(seq {rounds}); do {SUM}; done")
    for _ in range(3):
        guest.wait_for(r"^[0-9a-f]{64} ")
        guest.kill("block0/requestq", signal.SIGKILL)
        guest.wait_for("block0/requestq was killed by SIGKILL; it is restarted")
    assert not guest.agent.has_finished(number), "it has been killed under load"
    guest.agent.finish(number)
    good = machine.sum_of_disk().split()[0]
    assert re.findall(r"^([0-9a-f]{64}) ", guest.output[already:], re.MULTILINE) == [good] * rounds


def test_all_at_once(machine: Machine, guest: NestedGuest, cpus: int) -> None:
    """On every processor, somebody reads the disk, somebody reads random numbers, and somebody computes."""
    work = f"{SUM}; {SUM}; head -c 2000 /dev/hwrng | wc -c; i=0; while [ $i -lt 3000 ]; do i=$((i + 1)); done"
    shown = guest.run(f"for c in $(seq 0 {cpus - 1}); do taskset -c $c sh -c '{work}' & done; wait", seconds=300)
    good = machine.sum_of_disk().splitlines()
    assert sorted(shown.splitlines()) == sorted([*good * 2 * cpus, *["2000"] * cpus])


def test_a_processor_that_goes_takes_no_interrupt_with_it(guest: NestedGuest, cpus: int) -> None:
    if cpus == 1:
        pytest.skip("the only one cannot go")
    guest.run(
        "for i in 1 2 3; do for on in 0 1; do echo $on >/sys/devices/system/cpu/cpu1/online; "
        "dd if=/dev/vda of=/dev/null bs=4k count=20 iflag=direct 2>/dev/null; done; done"
    )


def test_an_interrupt_moves_to_another_processor_while_it_is_used(guest: NestedGuest, cpus: int) -> None:
    if cpus == 1:
        pytest.skip("there is no other one")
    shown = guest.run(
        "d=$(basename /sys/bus/virtio/drivers/virtio_rng/virtio*); "
        "n=$(grep $d-input /proc/interrupts | cut -d: -f1 | tr -d ' '); "
        "(while [ ! -e /tmp/stop ]; do head -c 500 /dev/hwrng >/dev/null; done) & "
        "for i in 1 2 3 4 5; do for m in 1 2; do echo $m >/proc/irq/$n/smp_affinity; grep $d-input /proc/interrupts; "
        "usleep 50000; done; done; touch /tmp/stop; wait; rm /tmp/stop"
    )
    counts = [tuple(map(int, line.split()[1 : 1 + cpus])) for line in shown.splitlines()]
    assert all(last > first for first, last in zip(counts[0], counts[-1], strict=True)), counts


def test_a_paused_guest_goes_on(guest: NestedGuest) -> None:
    """SIGSTOP and SIGCONT get every thread out of KVM, and back in."""
    number = guest.agent.start("for i in $(seq 100); do usleep 5000; done; echo done")
    for _ in range(3):
        guest.kill("cpu", signal.SIGSTOP)
        with pytest.raises(SessionError):
            guest.wait_for("nobody says this", seconds=0.1)
        guest.kill("cpu", signal.SIGCONT)
    assert guest.agent.finish(number) == "done\n"


def test_a_reboot_is_in_the_same_process(machine: Machine, guest: NestedGuest, cpus: int) -> None:
    before = guest.members()
    guest.agent.start("reboot -f")
    boot_with_network(guest)
    after = guest.members()
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] == before[name]] == [""]
    assert guest.run(f"nproc; {SUM}") == f"{cpus}\n{machine.sum_of_disk()}"


def test_a_guest_switches_itself_off(guest: NestedGuest) -> None:
    guest.power_off()


def test_interrupts_of_pins_work_and_a_guest_that_only_halts_is_off(machine: Machine, cpus: int) -> None:
    """They are level-triggered: each end of one is told to the I/O APIC, which is in the machine process."""
    guest = machine.launch(cpus, *DEVICES, arguments="quiet pci=nomsi")
    guest.boot()
    interrupts = guest.run("grep virtio /proc/interrupts")
    assert "IO-APIC" in interrupts
    assert "MSI" not in interrupts
    assert guest.run(f"head -c 1000 /dev/hwrng | wc -c; {SUM}") == f"1000\n{machine.sum_of_disk()}"
    guest.agent.start("halt -f")
    assert guest.wait() == 0


def test_a_kvm_that_can_is_used_without_being_asked_for_and_a_triple_fault_is_told(machine: Machine, cpus: int) -> None:
    guest = machine.launch(cpus, "--cpu=auto", "--verbose", arguments="quiet reboot=t")
    guest.wait_for(r"executed by KVM\r*\n")
    guest.boot()
    guest.agent.start("echo b >/proc/sysrq-trigger")
    assert guest.wait() == 3
    assert "the guest died: triple fault" in guest.output
    assert "CR3 0x" in guest.output


def test_as_many_processors_as_there_can_be_fit_into_the_jail(machine: Machine) -> None:
    """Each is a thread with a stack and two files; they are made when the limits hold already."""
    guest = machine.launch(MAX_CPUS, arguments="quiet maxcpus=1")
    guest.boot()
    last = MAX_CPUS - 1
    assert guest.run(f"nproc; echo 1 >/sys/devices/system/cpu/cpu{last}/online; nproc").split() == ["1", "2"]
    assert guest.run(f"taskset -c {last} grep -c processor /proc/cpuinfo") == "2\n"
    guest.power_off()
