"""Everything that is in guest memory before the first instruction: kernel, initrd, zero page, firmware tables."""
