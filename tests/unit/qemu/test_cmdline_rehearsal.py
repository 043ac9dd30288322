# ruff: noqa: E501  (command lines read better unbroken)
"""The same guest with nothing outside."""

from __future__ import annotations

import pytest

from cpr.qemu.cmdline import (
    CommandLine,
    CommandLineError,
    chardevs,
    displays,
    drives,
    fd_numbers,
    for_rehearsal,
    memory_backends,
    netdevs,
    not_rehearsed,
)
from tests.unit.qemu.test_cmdline_chardevs import line, words
from tests.unit.qemu.test_cmdline_samples import SAMPLES, parsed

FIRMWARE = {"libvirt-pflash0-format": 3653632, "libvirt-pflash1-format": 540672}


def rehearsed(text: str, **sizes: int) -> str:
    tail = " -display none -chardev socket,id=cpr-rehearsal,fd=9 -mon id=cpr-rehearsal,chardev=cpr-rehearsal,mode=control -S -incoming defer"
    done = words(for_rehearsal(line("-nodefaults " + text), monitor_fd=9, disk_sizes=sizes))
    assert done.startswith("-nodefaults")
    assert done.endswith(tail)
    return done.removeprefix("-nodefaults").removesuffix(tail).strip()


@pytest.mark.parametrize("name", SAMPLES)
def test_nothing_outside_is_left(name: str) -> None:
    cmdline = for_rehearsal(parsed(name), monitor_fd=9, disk_sizes=FIRMWARE)
    assert {c.backend for c in chardevs(cmdline) if c.label != "cpr-rehearsal"} <= {"null"}
    assert {n.type for n in netdevs(cmdline)} <= {"hubport", "user"}
    assert not [n for n in netdevs(cmdline) if n.hostfwd]
    assert {d.driver for d in drives(cmdline) if d.driver} <= {"null-co"}
    assert not [d for d in drives(cmdline) if d.file]
    assert {m.qom_type for m in memory_backends(cmdline)} <= {"memory-backend-memfd"}
    assert not [m for m in memory_backends(cmdline) if m.prealloc or m.hugetlb]
    assert [d.kind for d in displays(cmdline)] == ["none"]
    assert [found.fd for found in fd_numbers(cmdline)] == [9]
    assert CommandLine.parse(cmdline.argv()) == cmdline


def test_ids_and_labels_stay() -> None:
    before, after = parsed("libvirt-9"), for_rehearsal(parsed("libvirt-9"), monitor_fd=9, disk_sizes=FIRMWARE)
    assert [d.node_name for d in drives(after)] == [d.node_name for d in drives(before)]
    assert [c.label for c in chardevs(after)] == [*(c.label for c in chardevs(before)), "cpr-rehearsal"]
    assert [n.id for n in netdevs(after)] == ["hostnet0"]
    sizes = {d.node_name: d.params.get("size") for d in drives(after)}
    assert (sizes["libvirt-pflash0-format"], sizes["libvirt-1-format"]) == ("3653632", str(1 << 30))


