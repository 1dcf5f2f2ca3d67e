# gap.pl DEVICE SECONDS
#
# Reads a disk for so long, 4 KiB anywhere past the page cache, one after the other. Says when it begins, and at the end
# how many reads there were and the longest time between the ends of two, in milliseconds.

use strict;
use warnings;
BEGIN { require(($0 =~ s{[^/]*$}{}r) . "common.pl") }

use constant { SIZE => 4096 };

my ($device, $duration) = @ARGV;
my $disk = open_file($device, O_DIRECT);
my $blocks = int(sysseek($disk, 0, 2) / SIZE) or die "$device is empty\n";
my $buffer = "\0" x (2 * SIZE);
my $shift = -unpack("J", pack("p", $buffer)) % SIZE;
$| = 1;
print "reading\n";
my ($reads, $longest) = (0, 0);
my $last = seconds();
my $end = $last + $duration;
while ($last < $end) {
    sysseek($disk, SIZE * int rand $blocks, 0);
    my $read = sysread($disk, $buffer, SIZE, $shift);
    defined $read && $read == SIZE or die "read: $!\n";
    my $now = seconds();
    $longest = $now - $last if $now - $last > $longest;
    $last = $now;
    $reads++;
}
printf "%d reads, longest gap %.3f ms\n", $reads, $longest * 1000;
