# ruff: noqa: E501  (command lines read better unbroken)
"""Command lines as they are found in the wild, each put through everything that must not mind where it came from."""

from __future__ import annotations

import shlex

import pytest

from cpr.qemu.cmdline import (
    CommandLine,
    CommandLineError,
    Option,
    UnknownOption,
    add_fds,
    chardevs,
    devices,
    displays,
    drives,
    fd_numbers,
    for_incoming,
    gdbstub,
    guest_memory,
    machine,
    memory_backends,
    monitors,
    netdevs,
    normalise_chardevs,
    objects,
    settings,
    with_log_append,
)

LIBVIRT_9 = r"""
/usr/bin/qemu-system-x86_64 -name guest=web1,debug-threads=on -S
-object '{"qom-type":"secret","id":"masterKey0","format":"raw","file":"/var/lib/libvirt/qemu/domain-3-web1/master-key.aes"}'
-machine pc-q35-7.2,usb=off,dump-guest-core=off,memory-backend=pc.ram,pflash0=libvirt-pflash0-format,pflash1=libvirt-pflash1-format,hpet=off,acpi=on
-accel tcg -cpu qemu64,vmx=off -m size=524288k
-blockdev '{"driver":"file","filename":"/usr/share/OVMF/OVMF_CODE.fd","node-name":"libvirt-pflash0-storage","auto-read-only":true,"discard":"unmap"}'
-blockdev '{"node-name":"libvirt-pflash0-format","read-only":true,"driver":"raw","file":"libvirt-pflash0-storage"}'
-blockdev '{"driver":"file","filename":"/var/lib/libvirt/qemu/nvram/web1_VARS.fd","node-name":"libvirt-pflash1-storage","read-only":false}'
-blockdev '{"node-name":"libvirt-pflash1-format","read-only":false,"driver":"raw","file":"libvirt-pflash1-storage"}'
-object '{"qom-type":"memory-backend-memfd","id":"pc.ram","share":true,"x-use-canonical-path-for-ramblock-id":false,"prealloc":true,"size":536870912}'
-overcommit mem-lock=off -smp 2,sockets=2,cores=1,threads=1
-object '{"qom-type":"iothread","id":"iothread1"}' -uuid 9b1a31a6-4ab5-4a35-b5b6-2c6f4a0c0a0e
-no-user-config -nodefaults -chardev socket,id=charmonitor,fd=33,server=on,wait=off
-mon chardev=charmonitor,id=monitor,mode=control -rtc base=utc,driftfix=slew -no-shutdown -boot strict=on
-device '{"driver":"pcie-root-port","port":16,"chassis":1,"id":"pci.1","bus":"pcie.0","multifunction":true,"addr":"0x2"}'
-device '{"driver":"pcie-root-port","port":17,"chassis":2,"id":"pci.2","bus":"pcie.0","addr":"0x2.0x1"}'
-device '{"driver":"virtio-serial-pci","id":"virtio-serial0","bus":"pci.1","addr":"0x0"}'
-blockdev '{"driver":"file","filename":"/var/lib/libvirt/images/a,b.qcow2","node-name":"libvirt-1-storage","auto-read-only":true,"discard":"unmap"}'
-blockdev '{"node-name":"libvirt-1-format","read-only":false,"discard":"unmap","driver":"qcow2","file":"libvirt-1-storage","backing":null}'
-device '{"driver":"virtio-blk-pci","bus":"pci.2","addr":"0x0","drive":"libvirt-1-format","id":"virtio-disk0","bootindex":1}'
-netdev '{"type":"tap","fd":"34","vhost":true,"vhostfd":"36","id":"hostnet0"}'
-device '{"driver":"virtio-net-pci","netdev":"hostnet0","id":"net0","mac":"52:54:00:aa:bb:cc","bus":"pcie.0","addr":"0x3"}'
-add-fd set=0,fd=32,opaque=serial0-log
-chardev pty,id=charserial0,logfile=/dev/fdset/0,logappend=on
-device '{"driver":"isa-serial","chardev":"charserial0","id":"serial0","index":0}'
-chardev socket,id=charchannel0,fd=31,server=on,wait=off
-device '{"driver":"virtserialport","bus":"virtio-serial0.0","nr":1,"chardev":"charchannel0","id":"channel0","name":"org.qemu.guest_agent.0"}'
-audiodev '{"id":"audio1","driver":"none"}' -vnc 127.0.0.1:0,audiodev=audio1
-device '{"driver":"VGA","id":"video0","vgamem_mb":16,"bus":"pcie.0","addr":"0x1"}'
-device '{"driver":"virtio-balloon-pci","id":"balloon0","bus":"pcie.0","addr":"0x4"}'
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny -msg timestamp=on
"""

