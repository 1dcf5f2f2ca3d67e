# files-load.pl work|verify DIRECTORY SEED PROCESSES STOP
#
# work: makes, changes, reads and checks, flushes, renames and deletes files in a directory, until the file STOP
# appears; each of PROCESSES has its own. verify: all files are there and hold what was written last.

use strict;
use warnings;
BEGIN { require(($0 =~ s{[^/]*$}{}r) . "blocks.pl") }

use constant { FILES => 24 };

my ($verb, $directory, $seed, $processes, $stop) = @ARGV;

# What a process knows of its files is kept in memory: a line for each, of its name, its owner and its generations.
sub memory_of { return "/tmp/files-of-$_[0]" }

sub flags { return O_RDWR | (chance(0.5) ? O_DIRECT : 0) }

sub work {
    my ($process) = @_;
    srand($seed * 64 + $process);
    my $place = "$directory/$process";
    mkdir $place or die "$place: $!\n";
    my (%files, $generation, $serial, $operations);
    until (-e $stop) {
        my $name = "$place/" . int rand FILES;
        my $known = $files{$name};
        my $dice = rand;
        if (!$known) {
            my $count = 1 + int rand MOST;
            my $made = { owner => $process << 24 | ++$serial, generations => [map { ++$generation } 1 .. $count] };
            $files{$name} = $made;
            my $file = open_file($name, flags() | O_CREAT);
            store($file, 0, $made->{owner}, $made->{generations}, 0, $count);
        } elsif ($dice < 0.15) {
            unlink $name or die "unlink $name: $!\n";
            delete $files{$name};
        } elsif ($dice < 0.25) {
            my $other = "$place/" . int rand FILES;
            rename $name, $other or die "rename $name: $!\n";
            delete $files{$name};
            $files{$other} = $known;
        } else {
            my $generations = $known->{generations};
            my $at = int rand @$generations;
            my $count = 1 + int rand(@$generations - $at);
            my $file = open_file($name, flags());
            if ($dice < 0.60) {
                check($file, 0, $known->{owner}, $generations, $at, $count);
            } elsif ($dice < 0.95) {
                $generations->[$_] = ++$generation for $at .. $at + $count - 1;
                store($file, 0, $known->{owner}, $generations, $at, $count);
            } else {
                sync_file($file);
            }
        }
        $operations++;
    }
    open(my $memory, ">", memory_of($process)) or die "memory: $!\n";
    print $memory "$_ $files{$_}{owner} @{$files{$_}{generations}}\n" for keys %files;
    print "files $process: $operations operations, $generation blocks written\n";
}

sub verify {
    my ($process) = @_;
    open(my $memory, "<", memory_of($process)) or die "memory: $!\n";
    my $files = 0;
    while (<$memory>) {
        my ($name, $owner, @generations) = split;
        my $size = -s $name;
        defined $size && $size == @generations * BLOCK or die "$name: " . ($size // "gone") . "\n";
        check(open_file($name, O_RDWR | O_DIRECT), 0, $owner, \@generations, 0, scalar @generations);
        $files++;
    }
    opendir(my $place, "$directory/$process") or die "$directory/$process: $!\n";
    my @there = grep { !/^\./ } readdir $place;
    @there == $files or die "$files files of $process, but there are @there\n";
    print "files $process: $files files verified\n";
}

in_parallel($processes, $verb eq "verify" ? \&verify : \&work);
