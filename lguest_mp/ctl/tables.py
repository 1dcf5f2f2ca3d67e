"""Columns for people, and numbers as people read them.

What is shown may have been made up by a guest or by a launcher that is no longer itself: no control character reaches
the terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_UNITS = "KMGTPE"
_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def printable(text: str) -> str:
    """The text without what could do something to a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def columns(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines with the columns below each other. A heading that begins with ``>`` has its column to the right."""
    table = [[heading.removeprefix(">") for heading in header], *([printable(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    right = [heading.startswith(">") for heading in header]
    lines = []
    for row in table:
        cells = zip(row, widths, right, strict=True)
        lines.append(
            "  ".join(cell.rjust(width) if left else cell.ljust(width) for cell, width, left in cells).rstrip()
        )
    return lines


def or_dash(text: object | None) -> str:
    """The text, or a dash for what is not known."""
    return "-" if text is None or text == "" else str(text)


def size(count: float | None) -> str:
    """Bytes in three digits or so: ``0``, ``512``, ``1.5K``, ``23M``."""
    if count is None:
        return "-"
    value, unit = float(count), ""
    for name in _UNITS:
        if value < 1000:
            break
        value, unit = value / 1024, name
    return f"{value:.1f}{unit}" if unit and value < 9.95 else f"{value:.0f}{unit}"


def number(count: float | None) -> str:
    """A number that may be large: ``0``, ``999``, ``12.3k``, ``4.5M``."""
    if count is None:
        return "-"
    value, unit = float(count), ""
    for name in ("k", "M", "G", "T"):
        if value < 99_999.5 and not unit:
            return f"{value:.0f}"
        if unit and value < 999.5:
            break
        value, unit = value / 1000, name
    return f"{value:.1f}{unit}" if value < 99.95 else f"{value:.0f}{unit}"


def age(seconds: float | None) -> str:
    """How long ago, or for how long: ``0.3s``, ``12s``, ``5m``, ``3h12m``, ``4d``."""
    if seconds is None:
        return "-"
    seconds = max(0.0, seconds)
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < _MINUTE:
        return f"{whole}s"
    if whole < _HOUR:
        return f"{whole // _MINUTE}m{whole % _MINUTE:02}s"
    if whole < _DAY:
        return f"{whole // _HOUR}h{whole % _HOUR // _MINUTE:02}m"
    return f"{whole // _DAY}d{whole % _DAY // _HOUR:02}h"


def cpu_time(seconds: float | None) -> str:
    """CPU time as ``ps`` has it, with hundredths: ``0:03.21``, ``75:00.00``."""
    if seconds is None:
        return "-"
    hundredths = round(seconds * 100)
    return f"{hundredths // 6000}:{hundredths // 100 % 60:02}.{hundredths % 100:02}"


def percent(share: float | None) -> str:
    """A share of one CPU."""
    return "-" if share is None else f"{share * 100:.1f}"
