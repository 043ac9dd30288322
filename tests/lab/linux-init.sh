#!/bin/sh
# The Linux guest's init (busybox).  What it prints:
#
#   boot ID             the kernel's boot_id
#   tick N UPTIME       some 80 times a second, from when the agent listens; N grows by one, UPTIME is in seconds
#   disk ok N           every tenth block of the disk written, and another one read back as it was written
#   disk BAD N ...      one that was not
#   cpu I N             with cpr.busy: a process bound to each CPU, some times a second
#   e LINE              a line came in on the console
#
# The disk is /dev/vda.  Kernel command line: cpr.disk=NAME for another one, which may come late,
# cpr.awake to refuse to be suspended, cpr.ip=ADDRESS/BITS for eth0, cpr.busy.  On eth0: TCP port 7 echoes, port 19 sends
# the numbers from 1 on, a line each, as fast as it goes, port 20 eight of them each hundredth of a second.
# Virtio ports that are called cpr.echo.something echo what comes in on them.

mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs run /run
stty -echo
read -r boot < /proc/sys/kernel/random/boot_id
echo "boot $boot"
for module in /modules/*; do
    insmod "$module"
done
mkfifo /run/never       # nobody writes there: a `read` with a timeout is a sleep that needs no fork

pause() {
    read -r -t "$1" nothing <> /run/never
}

opened() {
    for file in "/proc/$1/fd/"*; do
        [ "$file" -ef "$2" ] && return 0
    done
    return 1
}

block() {
    yes "block $1 of $boot" | head -c 4096
}

disk() {
    blocks=$(($(cat "/sys/block/$1/size") / 8))
    [ "$blocks" -gt 256 ] && blocks=256
    n=0
    while :; do
        block $n > /run/out
        dd if=/run/out of="/dev/$1" bs=4096 seek=$((n % blocks)) oflag=direct conv=notrunc,fsync 2> /run/dd ||
            echo "disk BAD $n cannot write: $(cat /run/dd)"
        back=$blocks
        [ $n -lt "$blocks" ] && back=$((n + 1))
        m=$((n - n * 7919 % back))
        dd if="/dev/$1" of=/run/in bs=4096 skip=$((m % blocks)) count=1 iflag=direct 2> /run/dd ||
            echo "disk BAD $m cannot read: $(cat /run/dd)"
        block $m | cmp -s - /run/in || echo "disk BAD $m read back as: $(head -c 60 /run/in)"
        [ $((n % 10)) = 0 ] && echo "disk ok $n"
        n=$((n + 1))
        pause 0.02
    done
}

busy() {
    n=0
    while :; do
        i=0
        while [ $i -lt 500 ]; do i=$((i + 1)); done
        echo "cpu $1 $n"
        n=$((n + 1))
        pause 0.2
    done
}

echo_console() {
    while read -r line; do
        echo "e $line"
    done
}

echo_port() {
    while :; do
        cat             # ends when nobody is connected
        pause 0.5
    done
}

echo_ports() {          # they appear one after the other
    while :; do
        for port in /sys/class/virtio-ports/*; do
            device=${port##*/} name=
            [ -e "/run/$device" ] || read -r name 2> /dev/null < "$port/name"
            case $name in
            cpr.echo.*)
                : > "/run/$device"
                echo_port <> "/dev/$device" >&0 &
                ;;
            esac
        done
        pause 0.5
    done
}

[ -b /dev/vda ] && disk vda &
echo_console < /dev/console &
for word in $(cat /proc/cmdline); do
    case $word in
    cpr.ip=*)
        ip addr add "${word#cpr.ip=}" dev eth0
        ip link set eth0 up
        nc -ll -p 7 -e cat &
        nc -ll -p 19 -e seq 1 4000000000 &
        nc -ll -p 20 -e /bin/paced &
        ;;
    cpr.disk=*)
        name=${word#cpr.disk=}
        until [ -b "/dev/$name" ]; do pause 0.05; done && disk "$name" &
        ;;
    cpr.awake) mount -o remount,ro /sys ;;      # the agent's way to /sys/power/state
    cpr.busy)
        cpu=0
        while [ $cpu -lt "$(nproc)" ]; do
            busy $cpu &
            taskset -p -c $cpu $! > /dev/null
            cpu=$((cpu + 1))
        done
        ;;
    esac
done
[ -d /sys/class/virtio-ports ] && echo_ports &
if [ -x /usr/sbin/qemu-ga ]; then
    for port in /sys/class/virtio-ports/*; do
        if [ "$(cat "$port/name" 2> /dev/null)" = org.qemu.guest_agent.0 ]; then
            qemu-ga -m virtio-serial -p "/dev/${port##*/}" -t /run &
            n=0
            until opened $! "/dev/${port##*/}" || [ $n = 200 ]; do
                n=$((n + 1))
                pause 0.05
            done
        fi
    done
fi

n=0
while :; do
    read -r uptime idle < /proc/uptime
    echo "tick $n $uptime"
    n=$((n + 1))
    pause 0.01
done
