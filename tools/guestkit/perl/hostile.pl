# hostile.pl SLOT SEED SECONDS MEMORY
#
# The enemy: takes the device in a PCI slot from its driver and misuses it in every way that a guest has, for so long,
# in an order that SEED gives: rings of garbage and of proper requests, indices that jump, registers and configuration
# space written at random, resets and queue resets in the midst of it. Puts back what the driver's next start needs.
#
# The kernel has to leave it the last 4 MiB of the guest's MEMORY (MiB): memmap=4M$252M. The device writes to addresses
# there, or to ones that are no memory, and nowhere else. Otherwise the guest would corrupt itself. For the same reason
# interrupts are asked for by vectors that nobody has, and the window is moved to where nobody is.

use strict;
use warnings;
BEGIN { require(($0 =~ s{[^/]*$}{}r) . "common.pl") }

my ($slot, $seed, $duration, $memory) = @ARGV;
srand($seed);

use constant { RESERVED => 4 << 20, RINGS => 0x10000, DATA => 0x100000, PAGE => 4096 };
my $end = $memory << 20;
my $start = $end - RESERVED;
my $data = $start + DATA;

# ---- The device's memory and registers ----

my $address = sprintf "0000:00:%02x.0", $slot;
my $sysfs = "/sys/bus/pci/devices/$address";
write_file("$sysfs/driver/unbind", $address) if -e "$sysfs/driver";
my $configuration = open_file("$sysfs/config", O_RDWR);
pipe(my $from_pipe, my $to_pipe) or die "pipe: $!\n";

# map_file(FILE, OFFSET, LENGTH): the address in this process
sub map_file {
    my ($file, $offset, $length) = @_;
    my $at = syscall(MMAP, 0, $length, 3, 1, fileno($file), $offset);
    $at != -1 or die "mmap: $!\n";
    return $at;
}

my $ram = map_file(open_file("/dev/mem", O_RDWR), $start, RESERVED);
my $window = map_file(open_file("$sysfs/resource0", O_RDWR), 0, 0x8000);

sub peek { return unpack("P$_[1]", pack("J", $_[0])) }

# The kernel copies it there out of a pipe; into a device's window byte by byte.
sub poke {
    my ($at, $bytes) = @_;
    syswrite($to_pipe, $bytes) == length $bytes or die "pipe: $!\n";
    syscall(READ, fileno($from_pipe), $at, length $bytes) == length $bytes or die "poke: $!\n";
}

sub peek_ram { return peek($ram + $_[0] - $start, $_[1]) }
sub poke_ram { return poke($ram + $_[0] - $start, $_[1]) }

sub read_config {
    my ($offset, $length) = @_;
    sysseek($configuration, $offset, 0);
    sysread($configuration, my $bytes, $length) == $length or die "config: $!\n";
    return $bytes;
}

sub write_config {
    my ($offset, $bytes) = @_;
    sysseek($configuration, $offset, 0);
    syswrite($configuration, $bytes) == length $bytes or die "config: $!\n";
}

# Where the capabilities say that the registers are (virtio 1.2, 4.1.4).
my ($kind) = unpack("v", read_config(2, 2));
my %part;
my $msix;
for (my $at = unpack("C", read_config(0x34, 1)); $at; $at = unpack("C", read_config($at + 1, 1))) {
    my ($id, undef, undef, $type) = unpack("C4", read_config($at, 4));
    $msix = $at if $id == 0x11;
    $part{$type} = $type == 5 ? $at : unpack("V", read_config($at + 8, 4)) if $id == 9;
}
my ($common, $notify, $device, $access) = @part{1, 2, 4, 5};
my $saved_command = read_config(4, 2);
my $saved_bar = read_config(0x10, 4);

# write_window(OFFSET, SIZE, VALUE), read_window(OFFSET, SIZE): through configuration space (4.1.4.9), 1, 2 or 4 bytes
sub aim { write_config($access + 4, pack("C", 0)); write_config($access + 8, pack("VV", @_)) }
sub write_window {
    my ($offset, $size, $value) = @_;
    aim($offset, $size);
    write_config($access + 16, substr(pack("V", $value), 0, $size));
}
sub read_window {
    my ($offset, $size) = @_;
    aim($offset, $size);
    return unpack($size == 1 ? "C" : $size == 2 ? "v" : "V", read_config($access + 16, $size));
}

sub write_quadword {
    my ($offset, $value) = @_;
    write_window($offset, 4, $value & 0xffffffff);
    write_window($offset + 4, 4, $value >> 32);
}

