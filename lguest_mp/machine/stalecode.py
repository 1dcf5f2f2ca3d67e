"""The machine's side of the code map: workers ask for stale translations to be dropped, the CPU's thread drops them."""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from typing import Protocol

from lguest_mp.codemap import MAX_DATAGRAM, CodeMap, parse_request


class Translator(Protocol):
    """A CPU that translates code; see :class:`lguest_mp.cpu.engine.Engine`."""

    def call(self, job: Callable[[], None]) -> None:
        """Runs ``job`` on the CPU's thread between two instructions, soon. From any thread."""

    def forget_code(self, first_page: int, last_page: int) -> None:
        """Drops what was translated from these pages of guest memory. On the CPU's thread."""


def answer_workers(
    code_map: CodeMap, translator: Translator, add_reader: Callable[[int, Callable[[], None]], None]
) -> None:
    """Has each worker's channel answered. ``add_reader(fd, handler)`` has the events' thread read it."""
    for end in code_map.machine_ends:
        add_reader(end.fileno(), partial(_forget_code, end, translator, code_map.pages))


def _forget_code(channel: socket.socket, translator: Translator, pages: int) -> None:
    """A worker wrote pages that hold translated code: drop the translations, then answer."""
    try:
        parsed = parse_request(channel.recv(MAX_DATAGRAM, socket.MSG_DONTWAIT), pages)
    except BlockingIOError:
        return
    if parsed is None:
        return
    answer, runs = parsed

    def job() -> None:
        for first, last in runs:
            translator.forget_code(first, last)
        try:
            channel.send(answer, socket.MSG_DONTWAIT)
        except OSError:
            return  # the worker that asked is gone, or asks without listening

    translator.call(job)
