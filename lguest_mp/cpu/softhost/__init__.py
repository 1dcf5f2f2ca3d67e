"""The host half of lguest in software, on the embedded CPU."""

from lguest_mp.cpu.softhost.host import SoftHost

__all__ = ["SoftHost"]