# A store of eight bytes at any address: what the kernel does when it is asked for a segment's base.
sub store_quadword {
    my ($at, $value) = @_;
    syscall(ARCH_PRCTL, 0x1001, $value) == 0 and syscall(ARCH_PRCTL, 0x1004, $at);
}

# ---- What is wrong, and what is not ----

# number(BITS): any of so many bits
sub number {
    my ($bits) = @_;
    return int(rand(1 << $bits)) if $bits <= 32;
    return int(rand(1 << 32)) | int(rand(1 << ($bits - 32))) << 32;
}

# Beyond all memory, at its end, at the ends of what 64 bits can say.
sub nowhere {
    return pick($end, $end + number(20), number(63) | $end, 0xfee00000, 1 << 32, 1 << 63, ~0, ~0 - number(12));
}

# Where the device may write without hurting us. It never gets another address: it may see half of an old descriptor and
# half of a new one.
sub somewhere { return chance(0.85) ? $data + int rand($end - $data) : chance(0.5) ? $end - 1 - number(4) : nowhere() }

sub size { return pick(0, 1, 16, 512, 512, 4096, 65536, number(12), number(16), number(32), 0xffffffff) }

# The device's configuration of a queue (4.1.4.3), which was selected.
use constant { STATUS => 20, SELECT => 22, SIZE => 24, VECTOR => 26, ENABLE => 28 };
use constant { DESCRIPTORS => 32, AVAILABLE => 40, USED => 48, RESET => 58 };

my $queues = $kind == 0x1041 || $kind == 0x1043 ? 2 : 1;
my @size = (256) x $queues;
my @index = (0) x $queues;
my %count = map { $_ => 0 } qw(acts handshakes notifications used);
sub ring { return $start + $_[0] * RINGS }
sub available { return ring($_[0]) + 0x4000 }
sub used { return ring($_[0]) + 0x8000 }

sub set_up_queue {
    my ($queue) = @_;
    write_window($common + SELECT, 2, $queue);
    $size[$queue] = chance(0.8) ? pick(1, 2, 16, 128, 256) : 256;
    write_window($common + SIZE, 2, chance(0.9) ? $size[$queue] : pick(0, 3, 255, 257, 32768, number(16)));
    my %place = (DESCRIPTORS, ring($queue), AVAILABLE, available($queue), USED, used($queue));
    # The used ring is written to.
    $place{pick(sort keys %place)} = chance(0.5) ? nowhere() : $end - number(13) if chance(0.1);
    write_quadword($common + $_, $place{$_}) for sort keys %place;
    write_window($common + VECTOR, 2, pick(0, $queue, 0xffff, number(16)));
    poke_ram(used($queue), "\0" x 4);
    poke_ram(available($queue), "\0" x 4);
    $index[$queue] = 0;
    write_window($common + ENABLE, 2, 1) if chance(0.95);
}

sub handshake {
    write_config(4, pack("v", 6));
    write_window($common + STATUS, 1, 0);
    my @steps = (1, 3, "features", 11, "queues", 15);
    @steps = map { pick(@steps) } @steps if chance(0.05);
    for my $step (@steps) {
        if ($step eq "features") {
            for my $half (0, 1) {
                write_window($common, 4, $half);
                my $offered = read_window($common + 4, 4);
                write_window($common + 8, 4, $half);
                my $chosen = chance(0.5) ? $offered : chance(0.8) ? $offered & (number(32) | $half) : number(32);
                write_window($common + 12, 4, $chosen);
            }
        } elsif ($step eq "queues") {
            set_up_queue($_) for 0 .. $queues - 1;
        } else {
            write_window($common + STATUS, 1, $step);
        }
    }
    $count{handshakes}++;
}

# descriptor(ADDRESS, LENGTH, FLAGS, NEXT): 1 is for one that has a next, 2 for one to be written to, 4 for a table
sub descriptor { return pack("QVvv", @_) }

