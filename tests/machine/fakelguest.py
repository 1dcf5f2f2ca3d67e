"""A host half of lguest that does nothing by itself: registers, and what it was told."""

from __future__ import annotations

from collections.abc import Mapping

from lguest_mp.cpu.lguest_host import LguestHost, Pending, Register

#: A guest's kernel runs at ring 1.
KERNEL_CS, USER_CS = 0x61, 0x73


class FakeLguestHost(LguestHost):
    """A stopped guest whose registers are those given; all others have numbers of their own."""

    def __init__(self, registers: Mapping[Register, int] | None = None) -> None:
        self.registers = {register: 0x8182_8384 + 0x0101_0101 * register for register in Register}
        self.registers |= {Register.CS: KERNEL_CS, **(registers or {})}
        self.injected: list[int] = []

    def initialize(self, pfn_limit: int, start: int, device_limit: int) -> None:
        raise NotImplementedError

    def run(self) -> Pending:
        raise NotImplementedError

    def get_register(self, register: Register) -> int:
        return self.registers[register]

    def set_register(self, register: Register, value: int) -> None:
        assert 0 <= value < 1 << 32
        self.registers[register] = value

    def inject(self, trap: int) -> None:
        self.injected.append(trap)

    def interrupt(self, irq: int) -> None:
        raise NotImplementedError

    def attach(self, address: int, eventfd: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError
