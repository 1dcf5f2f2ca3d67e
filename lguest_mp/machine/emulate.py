"""The handful of instructions that the launcher carries out for an lguest guest.

A guest's kernel runs at ring 1, so what only ring 0 may do ends in a general protection fault (trap 13), and the
registers of devices lie where no page is mapped, so touching them ends in a page fault (trap 14). The host hands both
to the launcher, which does what hardware would have done and moves the guest past the instruction, or else hands the
trap on to the guest (:meth:`LguestHost.inject`).

There is little hardware to be: no device has ports or needs registers on this machine. Ports read as all ones, which
means that nothing is there, but for the keyboard controller's status, which always takes another command. `cli` does
nothing, because code that is not paravirtual enough to leave it out (a `cmpxchg8b` written in software) runs while
the guest takes no interrupts anyway.

Forms and lengths are those of the Intel SDM, volume 2, 2.1 and 3.2. The original got three of them wrong, none of which
its guests used: a displacement alone (mod 0, r/m 5) has four bytes, not two; a SIB byte counts, and has a displacement
without a base in it (mod 0, base 5); and bytes are moved by instructions with an operand-size prefix, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lguest_mp.cpu.lguest_host import GENERAL_PROTECTION, PAGE_FAULT, LguestHost, Pending, Register
from lguest_mp.record import Value

_KERNEL_RING = 1
_CLI = 0xFA
_OPERAND_SIZE = 0x66
_ALL_ONES = 0xFFFF_FFFF
#: The keyboard controller's status: its output buffer is full, its input buffer is not.
_KEYBOARD_STATUS_PORT = 0x64
_KEYBOARD_READY = 1

#: IN and OUT by their opcode without its lowest bit, which says "not just a byte": (is it IN, is the port in DX).
_IO_FORMS = {0xE4: (True, False), 0xE6: (False, False), 0xEC: (True, True), 0xEE: (False, True)}
#: MOV between a register and memory, likewise: whether it is a load.
_MOVE_FORMS = {0x88: False, 0x8A: True}

#: By number. Of single bytes, numbers 4 to 7 are bits 8 to 15 of the first four.
_REGISTERS = (
    Register.EAX,
    Register.ECX,
    Register.EDX,
    Register.EBX,
    Register.ESP,
    Register.EBP,
    Register.ESI,
    Register.EDI,
)


def _all_ones(_offset: int, _size: int) -> int:
    return _ALL_ONES


def _ignore(_offset: int, _size: int, _value: int) -> None:
    pass


class Region(Value):
    """A device's registers: ``size`` bytes at guest-physical ``address``.

    ``read(offset, size)`` is a load of 1, 2 or 4 bytes, of which it may give more than are asked for;
    ``write(offset, size, value)`` a store.
    """

    address: int
    size: int
    read: Callable[[int, int], int] = _all_ones
    write: Callable[[int, int, int], None] = _ignore


def emulate(
    host: LguestHost,
    pending: Pending,
    regions: Sequence[Region],
    *,
    warn: Callable[[str], None],
    verbose: Callable[[str], None] | None = None,
) -> None:
    """Does what the guest trapped for, or has it take the trap.

    ``pending.trap`` is GENERAL_PROTECTION or PAGE_FAULT (ValueError). ``warn`` is told what a person should know,
    ``verbose`` everything.
    """
    if pending.trap == GENERAL_PROTECTION:
        if verbose is not None:
            verbose(f"Emulating instruction at {host.get_register(Register.EIP):#x}")
        length = _emulate_io(host, pending.instruction, verbose)
    elif pending.trap == PAGE_FAULT:
        if verbose is not None:
            verbose(f"Emulating MMIO at {host.get_register(Register.EIP):#x}")
        length = _emulate_mmio(host, pending, regions, warn)
    else:
        raise ValueError(f"trap {pending.trap} is none to emulate")
    if length is None:
        host.inject(pending.trap)
    else:
        host.set_register(Register.EIP, host.get_register(Register.EIP) + length & _ALL_ONES)


def _emulate_io(host: LguestHost, code: bytes, verbose: Callable[[str], None] | None) -> int | None:
    """`cli`, or IN or OUT with what is at no port; the instruction's length, None: it is another one, or a user's."""
    if host.get_register(Register.CS) & 3 != _KERNEL_RING:
        return None
    if code[0] == _CLI:
        return 1
    prefix, size = _operand(code)
    form = _IO_FORMS.get(code[prefix] & 0xFE)
    if form is None:
        return None
    is_in, port_in_dx = form
    port = host.get_register(Register.EDX) & 0xFFFF if port_in_dx else code[prefix + 1]
    mask = _mask(size)
    eax = host.get_register(Register.EAX)
    if is_in:
        value = _KEYBOARD_READY if port == _KEYBOARD_STATUS_PORT else _ALL_ONES
        eax = eax & ~mask | value & mask
        host.set_register(Register.EAX, eax)
    if verbose is not None:
        verbose(f"IO {'IN' if is_in else 'OUT'} of {mask:x} to {port}: {eax:#08x}")
    return prefix + (1 if port_in_dx else 2)


def _emulate_mmio(
    host: LguestHost, pending: Pending, regions: Sequence[Region], warn: Callable[[str], None]
) -> int | None:
    """MOV between a register and a device's; the instruction's length, None: it is another one, or no device's."""
    code, address = pending.instruction, pending.address
    region = _find_region(regions, address)
    if region is None:
        warn(f"MMIO touching {address:#08x} (not a device)")
        return None
    prefix, size = _operand(code)
    is_load = _MOVE_FORMS.get(code[prefix] & 0xFE)
    operand_length = memory_operand_length(code[prefix + 1 :])
    if is_load is None or operand_length is None:
        shown = code[:4].hex(" ")
        warn(f"Unknown MMIO instruction touching {address:#08x}: {shown} at {host.get_register(Register.EIP)}")
        return None
    number, offset = code[prefix + 1] >> 3 & 7, address - region.address
    if is_load:
        _set_numbered(host, number, size, region.read(offset, size))
    else:
        region.write(offset, size, _get_numbered(host, number, size))
    return prefix + 1 + operand_length