PROXMOX = r"""
/usr/bin/kvm -id 101 -name 'web,,two,debug-threads=on' -no-shutdown
-chardev 'socket,id=qmp,path=/var/run/qemu-server/101.qmp,server=on,wait=off' -mon 'chardev=qmp,mode=control'
-chardev 'socket,id=qmp-event,path=/var/run/qmeventd.sock,reconnect=5' -mon 'chardev=qmp-event,mode=control'
-pidfile /var/run/qemu-server/101.pid -daemonize -smbios 'type=1,uuid=6a6c6e74-0000-4a4b-8d0b-2f8b7c9e7f11'
-smp '2,sockets=1,cores=2,maxcpus=2' -nodefaults
-boot 'menu=on,strict=on,reboot-timeout=1000,splash=/usr/share/qemu-server/bootsplash.jpg'
-vnc 'unix:/var/run/qemu-server/101.vnc,password=on' -cpu qemu64,+aes -m 512
-object 'iothread,id=iothread-virtioscsi0' -device 'pci-bridge,id=pci.1,chassis_nr=1,bus=pci.0,addr=0x1e'
-device 'piix3-usb-uhci,id=uhci,bus=pci.0,addr=0x1.0x2' -device 'usb-tablet,id=tablet,bus=uhci.0,port=1'
-chardev 'socket,id=serial0,path=/var/run/qemu-server/101.serial0,server=on,wait=off' -device 'isa-serial,chardev=serial0'
-device 'VGA,id=vga,bus=pci.0,addr=0x2'
-chardev 'socket,path=/var/run/qemu-server/101.qga,server=on,wait=off,id=qga0'
-device 'virtio-serial,id=qga0,bus=pci.0,addr=0x8' -device 'virtserialport,chardev=qga0,name=org.qemu.guest_agent.0'
-iscsi 'initiator-name=iqn.1993-08.org.debian:01:abcdef'
-drive 'if=none,id=drive-ide2,media=cdrom,aio=io_uring'
-device 'ide-cd,bus=ide.1,unit=0,drive=drive-ide2,id=ide2,bootindex=200'
-device 'virtio-scsi-pci,id=virtioscsi0,bus=pci.1,addr=0x1,iothread=iothread-virtioscsi0'
-drive 'file=/var/lib/vz/images/101/a,,b.qcow2,if=none,id=drive-scsi0,format=qcow2,cache=none,aio=native,detect-zeroes=on'
-device 'scsi-hd,bus=virtioscsi0.0,channel=0,scsi-id=0,lun=0,drive=drive-scsi0,id=scsi0,bootindex=100'
-netdev 'type=tap,id=net0,ifname=tap101i0,script=/var/lib/qemu-server/pve-bridge,downscript=/var/lib/qemu-server/pve-bridgedown,vhost=on,queues=2'
-device 'virtio-net-pci,mac=BC:24:11:00:00:01,netdev=net0,bus=pci.0,addr=0x12,id=net0,mq=on,vectors=6,bootindex=102'
-machine 'type=pc-i440fx-7.2'
"""

