"""Traffic between a guest and whoever is at the other end: Perl programs for the guest, and their counterparts here.

The programs use nothing but what is built into Perl. A guest's commands are single lines in single quotes, and so are
the programs (no comments, no single quotes).
"""

from __future__ import annotations

import hashlib
import socket
import time
from dataclasses import dataclass

from guestkit.disk import MIB

#: What the programs that wait for somebody show when they do (for Session.wait_for).
LISTENING = r"^listening\r*\n"
#: How long the other side may be silent, in seconds.
_PATIENCE = 60.0

#: What all of them share: an IPv4 address and a port as sockaddr_in.
_ADDRESS = r"""
sub address { return pack("Sna4x8", 2, $_[1], pack("C4", split(/\./, $_[0]))) }
"""

#: Listens (once, and says so) or connects, then sends a file's content or stores what comes; prints how many bytes.
_TRANSFER = r"""
($role, $host, $port, $direction, $file) = @ARGV;
socket(S, 2, 1, 6) or die "socket: $!";
if ($role eq "listen") {
    setsockopt(S, 1, 2, pack("i", 1)); bind(S, address($host, $port)) or die "bind: $!"; listen(S, 1);
    $| = 1; print "listening\n"; accept(C, S) or die "accept: $!";
} else {
    connect(S, address($host, $port)) or die "connect: $!"; *C = *S;
}
if ($direction eq "send") { open(F, "<", $file) or die "$file: $!"; ($from, $to) = (*F, *C); }
else { open(F, ">", $file) or die "$file: $!"; ($from, $to) = (*C, *F); }
while ($n = sysread($from, $b, 131072)) {
    for ($at = 0; $at < $n; $at += $w) { $w = syswrite($to, $b, $n - $at, $at) or die "write: $!"; }
    $total += $n;
}
defined $n or die "read: $!";
close($to) or die "close: $!";
print "$total\n";
"""

#: Sends every datagram back to where it came from, until an empty one comes; says that it listens, and how many came.
_ECHO = r"""
socket(S, 2, 2, 17) or die "socket: $!"; bind(S, address("0.0.0.0", $ARGV[0])) or die "bind: $!";
$| = 1; print "listening\n";
while (defined($from = recv(S, $b, 2048, 0)) and length $b) { send(S, $b, 0, $from) or die "send: $!"; $n++; }
print "$n\n";
"""

#: Sends that many MiB out of its memory.
_SOURCE = r"""
($host, $port, $mib) = @ARGV; $b = "x" x 131072;
socket(S, 2, 1, 6) or die "socket: $!"; connect(S, address($host, $port)) or die "connect: $!";
for ($left = $mib * 1048576; $left > 0; $left -= $n) { $n = syswrite(S, $b, 131072) or die "write: $!"; }
"""

#: Reads that many MiB and keeps nothing.
_SINK = r"""
($host, $port, $mib) = @ARGV;
socket(S, 2, 1, 6) or die "socket: $!"; connect(S, address($host, $port)) or die "connect: $!";
for ($left = $mib * 1048576; $left > 0; $left -= $n) { $n = sysread(S, $b, 131072) or die "read: $!"; }
"""


#: Fills a file with that many MiB that look random and are the same nowhere in it.
_MAKE = r"""
($file, $mib) = @ARGV;
open(R, "<", "/dev/urandom") or die "random: $!"; read(R, $b, 65536) == 65536 or die "random: $!";
open(F, ">", $file) or die "$file: $!";
for (1 .. $mib * 16) { print F $b ^ (pack("N", $_) x 16384); }
close(F) or die "$file: $!";
"""


def _perl(program: str, *arguments: object) -> str:
    """The shell command that runs a program in a guest whose initramfs has perl."""
    line = " ".join((_ADDRESS + program).split())
    return f"/sysroot/bin/perl -e '{line}' {' '.join(map(str, arguments))}"


def guest_makes(file: str, mebibytes: int) -> str:
    """The command that fills ``file`` with bytes that look random (/dev/urandom would take long)."""
    return _perl(_MAKE, file, mebibytes)


def guest_connects(host: str, port: int, direction: str, file: str) -> str:
    """The command that connects to ``host`` and has ``file`` filled from there or, with "send", sent there."""
    return _perl(_TRANSFER, "connect", host, port, direction, file)


def guest_listens(port: int, direction: str, file: str) -> str:
    """The command that does the same with whoever connects first."""
    return _perl(_TRANSFER, "listen", "0.0.0.0", port, direction, file)


def guest_echoes(port: int) -> str:
    """The command that sends datagrams back to who sent them until an empty one comes, and prints how many."""
    return _perl(_ECHO, port)


def guest_sends(host: str, port: int, mebibytes: int) -> str:
    """The command that connects to ``host`` and sends that much, as fast as can be."""
    return _perl(_SOURCE, host, port, mebibytes)


def guest_reads(host: str, port: int, mebibytes: int) -> str:
    """The command that connects to ``host`` and reads that much, as fast as can be."""
    return _perl(_SINK, host, port, mebibytes)


def listener(address: str = "0.0.0.0") -> socket.socket:
    """A TCP socket here that guests can connect to, on a free port of its own."""
    return socket.create_server((address, 0))


def port_of(bound: socket.socket) -> int:
    """The port that a socket is bound to."""
    port: int = bound.getsockname()[1]
    return port


def accepted(listening: socket.socket) -> socket.socket:
    """The next connection."""
    listening.settimeout(_PATIENCE)
    connection, _ = listening.accept()
    connection.settimeout(_PATIENCE)
    return connection


def checksum_of_the_rest(connection: socket.socket) -> tuple[int, str]:
    """Reads until the end: how many bytes came, and their SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    total = 0
    piece = bytearray(MIB)
    while length := connection.recv_into(piece):
        digest.update(memoryview(piece)[:length])
        total += length
    return total, digest.hexdigest()


def seconds_to_send(connection: socket.socket, mebibytes: int) -> float:
    """Sends that much; how long it took until the other side had read it and closed the connection."""
    piece = bytes(MIB)
    started = time.monotonic()
    for _ in range(mebibytes):
        connection.sendall(piece)
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)
    return time.monotonic() - started


def seconds_to_receive(connection: socket.socket, mebibytes: int) -> float:
    """Reads until the end, which is after that much; how long it took."""
    piece = bytearray(MIB)
    total = 0
    started = time.monotonic()
    while length := connection.recv_into(piece):
        total += length
    seconds = time.monotonic() - started
    assert total == mebibytes * MIB
    return seconds


@dataclass(frozen=True)
class EchoResult:
    """How many datagrams were sent, and how many came back as they were sent."""

    sent: int
    returned: int


def exchange_datagrams(
    address: tuple[str, int], count: int, window: int, size: int = 64, patience: float = 5.0
) -> EchoResult:
    """Sends ``count`` datagrams of ``size`` bytes, at most ``window`` of them on their way at a time.

    Each has its number in front. What has not come back ``patience`` seconds after the last one did is lost.
    """
    returned: set[int] = set()
    sent = 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as here:
        here.connect(address)
        here.settimeout(patience)
        while len(returned) < count:
            while sent < count and sent - len(returned) < window:
                here.send(_datagram(sent, size))
                sent += 1
            try:
                data = here.recv(2048)
            except TimeoutError:
                break
            number = int.from_bytes(data[:4], "big")
            if data == _datagram(number, size):
                returned.add(number)
        here.send(b"")
    return EchoResult(sent, len(returned))


def _datagram(number: int, size: int) -> bytes:
    return number.to_bytes(4, "big") + bytes((number + at) & 0xFF for at in range(size - 4))
