"""What one process needs of the host, beyond what all of them do."""

from __future__ import annotations

from lguest_mp.jail.calls import Call
from lguest_mp.record import Value


class Needs(Value):
    """The needs of a worker that does nothing but serve guest memory from guest memory, and more as it is said.

    ``calls``: system calls besides ``calls.COMMON``. ``more_files``: how many files it opens itself, or is sent.
    ``longest_file``: how long (bytes) a regular file may become by its writes; None: as long as may be. ``memory``: how
    many bytes of memory it may take for itself. ``threads``: whether it has several.
    """

    calls: tuple[Call, ...] = ()
    more_files: int = 0
    longest_file: int | None = 0
    memory: int = 64 << 20
    threads: bool = False
