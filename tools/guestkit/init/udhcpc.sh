#!/bin/sh
# What udhcpc runs at each event (its name is $1): the interface gets what the server offers.

case "$1" in
    deconfig)
        ip addr flush dev "$interface"
        ip link set "$interface" up
        ;;
    bound | renew)
        ip addr flush dev "$interface"
        ip addr add "$ip/${mask:-24}" dev "$interface"
        for address in $router; do
            ip route add default via "$address" dev "$interface"
            break
        done
        : >/etc/resolv.conf
        for address in $dns; do
            echo "nameserver $address" >>/etc/resolv.conf
        done
        ;;
esac
