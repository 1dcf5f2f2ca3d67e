"""The firmware tables are sound, lead to each other, and tell what the platform answers to."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from lguest_mp.boot.acpi import acpi_tables
from lguest_mp.machine import layout

BASE = 0xE0000
IASL = shutil.which("iasl")


def at(address: int, length: int) -> bytes:
    return acpi_tables(BASE)[address - BASE : address - BASE + length]


def table(address: int) -> bytes:
    (length,) = struct.unpack("<I", at(address + 4, 4))
    return at(address, length)


def tables() -> dict[str, bytes]:
    """Every table by its signature, found as a kernel finds them: RSDP, XSDT, FADT, DSDT."""
    rsdp = at(BASE, 36)
    (xsdt_address,) = struct.unpack_from("<Q", rsdp, 24)
    xsdt = table(xsdt_address)
    found = [table(address) for (address,) in struct.iter_unpack("<Q", xsdt[36:])]
    fadt = next(entry for entry in found if entry[:4] == b"FACP")
    (dsdt_address,) = struct.unpack_from("<Q", fadt, 140)
    return {entry[:4].decode(): entry for entry in (xsdt, *found, table(dsdt_address))}


def port(address: int) -> bytes:
    """Generic Address Structure: I/O space, 8 bits wide, at bit 0, accessed by bytes (ACPI 6.4, 5.2.3.2)."""
    return struct.pack("<BBBBQ", 1, 8, 0, 1, address)


def test_the_rsdp_is_of_revision_2_and_both_its_sums_are_zero() -> None:
    rsdp = at(BASE, 36)
    assert rsdp[:8] == b"RSD PTR "
    assert rsdp[15] == 2
    assert struct.unpack_from("<I", rsdp, 20) == (36,)
    assert sum(rsdp[:20]) % 256 == 0
    assert sum(rsdp) % 256 == 0
    assert struct.unpack_from("<I", rsdp, 16) == (0,), "no RSDT"


def test_every_table_is_there_and_its_sum_is_zero() -> None:
    found = tables()
    assert set(found) == {"XSDT", "FACP", "APIC", "SPCR", "DSDT"}
    for signature, content in found.items():
        assert sum(content) % 256 == 0, signature
        assert content[10:16] == b"LGUEST"


def test_tables_do_not_reach_into_the_bios() -> None:
    assert len(acpi_tables(BASE)) <= 0x10000


def test_tables_are_aligned() -> None:
    for (address,) in struct.iter_unpack("<Q", tables()["XSDT"][36:]):
        assert address % 16 == 0


def test_the_fadt_tells_of_a_machine_without_a_past() -> None:
    fadt = tables()["FACP"]
    assert (len(fadt), fadt[8], fadt[131]) == (276, 6, 4)
    (flags,) = struct.unpack_from("<I", fadt, 112)
    assert flags & 1 << 20, "HW_REDUCED_ACPI"
    assert flags & 1 << 10, "RESET_REG_SUP"
    (boot_flags,) = struct.unpack_from("<H", fadt, 109)
    assert boot_flags == 1 << 2 | 1 << 5, "no VGA, no CMOS RTC; no legacy devices, no 8042; MSI allowed"
    assert not any(fadt[46:109]), "no fixed hardware"
    assert not any(fadt[148:244]), "nor by its 64-bit addresses"


def test_the_fadt_has_the_registers_of_the_platform() -> None:
    fadt = tables()["FACP"]
    assert fadt[116:128] == port(layout.RESET_PORT)
    assert fadt[128] == layout.RESET_VALUE
    assert fadt[244:256] == port(layout.SLEEP_CONTROL_PORT)
    assert fadt[256:268] == port(layout.SLEEP_STATUS_PORT)


def test_the_dsdt_is_found_by_both_addresses() -> None:
    fadt = tables()["FACP"]
    assert struct.unpack_from("<I", fadt, 40) == struct.unpack_from("<I", fadt, 140)
    assert struct.unpack_from("<I", fadt, 144) == (0,)


def test_the_madt_has_one_cpu_and_one_io_apic() -> None:
    madt = tables()["APIC"]
    assert struct.unpack_from("<II", madt, 36) == (layout.LOCAL_APIC_BASE, 0), "and no 8259s"
    assert madt[44:] == struct.pack("<BBBBI", 0, 8, 0, 0, 1) + struct.pack(
        "<BBBBII", 1, 12, 0, 0, layout.IO_APIC_BASE, 0
    )


@pytest.mark.parametrize("cpus", [2, 255])
def test_the_madt_has_as_many_cpus_as_there_are(cpus: int) -> None:
    found = acpi_tables(BASE, cpus)
    start = found.index(b"APIC")
    (length,) = struct.unpack_from("<I", found, start + 4)
    madt = found[start : start + length]
    assert sum(madt) % 256 == 0
    assert [struct.unpack_from("<BBBBI", madt, 44 + 8 * cpu) for cpu in range(cpus)] == [
        (0, 8, cpu, cpu, 1) for cpu in range(cpus)
    ]
    assert madt[44 + 8 * cpus] == 1  # then comes the I/O APIC


def test_the_spcr_tells_of_the_serial_port() -> None:
    spcr = tables()["SPCR"]
    assert (len(spcr), spcr[8], spcr[36]) == (80, 2, 0)
    assert spcr[40:52] == port(layout.SERIAL_PORT)
    assert (spcr[52], struct.unpack_from("<I", spcr, 54)[0], spcr[58]) == (2, layout.SERIAL_IRQ, 7)


def test_power_off_is_s5() -> None:
    assert tables()["DSDT"].endswith(b"\x08\\_S5_" + bytes((0x12, 7, 4, 0x0A, layout.SLEEP_TYPE_S5, 0, 0, 0)))


@pytest.mark.skipif(IASL is None, reason="iasl (acpica-tools) is not installed")
@pytest.mark.parametrize("signature", ["FACP", "APIC", "SPCR", "DSDT"])
def test_intels_compiler_agrees(signature: str, tmp_path: Path) -> None:
    """The table can be disassembled, and what comes out compiled, without a remark."""
    assert IASL
    binary = tmp_path / "table.dat"
    binary.write_bytes(tables()[signature])
    for command in (["-d", "table.dat"], ["table.dsl"]):
        done = subprocess.run([IASL, *command], cwd=tmp_path, capture_output=True, text=True, check=True)
        output = done.stdout + done.stderr
        assert not re.search(r"incorrect|invalid|(error|warning|remark)\s+\d+ -|acpi (error|warning)", output, re.I), (
            output
        )


@pytest.mark.skipif(IASL is None, reason="iasl (acpica-tools) is not installed")
def test_the_dsdt_as_a_kernel_reads_it(tmp_path: Path) -> None:
    assert IASL
    (tmp_path / "dsdt.dat").write_bytes(tables()["DSDT"])
    subprocess.run([IASL, "-d", "dsdt.dat"], cwd=tmp_path, capture_output=True, check=True)
    source = "".join((tmp_path / "dsdt.dsl").read_text().split())
    assert 'Device(PCI0){Name(_HID,EisaId("PNP0A03")' in source
    assert 'Device(COM1){Name(_HID,EisaId("PNP0501")' in source
    assert 'Name(_HID,"QEMU0001")' in source
    assert "Interrupt(ResourceConsumer,Edge,ActiveHigh,Exclusive,,,){0x00000004,}" in source
    assert "IO(Decode16,0x0505," in source
    # Slot 1's INTD# is the pin after the last, swizzled: (1 + 3) % 4 = 0.
    assert f"Package(0x04){{0x0001FFFF,0x03,Zero,0x{layout.PCI_INTX_PIN:02X}}}" in source
    assert f"Package(0x04){{0x001FFFFF,0x03,Zero,0x{layout.PCI_INTX_PIN + 2:02X}}}" in source
