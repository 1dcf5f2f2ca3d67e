"""Finding something out in a child, while its parent does something else.

A launch has a few things to find out that take as long as its imports, and a second processor to do so. In a process
of its own it costs the launcher neither time nor memory, and whatever goes wrong there is the child's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NoReturn


class Aside:
    """Something that is being found out."""

    def __init__(self, find_out: Callable[[], bytes]) -> None:
        """``find_out`` is called in the child; its answer is short enough for a pipe. OSError: there is no child."""
        self._answer, answer = os.pipe()
        try:
            self._child = os.fork()
            if self._child == 0:
                _be_child(find_out, answer)
        except OSError:
            os.close(self._answer)
            raise
        finally:
            os.close(answer)

    def answer(self) -> bytes | None:
        """Waits for the end of it; None: it failed. To be asked once."""
        with os.fdopen(self._answer, "rb") as file:
            said = file.read()
        _, status = os.waitpid(self._child, 0)
        return said if status == 0 else None


def _be_child(find_out: Callable[[], bytes], answer: int) -> NoReturn:
    status = 1
    try:
        os.write(answer, find_out())
        status = 0
    finally:
        os._exit(status)
