"""Questions to a command line."""

from __future__ import annotations

import pytest

from cpr.qemu.cmdline import (
    CommandLine,
    add_fds,
    devices,
    displays,
    drives,
    fd_numbers,
    gdbstub,
    guest_memory,
    machine,
    memory_backends,
    netdevs,
    objects,
    settings,
    with_fd_number,
    with_fd_numbers,
)
from tests.unit.qemu.test_cmdline_chardevs import line, words
from tests.unit.qemu.test_cmdline_samples import SAMPLES, parsed


def test_settings() -> None:
    hand, proxmox, libvirt = (settings(parsed(name)) for name in ("by-hand", "proxmox", "libvirt-9"))
    assert (proxmox.name, libvirt.name, hand.name) == ("web,two", "web1", None)
    assert libvirt.uuid == "9b1a31a6-4ab5-4a35-b5b6-2c6f4a0c0a0e"
    assert (hand.accel, libvirt.accel, proxmox.accel) == (("kvm",), ("tcg",), ())
    assert (proxmox.daemonize, proxmox.pidfile) == (True, "/var/run/qemu-server/101.pid")
    assert (libvirt.paused, libvirt.nodefaults, hand.paused) == (True, True, False)
    assert settings(parsed("nographic")).snapshot
    assert settings(line("-run-with chroot=/c,user=u")).chroot == "/c"
    assert settings(line("-runas nobody")).runas == "nobody"
    assert settings(line("-machine pc,accel=kvm:tcg")).accel == ("kvm", "tcg")
    assert settings(line("-name a -name debug-threads=on")).name == "a"


def test_machine_options_are_merged() -> None:
    found = machine(line("-M q35,hpet=on -machine hpet=off,memory-backend=r -M type=pc"))
    assert (found.type, found.params.get("hpet"), found.params.get("memory-backend")) == ("pc", "off", "r")
    assert found.indexes == (0, 1, 2)
    assert machine(line("-m 1G")).type is None


def test_memory_backends() -> None:
    ram0, ram1, dimm = memory_backends(parsed("numa"))
    assert (ram0.id, ram0.size, ram0.share, ram0.mem_path, ram0.discard_data) == (
        "ram0",
        1 << 30,
        True,
        "/dev/shm/ram0",
        True,
    )
    assert (ram1.size, ram1.share, ram1.prealloc, ram1.policy, ram1.host_nodes) == (1 << 30, False, True, "bind", "0-1")
    assert (dimm.qom_type, dimm.hugetlb, dimm.share, dimm.size) == ("memory-backend-memfd", True, True, 1 << 30)
    for text, share in (
        ("memory-backend-memfd", True),
        ("memory-backend-shm", True),
        ("memory-backend-ram", False),
        ("memory-backend-file", False),
        ("memory-backend-memfd,share=off", False),
    ):
        assert memory_backends(line(f"-object {text},id=a,size=1M"))[0].share is share


def test_guest_memory() -> None:
    numa, hand = guest_memory(parsed("numa")), guest_memory(parsed("by-hand"))
    assert (numa.size, numa.max_size, numa.slots) == (2 << 30, 4 << 30, 2)
    assert [(node.nodeid, node.memdev) for node in numa.nodes] == [(0, "ram0"), (1, "ram1")]
    assert (hand.size, hand.machine_backend) == (1 << 30, None)
    assert guest_memory(parsed("libvirt-9")).machine_backend == "pc.ram"
    assert guest_memory(parsed("libvirt-9")).size == 512 << 20
    old = guest_memory(line("-m 512 -mem-path /dev/hugepages -mem-prealloc -numa node,mem=256"))
    assert (old.size, old.mem_path, old.prealloc, old.nodes[0].mem) == (512 << 20, "/dev/hugepages", True, 256 << 20)
    assert guest_memory(line("-S")).size is None


