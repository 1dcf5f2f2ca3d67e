"""A processor's registers: as the guest's first instruction finds them, and as a person reads them when it died."""

from __future__ import annotations

from lguest_mp.cpu.engine import EntryState
from lguest_mp.cpu.kvm.api import GENERAL_REGISTERS, Registers, Segment, Vcpu

#: CR0: PG, NE, ET, MP, PE; CR4: PAE; EFER: LMA, LME (SDM 3A, 2.5 and 2.2.1).
_CR0 = 0x8000_0033
_CR4 = 1 << 5
_EFER = 0x500
#: RFLAGS: bit 1 is always set, interrupts are off.
_RFLAGS = 2
#: Segment types (SDM 3A, 3.4.5.1): data, read and write, accessed; code, execute and read, accessed.
_DATA = 3
_CODE = 11

IA32_MISC_ENABLE = 0x1A0
_FAST_STRINGS = 1 << 0
IA32_MTRR_DEF_TYPE = 0x2FF
#: MTRRs on, and all memory write-back, as a BIOS leaves it. Linux does without PAT when MTRRs are off.
_MTRR_WRITE_BACK = 1 << 11 | 6


def enter(vcpu: Vcpu, state: EntryState) -> None:
    """Long mode, paging on, flat segments, as the 64-bit boot protocol wants it."""
    system = vcpu.get_system_registers()
    system.cs = _flat(state.code_selector, _CODE, long=True)
    data = _flat(state.data_selector, _DATA, long=False)
    system.ds = system.es = system.fs = system.gs = system.ss = data
    system.gdt.base, system.gdt.limit = state.gdt_base, state.gdt_limit
    system.cr0, system.cr3, system.cr4, system.efer = _CR0, state.cr3, _CR4, _EFER
    vcpu.set_system_registers(system)
    vcpu.set_registers(Registers(rip=state.rip, rsi=state.rsi, rflags=_RFLAGS))


def _flat(selector: int, kind: int, *, long: bool) -> Segment:
    """A segment of 4 GiB from address 0 on, as processors have it when the descriptor was loaded."""
    return Segment(0, 0xFFFF_FFFF, selector, type=kind, present=1, db=not long, s=1, l=long, g=1)


def set_msrs(vcpu: Vcpu) -> None:
    """What firmware would have set on every processor, and KVM has not; what this host does not have is left out."""
    enabled = vcpu.get_msr(IA32_MISC_ENABLE)
    if enabled is not None:
        vcpu.set_msr(IA32_MISC_ENABLE, enabled | _FAST_STRINGS)
    vcpu.set_msr(IA32_MTRR_DEF_TYPE, _MTRR_WRITE_BACK)


def describe(vcpu: Vcpu) -> str:
    """All that may tell why it died, in a few lines."""
    general = vcpu.get_registers()
    system = vcpu.get_system_registers()
    values = [(name, getattr(general, name)) for name in GENERAL_REGISTERS]
    values += [(name, getattr(system, name)) for name in ("cr0", "cr2", "cr3", "cr4", "efer")]
    values += [(name, getattr(system, name).base) for name in ("gdt", "idt", "fs", "gs", "tr")]
    values += [(name, getattr(system, name).selector) for name in ("cs", "ss")]
    words = [f"{name.upper()} {value:#x}" for name, value in values]
    return "\n".join(" ".join(words[start : start + 4]) for start in range(0, len(words), 4))
