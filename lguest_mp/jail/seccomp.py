"""The system calls of a process, as a filter that the kernel runs before each of them (seccomp(2)).

The filter is a program of the classic BPF machine over ``struct seccomp_data``: the call's number, the architecture it
is made for, its six arguments. :func:`assemble` makes it of an allow-list, once, in the supervisor; a process that is
forked has only to install it (:attr:`Program.steps`), and cannot take it off again, nor can what it executes.

- A call that is not in the list kills the process by SIGSYS: at once, all threads, without a handler. The supervisor
  sees that as it sees any death, and the kernel's log names the call.
- A few calls fail with an error instead; ``calls.py`` says which, and why.
- A call of another architecture (``int 0x80`` makes 32-bit ones) or of the x32 kind has other numbers: killed.

Sources: the kernel's Documentation/userspace-api/seccomp_filter.rst; include/uapi/linux/seccomp.h, filter.h,
bpf_common.h, audit.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Iterable

from lguest_mp import steps
from lguest_mp.jail.calls import NUMBERS, Call, Check, Refusal
from lguest_mp.record import Value
from lguest_mp.steps import Step

_SYS_GETPID = 39
_SYS_SECCOMP = 317
_SET_MODE_FILTER = 1
_GET_ACTION_AVAIL = 2
#: Linux before 5.16 slows a process with a filter down by its protection against speculation (SSBD, STIBP), for the
#: sake of those that run others' code beside their own secrets. Ours have no secrets but their own guest's.
_FILTER_FLAG_SPEC_ALLOW = 1 << 2
_RET_KILL_PROCESS = 0x8000_0000
_RET_ERRNO = 0x0005_0000
_RET_ALLOW = 0x7FFF_0000

_AUDIT_ARCH_X86_64 = 0xC000_003E
#: Numbers from here on are those of the x32 ABI (arch/x86/include/uapi/asm/unistd.h).
_X32_SYSCALL_BIT = 0x4000_0000

#: Offsets in struct seccomp_data, and where the words of an argument are on a little-endian machine.
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
#: struct sock_filter: code, how far to jump if true and if false, operand.
_INSTRUCTION = struct.Struct("=HBBI")
_OPERAND_OFFSET = 4
#: BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_JMP|BPF_JGE|BPF_K, BPF_ALU|BPF_AND|BPF_K, BPF_RET|BPF_K
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
#: BPF_MAXINSNS, and how far a conditional jump goes.
_MOST_INSTRUCTIONS = 4096
_FURTHEST = 255


class _Filter(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


class _Instruction(Value):
    code: int
    operand: int
    if_true: int = 0
    if_false: int = 0
    #: The operand is the process's own ID, which nobody knows before it is there.
    is_own_pid: bool = False


class Program:
    """An assembled filter. Made before a fork, installed after it."""

    def __init__(self, instructions: list[_Instruction]) -> None:
        if len(instructions) > _MOST_INSTRUCTIONS:
            raise ValueError(f"a filter of {len(instructions)} instructions; the kernel takes {_MOST_INSTRUCTIONS}")
        code = b"".join(
            _INSTRUCTION.pack(each.code, each.if_true, each.if_false, each.operand) for each in instructions
        )
        self._code = ctypes.create_string_buffer(code, len(code))
        self._filter = _Filter(len(instructions), ctypes.addressof(self._code))
        own_pids = [
            index * _INSTRUCTION.size + _OPERAND_OFFSET for index, each in enumerate(instructions) if each.is_own_pid
        ]
        #: They take effect in the thread that makes them, and whatever it starts, for good, and need no-new-privileges.
        self.steps = (
            *(Step("getpid", (_SYS_GETPID,), into=ctypes.c_uint32.from_buffer(self._code, each)) for each in own_pids),
            Step("seccomp", (_SYS_SECCOMP, _SET_MODE_FILTER, _FILTER_FLAG_SPEC_ALLOW, ctypes.byref(self._filter))),
        )

    def __bytes__(self) -> bytes:
        return self._code.raw


def missing() -> str | None:
    """Why this host has no such filter, or none with the action that we need; None: it has."""
    if os.uname().machine != "x86_64" or sys.maxsize < 1 << 32:
        return "is known to us for 64-bit x86 only"
    action = ctypes.c_uint32(_RET_KILL_PROCESS)
    try:
        steps.make([Step("seccomp", (_SYS_SECCOMP, _GET_ACTION_AVAIL, 0, ctypes.byref(action)))])
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
            return "is not in this kernel, or this kernel is older than 4.14"
        return f"is refused by this host: {os.strerror(error.errno or 0)}"
    return None


class _Verdict:
    """What becomes of one system call: allowed if all checks of one alternative hold, else refused if all of one do."""

    def __init__(self) -> None:
        self.alternatives: list[tuple[Check, ...]] = []
        self.refusals: list[tuple[tuple[Check, ...], int]] = []


def assemble(allowed: Iterable[Call], refused: Iterable[Refusal] = ()) -> Program:
    """The filter that lets the ``allowed`` calls through and has the ``refused`` ones fail, unless they are allowed."""
    verdicts: dict[int, _Verdict] = {}
    for call in allowed:
        verdicts.setdefault(NUMBERS[call.name], _Verdict()).alternatives.append(call.checks)
    for refusal in refused:
        verdict = verdicts.setdefault(NUMBERS[refusal.call.name], _Verdict())
        verdict.refusals.append((refusal.call.checks, refusal.errno))
    program = [
        _Instruction(_LOAD, _ARCHITECTURE),
        _Instruction(_IF_EQUAL, _AUDIT_ARCH_X86_64, if_true=1),
        _Instruction(_RETURN, _RET_KILL_PROCESS),
        _Instruction(_LOAD, _NUMBER),
        _Instruction(_IF_AT_LEAST, _X32_SYSCALL_BIT, if_false=1),
        _Instruction(_RETURN, _RET_KILL_PROCESS),
    ]
    # Of the calls that are always allowed newer kernels keep a list, and do not come here. So the others are first.
    for number, verdict in sorted(verdicts.items(), key=lambda item: not all(item[1].alternatives)):
        body = _decide(verdict)
        if len(body) > _FURTHEST:
            raise ValueError(f"system call {number} has too many alternatives")
        program += [_Instruction(_IF_EQUAL, number, if_false=len(body)), *body]
    return Program([*program, _Instruction(_RETURN, _RET_KILL_PROCESS)])


def _decide(verdict: _Verdict) -> list[_Instruction]:
    """What is done once it is known which call it is; never goes on to what is behind it."""
    if () in verdict.alternatives:
        return [_Instruction(_RETURN, _RET_ALLOW)]
    body = []
    for checks in verdict.alternatives:
        body += _return_if(checks, _RET_ALLOW)
    for checks, number in verdict.refusals:
        body += _return_if(checks, _RET_ERRNO | number)
    return [*body, _Instruction(_RETURN, _RET_KILL_PROCESS)]


def _return_if(checks: tuple[Check, ...], result: int) -> list[_Instruction]:
    """Ends with ``result`` if all checks hold; otherwise goes on behind it."""
    words = [word for check in checks for word in _words(check)]
    lengths = [len(word) for word in words]
    body: list[_Instruction] = []
    for index, word in enumerate(words):
        *before, compare = word
        away = sum(lengths[index + 1 :]) + 1  # over the other words, and the return
        body += [*before, _Instruction(compare.code, compare.operand, 0, away, compare.is_own_pid)]
    return [*body, _Instruction(_RETURN, result)]


def _words(check: Check) -> Iterable[list[_Instruction]]:
    """The comparison of each 32-bit half of an argument that counts: load, mask, compare."""
    value = check.value or 0
    for half in (0, 1):
        mask = check.mask >> 32 * half & 0xFFFF_FFFF
        if not mask:
            continue
        word = [_Instruction(_LOAD, _ARGUMENTS + 8 * check.argument + 4 * half)]
        if mask != 0xFFFF_FFFF:
            word.append(_Instruction(_AND, mask))
        expected = value >> 32 * half & 0xFFFF_FFFF
        yield [*word, _Instruction(_IF_EQUAL, expected, is_own_pid=check.value is None)]
