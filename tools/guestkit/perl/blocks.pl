# Blocks of a disk or a file that say whose they are: each holds its owner, its number and its generation, in each of
# its sectors. Who reads one knows whether it is the last one that was written, all of it, and in its place.

use strict;
use warnings;
BEGIN { require(($0 =~ s{[^/]*$}{}r) . "common.pl") }

use constant { BLOCK => 4096, MOST => 32 };

# One buffer for all, at an address that O_DIRECT takes; it is never moved.
my $buffer = "\0" x (BLOCK * (MOST + 1));
my $shift = -unpack("J", pack("p", $buffer)) % BLOCK;

# content(OWNER, NUMBER, GENERATION): the bytes of a block; generation 0 is one that was never written
sub content {
    my ($owner, $number, $generation) = @_;
    return "\0" x BLOCK unless $generation;
    return join "", map { pack("N4", $owner, $number, $generation, $_) x 32 } 0 .. 7;
}

# store(FILE, FIRST, OWNER, GENERATIONS, AT, COUNT): writes COUNT blocks from number AT on, as GENERATIONS has them;
# number 0 is the file's block FIRST
sub store {
    my ($file, $first, $owner, $generations, $at, $count) = @_;
    my $length = $count * BLOCK;
    substr($buffer, $shift, $length, join "", map { content($owner, $_, $generations->[$_]) } $at .. $at + $count - 1);
    sysseek($file, ($first + $at) * BLOCK, 0) or die "seek: $!\n";
    my $written = syswrite($file, $buffer, $length, $shift);
    defined $written or die "write of $count blocks at $at of $owner: $!\n";
    $written == $length or die "write of $count blocks at $at of $owner: only $written bytes\n";
}

# check(FILE, FIRST, OWNER, GENERATIONS, AT, COUNT): reads them; dies unless they are as GENERATIONS has them
sub check {
    my ($file, $first, $owner, $generations, $at, $count) = @_;
    my $length = $count * BLOCK;
    sysseek($file, ($first + $at) * BLOCK, 0) or die "seek: $!\n";
    my $read = sysread($file, $buffer, $length, $shift);
    defined $read or die "read of $count blocks at $at of $owner: $!\n";
    $read == $length or die "read of $count blocks at $at of $owner: only $read bytes\n";
    for my $number ($at .. $at + $count - 1) {
        my $found = substr($buffer, $shift + ($number - $at) * BLOCK, BLOCK);
        next if $found eq content($owner, $number, $generations->[$number]);
        my @sectors = map { "[" . join(" ", unpack("N4", substr($found, 512 * $_, 16))) . "]" } 0 .. 7;
        die "block $number of $owner is not of generation $generations->[$number]: its sectors say @sectors\n";
    }
}

# sync_file(FILE): has all that was written be on the disk
sub sync_file { syscall(FSYNC, fileno($_[0])) == 0 or die "fsync: $!\n" }

# in_parallel(PROCESSES, WORK): WORK with each number below PROCESSES, at the same time; ends this program
sub in_parallel {
    my ($processes, $work) = @_;
    $| = 1;
    for my $number (0 .. $processes - 1) {
        defined(my $pid = fork) or die "fork: $!\n";
        next if $pid;
        $work->($number);
        exit 0;
    }
    my $failed = 0;
    while (wait() > 0) { $failed = 1 if $? }
    exit $failed;
}

1;