# A chain as the device's kind has it: pairs of length and flags, and what the first buffer holds.
sub proper_request {
    my ($queue) = @_;
    if ($kind == 0x1042) {
        my $type = pick(0, 0, 1, 1, 4, 8, 11, 13, number(32));
        my $header = pack("VVQ", $type, 0, pick(0, number(10), number(14), ~0));
        my $flag = $type == 1 || $type == 11 || $type == 13 ? 0 : 2;
        my $length = $type == 11 || $type == 13 ? 16 : pick(512, 4096, 1024, 20);
        return ($header, [16, 0], $type == 4 ? () : [$length, $flag], [1, 2]);
    }
    return ("", [pick(1, 64, 4096), 2]) if $kind == 0x1044;
    return ("", map { [pick(64, 1536, 65550), 2] } 1 .. 1 + rand 3) if $queue == 0;
    return ("", [pick(1, 40, 400), 0]) if $kind == 0x1043;
    my @lengths = map { pick(0, 12, number(16)) } 1 .. 5;
    my $header = pack("CCv5", pick(0, 0, 1, number(8)), pick(0, 0, 1, 4, number(8)), @lengths);
    return ($header, [12, 0], [pick(14, 60, 1514, 65535), 0]);
}

# chain(QUEUE, FIRST, WILD): descriptors from number FIRST on for a request, proper or, when it may be wild, spoiled
sub chain {
    my ($queue, $first, $wild) = @_;
    my ($header, @buffers) = proper_request($queue);
    my $place = $data + PAGE * int rand(256);
    my @descriptors;
    for my $position (0 .. $#buffers) {
        my ($length, $flags) = @{$buffers[$position]};
        my $more = $position < $#buffers;
        push @descriptors, [$place, $length, $flags | $more, $more ? ($first + $position + 1) % 256 : 0];
        poke_ram($place, $header) if $position == 0 && length $header;
        $place += $length;
    }
    if ($wild && chance(0.25)) {
        my $spoiled = pick(@descriptors);
        my $field = int rand 4;
        if ($field == 0) { $spoiled->[0] = somewhere() }
        elsif ($field == 1) { $spoiled->[1] = size() }
        elsif ($field == 2) { $spoiled->[2] = number(chance(0.8) ? 3 : 16) }
        else { $spoiled->[3] = pick($first, $first + 1, 255, 256, number(16)) }
    }
    return @descriptors;
}

sub garbage_descriptor {
    return [somewhere(), size(), number(chance(0.9) ? 3 : 16), chance(0.7) ? number(8) : number(16)];
}

# Moves what descriptors point to into a table of their own, as an indirect descriptor has it.
sub indirect {
    my ($wild, @descriptors) = @_;
    my $table = $data + 0x200000 + 16 * int rand 4096;
    my $next = 0;
    $_->[3] = ++$next for @descriptors;
    $descriptors[-1][3] = number(16) if $wild && chance(0.1);
    poke_ram($table, join "", map { descriptor(@$_) } @descriptors);
    my $length = 16 * @descriptors;
    return [$table, $length, 4, 0] unless $wild;
    return [$table, $length + pick(0, 0, 0, 1, -1, 16, 65536), 4 | (chance(0.1) ? number(2) : 0), number(8)];
}

sub notify_queue {
    my ($queue) = @_;
    write_window($notify + 4 * $queue, 2, $queue);
    $count{notifications}++;
}

# Fills part of the descriptor table, makes some of it available, and says so.
sub submit {
    my $queue = int rand $queues;
    my $wild = chance(0.4);
    my ($at, @heads) = 0;
    my @table;
    for (1 .. 1 + rand($size[$queue] < 8 ? $size[$queue] : 8)) {
        my @made = !$wild || chance(0.75) ? chain($queue, $at, $wild) : map { garbage_descriptor() } 1 .. 1 + rand 4;
        @made = indirect($wild, @made) if chance(0.2);
        push @heads, $wild && chance(0.05) ? number(16) : $at;
        push @table, @made;
        $at += @made;
    }
    poke_ram(ring($queue), join "", map { descriptor(@$_) } @table);
    my $size = $size[$queue];
    poke_ram(available($queue) + 4 + 2 * (($index[$queue] + $_) % $size), pack("v", $heads[$_])) for 0 .. $#heads;
    my $before = unpack("v", peek_ram(used($queue) + 2, 2));
    my $step = $wild && chance(0.1) ? pick(0, $size, $size + 1, number(16)) : @heads;
    $index[$queue] = ($index[$queue] + $step) & 0xffff;
    poke_ram(available($queue), pack("vv", chance(0.9) ? 0 : number(16), $index[$queue]));
    notify_queue($queue);
    my $done = 0;
    for my $pause (chance(0.3) ? (0.001) x (chance(0.2) ? 30 : 1) : (0)) {
        select(undef, undef, undef, $pause) if $pause;
        $done = (unpack("v", peek_ram(used($queue) + 2, 2)) - $before) & 0xffff;
        last if $done;
    }
    # A storm may have left another index there.
    $count{used} += $done if $done <= @heads;
}

