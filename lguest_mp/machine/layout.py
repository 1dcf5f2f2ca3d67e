"""Where things are in the `pc` machine: the addresses that the firmware tables tell and the platform answers.

Everything between the end of low RAM and 4 GiB, and everything above RAM, is the devices' (``memory.py``).
"""

from __future__ import annotations

#: I/O APIC and local APIC (Intel SDM 3A, 11.4.1, and the 82093AA datasheet), each one page.
IO_APIC_BASE = 0xFEC0_0000
LOCAL_APIC_BASE = 0xFEE0_0000
#: Inputs of the I/O APIC: 0-15 as ISA's, 16-23 for PCI's INTA#-INTD#.
IO_APIC_PINS = 24

#: APIC IDs are 0 to 254; 255 means all of them.
MAX_CPUS = 255

#: Four pages of nobody's, in which KVM keeps what Intel's processors need of it in real mode.
KVM_PAGES = 0xFFFB_C000

#: The window from which PCI's memory BARs are assigned, first and last byte.
PCI_WINDOW_FIRST = 0xC000_0000
PCI_WINDOW_LAST = 0xFEBF_FFFF
#: Type-1 configuration mechanism (PCI Local Bus 3.0, 3.2.2.3.2).
PCI_CONFIG_ADDRESS = 0xCF8
PCI_CONFIG_DATA = 0xCFC
#: PCI's INTA#-INTD# go to this I/O APIC pin and the three after it, swizzled by slot: pin + (slot + intx) % 4.
PCI_INTX_PIN = 16

#: The 16550 (first serial port), its eight registers and its ISA interrupt.
SERIAL_PORT = 0x3F8
SERIAL_IRQ = 4

#: ACPI's fixed hardware for hardware-reduced platforms (ACPI 6.4, 4.8.3.7): sleep control, sleep status, reset.
SLEEP_CONTROL_PORT = 0x600
SLEEP_STATUS_PORT = 0x601
RESET_PORT = 0x602
#: The value that resets when written to RESET_PORT, and SLP_TYP of S5 (power off) in SLEEP_CONTROL_PORT.
RESET_VALUE = 1
SLEEP_TYPE_S5 = 5

#: Where a panicking kernel says so (pvpanic; ACPI device QEMU0001): bit 0 panicked, bit 1 crash kernel loaded.
PANIC_PORT = 0x505
#: The keyboard controller's command port: 0xfe pulses the CPU's reset line, the kernel's second choice for a reset.
KEYBOARD_COMMAND_PORT = 0x64
KEYBOARD_RESET = 0xFE
