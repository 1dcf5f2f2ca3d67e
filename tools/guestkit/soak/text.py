"""A long text in which no two places are alike, and how a guest shows it (``perl/chatter.pl``) whose workers die."""

from __future__ import annotations

from dataclasses import dataclass

#: A terminal driver's buffer: no piece that is shown twice is longer.
LONGEST_PIECE = 4096
#: So many characters say which place of the text they are.
_TELLING = 32
#: A piece that is shown again may begin like what would have come next; so far at most.
_COINCIDENCE = 32


def line(number: int) -> str:
    """A line of the text; 32 characters."""
    return f"{number:010d} {number:08x} {number:011o}\n"


@dataclass(frozen=True)
class Text:
    """A text of ``lines`` lines, and how it was ``shown``."""

    lines: int
    shown: str

    def repeats(self) -> list[int]:
        """The lengths of the pieces that were shown a second time. AssertionError: something is missing, or foreign."""
        text = "".join(map(line, range(self.lines)))
        shown = self.shown
        found = []
        at = place = 0
        while at < len(shown) or place < len(text):
            same = _common(shown, at, text, place)
            at, place = at + same, place + same
            if at == len(shown) and place == len(text):
                break
            back, length = self._find_repeat(text, at, place)
            found.append(length)
            at, place = at - back, place - back - length
        return found

    def _find_repeat(self, text: str, at: int, place: int) -> tuple[int, int]:
        """A piece is shown again from ``back`` characters before ``at`` on: ``back``, and how long it is."""
        for back in range(min(_COINCIDENCE, at) + 1):
            begin = self.shown[at - back :][:_TELLING]
            earliest = max(0, place - back - LONGEST_PIECE)
            where = text.rfind(begin, earliest, place - back - 1 + len(begin)) if begin else -1
            if where >= 0:
                return back, place - back - where
        raise AssertionError(
            f"after {text[max(0, place - 64) : place]!r} was to come {text[place : place + 64]!r}, "
            f"but there is {self.shown[at : at + 256]!r}"
        )


def _common(one: str, at: int, other: str, place: int) -> int:
    """How many characters are the same from there on."""
    length = 0
    step = 1 << 16
    while step:
        piece = one[at + length : at + length + step]
        if piece and piece == other[place + length : place + length + step]:
            length += len(piece)
        else:
            step >>= 1
    return length
