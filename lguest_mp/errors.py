"""What can go wrong, as one line for a person each: what was wrong, with which value, what to do.

A traceback is for bugs of ours. Everything that the user, the host or the guest can cause is one of these.
"""


class LguestError(Exception):
    """The launcher cannot go on. Its text is the one line that is shown (exit status 1)."""


class GuestError(Exception):
    """The guest broke a rule. Its text says which; whoever serves the guest decides what is stopped."""


class GuestAddressError(GuestError):
    """The guest named memory that it does not have."""

    def __init__(self, address: int, length: int) -> None:
        super().__init__(f"no guest memory at {address:#x}, {length} bytes")
        self.address = address
        self.length = length


class DeviceProtocolError(GuestError):
    """The guest's driver broke the virtio standard; the device stops and needs a reset.

    ``section`` is the section of the virtio 1.2 standard whose rule was broken, for example ``"2.7.5"``.
    """

    def __init__(self, section: str, problem: str) -> None:
        super().__init__(f"{problem} (virtio 1.2, {section})")
        self.section = section
