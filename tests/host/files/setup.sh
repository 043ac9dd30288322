#!/bin/sh
# What both variants of the host VM do first: modules, and the read-only disks where cpr.lab= and cpr.site= say.
# The file tells that it is done.
modprobe -q kvm_amd
for word in $(cat /proc/cmdline); do
    case $word in
    cpr.lab=*) mkdir -p "${word#cpr.lab=}" && mount -t ext4 -o ro,noatime /dev/vdb "${word#cpr.lab=}" ;;
    cpr.site=*) mkdir -p "${word#cpr.site=}" && mount -t ext4 -o ro,noatime /dev/vdc "${word#cpr.site=}" ;;
    memmap=* | cpr.nvdimm) modprobe -qa nd_e820 nfit nd_pmem dax_pmem device_dax ;;
    esac
done
ip link set lo up
chmod 666 /dev/kvm
(modprobe -qa tun vhost_net; chmod 666 /dev/vhost-net /dev/net/tun) &   # nobody needs them within a second
touch /run/cpr-host-ready
