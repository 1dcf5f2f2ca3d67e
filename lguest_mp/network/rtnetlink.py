"""Whether an interface of the host is up, and hearing of it when that changes: rtnetlink(7).

The kernel tells every change of an interface to all who listen. Here such a message only says that it is time to ask:
then it does not matter whether some were lost (ENOBUFS: nobody read them for a while), what exactly they said, or that
leaving a bridge is announced as the deletion of an interface. What is said of other interfaces is dropped by a filter
in the kernel, so on a host where they come and go all day nobody is woken, and nothing overruns.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct

#: include/uapi/linux/rtnetlink.h, netlink.h, if.h
RTMGRP_LINK = 1
_RTM_NEWLINK = 16
_RTM_GETLINK = 18
_NLMSG_ERROR = 2
_NLM_F_REQUEST = 1
_IFF_UP = 1 << 0
_IFF_LOWER_UP = 1 << 16
#: struct nlmsghdr: length, type, flags, sequence, port. struct ifinfomsg: family, type, index, flags, change.
_HEADER = struct.Struct("=IHHII")
_LINK = struct.Struct("=BxHiII")
_ERROR = struct.Struct("=i")
_REQUEST_LENGTH = _HEADER.size + _LINK.size

#: include/uapi/asm-generic/socket.h
_SO_ATTACH_FILTER = 26
#: struct sock_filter: code, where to go if true and if false, operand; struct sock_fprog: length, address. The codes
#: (include/uapi/linux/bpf_common.h) load a word or half of one, compare it, and return how much to keep.
_INSTRUCTION = struct.Struct("=HBBI")
_PROGRAM = struct.Struct("@HP")
_LOAD_WORD = 0x20
_LOAD_HALF = 0x28
_IF_EQUAL = 0x15
_RETURN = 0x06
_EVERYTHING = 0xFFFFFFFF


class LinkWatch:
    """Interface number ``index`` of this thread's network namespace; names change. OSError without rtnetlink.

    :meth:`fileno` is readable when something may have changed, until :meth:`is_up` is asked. One process at a time.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self._sequence = 0
        self._message = bytearray(_REQUEST_LENGTH)
        self._socket = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
            socket.NETLINK_ROUTE,
        )
        try:
            _hear_only(self._socket, index)
            self._socket.bind((0, RTMGRP_LINK))
            self._port = self._socket.getsockname()[0]
        except OSError:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """The socket's file descriptor."""
        return self._socket.fileno()

    def close(self) -> None:
        """Stops listening."""
        self._socket.close()

    def is_up(self) -> bool | None:
        """Whether frames can pass: it is up and has a carrier. None: it is not in the namespace any more.

        OSError if the kernel does not say.
        """
        while True:
            # As long as the socket is overrun the kernel puts nothing into it, answers neither.
            while self._receive():
                pass
            self._sequence = (self._sequence + 1) & 0xFFFFFFFF
            self._socket.send(
                _HEADER.pack(_REQUEST_LENGTH, _RTM_GETLINK, _NLM_F_REQUEST, self._sequence, 0)
                + _LINK.pack(socket.AF_UNSPEC, 0, self._index, 0, 0)
            )
            # The answer is there when send() returns, behind what was announced meanwhile.
            while self._receive():
                _, kind, _, sequence, port = _HEADER.unpack_from(self._message)
                if (sequence, port) != (self._sequence, self._port):
                    continue
                if kind == _RTM_NEWLINK:
                    *_, flags, _ = _LINK.unpack_from(self._message, _HEADER.size)
                    return bool(flags & _IFF_UP and flags & _IFF_LOWER_UP)
                (error,) = _ERROR.unpack_from(self._message, _HEADER.size)
                if error != -errno.ENODEV:
                    raise OSError(-error, os.strerror(-error))
                return None

    def _receive(self) -> bool:
        """The beginning of the next message; False if there is none now."""
        while True:
            try:
                self._socket.recv_into(self._message)
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
            else:
                return True


def _hear_only(listener: socket.socket, index: int) -> None:
    """Has the kernel drop what is not about interface ``index``, except that a request failed."""
    program = b"".join(
        (
            _INSTRUCTION.pack(_LOAD_WORD, 0, 0, _HEADER.size + 4),  # ifinfomsg.ifi_index, read as big-endian
            _INSTRUCTION.pack(_IF_EQUAL, 2, 0, socket.htonl(index)),
            _INSTRUCTION.pack(_LOAD_HALF, 0, 0, 4),  # nlmsghdr.nlmsg_type
            _INSTRUCTION.pack(_IF_EQUAL, 0, 1, socket.htons(_NLMSG_ERROR)),
            _INSTRUCTION.pack(_RETURN, 0, 0, _EVERYTHING),
            _INSTRUCTION.pack(_RETURN, 0, 0, 0),
        )
    )
    memory = ctypes.create_string_buffer(program, len(program))
    length = len(program) // _INSTRUCTION.size
    listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, _PROGRAM.pack(length, ctypes.addressof(memory)))
