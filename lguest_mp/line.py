"""A line to a guest's console: how people attach to it, besides the terminal in which the launcher was started.

It consists of a *screen* (``screen.py``), which the machine and the console's transmitq worker write to and everybody
may read; of its *news*; and of the *keys*, a pipe from those who are attached to whoever reads what is typed: the
machine for its serial port, then the worker of the console's receiveq. The supervisor makes it before anything is
forked, and gives ends of it away. It carries nothing itself.
"""

from __future__ import annotations

import os
import select
from contextlib import ExitStack

from lguest_mp import screen
from lguest_mp.errors import LguestError
from lguest_mp.record import Value
from lguest_mp.screen import ScreenWriter, Track


class Attachment(Value):
    """What somebody needs who is attached: file descriptors to be sent or duplicated.

    ``screen`` (the supervisor's) is for :class:`lguest_mp.screen.ScreenReader`. ``news`` is readable when there is
    something new on it since the last ``epoll_wait``; it is this attachment's own. ``keys`` (the supervisor's) is the
    writing end of a pipe. That does not block, and is to be left so, since all who are attached share it: what the
    guest does not take yet is for each of them to keep.
    """

    screen: int
    news: select.epoll
    keys: int


class Line:
    """One line. LguestError: the host has no files or memory left."""

    def __init__(self) -> None:
        with ExitStack() as opened:
            try:
                self._screen = _owned(opened, screen.create())
                self._news = _owned(opened, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
                #: What is typed, for whoever reads that now; does not block.
                self.keys, typed = (_owned(opened, end) for end in os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK))
                self._typed = typed
                self._readable_screen = _owned(opened, _for_reading(self._screen))
            except OSError as error:
                raise LguestError(f"cannot make the console's line: {error.strerror}") from error
            self._opened = opened.pop_all()

    @property
    def files(self) -> tuple[int, ...]:
        """What the machine and the console's workers need."""
        return (self._screen, self._news, self.keys)

    @property
    def writer_files(self) -> tuple[int, ...]:
        """What a writer needs."""
        return (self._screen, self._news)

    def writer(self, track: Track) -> ScreenWriter:
        """For the process whose track it is. OSError."""
        return ScreenWriter(self._screen, self._news, track)

    def attach(self) -> Attachment:
        """For one more person. OSError.

        They do not get the eventfd of the news itself: who has that can make it block, and its writers with it.
        """
        news = select.epoll()
        news.register(self._news, select.EPOLLIN | select.EPOLLET)
        return Attachment(self._readable_screen, news, self._typed)

    def hand_on(self) -> None:
        """What the screen shows is to be seen in the guest's next life, too. OSError."""
        screen.hand_on(self._screen)

    def close(self) -> None:
        """Closes the supervisor's ends. May be called again."""
        self._opened.close()


def _owned(opened: ExitStack, fd: int) -> int:
    opened.callback(os.close, fd)
    return fd


def _for_reading(fd: int) -> int:
    """The same file, opened for reading only, where there is a /proc to do that by."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return os.dup(fd)
