#!/bin/sh
# The first process of a guest under test. It loads the drivers and then does what it is told, one line at a time:
# "run ID COMMAND" runs COMMAND in a shell and ends its output with the line "@ID STATUS" (after a line end of its own).
#
# On the kernel's command line:
#   agent=TTY      where it listens (hvc0); ttyS0 works without any driver
#   load=A,B,...   the modules to load; all (the default), none

echo "init: started"
. /init-common

agent() {
    exec <"/dev/$1" >"/dev/$1" 2>&1
    stty -echo
    echo "agent: ready on $1"
    while read -r verb id command; do
        [ "$verb" = run ] || continue
        (eval "$command")
        printf '\n@%s %s\n' "$id" $?
    done
    echo "agent: hung up"
}

dmesg -n 1
for module in $(cat /init-modules); do
    case ",$(option load all)," in *,all,* | *,$module,*) modprobe "$module" ;; esac
done

tty=$(option agent hvc0)
# While there is a virtio console, what is typed goes there; the driver may be built into the kernel.
[ "$tty" = hvc0 ] || console_driver unbind
wait_for "/dev/$tty" || echo "init: there is no /dev/$tty"
agent "$tty"
while :; do sleep 1000; done