BY_HAND = r"""
qemu-system-x86_64 --enable-kvm -M q35 -machine hpet=off -m 1G -hda /srv/disk.img -cdrom /srv/install.iso
-serial mon:stdio -serial unix:/run/con,server,nowait -parallel file:/tmp/printer -monitor tcp:127.0.0.1:4444,server,nowait
-qmp unix:/run/qmp,server=on,wait=off -net nic -net user,hostfwd=tcp::2222-:22,hostfwd=tcp::8080-:80
-vnc :1,password -gdb tcp::9000 -usb -usbdevice tablet -D /tmp/qemu.log -pidfile /run/q.pid
"""

NOGRAPHIC = "qemu-system-x86_64 -nographic -kernel /boot/vmlinuz -append console=ttyS0 -m 256 -s -snapshot /srv/d.img"

NUMA = r"""
qemu-system-x86_64 -machine pc-q35-10.0 -m 2G,slots=2,maxmem=4G -nodefaults -display none
-object memory-backend-file,id=ram0,size=1G,share=on,mem-path=/dev/shm/ram0,discard-data=on,align=2M
-object memory-backend-ram,id=ram1,size=0x40000000,prealloc=on,host-nodes=0-1,policy=bind
-numa node,nodeid=0,cpus=0,memdev=ram0 -numa node,nodeid=1,cpus=1,memdev=ram1 -smp 2
-object '{"qom-type":"memory-backend-memfd","id":"dimm","size":1073741824,"hugetlb":true,"hugetlbsize":2097152,"share":true}'
-device pc-dimm,id=d0,memdev=dimm -incoming fd:17 -qmp stdio
-netdev stream,id=n0,server=off,addr.type=fd,addr.str=21
-blockdev driver=qcow2,node-name=disk0,file.driver=file,file.filename=/srv/a,,b.qcow2 -device virtio-blk-pci,drive=disk0
"""

SAMPLES = {
    name: shlex.split(text)
    for name, text in {
        "libvirt-9": LIBVIRT_9,
        "proxmox": PROXMOX,
        "by-hand": BY_HAND,
        "nographic": NOGRAPHIC,
        "numa": NUMA,
    }.items()
}


def parsed(name: str) -> CommandLine:
    return CommandLine.parse(SAMPLES[name])


@pytest.mark.parametrize("name", SAMPLES)
def test_round_trip(name: str) -> None:
    assert parsed(name).argv() == SAMPLES[name]


@pytest.mark.parametrize("name", SAMPLES)
def test_every_value_is_rendered_as_it_was(name: str) -> None:
    for option in parsed(name).options:
        if option.params.names() and not (option.value or "").startswith("{"):
            assert option.params.render() == option.value


@pytest.mark.parametrize("name", SAMPLES)
def test_every_question_has_an_answer(name: str) -> None:
    cmdline = parsed(name)
    for ask in (
        *(chardevs, monitors, netdevs, displays, drives, fd_numbers, gdbstub, guest_memory, machine, add_fds),
        *(memory_backends, objects, devices, settings),
    ):
        ask(cmdline)


@pytest.mark.parametrize("edit", [normalise_chardevs, for_incoming, with_log_append])
@pytest.mark.parametrize("name", SAMPLES)
def test_edits_that_may_be_done_twice(name: str, edit: object) -> None:
    assert callable(edit)
    once = edit(parsed(name))
    assert edit(once) == once
    assert CommandLine.parse(once.argv()) == once


def test_unknown_option_is_named() -> None:
    with pytest.raises(UnknownOption, match="-frobnicate") as caught:
        CommandLine.parse(["q", "-m", "1G", "-frobnicate", "x"])
    assert caught.value.name == "-frobnicate"
    assert isinstance(caught.value, ValueError)


def test_missing_argument() -> None:
    with pytest.raises(CommandLineError, match="-m needs an argument"):
        CommandLine.parse(["q", "-S", "-m"])


def test_an_argument_may_look_like_an_option() -> None:
    cmdline = CommandLine.parse(["q", "-append", "-S", "--M", "pc", "disk.img"])
    assert cmdline.options == (Option("append", "-S"), Option("machine", "pc"), Option("", "disk.img"))
    assert cmdline.argv() == ["q", "-append", "-S", "--M", "pc", "disk.img"]
