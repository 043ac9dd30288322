#!/bin/busybox sh
# The host VM's initramfs: the few modules that lead to the root disk, then what `init=` names (/sbin/init if nothing).
busybox=/bin/busybox
$busybox mount -t devtmpfs dev /dev
$busybox mount -t proc proc /proc
for module in /beside/*; do
    $busybox insmod "$module"
done &
for module in /first/*; do
    $busybox insmod "$module"
done
tries=0
until [ -b /dev/vda ] || [ $tries = 1000 ]; do
    $busybox usleep 10000
    tries=$((tries + 1))
done
init=/sbin/init
for word in $($busybox cat /proc/cmdline); do
    case $word in init=*) init=${word#init=} ;; esac
done
$busybox mount -t ext4 -o rw,noatime /dev/vda /new || echo "host VM: no root disk" > /dev/kmsg
wait
$busybox mount --move /dev /new/dev
$busybox umount /proc
exec $busybox switch_root /new "$init"