def memory_operand_length(code: bytes) -> int | None:
    """The length of a ModRM byte with 32-bit addressing and all that belongs to it: SIB byte, displacement.

    ``code`` begins with it and has at least two bytes. None: the operand is a register. (SDM 2.1.5.)
    """
    mod, rm = code[0] >> 6, code[0] & 7
    has_sib = rm == 4
    no_base = (code[1] & 7 if has_sib else rm) == 5
    match mod:
        case 0:
            displacement = 4 if no_base else 0
        case 1:
            displacement = 1
        case 2:
            displacement = 4
        case _:
            return None
    return 1 + has_sib + displacement


def _find_region(regions: Sequence[Region], address: int) -> Region | None:
    return next((region for region in regions if 0 <= address - region.address < region.size), None)


def _operand(code: bytes) -> tuple[int, int]:
    """How many bytes precede the opcode (one or none), and the operand's size, in bytes."""
    prefix = 1 if code[0] == _OPERAND_SIZE else 0
    if code[prefix] & 1 == 0:
        return prefix, 1
    return prefix, 2 if prefix else 4


def _mask(size: int) -> int:
    return (1 << 8 * size) - 1


def _place(number: int, size: int) -> tuple[Register, int]:
    """Where an instruction's register number is: in which whole register, from which bit."""
    if size == 1:
        return _REGISTERS[number & 3], 8 if number & 4 else 0
    return _REGISTERS[number], 0


def _get_numbered(host: LguestHost, number: int, size: int) -> int:
    register, shift = _place(number, size)
    return host.get_register(register) >> shift & _mask(size)


def _set_numbered(host: LguestHost, number: int, size: int, value: int) -> None:
    register, shift = _place(number, size)
    mask = _mask(size) << shift
    host.set_register(register, host.get_register(register) & ~mask | value << shift & mask)
