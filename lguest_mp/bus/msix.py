"""MSI-X: a device's table of interrupt messages (PCI Local Bus Specification 3.0, 6.8.2).

Each vector has an address, a value to write there, and a mask bit; the function as a whole has an enable and a mask
bit, and it cannot write at all while bus mastering is off. A vector that is raised while any of these holds it back
stays *pending*, and is sent as soon as nothing does: the guest may mask what it likes without losing an interrupt.
"""

from __future__ import annotations

from collections.abc import Callable

#: MSI-X's capability ID.
CAPABILITY = 0x11
#: Message control (6.8.2.3).
ENABLE = 1 << 15
FUNCTION_MASK = 1 << 14

#: A table entry: four doublewords (address low and high, data, vector control).
ENTRY_SIZE = 16
_MASKED = 1


class MsixTable:
    """The table and the pending bits of ``vectors`` vectors.

    ``send`` gets address and data. Every method is called with the platform's lock held.
    """

    def __init__(self, vectors: int, send: Callable[[int, int], object]) -> None:
        self.vectors = vectors
        self._send = send
        self._words = [0, 0, 0, _MASKED] * vectors
        self._open = False
        #: A bit for each pending vector.
        self.pending = 0

    def raise_vector(self, vector: int) -> None:
        """Sends the vector's message, now or when nothing masks it any more."""
        first = vector * 4
        words = self._words
        if self._open and not words[first + 3] & _MASKED:
            self._send(words[first] | words[first + 1] << 32, words[first + 2])
        else:
            self.pending |= 1 << vector

    def message(self, vector: int) -> tuple[int, int] | None:
        """The address and data that the vector sends now, or None: something masks it."""
        first = vector * 4
        words = self._words
        if not self._open or words[first + 3] & _MASKED:
            return None
        return words[first] | words[first + 1] << 32, words[first + 2]

    def set_open(self, is_open: bool) -> None:
        """Whether the function as a whole may send."""
        self._open = is_open
        if is_open:
            for vector in range(self.vectors):
                self._release(vector)

    def _release(self, vector: int) -> None:
        if self.pending >> vector & 1:
            self.pending &= ~(1 << vector)
            self.raise_vector(vector)

    def forget(self) -> None:
        """Drops what is pending (the device was reset)."""
        self.pending = 0

    def read(self, offset: int, size: int) -> int:
        """Reads the table; accesses are aligned doublewords or quadwords (6.8.2)."""
        index = offset // 4
        if size not in {4, 8} or offset % size or index >= len(self._words):
            return 0
        low = self._words[index]
        return low if size == 4 else low | self._words[index + 1] << 32

    def write(self, offset: int, size: int, value: int) -> None:
        """Writes the table."""
        index = offset // 4
        if size not in {4, 8} or offset % size or index >= len(self._words):
            return
        self._put(index, value & 0xFFFF_FFFF)
        if size == 8:
            self._put(index + 1, value >> 32)

    def _put(self, index: int, word: int) -> None:
        vector, field = divmod(index, 4)
        if field == 0:
            word &= ~3
        elif field == 3:
            word &= _MASKED
        self._words[index] = word
        if field == 3 and not word:
            self._release(vector)

    def read_pending(self, offset: int, size: int) -> int:
        """Reads the pending-bit array."""
        if size not in {4, 8} or offset % size:
            return 0
        return self.pending >> offset * 8 & (1 << size * 8) - 1
