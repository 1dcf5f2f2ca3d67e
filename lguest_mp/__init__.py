"""A launcher for virtual machines whose every virtqueue is served by a process of its own."""

__version__ = "0.1.0"
