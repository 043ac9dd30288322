#!/bin/sh
# Process 1 of the small host VM: the agent, what a host has mounted meanwhile, and a shell on the second serial port if
# cpr.shell is said.  It reaps whatever it inherits.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs run /run
/usr/lib/cpr-host/agent &
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs -o mode=1777,huge=always tmp /tmp   # RAM of guests: 512 times fewer faults, each dear under TCG
mkdir -p /dev/shm /dev/pts
mount -t tmpfs -o mode=1777,huge=always shm /dev/shm
mount -t devpts pts /dev/pts
echo cpr-host > /proc/sys/kernel/hostname
echo '+cpu +memory +io +pids' > /sys/fs/cgroup/cgroup.subtree_control
/usr/lib/cpr-host/setup
grep -q cpr.shell /proc/cmdline && while :; do
    setsid -c bash -l < /dev/ttyS1 > /dev/ttyS1 2>&1
    sleep 0.2
done &
while :; do
    wait
    sleep 1
done
