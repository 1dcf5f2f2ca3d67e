# stream.pl connect|listen HOST PORT send|receive MIB
#
# Sends so many MiB of which no 64 KiB are alike, or receives them and compares every byte: 64 KiB that look random, and
# then these XOR'd with the number (32 bits, big-endian, repeated) of each next 64 KiB. Who listens says so.

use strict;
use warnings;
BEGIN { require(($0 =~ s{[^/]*$}{}r) . "common.pl") }

use constant { CHUNK => 65536, AF_INET => 2, SOCK_STREAM => 1, SOL_SOCKET => 1, SO_REUSEADDR => 2 };

my ($role, $host, $port, $verb, $mebibytes) = @ARGV;
my $address = pack("Sna4x8", AF_INET, $port, pack("C4", split(/\./, $host)));
socket(my $connection, AF_INET, SOCK_STREAM, 0) or die "socket: $!\n";
if ($role eq "listen") {
    my $listening = $connection;
    setsockopt($listening, SOL_SOCKET, SO_REUSEADDR, pack("i", 1));
    bind($listening, $address) or die "bind: $!\n";
    listen($listening, 1) or die "listen: $!\n";
    $| = 1;
    print "listening\n";
    accept($connection = undef, $listening) or die "accept: $!\n";
} else {
    connect($connection, $address) or die "connect: $!\n";
}

sub send_all {
    my ($chunk) = @_;
    for (my $at = 0; $at < CHUNK;) {
        $at += syswrite($connection, $chunk, CHUNK - $at, $at) || die "write: $!\n";
    }
}

sub receive_all {
    my $chunk = "";
    while (length $chunk < CHUNK) {
        my $read = sysread($connection, $chunk, CHUNK - length $chunk, length $chunk);
        defined $read or die "read: $!\n";
        $read or die "the stream ended early\n";
    }
    return $chunk;
}

my $base;
if ($verb eq "send") {
    my $random = open_file("/dev/urandom", 0);
    sysread($random, $base, CHUNK) == CHUNK or die "random: $!\n";
    send_all($base);
    send_all($base ^ (pack("N", $_) x (CHUNK / 4))) for 1 .. $mebibytes * 16 - 1;
    shutdown($connection, 1);
    # The other side closes when it has all.
    my $read = sysread($connection, $base, 1);
    defined $read && $read == 0 or die "the other side was not content: $!\n";
} else {
    $base = receive_all();
    for my $number (1 .. $mebibytes * 16 - 1) {
        receive_all() eq ($base ^ (pack("N", $number) x (CHUNK / 4))) or die "the 64 KiB number $number are wrong\n";
    }
    my $read = sysread($connection, $base, 1);
    defined $read or die "read: $!\n";
    $read == 0 or die "more came than was sent\n";
}
print "$mebibytes MiB\n";
