# chatter.pl: prints numbered lines in pieces of any size, until a line that says "end" is typed; then how many there
# were, and how often each other line that was typed has been heard.

use strict;
use warnings;
BEGIN { require(($0 =~ s{[^/]*$}{}r) . "common.pl") }

my ($lines, $typed, $pending) = (0, "", "");
my @heard;
until ($pending eq "end") {
    my $text = join "", map { sprintf "%010d %08x %011o\n", $_, $_, $_ } $lines .. $lines + int rand 60;
    $lines += length($text) / 32;
    for (my $at = 0; $at < length $text;) {
        my $written = syswrite(STDOUT, $text, length($text) - $at, $at);
        defined $written or die "write: $!\n";
        $at += $written;
    }
    my $ready = "\1";
    next unless select($ready, undef, undef, 0);
    sysread(STDIN, $typed, 4096, length $typed) or die "the terminal is gone\n";
    while ($pending ne "end" && $typed =~ s/^([^\n]*)\n//) {
        $pending = $1;
        push @heard, $pending;
    }
}
print "lines $lines\n";
print "heard $_\n" for @heard;
