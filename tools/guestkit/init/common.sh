# What every first process of ours does first: see the world, and load the drivers.

mount -t devtmpfs dev /dev
mkdir -p /proc /sys /tmp /run /mnt /dev/pts
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
mount -t devpts devpts /dev/pts
export PATH=/bin HOME=/root TERM="${TERM:-linux}"

# option NAME DEFAULT: the value of NAME=... on the kernel's command line
option() {
    for word in $(cat /proc/cmdline); do
        case "$word" in "$1"=*) echo "${word#*=}"; return ;; esac
    done
    echo "$2"
}

# wait_for FILE: until a driver has made it; a second at most, then whoever needs it says so
wait_for() {
    tries=100
    while ! [ -e "$1" ] && [ "$tries" -gt 0 ]; do usleep 10000; tries=$((tries - 1)); done
    [ -e "$1" ]
}

# console_driver bind|unbind: has the virtio console be served by its driver, or not, be it a module or built in
console_driver() {
    [ "$1" = unbind ] || modprobe -q virtio_console
    for device in /sys/bus/virtio/devices/*; do
        [ "$(cat "$device/device")" = 0x0003 ] || continue
        possible=unbind
        [ -e "$device/driver" ] || possible=bind
        [ "$1" = "$possible" ] && echo "${device##*/}" >"/sys/bus/virtio/drivers/virtio_console/$1"
    done
    [ "$1" = unbind ] || wait_for /dev/hvc0
}
