"""Programs that tell when stale code runs: many, all alike from outside, all different inside.

Each is a static ELF file with its code spread over whole pages at the same addresses as everybody else's. It jumps
from page to page in an order of its own, computes a number with constants of its own, and prints it. The host computes
the same number. A CPU that runs one translated block of another program, which had the same page of memory before,
prints another one (or crashes).
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass

_BASE = 0x400000
_PAGE = 4096
_HEADERS = 64 + 56
_WORD = (1 << 64) - 1
#: Code that prints RAX as 16 hexadecimal digits and a line end, and exits with status 0.
_EPILOGUE = bytes.fromhex(
    "4883ec20"  # sub rsp, 32
    "4889e6"  # mov rsi, rsp
    "4889e7"  # mov rdi, rsp
    "b910000000"  # mov ecx, 16
    "48c1c004"  # again: rol rax, 4
    "89c2"  # mov edx, eax
    "83e20f"  # and edx, 15
    "80c230"  # add dl, '0'
    "80fa39"  # cmp dl, '9'
    "7603"  # jbe +3
    "80c227"  # add dl, 'a' - '9' - 1
    "8817"  # mov [rdi], dl
    "48ffc7"  # inc rdi
    "ffc9"  # dec ecx
    "75e3"  # jnz again
    "c6070a"  # mov byte [rdi], '\n'
    "bf01000000"  # mov edi, 1
    "ba11000000"  # mov edx, 17
    "b801000000"  # mov eax, 1 (write)
    "0f05"  # syscall
    "31ff"  # xor edi, edi
    "b83c000000"  # mov eax, 60 (exit)
    "0f05"  # syscall
)


@dataclass(frozen=True)
class Program:
    """An ELF file's bytes, and the one line that it prints when all is well."""

    image: bytes
    line: str


def make_program(seed: int, pages: int = 8) -> Program:
    """The program number ``seed``, whose code lies on ``pages`` pages after the one with the headers."""
    choose = random.Random(seed)
    order = list(range(1, pages + 1))
    choose.shuffle(order)
    starts = [page * _PAGE + choose.randrange(16, 512) for page in order]
    image = bytearray((pages + 1) * _PAGE)
    value = choose.getrandbits(64)
    code = b"\x48\xb8" + struct.pack("<Q", value)  # mov rax, imm64
    for position, start in enumerate(starts):
        for _ in range(choose.randrange(4, 24)):
            operation, value = _random_operation(choose, value)
            code += operation
        if position + 1 < len(starts):
            end = start + len(code) + 5
            code += b"\xe9" + struct.pack("<i", starts[position + 1] - end)  # jmp rel32
        else:
            code += _EPILOGUE
        image[start : start + len(code)] = code
        code = b""
    image[:_HEADERS] = _headers(_BASE + starts[0], len(image))
    return Program(bytes(image), f"{value:016x}")


def _random_operation(choose: random.Random, value: int) -> tuple[bytes, int]:
    """An instruction on RAX, and what it makes of ``value``."""
    constant = choose.randrange(-(1 << 31), 1 << 31) | 1
    packed = struct.pack("<i", constant)
    match choose.randrange(4):
        case 0:
            return b"\x48\x05" + packed, (value + constant) & _WORD  # add rax, imm32
        case 1:
            return b"\x48\x35" + packed, (value ^ constant) & _WORD  # xor rax, imm32
        case 2:
            return b"\x48\x69\xc0" + packed, (value * constant) & _WORD  # imul rax, rax, imm32
        case _:
            turns = choose.randrange(1, 64)
            return b"\x48\xc1\xc0" + bytes([turns]), (value << turns | value >> 64 - turns) & _WORD  # rol rax, imm8


def _headers(entry: int, size: int) -> bytes:
    """The ELF header and one program header that maps the whole file, readable and executable."""
    identification = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, entry, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, _PAGE)
    return identification + header + segment