def test_netdevs() -> None:
    (tap,) = netdevs(parsed("libvirt-9"))
    assert (tap.type, tap.id, tap.fds, tap.vhost, tap.vhostfds) == ("tap", "hostnet0", ("34",), True, ("36",))
    (made,) = netdevs(parsed("proxmox"))
    assert (made.ifname, made.script, made.downscript, made.queues, made.vhost) == (
        *("tap101i0", "/var/lib/qemu-server/pve-bridge", "/var/lib/qemu-server/pve-bridgedown", 2, True),
    )
    (user,) = netdevs(parsed("by-hand"))
    assert (user.option, user.id, user.hostfwd) == ("net", None, ("tcp::2222-:22", "tcp::8080-:80"))
    (nic,) = netdevs(line("-nic tap,fds=3:4,vhostfds=5:6,model=virtio -nic none -net nic"))
    assert (nic.option, nic.fds, nic.vhostfds) == ("nic", ("3", "4"), ("5", "6"))
    (bridge,) = netdevs(line("-netdev bridge,id=b,br=br1,helper=/h"))
    assert (bridge.br, bridge.helper) == ("br1", "/h")


VNC = [
    (":1", [("tcp", "", 5901, "")]),
    ("127.0.0.1:0", [("tcp", "127.0.0.1", 5900, "")]),
    ("[::1]:2", [("tcp", "::1", 5902, "")]),
    ("unix:/v", [("unix", "", 0, "/v")]),
    ("none", []),
    ("h:5500,reverse=on", [("tcp", "h", 5500, "")]),
    (":1,vnc=unix:/v", [("tcp", "", 5901, ""), ("unix", "", 0, "/v")]),
]


@pytest.mark.parametrize(("text", "addresses"), VNC)
@pytest.mark.parametrize("option", ["-vnc ", "-display vnc="])
def test_vnc_addresses(option: str, text: str, addresses: list[tuple[str, str, int, str]]) -> None:
    (display,) = displays(line(option + text))
    assert display.vnc is not None
    assert [(a.kind, a.host, a.port, a.path) for a in display.vnc.addresses] == addresses
    assert (display.kind, display.vnc.id) == ("vnc", "default")


def test_vnc_ids_and_parameters() -> None:
    found = displays(
        line("-vnc :0,id=vnc2 -vnc :1 -vnc :2,password,to=9,websocket=on,share=ignore -vnc :3,id=x -display gtk")
    )
    assert [d.vnc.id if d.vnc else d.kind for d in found] == ["vnc2", "default", "vnc3", "x", "gtk"]
    third = found[2].vnc
    assert third is not None
    assert (third.password, third.to, third.websocket, third.share) == (True, 9, "on", "ignore")


def test_other_displays() -> None:
    found = displays(line("-nographic -curses -sdl -spice port=5930 -display egl-headless,rendernode=/dev/dri/r"))
    assert [d.kind for d in found] == ["none", "curses", "sdl", "spice", "egl-headless"]


def test_drives_of_libvirt() -> None:
    by_node = {drive.node_name: drive for drive in drives(parsed("libvirt-9"))}
    storage, disk = by_node["libvirt-1-storage"], by_node["libvirt-1-format"]
    assert (storage.file, storage.format, storage.interface) == ("/var/lib/libvirt/images/a,b.qcow2", "file", "none")
    assert (disk.child, disk.file, disk.format) == ("libvirt-1-storage", None, "qcow2")
    assert by_node["libvirt-pflash0-format"].readonly


def test_drives_of_proxmox() -> None:
    cdrom, disk = drives(parsed("proxmox"))
    assert (cdrom.id, cdrom.file, cdrom.media) == ("drive-ide2", None, "cdrom")
    assert (disk.id, disk.file, disk.format, disk.interface) == (
        *("drive-scsi0", "/var/lib/vz/images/101/a,b.qcow2", "qcow2", "none"),
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-hdb /d", ("/d", None, "disk", "1")),
        ("-cdrom /d", ("/d", None, "cdrom", "2")),
        ("-fda /d", ("/d", "floppy", None, "0")),
        ("-pflash /d", ("/d", "pflash", None, None)),
        ("-sd /d", ("/d", "sd", None, None)),
        ("/d", ("/d", None, "disk", "0")),
        ("-drive file.filename=/d,file.driver=file,if=virtio", ("/d", "virtio", None, None)),
        ('-drive file=json:{"file.filename":"/d"},if=ide', ("/d", "ide", None, None)),
        ('-drive file=json:{"file":{"filename":"/d"}},if=ide', ("/d", "ide", None, None)),
        ("-blockdev driver=qcow2,node-name=n,file.file.filename=/d", ("/d", "none", None, None)),
    ],
)
def test_drive_spellings(text: str, expected: tuple[str | None, ...]) -> None:
    (drive,) = drives(line(text))
    assert (drive.file, drive.interface, drive.media, drive.params.get("index")) == expected


