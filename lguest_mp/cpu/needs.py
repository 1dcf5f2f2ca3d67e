"""What the machine process needs of the host, by the engine that executes the guest (see ``lguest_mp/jail``).

It enters its jail when everything is imported, and before it makes its event loop and its CPU. So both are here, but no
file that would have to be opened by its name. An engine with a file of its own (``parts.machine_files``) names the
requests that it makes there: :func:`~lguest_mp.jail.calls.ioctls`, ``pread64``.
"""

from __future__ import annotations

from lguest_mp.jail.calls import CODE, EVENTS, Call, plain
from lguest_mp.jail.needs import Needs

#: Three epolls, a timer or two, wake-ups, a copy of standard output; and some.
_FILES = 16


def of_machine(engine: tuple[Call, ...], memory: int, files: int = 0) -> Needs:
    """Those of a machine whose engine makes these calls and takes ``memory`` bytes, and ``files``.

    It has threads, events, a terminal.
    """
    return Needs((*EVENTS, *engine), more_files=_FILES + files, longest_file=None, memory=memory, threads=True)


#: The embedded CPU: translated code (TRANSLATION_BYTES) and what is kept about it, fences across threads. How much
#: memory there is decides how its library hashes.
EMBEDDED = of_machine((*CODE, *plain("membarrier", "sysinfo")), memory=1 << 30)
#: /dev/lguest: all requests are reads and writes.
DEV_LGUEST = of_machine(plain("pread64", "pwrite64"), memory=256 << 20)