# Changes the rings while the device looks at them.
sub storm {
    my $queue = int rand $queues;
    notify_queue($queue);
    for (1 .. 50 + rand 200) {
        my $entry = number(9);
        my $place = pick(ring($queue) + 16 * ($entry & 255), available($queue) + 2 * $entry, used($queue) + 4 * $entry);
        if ($place < available($queue)) { poke_ram($place, descriptor(@{garbage_descriptor()})) }
        else { poke_ram($place, pack("v", number(pick(2, 8, 16)))) }
        notify_queue($queue) if chance(0.05);
    }
}

# Registers at random, in their own widths and in others; never through them what would have the device write elsewhere.
sub registers {
    for (1 .. 1 + rand 20) {
        my $offset = number(15);
        $offset = $common + int rand 64 if chance(0.6);
        $offset = $device + number(6) if defined $device && chance(0.1);
        next if $offset >= 0x4000 && $offset < 0x5000;
        my $queue_address = $offset >= $common + DESCRIPTORS - 7 && $offset < $common + USED + 8;
        my $value = $queue_address ? nowhere() & 0xffffffff | 0xf0000000 : number(pick(1, 4, 8, 16, 32));
        my $way = rand;
        if ($way < 0.6) { write_window($offset, pick(1, 2, 4), $value) }
        elsif ($way < 0.7) { poke($window + $offset % 0x7ff0, "\xf0" x (1 + rand 8)) }
        elsif ($way < 0.8) { store_quadword($window + $offset % 0x7ff0, number(15) | (0x7ff0 << 32)) }
        else { peek($window + $offset % 0x7ff0, pick(1, 2, 4, 8)) }
    }
}

# Messages to vectors that nobody has, and to no interrupt controller at all.
sub messages {
    my $entry = 0x4000 + 16 * int rand 8;
    my $vector = pick(0x30 .. 0x7f);
    write_window($entry, 4, pick(0xfee00000, 0, number(31), 0xfee01000));
    write_window($entry + 4, 4, pick(0, 0, number(32)));
    write_window($entry + 8, 4, $vector);
    write_window($entry + 12, 4, pick(0, 1, number(32)));
    write_config($msix + 2, pack("v", pick(0x8000, 0xc000, 0, number(16))));
}

# The header of the function and its capabilities; the window goes to where nobody is, and comes back.
sub header {
    my $offset = pick(4, 4, 0x10, 0x10, number(8));
    return if $offset > 0x0c && $offset < 0x18 && $offset != 0x10;
    return if $offset < 8 && $offset != 4 || $offset >= $access && $offset < $access + 20;
    my $size = pick(1, 2, 4);
    $size = 2 if $offset == 4;
    $size = 4 if $offset == 0x10;
    return if $offset + $size > 256; # the kernel writes the part that there is
    my $value = $offset == 0x10 ? pick(0xffffffff, 0xc8000000 + number(24), 0xe0000000 + number(28)) : number(32);
    write_config($offset, substr(pack("V", $value), 0, $size));
    read_config(number(6) * 4, 4);
    write_config(0x10, $saved_bar) if chance(0.8);
}

sub reset_queue {
    my $queue = int rand($queues + 1);
    write_window($common + SELECT, 2, $queue);
    write_window($common + RESET, 2, chance(0.9) ? 1 : number(16));
    set_up_queue($queue) if $queue < $queues && chance(0.8);
}

# ---- The story ----

my @acts = ((\&submit) x 40, (\&storm) x 6, (\&registers) x 6, (\&messages) x 3, (\&header) x 2, (\&reset_queue) x 4);
poke_ram($data + PAGE * $_, "." x PAGE) for 0 .. 511;
my $until = seconds() + $duration;
handshake();
while (seconds() < $until) {
    # A device that was broken serves nothing until it is reset; one that was left alone is reset, too.
    handshake() if read_window($common + STATUS, 1) != 15 && chance(0.7) || chance(0.02);
    pick(@acts)->();
    $count{acts}++;
}
write_config($msix + 2, pack("v", 0));
write_config(0x10, $saved_bar);
write_config(4, pack("v", 6));
write_window($common + STATUS, 1, 0);
write_config(4, $saved_command);
write_file("/sys/bus/pci/drivers/virtio-pci/bind", $address);
print join(", ", map { "$count{$_} $_" } sort keys %count), "\n";
