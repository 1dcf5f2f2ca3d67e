r"""The firmware tables of the `pc` machine: what a stock kernel is told by ACPI.

A kernel that is told nothing looks for what a PC of 1995 had, and waits for it. So the machine is *hardware-reduced*
(ACPI 6.4, 4.1): no PIC, no PIT, no ACPI interrupt, no fixed power registers; flags say that there is no VGA, no CMOS
clock and no keyboard controller to probe. What there is:

- RSDP → XSDT → FADT (with the sleep and reset registers) → DSDT; MADT: the CPUs, one I/O APIC; SPCR: the serial port
  as the console of ``earlycon``.
- The DSDT: the PCI host bridge with its windows and the way of every slot's INTA#-INTD# to the I/O APIC, the first
  serial port, the panic port, and S5 (power off).

Addresses and numbers come from ``machine/layout.py``, where the platform that answers to them has them from too.

Source: ACPI 6.4, chapter 5 (tables); the PCI Firmware Specification 3.2 for _CRS of a host bridge; Microsoft's "Serial
Port Console Redirection Table"; QEMU's docs/specs/pvpanic.rst for QEMU0001.
"""

from __future__ import annotations

import struct

from lguest_mp.boot import aml
from lguest_mp.machine import layout

_OEM_ID = b"LGUEST"
_OEM_TABLE_ID = b"LGUESTPC"
_CREATOR_ID = b"LGMP"
_HEADER_SIZE = 36

#: FADT: IA-PC boot architecture flags (5.2.9.3), fixed feature flags (5.2.9).
_VGA_NOT_PRESENT = 1 << 2
_CMOS_RTC_NOT_PRESENT = 1 << 5
_WBINVD = 1 << 0
_PROC_C1 = 1 << 2
_PWR_BUTTON = 1 << 4
_SLP_BUTTON = 1 << 5
_RESET_REG_SUP = 1 << 10
_HW_REDUCED_ACPI = 1 << 20

_LOCAL_APIC_ENABLED = 1
_PCI_SLOTS = 32
_PCI_INTX_PINS = 4
#: _STA: present, enabled, shown, working.
_PRESENT = 0xF


def acpi_tables(base: int, cpus: int = 1) -> bytes:
    """All tables as they lie in guest memory from ``base`` (16-byte aligned) on; the RSDP is at ``base``.

    ``cpus``: how many there are, at most :data:`lguest_mp.machine.layout.MAX_CPUS`.
    """
    position = base + 64  # the RSDP's 36 bytes, rounded up
    tables = bytearray(64)

    def place(table: bytes) -> int:
        nonlocal position
        address = position
        padding = -len(table) % 16
        tables.extend(table + bytes(padding))
        position += len(table) + padding
        return address

    dsdt = place(_dsdt())
    pointers = [place(table) for table in (_fadt(dsdt), _madt(cpus), _spcr())]
    xsdt = place(_table(b"XSDT", 1, struct.pack(f"<{len(pointers)}Q", *pointers)))
    rsdp = _rsdp(xsdt)
    tables[: len(rsdp)] = rsdp
    return bytes(tables)


def _checksum(data: bytes | bytearray) -> int:
    """The byte that makes the sum of all a multiple of 256."""
    return -sum(data) & 0xFF


def _rsdp(xsdt: int) -> bytes:
    """Root System Description Pointer, revision 2 (5.2.5.3): a checksum over its first 20 bytes, one over all."""
    rsdp = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM_ID, 2, 0, 36, xsdt, 0))
    rsdp[8] = _checksum(rsdp[:20])
    rsdp[32] = _checksum(rsdp)
    return bytes(rsdp)


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A table behind its header (5.2.6)."""
    header = struct.pack(
        "<4sIBB6s8sI4sI",
        signature,
        _HEADER_SIZE + len(body),
        revision,
        0,
        _OEM_ID,
        _OEM_TABLE_ID,
        1,
        _CREATOR_ID,
        1,
    )
    table = bytearray(header + body)
    table[9] = _checksum(table)
    return bytes(table)


def _port(address: int) -> bytes:
    """Generic Address Structure of one byte-wide I/O port (5.2.3.2)."""
    return struct.pack("<BBBBQ", 1, 8, 0, 1, address)


def _fadt(dsdt: int) -> bytes:
    """Fixed ACPI Description Table, revision 6.4 (5.2.9). Zero: not there."""
    table = bytearray(276 - _HEADER_SIZE)

    def put(offset: int, data: bytes) -> None:
        """``offset`` as the standard counts, from the table's header on."""
        table[offset - _HEADER_SIZE : offset - _HEADER_SIZE + len(data)] = data

    put(40, struct.pack("<I", dsdt))
    put(109, struct.pack("<H", _VGA_NOT_PRESENT | _CMOS_RTC_NOT_PRESENT))
    flags = _WBINVD | _PROC_C1 | _PWR_BUTTON | _SLP_BUTTON | _RESET_REG_SUP | _HW_REDUCED_ACPI
    put(112, struct.pack("<I", flags))
    put(116, _port(layout.RESET_PORT))
    put(128, bytes((layout.RESET_VALUE,)))
    put(131, bytes((4,)))  # minor version
    put(140, struct.pack("<Q", dsdt))
    put(244, _port(layout.SLEEP_CONTROL_PORT))
    put(256, _port(layout.SLEEP_STATUS_PORT))
    return _table(b"FACP", 6, bytes(table))


