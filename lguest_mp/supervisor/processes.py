"""What the host says about the processes of a guest, as a table for a person: state, CPU time, memory of their own.

psutil reads it from /proc; it is imported when somebody asks (SIGUSR1, the end of a --verbose run). In another root
directory there is neither psutil nor /proc, and another user may not look into processes that changed their user:
what cannot be known is a dash.
"""

from __future__ import annotations

from collections.abc import Iterable

from lguest_mp.record import Value


class Sample(Value):
    """One process at one moment: its ``state`` in psutil's words, CPU ``seconds``, ``own_memory`` (USS) in bytes."""

    name: str
    pid: int
    state: str | None = None
    seconds: float | None = None
    own_memory: int | None = None


def look_at(name: str, pid: int) -> Sample:
    """What can be known about one process now."""
    try:
        import psutil  # noqa: PLC0415
    except (ImportError, OSError):  # another root directory; no files left to read it
        return Sample(name, pid)
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            times = process.cpu_times()
            state = process.status()
    except (psutil.Error, OSError):
        return Sample(name, pid)
    try:
        own_memory = process.memory_full_info().uss
    except (psutil.Error, OSError):
        own_memory = None
    return Sample(name, pid, state, times.user + times.system, own_memory)


def table(members: Iterable[tuple[str, int]]) -> list[str]:
    """A header and a line for each (name, PID)."""
    lines = [f"{'process':<20} {'pid':>8} {'state':<10} {'cpu s':>9} {'own KiB':>9}"]
    for sample in (look_at(name, pid) for name, pid in members):
        state = sample.state or "-"
        seconds = "-" if sample.seconds is None else f"{sample.seconds:.2f}"
        memory = "-" if sample.own_memory is None else f"{sample.own_memory >> 10}"
        lines.append(f"{sample.name:<20} {sample.pid:>8} {state:<10} {seconds:>9} {memory:>9}")
    return lines