NULL = "driver=null-co,size=4096,read-zeroes=on"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("-drive if=virtio,file=d,format=qcow2,id=i,cache=none,aio=native", f"-drive if=virtio,id=i,cache=none,{NULL}"),
        ("-drive if=pflash,format=raw,unit=0,readonly=on,file=d", f"-drive if=pflash,unit=0,readonly=on,{NULL}"),
        ("-hda d", f"-drive index=0,media=disk,{NULL}"),
        ("-cdrom d", f"-drive index=2,media=cdrom,{NULL}"),
        ("-fda d", f"-drive if=floppy,index=0,{NULL}"),
        ("-pflash d", f"-drive if=pflash,{NULL}"),
        ("d", f"-drive index=0,media=disk,{NULL}"),
        ("-drive if=none,id=empty,media=cdrom", "-drive if=none,id=empty,media=cdrom"),
        (
            "-drive if=none,id=a,file=d,snapshot=on,werror=stop,throttling.bps-total=5",
            f"-drive if=none,id=a,werror=stop,throttling.bps-total=5,{NULL}",
        ),
        (
            "-blockdev qcow2,node-name=d,file=x,read-only=on",
            "-blockdev null-co,node-name=d,read-only=on,size=4096,read-zeroes=on",
        ),
        (
            '-blockdev {"driver":"qcow2","node-name":"d","file":{"driver":"file","filename":"/f"},"cache":{"direct":true}}',
            '-blockdev {"driver":"null-co","node-name":"d","cache":{"direct":true},"size":4096,"read-zeroes":true}',
        ),
        (
            '-blockdev {"driver":"throttle","node-name":"t","throttle-group":"g","file":"d"}',
            '-blockdev {"driver":"throttle","node-name":"t","throttle-group":"g","file":"d"}',
        ),
    ],
)
def test_disks(before: str, after: str) -> None:
    assert rehearsed(before, d=4096) == after


def test_flash_must_have_its_size() -> None:
    for text in ("-pflash x", "-drive if=pflash,file=x", "-machine pflash0=f -blockdev raw,node-name=f,file=x"):
        with pytest.raises(CommandLineError, match="flash"):
            rehearsed(text)
    assert "size=1073741824" in rehearsed("-drive if=virtio,file=x")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "-serial file:/x -qmp unix:/q",
            "-chardev null,id=serial0 -serial chardev:serial0 -chardev null,id=compat_monitor0",
        ),
        ("-chardev pty,id=a,logfile=/l,logappend=on,mux=on", "-chardev null,id=a,mux=on"),
        ("-audiodev pa,id=a,server=x", "-audiodev none,id=a"),
        ("-device scsi-block,drive=x", "-device scsi-hd,drive=x"),
        ("-device vfio-pci,host=1 -device usb-host -object iommufd,id=i -device e1000", "-device e1000"),
        ("-spice port=1,addr=x,tls-port=2,password-secret=s", "-spice disable-ticketing=on"),
        ("-vnc :1 -pidfile /p -daemonize -D /l -d int -loadvm x -snapshot -overcommit mem-lock=on", ""),
        ("-mem-path /x -mem-prealloc -m 1G -run-with chroot=/x -runas u -add-fd fd=3,set=1", "-m 1G"),
        ("-set drive.a.file=/x -set device.b.c=d", "-set device.b.c=d"),
    ],
)
def test_the_rest(before: str, after: str) -> None:
    assert rehearsed(before) == after


def test_defaults_are_quiet() -> None:
    done = words(for_rehearsal(line("-nographic -kernel k"), monitor_fd=9, disk_sizes={}))
    assert "-nographic" not in done
    assert "-chardev null,id=serial0 -serial chardev:serial0 -chardev null,id=parallel0" in done
    assert "-machine graphics=off" in done


def test_ram_of_the_guest_itself_is_mapped_privately() -> None:
    cmdline = for_rehearsal(
        line("-object memory-backend-memfd,id=r,size=1G,share=on -netdev tap,id=n,ifname=t"),
        monitor_fd=9,
        disk_sizes={},
        ram_fds={"r": 5},
        tap_fds={"n": (6, 7)},
    )
    (ram,) = memory_backends(cmdline)
    assert (ram.share, ram.mem_path) == (False, "/proc/self/fd/5")
    assert netdevs(cmdline)[0].fds == ("6", "7")


def test_what_is_not_rehearsed_is_named() -> None:
    left_out = not_rehearsed(line("-device vfio-pci,host=1,id=gpu -object filter-dump,id=f,netdev=n -device e1000"))
    assert [found.id for found in left_out] == ["gpu", "f"]


def test_readconfig_comes_first() -> None:
    with pytest.raises(CommandLineError, match="readconfig"):
        for_rehearsal(line("-readconfig /x"), monitor_fd=9, disk_sizes={})