def _madt(cpus: int) -> bytes:
    """Multiple APIC Description Table (5.2.12): the CPUs, and the I/O APIC whose inputs are the GSIs from 0 on.

    A CPU's number and the ID of its APIC are the same.
    """
    local_apics = b"".join(struct.pack("<BBBBI", 0, 8, cpu, cpu, _LOCAL_APIC_ENABLED) for cpu in range(cpus))
    io_apic = struct.pack("<BBBBII", 1, 12, 0, 0, layout.IO_APIC_BASE, 0)
    return _table(b"APIC", 5, struct.pack("<II", layout.LOCAL_APIC_BASE, 0) + local_apics + io_apic)


def _spcr() -> bytes:
    """Serial Port Console Redirection Table, revision 2: a 16550 at 115200 baud, 8 data bits, no parity."""
    body = struct.pack(
        "<B3x12sBBIBBBBBBHHBBBIBI",
        0,  # 16550
        _port(layout.SERIAL_PORT),
        1 << 1,  # by I/O APIC
        0,
        layout.SERIAL_IRQ,
        7,  # 115200
        0,
        1,  # one stop bit
        0,
        3,  # ANSI terminal
        0,
        0xFFFF,  # not a PCI device
        0xFFFF,
        0,
        0,
        0,
        0,
        0,
        0,
    )
    return _table(b"SPCR", 2, body)


def _dsdt() -> bytes:
    """Differentiated System Description Table: the devices that cannot be found by looking."""
    config_first, config_last = layout.PCI_CONFIG_ADDRESS, layout.PCI_CONFIG_DATA + 3
    host_bridge = aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", aml.integer(0)),
        aml.name(
            "_CRS",
            aml.resources(
                aml.bus_numbers(0, 0),
                aml.io_ports(config_first, config_last - config_first + 1),
                aml.io_window(0, config_first - 1),
                aml.io_window(config_last + 1, 0xFFFF),
                aml.memory_window(layout.PCI_WINDOW_FIRST, layout.PCI_WINDOW_LAST),
            ),
        ),
        aml.name("_PRT", _pci_routing()),
    )
    serial = aml.device(
        "COM1",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.integer(1)),
        aml.name("_STA", aml.integer(_PRESENT)),
        aml.name("_CRS", aml.resources(aml.io_ports(layout.SERIAL_PORT, 8), aml.interrupt_edge(layout.SERIAL_IRQ))),
    )
    panic = aml.device(
        "PEVT",
        aml.name("_HID", aml.string("QEMU0001")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_STA", aml.integer(_PRESENT)),
        aml.name("_CRS", aml.resources(aml.io_ports(layout.PANIC_PORT, 1))),
    )
    sleep_type = aml.integer(layout.SLEEP_TYPE_S5)
    nothing = aml.integer(0)
    return _table(
        b"DSDT",
        2,
        aml.scope("\\_SB", host_bridge, serial, panic)
        + aml.name("\\_S5", aml.package(sleep_type, nothing, nothing, nothing)),
    )


def _pci_routing() -> bytes:
    """_PRT (6.2.13): INTA#-INTD# of every function of a slot go straight to an input of the I/O APIC."""
    return aml.package(
        *(
            aml.package(
                aml.integer(slot << 16 | 0xFFFF),
                aml.integer(pin),
                aml.integer(0),
                aml.integer(layout.PCI_INTX_PIN + (slot + pin) % _PCI_INTX_PINS),
            )
            for slot in range(_PCI_SLOTS)
            for pin in range(_PCI_INTX_PINS)
        )
    )
