# What our Perl programs for guests share. Nothing but what is in perl-base is there, so system calls have numbers.

use strict;
use warnings;

# asm/unistd_64.h
use constant { READ => 0, MMAP => 9, FSYNC => 74, ARCH_PRCTL => 158, FADVISE64 => 221, CLOCK_GETTIME => 228 };
# fcntl.h
use constant { O_RDWR => 2, O_CREAT => 0100, O_DIRECT => 040000 };

# seconds(): the guest's monotonic clock.
sub seconds {
    my $time = "\0" x 16;
    syscall(CLOCK_GETTIME, 1, $time) == 0 or die "clock_gettime: $!";
    my ($seconds, $nanoseconds) = unpack("qq", $time);
    return $seconds + $nanoseconds / 1e9;
}

# chance(P): true with that probability
sub chance { return rand() < $_[0] }

# pick(A, B, ...): one of them
sub pick { return $_[rand @_] }

# open_file(PATH, FLAGS): the file, which has to open
sub open_file {
    my ($path, $flags) = @_;
    sysopen(my $file, $path, $flags) or die "$path: $!\n";
    return $file;
}

# write_file(PATH, TEXT): for what sysfs and procfs have
sub write_file {
    my ($path, $text) = @_;
    my $file = open_file($path, 1);
    defined syswrite($file, $text) or die "$path: $!\n";
}

1;
