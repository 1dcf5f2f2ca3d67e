"""What the launcher does for an lguest guest that traps, instruction by instruction.

instructions.txt is the assembler's word on what each instruction looks like; what it does is read off its text here.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fakelguest import USER_CS, FakeLguestHost
from hypothesis import given
from hypothesis import strategies as st

from lguest_mp.cpu.lguest_host import GENERAL_PROTECTION, NOTIFY, PAGE_FAULT, Pending, Register
from lguest_mp.machine.emulate import Region, emulate, memory_operand_length

CHECKOUT = Path(__file__).parent.parent.parent
TABLE = Path(__file__).with_name("instructions.txt")

WHERE, SIZE = 0x0400_0000, 0x100
ADDRESS = WHERE + 0x10
EIP = 0xC010_0000
#: What follows the instruction in memory: bytes that are part of many instructions.
FOLLOWING = bytes.fromhex("8b05668b840506")

#: Registers by name: the whole one, from which bit, how many bytes.
NAMED: dict[str, tuple[Register, int, int]] = {}
for letter, whole in zip("acdb", (Register.EAX, Register.ECX, Register.EDX, Register.EBX), strict=True):
    NAMED |= {f"e{letter}x": (whole, 0, 4), f"{letter}x": (whole, 0, 2)}
    NAMED |= {f"{letter}l": (whole, 0, 1), f"{letter}h": (whole, 8, 1)}
for name, whole in (("sp", Register.ESP), ("bp", Register.EBP), ("si", Register.ESI), ("di", Register.EDI)):
    NAMED |= {f"e{name}": (whole, 0, 4), name: (whole, 0, 2)}


def read_table() -> list[tuple[bytes, str]]:
    lines = [line for line in TABLE.read_text().splitlines() if not line.startswith("#")]
    return [(bytes.fromhex(code), text) for code, text in (line.split("\t") for line in lines)]


INSTRUCTIONS = read_table()
IO = re.compile(r"(in|out) (?:\$(?P<port>0x..)|%dx|%(?P<value>e?a.)), (?:\$(?P<port2>0x..)|%dx|%(?P<value2>e?a.))")
STORE = re.compile(r"mov[bwl] %(\w+), (?:0x\w+)?(?:\(.*\))?")
LOAD = re.compile(r"mov[bwl] (?:0x\w+)?(?:\(.*\))?, %(\w+)")
#: MOV between AL, AX, EAX and an address in the instruction: a form of its own, not among the four.
SHORT_FORM = range(0xA0, 0xA4)


def is_emulated_move(code: bytes, text: str) -> bool:
    registers = (match[1] for match in (STORE.fullmatch(text), LOAD.fullmatch(text)) if match)
    return any(name in NAMED for name in registers) and code.lstrip(b"\x66")[0] not in SHORT_FORM and code[0] != 0x64


IO_INSTRUCTIONS = [(code, text) for code, text in INSTRUCTIONS if IO.fullmatch(text)]
MOVES = [(code, text) for code, text in INSTRUCTIONS if is_emulated_move(code, text)]
STORES = [(code, text) for code, text in MOVES if STORE.fullmatch(text)]
LOADS = [(code, text) for code, text in MOVES if LOAD.fullmatch(text)]


@dataclass
class Launcher:
    """A launcher with one device, whose registers all read as ``value``, and a guest that trapped."""

    value: int = 0x1122_3344
    registers: dict[Register, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.host = FakeLguestHost({Register.EIP: EIP, **self.registers})
        self.before = dict(self.host.registers)
        self.accesses: list[tuple[object, ...]] = []
        self.warnings: list[str] = []
        self.words: list[str] = []

    def _read(self, offset: int, size: int) -> int:
        self.accesses.append(("load", offset, size))
        return self.value

    def _write(self, offset: int, size: int, value: int) -> None:
        self.accesses.append(("store", offset, size, value))

    def trap(self, trap: int, code: bytes, address: int = ADDRESS) -> None:
        pending = Pending(trap, (code + FOLLOWING)[:7], address)
        regions = [Region(0x0300_0000, 16), Region(WHERE, SIZE, self._read, self._write)]
        emulate(self.host, pending, regions, warn=self.warnings.append, verbose=self.words.append)

    def changed(self) -> dict[Register, int]:
        """The registers that are others than before."""
        return {register: value for register, value in self.host.registers.items() if value != self.before[register]}

    def assert_reflected(self, trap: int) -> None:
        assert self.host.injected == [trap]
        assert self.changed() == {}
        assert self.accesses == []


def after(code: bytes) -> int:
    return EIP + len(code)


def part(registers: dict[Register, int], name: str) -> int:
    """What a register of any width holds."""
    whole, shift, size = NAMED[name]
    return registers[whole] >> shift & (1 << 8 * size) - 1


def with_part(registers: dict[Register, int], name: str, value: int) -> dict[Register, int]:
    """All registers after that one got the low bytes of ``value``, as many as it has."""
    whole, shift, size = NAMED[name]
    data = bytearray(registers[whole].to_bytes(4, "little"))
    data[shift // 8 : shift // 8 + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    return {**registers, whole: int.from_bytes(data, "little")}


# ---- The assembler's table ----


def test_the_table_is_what_the_assembler_makes_of_it() -> None:
    if shutil.which("as") is None or "GNU assembler" not in subprocess.check_output(["as", "--version"], text=True):
        pytest.skip("there is no GNU assembler")
    subprocess.run([sys.executable, CHECKOUT / "tools" / "build-instructions", "--check"], check=True)


def test_the_table_has_every_form() -> None:
    opcodes = {code.lstrip(b"\x66")[0] for code, _ in IO_INSTRUCTIONS}
    assert opcodes == {0xE4, 0xE5, 0xE6, 0xE7, 0xEC, 0xED, 0xEE, 0xEF}
    moved = {(STORE.fullmatch(text) or LOAD.fullmatch(text) or [""] * 2)[1] for _, text in MOVES}
    assert moved == set(NAMED)
    assert {code.lstrip(b"\x66")[0] for code, _ in MOVES} == {0x88, 0x89, 0x8A, 0x8B}
    longs = [(code[1] >> 6, code[1] & 7, (code + FOLLOWING)[2]) for code, _ in MOVES if code[0] == 0x89]
    assert {(mod, rm) for mod, rm, _ in longs} == {(mod, rm) for mod in range(3) for rm in range(8)}
    assert {(mod, sib) for mod, rm, sib in longs if rm == 4} >= {
        (mod, sib) for mod in range(3) for sib in range(256) if sib >> 3 & 7 != 4
    }


def test_instructions_that_access_ports() -> None:
    for port_in_dx in (0x64, 0x3F8, 0xFFFF):
        for code, text in IO_INSTRUCTIONS:
            match = IO.fullmatch(text)
            assert match
            launcher = Launcher(registers={Register.EDX: 0xABCD_0000 | port_in_dx})
            launcher.trap(GENERAL_PROTECTION, code)
            port = int(match["port"] or match["port2"] or hex(port_in_dx), 16)
            expected = launcher.before | {Register.EIP: after(code)}
            if match[1] == "in":
                expected = with_part(expected, match["value2"], 1 if port == 0x64 else 0xFFFF_FFFF)
            assert launcher.host.registers == expected, text
            assert (launcher.host.injected, launcher.warnings) == ([], [])


def test_cli_is_skipped() -> None:
    launcher = Launcher()
    launcher.trap(GENERAL_PROTECTION, b"\xfa")
    assert launcher.changed() == {Register.EIP: EIP + 1}


def test_every_other_instruction_that_is_not_allowed_is_the_guests_problem() -> None:
    for code, text in INSTRUCTIONS:
        if text != "cli" and not IO.fullmatch(text):
            launcher = Launcher()
            launcher.trap(GENERAL_PROTECTION, code)
            launcher.assert_reflected(GENERAL_PROTECTION)
            assert launcher.warnings == [], text


def test_instructions_that_store_to_a_device() -> None:
    for code, text in STORES:
        match = STORE.fullmatch(text)
        assert match
        launcher = Launcher()
        launcher.trap(PAGE_FAULT, code)
        assert launcher.changed() == {Register.EIP: after(code)}, text
        assert launcher.accesses == [("store", 0x10, NAMED[match[1]][2], part(launcher.before, match[1]))], text
        assert (launcher.host.injected, launcher.warnings) == ([], [])


def test_instructions_that_load_from_a_device() -> None:
    for code, text in LOADS:
        match = LOAD.fullmatch(text)
        assert match
        launcher = Launcher()
        launcher.trap(PAGE_FAULT, code)
        expected = with_part(launcher.before | {Register.EIP: after(code)}, match[1], launcher.value)
        assert launcher.host.registers == expected, text
        assert launcher.accesses == [("load", 0x10, NAMED[match[1]][2])], text
        assert (launcher.host.injected, launcher.warnings) == ([], [])


def test_every_other_instruction_that_touches_a_device_is_the_guests_problem() -> None:
    for code, text in INSTRUCTIONS:
        if not is_emulated_move(code, text):
            launcher = Launcher()
            launcher.trap(PAGE_FAULT, code)
            launcher.assert_reflected(PAGE_FAULT)
            shown = (code + FOLLOWING)[:4].hex(" ")
            assert launcher.warnings == [
                f"Unknown MMIO instruction touching 0x4000010: {shown} at {EIP}",
            ], text


# ---- What is not in the instruction ----


def test_a_byte_with_an_operand_size_prefix_is_a_byte() -> None:
    launcher = Launcher()
    launcher.trap(PAGE_FAULT, bytes.fromhex("668a1a"))  # data16 mov (%edx), %bl
    assert launcher.changed()[Register.EIP] == EIP + 3
    assert launcher.accesses == [("load", 0x10, 1)]


def test_a_register_is_no_memory() -> None:
    # So this cannot be the instruction that touched the device.
    launcher = Launcher()
    launcher.trap(PAGE_FAULT, bytes.fromhex("89d8"))  # mov %ebx, %eax
    launcher.assert_reflected(PAGE_FAULT)


def test_a_users_port_access_is_the_guest_kernels_problem() -> None:
    for code, _ in INSTRUCTIONS:
        launcher = Launcher(registers={Register.CS: USER_CS})
        launcher.trap(GENERAL_PROTECTION, code)
        launcher.assert_reflected(GENERAL_PROTECTION)


@pytest.mark.parametrize(
    ("address", "known"),
    [
        *((WHERE - 1, False), (WHERE, True), (WHERE + SIZE - 1, True), (WHERE + SIZE, False)),
        *((0x02FF_FFFF, False), (0x0300_0000, True), (0x0300_000F, True), (0x0300_0010, False)),
    ],
)
def test_a_region_begins_and_ends(address: int, known: bool) -> None:
    launcher = Launcher()
    launcher.trap(PAGE_FAULT, bytes.fromhex("8b0a"), address)  # mov (%edx), %ecx
    assert launcher.host.injected == ([] if known else [PAGE_FAULT])
    assert launcher.warnings == ([] if known else [f"MMIO touching {address:#08x} (not a device)"])


def test_registers_that_nobody_defined_read_as_all_ones() -> None:
    launcher = Launcher()
    launcher.trap(PAGE_FAULT, bytes.fromhex("8b0a"), 0x0300_0000)  # mov (%edx), %ecx
    assert launcher.changed() == {Register.ECX: 0xFFFF_FFFF, Register.EIP: EIP + 2}
    launcher.trap(PAGE_FAULT, bytes.fromhex("890a"), 0x0300_0000)  # mov %ecx, (%edx)
    assert launcher.changed() == {Register.ECX: 0xFFFF_FFFF, Register.EIP: EIP + 4}


def test_the_instruction_pointer_wraps() -> None:
    launcher = Launcher(registers={Register.EIP: 0xFFFF_FFFF})
    launcher.trap(GENERAL_PROTECTION, b"\xec")
    assert launcher.host.registers[Register.EIP] == 0


def test_what_is_told_to_those_who_want_to_hear_everything() -> None:
    launcher = Launcher(registers={Register.EDX: 0x3F8, Register.EAX: 0x1234})
    launcher.trap(GENERAL_PROTECTION, b"\xee")
    launcher.trap(GENERAL_PROTECTION, b"\x66\xe5\x60")
    launcher.trap(PAGE_FAULT, b"\x8b\x0a")
    assert launcher.words == [
        "Emulating instruction at 0xc0100000",
        "IO OUT of ff to 1016: 0x001234",
        "Emulating instruction at 0xc0100001",
        "IO IN of ffff to 96: 0x00ffff",
        "Emulating MMIO at 0xc0100004",
    ]


def test_nothing_is_told_to_those_who_do_not() -> None:
    host = FakeLguestHost({Register.EIP: EIP})
    warnings: list[str] = []
    emulate(host, Pending(GENERAL_PROTECTION, b"\xee" + bytes(6)), [], warn=warnings.append)
    emulate(host, Pending(PAGE_FAULT, b"\x89\x02" + bytes(5), ADDRESS), [], warn=warnings.append)
    assert warnings == ["MMIO touching 0x4000010 (not a device)"]
    assert (host.registers[Register.EIP], host.injected) == (EIP + 1, [PAGE_FAULT])


@pytest.mark.parametrize("trap", [0, 6, NOTIFY])
def test_other_traps_are_none_of_its_business(trap: int) -> None:
    with pytest.raises(ValueError, match=f"trap {trap} is none"):
        Launcher().trap(trap, b"\x90")


# ---- Any bytes at all, against a model that was written from the manual's tables ----

words = st.integers(0, 0xFFFF_FFFF)
registers = st.fixed_dictionaries(dict.fromkeys(Register, words))
anything = st.binary(min_size=7, max_size=7)
#: Bytes that are nearly always one of the instructions in question.
likely = st.builds(
    lambda prefix, opcode, rest: (prefix + bytes([opcode]) + rest)[:7],
    st.sampled_from([b"", b"\x66", b"\x66\x66"]),
    st.sampled_from([0x88, 0x89, 0x8A, 0x8B, 0xE4, 0xE5, 0xE6, 0xE7, 0xEC, 0xED, 0xEE, 0xEF, 0xFA]),
    anything,
)
#: SDM volume 2, table 2-2 and 2-3: how many bytes of displacement follow, by mod (rows) and r/m or base (columns).
DISPLACEMENTS = ([0, 0, 0, 0, 0, 4, 0, 0], [1] * 8, [4] * 8)
BYTE_NAMES = ("al", "cl", "dl", "bl", "ah", "ch", "dh", "bh")
WORD_NAMES = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")


def model_length(code: bytes) -> int | None:
    mod, rm, base = code[0] // 64, code[0] % 8, code[1] % 8
    if mod == 3:
        return None
    return 2 + DISPLACEMENTS[mod][base] if rm == 4 else 1 + DISPLACEMENTS[mod][rm]


@given(st.binary(min_size=2, max_size=2))
def test_the_length_of_a_memory_operand(code: bytes) -> None:
    assert memory_operand_length(code) == model_length(code)


@given(anything | likely, registers)
def test_any_instruction_that_touches_a_device(code: bytes, values: dict[Register, int]) -> None:
    launcher = Launcher(registers=values)
    launcher.trap(PAGE_FAULT, code)
    wide, rest = (False, code[1:]) if code[0] == 0x66 else (True, code)
    length = model_length(rest[1:])
    if rest[0] not in {0x88, 0x89, 0x8A, 0x8B} or length is None:
        launcher.assert_reflected(PAGE_FAULT)
        return
    number = rest[1] // 8 % 8
    name = BYTE_NAMES[number] if rest[0] in {0x88, 0x8A} else ("e" if wide else "") + WORD_NAMES[number]
    expected = dict(values)
    if rest[0] in {0x88, 0x89}:
        assert launcher.accesses == [("store", 0x10, NAMED[name][2], part(values, name))]
    else:
        assert launcher.accesses == [("load", 0x10, NAMED[name][2])]
        expected = with_part(values, name, launcher.value)
    expected[Register.EIP] = (values[Register.EIP] + 7 - len(rest) + 1 + length) % 2**32
    assert launcher.host.registers == expected


@given(anything | likely, registers, st.sampled_from([0, 1, 2, 3]))
def test_any_instruction_that_is_not_allowed(code: bytes, values: dict[Register, int], ring: int) -> None:
    values[Register.CS] = values[Register.CS] & ~3 | ring
    launcher = Launcher(registers=values)
    launcher.trap(GENERAL_PROTECTION, code)
    rest = code[1:] if code[0] == 0x66 else code
    if ring != 1 or (rest[0] not in {0xE4, 0xE5, 0xE6, 0xE7, 0xEC, 0xED, 0xEE, 0xEF} and code[0] != 0xFA):
        launcher.assert_reflected(GENERAL_PROTECTION)
        return
    expected = dict(values)
    length = 1
    if code[0] != 0xFA:
        immediate = rest[0] < 0xE8
        length = 7 - len(rest) + (2 if immediate else 1)
        port = rest[1] if immediate else values[Register.EDX] % 65536
        if rest[0] in {0xE4, 0xE5, 0xEC, 0xED}:
            name = "al" if rest[0] in {0xE4, 0xEC} else "ax" if code[0] == 0x66 else "eax"
            expected = with_part(values, name, 1 if port == 0x64 else 0xFFFF_FFFF)
    expected[Register.EIP] = (values[Register.EIP] + length) % 2**32
    assert launcher.host.registers == expected