def test_small_questions() -> None:
    stub = gdbstub(line("-s"))
    assert stub is not None
    assert stub.address == "tcp::1234"
    assert gdbstub(line("-gdb none")) is None
    (added,) = add_fds(parsed("libvirt-9"))
    assert (added.fd, added.fdset, added.opaque) == (32, 0, "serial0-log")
    assert [d.driver for d in devices(parsed("numa"))] == ["pc-dimm", "virtio-blk-pci"]
    assert [o.id for o in objects(parsed("libvirt-9"))] == ["masterKey0", "pc.ram", "iothread1"]


FDS = [
    ("-netdev tap,id=n,fds=3:4,vhostfds=5:6", [3, 4, 5, 6]),
    ('-netdev {"type":"tap","fd":"34","id":"n","vhostfd":36}', [34, 36]),
    ("-chardev socket,id=a,fd=7,server=on", [7]),
    ("-chardev socket,id=a,fd=named", []),
    ("-chardev file,id=a,path=/dev/fdset/3", []),
    ("-add-fd fd=9,set=1", [9]),
    ('-device {"driver":"vfio-pci","fd":"12"}', [12]),
    ("-device vhost-vsock-pci,guest-cid=3,vhostfd=8", [8]),
    ("-object iommufd,id=i,fd=20", [20]),
    ("-object memory-backend-file,id=r,size=1M,mem-path=/proc/self/fd/31", [31]),
    ('-object {"qom-type":"memory-backend-file","id":"r","mem-path":"/dev/fd/31"}', [31]),
    ("-incoming fd:17", [17]),
    ('-incoming {"channel-type":"main","addr":{"transport":"socket","type":"fd","str":"18"}}', [18]),
    ("-netdev stream,id=n,addr.type=fd,addr.str=21", [21]),
    ('-netdev {"type":"dgram","id":"n","local":{"type":"fd","str":"22"}}', [22]),
    ("-netdev stream,id=n,addr.type=unix,addr.path=/21", []),
    ("-kernel /proc/self/fd/6 -mem-path /dev/fd/5", [6, 5]),
    ("-virtfs proxy,id=v,sock_fd=4,mount_tag=t", [4]),
    ("-smp 2 -device isa-serial,fd-like=3", []),
]


@pytest.mark.parametrize(("text", "numbers"), FDS)
def test_descriptor_numbers(text: str, numbers: list[int]) -> None:
    cmdline = line(text)
    assert [found.fd for found in fd_numbers(cmdline)] == numbers
    shifted = with_fd_numbers(cmdline, {fd: fd + 100 for fd in numbers})
    assert [found.fd for found in fd_numbers(shifted)] == [fd + 100 for fd in numbers]
    assert with_fd_numbers(shifted, {fd + 100: fd for fd in numbers}) == cmdline


def test_descriptors_may_change_places() -> None:
    cmdline = with_fd_numbers(line("-netdev tap,id=n,fd=3,vhostfd=4"), {3: 4, 4: 3})
    assert words(cmdline) == "-netdev tap,id=n,fd=4,vhostfd=3"
    assert words(with_fd_number(cmdline, 4, 9)) == "-netdev tap,id=n,fd=9,vhostfd=3"


def test_descriptors_of_libvirt() -> None:
    assert [(found.option, found.key, found.fd) for found in fd_numbers(CommandLine.parse(SAMPLES["libvirt-9"]))] == [
        ("chardev", "fd", 33),
        ("netdev", "fd", 34),
        ("netdev", "vhostfd", 36),
        ("add-fd", "fd", 32),
        ("chardev", "fd", 31),
    ]
