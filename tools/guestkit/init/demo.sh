#!/bin/sh
# The first process of the demo's guest: shows what the guest has, then leaves the person at a shell.
# demo=auto on the kernel's command line: there is no person; show it and switch off.

. /init-common
dmesg -n 1
modprobe -a $(cat /init-modules)
modprobe -q virtio_net
wait_for /dev/hvc0 || { echo "there is no virtio console"; poweroff -f; }
exec </dev/hvc0 >/dev/hvc0 2>&1

name_of() {
    case "$1" in
        0x0001) echo network ;; 0x0002) echo block ;; 0x0003) echo console ;; 0x0004) echo entropy ;; *) echo "$1" ;;
    esac
}

echo
echo "This is $(uname -sr), unmodified, $(awk '/^MemTotal/ { print int($2 / 1024) }' /proc/meminfo) MiB of memory, up for $(cut -d' ' -f1 /proc/uptime) s."
echo
echo "Its virtio devices (/sys/bus/virtio/devices):"
for device in /sys/bus/virtio/devices/*; do
    echo "  ${device##*/}: $(name_of "$(cat "$device/device")") at PCI $(basename "$(readlink -f "$device/..")"), driver $(basename "$(readlink -f "$device/driver")")"
done
echo
echo "Its disk (/dev/vda, $(($(cat /sys/block/vda/size) / 2048)) MiB), formatted and mounted on /mnt:"
if ! mount -t ext4 /dev/vda /mnt 2>/dev/null; then
    mke2fs -F /dev/vda >/dev/null && mount -t ext4 /dev/vda /mnt
fi
echo "guest of $(date '+%F %T')" >>/mnt/visits
sync
df -h /mnt | sed 's/^/  /'
echo "  boots of this disk: $(wc -l </mnt/visits)"
echo
echo "Its network (eth0, as DHCP has it; the router answers):"
if wait_for /sys/class/net/eth0 && udhcpc -q -n -i eth0 >/dev/null 2>&1; then
    ip -o -4 addr show dev eth0 | awk '{ print "  " $2 ": " $4 }'
    ip route | sed 's/^/  /'
    ping -c 1 10.0.2.2 | sed -n 's/^/  /; /bytes from/p'
else
    echo "  none"
fi
echo
echo "Random bytes (/dev/hwrng, $(cat /sys/class/misc/hw_random/rng_current)):"
head -c 32 /dev/hwrng | hexdump -C | sed 's/^/  /'
echo

if [ "$(option demo shell)" = auto ]; then
    echo "demo: shown"
    read -r _
else
    echo "Who serves all this? Look from another terminal: ps -eo pid,rss,args | grep 'lguest\[demo\]'"
    echo "Leave with exit (or three times ^C within a second)."
    echo
    cd /root || cd /
    setsid -c sh -l
fi
umount /mnt
sync
poweroff -f
