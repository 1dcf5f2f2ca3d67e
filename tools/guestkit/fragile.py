"""``lguest`` with workers that a signal breaks: SIGUSR2 raises an exception wherever their Python code is.

That is what a bug of ours, or a library's, would do: it strikes between any two bytecodes, and nothing is prepared for
it. A program of its own, run as ``python fragile.py OPTIONS...``, since the launcher itself has no such thing.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import NoReturn

from lguest_mp import cli, worker


class Broken(RuntimeError):
    """What such a bug raises."""


def _break(_number: int, _frame: FrameType | None) -> NoReturn:
    raise Broken("an exception in the midst of it all")


def main() -> int:
    """The launcher, with other workers."""
    run = worker.run

    def fragile_run(*arguments: object, **others: object) -> int:
        signal.signal(signal.SIGUSR2, _break)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
        return run(*arguments, **others)  # type: ignore[arg-type]

    worker.run = fragile_run
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
