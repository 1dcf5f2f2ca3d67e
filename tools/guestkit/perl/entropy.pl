# entropy.pl STOP: reads random numbers in pieces of any size, until the file STOP appears. Each is as long as was asked
# for, and no 16 bytes come twice in a row.

use strict;
use warnings;
BEGIN { require(($0 =~ s{[^/]*$}{}r) . "common.pl") }

my ($stop) = @ARGV;
my $source = open_file("/dev/hwrng", 0);
my ($pieces, $bytes, $last) = (0, 0, "");
until (-e $stop) {
    my $size = 16 * (1 + int rand pick(4, 64, 512));
    my $piece = "";
    while (length $piece < $size) {
        my $read = sysread($source, $piece, $size - length $piece, length $piece);
        defined $read or die "read of $size: $!\n";
        $read or die "end of file within $size\n";
    }
    for my $number (unpack("(a16)*", $piece)) {
        $number ne $last or die "the same 16 bytes twice\n";
        $last = $number;
    }
    $pieces++;
    $bytes += $size;
}
print "$pieces pieces, $bytes bytes\n";
