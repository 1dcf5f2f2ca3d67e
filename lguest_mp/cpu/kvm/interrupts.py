"""KVM's local APICs, and the ways to them: messages, and eventfds that become messages without anybody's help.

KVM is the local APICs (Linux calls this the *split* irqchip); the I/O APIC is the machine's, the same as with the
embedded CPU. What reaches a local APIC is always a message, sent in one of two ways:

- at once, by a request to KVM (the I/O APIC, a device's rarer interrupts);
- by an *irqfd*: an eventfd whose writes are interrupts of a number (GSI), and a routing table that says which message
  each number is. A worker's interrupt then goes from its ``write`` to the guest inside the kernel.

The end of a level-triggered interrupt has to come back to the I/O APIC. KVM tells of it, by an exit, for vectors
that the routing table has in one of its first entries, which are the I/O APIC's. So a level is put there before it
is sent, for each pin the one that it sent last.
"""

from __future__ import annotations

from collections.abc import Callable

from lguest_mp.cpu.kvm.api import KvmError, Vm

#: A message's address: where it goes, and bit 2 for a logical destination; its data (SDM 3A, 11.11).
_ADDRESS = 0xFEE0_0000
_LEVEL = 1 << 15
_ASSERT = 1 << 14

Message = tuple[int, int]


class KvmInterrupts:
    """The machine's way to KVM's local APICs: :class:`lguest_mp.cpu.engine.LocalApics` and ``DirectPaths``.

    Every method is called with the machine's lock held.
    """

    #: KVM answers for the APICs' registers itself.
    page = -1

    def __init__(self, vm: Vm, pins: int) -> None:
        """``pins``: how many an I/O APIC has."""
        self._vm = vm
        self._pins = pins
        self._routes: dict[int, Message] = {}
        self._broadcast_eoi: Callable[[int], None] = _nobody_listens

    def connect(self, broadcast_eoi: Callable[[int], None]) -> None:
        """Who is told, on a CPU's thread and without the lock, that a level-triggered vector has ended."""
        self._broadcast_eoi = broadcast_eoi

    def end_of_interrupt(self, vector: int) -> None:
        """KVM has told so. Without the lock."""
        self._broadcast_eoi(vector)

    def read(self, _offset: int, _size: int) -> int:
        """Never called: there is no page of registers."""
        return 0

    def write(self, _offset: int, _size: int, _value: int) -> None:
        """Never called, either."""

    def message(self, address: int, data: int) -> bool:
        """Sends a message-signalled interrupt; whether a processor took it. Elsewhere it would be a write to memory."""
        return is_interrupt(address) and self._vm.signal_msi(address, data)

    def deliver(self, *, pin: int, destination: int, logical: bool, mode: int, vector: int, level: bool) -> bool:
        """Sends what an input of the I/O APIC has to send; whether a processor took it."""
        address = _ADDRESS | destination << 12 | logical << 2
        data = vector | mode << 8 | (_LEVEL | _ASSERT if level else 0)
        if level:
            self._route(pin, (address, data))
        return self._vm.signal_msi(address, data)

    def _route(self, gsi: int, message: Message) -> None:
        if self._routes.get(gsi) != message:
            self._routes[gsi] = message
            self._vm.set_gsi_routing([(number, *each) for number, each in sorted(self._routes.items())])

    # Past the machine

    def attach_interrupt(self, line: int, call: int, message: Message) -> bool:
        """See DirectPaths."""
        if not self.change_interrupt(line, message):
            return False
        try:
            self._vm.irqfd(call, self._pins + line, assign=True)
        except KvmError:
            return False
        return True

    def change_interrupt(self, line: int, message: Message) -> bool:
        """See DirectPaths."""
        if not is_interrupt(message[0]):
            return False
        self._route(self._pins + line, message)
        return True

    def detach_interrupt(self, line: int, call: int) -> None:
        """See DirectPaths. All writes so far have been interrupts when it returns, or are left."""
        self._vm.irqfd(call, self._pins + line, assign=False)

    def attach_notification(self, address: int, kick: int) -> bool:
        """See DirectPaths. False also where another device's window lies."""
        try:
            self._vm.ioeventfd(kick, address, assign=True)
        except KvmError:
            return False
        return True

    def detach_notification(self, address: int, kick: int) -> None:
        """See DirectPaths."""
        self._vm.ioeventfd(kick, address, assign=False)


def is_interrupt(address: int) -> bool:
    """Whether a store of a device to ``address`` reaches a local APIC."""
    return address >> 20 == _ADDRESS >> 20


def _nobody_listens(_vector: int) -> None:
    """Before the machine is there."""
