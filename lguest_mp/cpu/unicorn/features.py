"""What CPUID says of the embedded CPU itself, where the library's model says it of the processor it is modelled on.

The model is an AMD EPYC of the first generation. Two things about it cost a guest's kernel a lot here, for nothing or
for little:

- *Its branch prediction can be abused*, Linux knows that and takes detours: every return of the kernel goes through two
  more, every indirect call through one. Translated code predicts nothing of the guest's. So CPUID says what newer
  processors say of themselves, by the bits that AMD gave it, and kernels since 6.1 leave the detours out.
- *SMAP*, which keeps the kernel from using user memory by mistake, is switched off and on around each access that it
  means. Here each switch ends a translated block and changes the TLB: reading 4 KiB of /dev/zero takes twice as long.
  So there is no SMAP, as in QEMU's default model. SMEP costs nothing and is there.
"""

from __future__ import annotations

from lguest_mp.cpu.engine import CpuidResult

#: Leaf 7, EBX (AMD64 APM 3, E.3.6).
_SMAP = 1 << 20
#: Leaf 0x80000008, EBX (E.4.7): no speculative store bypass, no branch type confusion (Retbleed).
_SSB_NO = 1 << 26
_BTC_NO = 1 << 29
#: Leaf 0x80000021, EAX (E.4.17): IBRS needs no switching (EFER.AIBRSE, which the library ignores); no speculative
#: return stack overflow.
_AUTOMATIC_IBRS = 1 << 8
_SRSO_NO = 1 << 29
_LAST_LEAF = 0x8000_0021


def native(leaf: int, subleaf: int, said: CpuidResult) -> CpuidResult:
    """The CPU's own answer, given the model's."""
    eax, ebx, ecx, edx = said
    match leaf:
        case 7 if subleaf == 0:
            return eax, ebx & ~_SMAP, ecx, edx
        case 0x8000_0000:
            return max(eax, _LAST_LEAF), ebx, ecx, edx
        case 0x8000_0008:
            return eax, ebx | _SSB_NO | _BTC_NO, ecx, edx
        case 0x8000_001F | 0x8000_0020:
            return 0, 0, 0, 0
        case 0x8000_0021:
            return _AUTOMATIC_IBRS | _SRSO_NO, 0, 0, 0
    return said
