"""A launcher without a guest: a supervisor and two workers that do nothing, by their titles.

A worker that dies or is stopped is replaced, unless the options say ``--mourn``: then the supervisor ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from typing import NoReturn

from setproctitle import setproctitle

WORKERS = ("block0/requestq", "rng0/requestq")


def start(guest: str, worker: str) -> int:
    """Forks a worker; its process ID."""
    pid = os.fork()
    if pid == 0:
        setproctitle(f"lguest[{guest}] {worker}")
        time.sleep(1000)
        os._exit(0)
    return pid


def main() -> NoReturn:
    """Watches the workers."""
    guest = next(word.partition("=")[2] for word in sys.argv if word.startswith("--name="))
    setproctitle(f"lguest[{guest}]")
    workers = {start(guest, worker): worker for worker in WORKERS}
    while True:
        pid, status = os.waitpid(-1, os.WUNTRACED)
        if "--mourn" in sys.argv:
            sys.exit(4)
        if os.WIFSTOPPED(status):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        else:
            time.sleep(0.02)
            worker = workers.pop(pid)
            workers[start(guest, worker)] = worker


if __name__ == "__main__":
    main()
