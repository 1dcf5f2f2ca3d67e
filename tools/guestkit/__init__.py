"""What the demo, the tests and the benchmark need of a guest: a stock kernel, an initramfs, a disk, a session with it.

Python's standard library and Debian's apt are all that is used, because the demo runs before anything is installed.
"""
