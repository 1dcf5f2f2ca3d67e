# raw-load.pl DEVICE BLOCKS SEED PROCESSES STOP
#
# Works the first BLOCKS blocks of a disk that is all zeros, until the file STOP appears: each of PROCESSES writes
# (past the page cache and through it), reads and checks, flushes, discards and clears blocks of its own.

use strict;
use warnings;
BEGIN { require(($0 =~ s{[^/]*$}{}r) . "blocks.pl") }

# linux/fs.h
use constant { BLKDISCARD => 0x1277, BLKZEROOUT => 0x127f };
# linux/fadvise.h: nobody else's blocks are read ahead
use constant { FADV_RANDOM => 1 };

my ($device, $blocks, $seed, $processes, $stop) = @ARGV;
my $share = int($blocks / $processes);

in_parallel($processes, sub {
    my ($owner) = @_;
    srand($seed * 64 + $owner);
    my $direct = open_file($device, O_RDWR | O_DIRECT);
    my $cached = open_file($device, O_RDWR);
    syscall(FADVISE64, fileno($cached), 0, 0, FADV_RANDOM) == 0 or die "fadvise: $!\n";
    my @generations = (0) x $share;
    my ($first, $generation, $operations) = ($owner * $share, 0, 0);
    until (-e $stop) {
        my $file = pick($direct, $cached);
        my $count = 1 + int rand MOST;
        my $at = int rand($share - $count + 1);
        my @range = ($at .. $at + $count - 1);
        my $dice = rand;
        if ($dice < 0.45) {
            $_ = ++$generation for @generations[@range];
            store($file, $first, $owner, \@generations, $at, $count);
        } elsif ($dice < 0.90) {
            check($file, $first, $owner, \@generations, $at, $count);
        } elsif ($dice < 0.95) {
            sync_file($file);
        } else {
            my $request = $dice < 0.98 ? BLKDISCARD : BLKZEROOUT;
            ioctl($file, $request, pack("QQ", ($first + $at) * BLOCK, $count * BLOCK)) or die "ioctl $request: $!\n";
            $_ = 0 for @generations[@range];
        }
        $operations++;
    }
    sync_file($cached);
    for (my $at = 0; $at < $share; $at += MOST) {
        check($direct, $first, $owner, \@generations, $at, $share - $at < MOST ? $share - $at : MOST);
    }
    print "raw $owner: $operations operations, $generation blocks written\n";
});
