# ruff: noqa: E501  (command lines read better unbroken)
"""Edits, each as a line before and a line after."""

from __future__ import annotations

import pytest

from cpr.qemu.cmdline import (
    CommandLine,
    CommandLineError,
    append_options,
    for_incoming,
    remove_appended,
    with_generation_id,
    with_machine_type,
    with_memory_backend_fd,
    with_memory_backend_memfd,
    with_netdev_fds,
    with_netdev_null,
    with_program,
    with_vnc_detached,
    without,
    without_gdb,
    without_hostfwd,
)
from tests.unit.qemu.test_cmdline_chardevs import line, words
from tests.unit.qemu.test_cmdline_samples import SAMPLES, parsed


def test_program() -> None:
    assert with_program(line("-S"), "/new/qemu").argv() == ["/new/qemu", "-S"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("-S", "-machine T -S"),
        ("-M q35", "-M T"),
        ("--machine q35,hpet=off", "--machine T,hpet=off"),
        ("-machine hpet=off,type=q35", "-machine hpet=off,type=T"),
        ("-machine hpet=off", "-machine T,hpet=off"),
        ("-machine q35,usb=off -M hpet=off", "-machine T,usb=off -M hpet=off"),
        ("-M q35 -machine pc,hpet=off -S", "-M q35 -machine T,hpet=off -S"),
    ],
)
def test_machine_type(before: str, after: str) -> None:
    assert words(with_machine_type(line(before), "T")) == after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("-device vmgenid,guid=auto,id=g -device VGA", "-device vmgenid,guid=G,id=g -device VGA"),
        ("-device vmgenid", "-device vmgenid,guid=G"),
        ('-device {"driver":"vmgenid","guid":"auto"}', '-device {"driver":"vmgenid","guid":"G"}'),
        ("-device VGA", "-device VGA"),
    ],
)
def test_generation_id(before: str, after: str) -> None:
    assert words(with_generation_id(line(before), "G")) == after


def test_without() -> None:
    cmdline = line("-loadvm s --S -M pc -pidfile /p -daemonize -m 1G -incoming defer")
    assert words(without(cmdline, ("-loadvm", "S", "--pidfile", "daemonize", "incoming"))) == "-M pc -m 1G"


def test_incoming_does_not_grow() -> None:
    once = for_incoming(line("-S -incoming tcp:0:4444 -m 1G"))
    assert words(once) == "-m 1G -S -incoming defer"
    assert for_incoming(once) == once


def test_additions_are_replaced() -> None:
    start = line("-m 1G -device e1000")
    first = ["-device", "e1000", "-global", "x.y=z"]
    updated = append_options(start, first)
    assert words(updated) == "-m 1G -device e1000 -device e1000 -global x.y=z"
    assert remove_appended(updated, first) == start
    again = append_options(remove_appended(updated, first), ["-cpu", "max"])
    assert words(again) == "-m 1G -device e1000 -cpu max"
    assert remove_appended(start, ["-cpu", "max"]) == start


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "-object memory-backend-memfd,id=r,size=1G,share=on,hugetlb=on,hugetlbsize=2M,seal=on,prealloc=on,prealloc-threads=2",
            "-object memory-backend-file,id=r,size=1G,share=on,mem-path=/proc/self/fd/7",
        ),
        (
            "-object memory-backend-file,id=r,mem-path=/dev/shm/x,size=1G,align=2M,pmem=on,discard-data=on,merge=off,"
            "dump=off,host-nodes=0,policy=bind,readonly=off,rom=off",
            "-object memory-backend-file,id=r,mem-path=/proc/self/fd/7,size=1G,align=2M,pmem=on,discard-data=off,merge=off,"
            "dump=off,readonly=off,rom=off,share=on",
        ),
        (
            "-object memory-backend-ram,id=r,size=1G",
            "-object memory-backend-file,id=r,size=1G,mem-path=/proc/self/fd/7,share=on,"
            "x-use-canonical-path-for-ramblock-id=off",
        ),
        (
            '-object {"qom-type":"memory-backend-memfd","id":"r","share":true,"x-use-canonical-path-for-ramblock-id":false,'
            '"prealloc":true,"host-nodes":[0,1],"policy":"bind","size":5}',
            '-object {"qom-type":"memory-backend-file","id":"r","share":true,"x-use-canonical-path-for-ramblock-id":false,'
            '"size":5,"mem-path":"/proc/self/fd/7"}',
        ),
    ],
)
def test_memory_backend_by_descriptor(before: str, after: str) -> None:
    once = with_memory_backend_fd(line(before), "r", 7)
    assert words(once) == after
    assert with_memory_backend_fd(once, "r", 7) == once


def test_memory_backend_for_rehearsal() -> None:
    cmdline = line("-object memory-backend-file,id=r,mem-path=/x,size=1G,align=2M,readonly=on,host-nodes.0=1")
    assert words(with_memory_backend_memfd(cmdline, "r")) == "-object memory-backend-memfd,id=r,size=1G,share=on"
    assert "share=off" in words(with_memory_backend_fd(cmdline, "r", 7, share=False))
    with pytest.raises(CommandLineError, match="other"):
        with_memory_backend_fd(cmdline, "other", 7)


@pytest.mark.parametrize(
    ("before", "fds", "vhostfds", "after"),
    [
        (
            "-netdev type=tap,id=n,ifname=t0,script=/s,downscript=/d,vhost=on,queues=2",
            *((3, 4), (5, 6), "-netdev type=tap,id=n,vhost=on,fds=3:4,vhostfds=5:6"),
        ),
        ("-netdev tap,id=n,fd=1,vhostfd=2", (3,), (4,), "-netdev tap,id=n,fd=3,vhostfd=4"),
        ("-netdev tap,id=n,fds=1:2,vnet_hdr=on", (3,), (), "-netdev tap,id=n,fd=3"),
        ("-netdev bridge,id=n,br=br0,helper=/h", (3,), (), "-netdev tap,id=n,fd=3"),
        ("-nic tap,id=n,ifname=t0,model=virtio,mac=m", (3,), (), "-nic tap,id=n,model=virtio,mac=m,fd=3"),
        ("-net nic,netdev=n -net tap,id=n,script=no", (3,), (), "-net nic,netdev=n -net tap,id=n,fd=3"),
        (
            '-netdev {"type":"tap","ifname":"t","id":"n","vhost":true}',
            *((3,), (), '-netdev {"type":"tap","id":"n","vhost":true,"fd":"3"}'),
        ),
    ],
)
def test_taps_by_descriptor(before: str, fds: tuple[int, ...], vhostfds: tuple[int, ...], after: str) -> None:
    assert words(with_netdev_fds(line(before), "n", fds, vhostfds)) == after


def test_taps_by_index_and_what_is_none() -> None:
    cmdline = line("-S -nic tap,model=e1000")
    assert words(with_netdev_fds(cmdline, 1, (3,))) == "-S -nic tap,model=e1000,fd=3"
    for bad in ("-netdev user,id=n", "-S"):
        with pytest.raises(CommandLineError):
            with_netdev_fds(line(bad), "n", (3,))
    with pytest.raises(CommandLineError, match="2 queues, 1 vhost"):
        with_netdev_fds(line("-netdev tap,id=n"), "n", (3, 4), (5,))


def test_null_netdevs() -> None:
    assert words(with_netdev_null(line("-netdev tap,id=n,ifname=t"), "n")) == "-netdev hubport,hubid=7000,id=n"
    assert words(with_netdev_null(line("-net nic -net user,smb=/d,hostfwd=x"), 1)) == "-net nic -net user,restrict=on"
    assert words(with_netdev_null(line("-S -nic tap,model=virtio,mac=m,ifname=x"), 1)) == (
        "-S -nic hubport,hubid=7001,model=virtio,mac=m"
    )
    assert words(with_netdev_null(line("-net nic -net tap"), 1)) == "-net nic"
    assert (
        words(with_netdev_null(line("-netdev tap,id=n,ifname=t,vhost=on"), "n", (3, 4))) == "-netdev tap,id=n,fds=3:4"
    )


def test_forwardings() -> None:
    cmdline, taken = without_hostfwd(
        line(
            '-netdev user,id=n,hostfwd=tcp::1-:1,dns=1.1.1.1,hostfwd=udp::2-:2 -net user,hostfwd=tcp::3-:3 -netdev {"type":"user","id":"m","hostfwd":[{"str":"tcp::4-:4"}]}'
        )
    )
    assert words(cmdline) == '-netdev user,id=n,dns=1.1.1.1 -net user -netdev {"type":"user","id":"m"}'
    assert [rule.hmp() for rule in taken] == [
        "hostfwd_add n tcp::1-:1",
        "hostfwd_add n udp::2-:2",
        "hostfwd_add tcp::3-:3",
        "hostfwd_add m tcp::4-:4",
    ]


def test_vnc_listens_nowhere() -> None:
    cmdline, taken = with_vnc_detached(
        line("-vnc :1,to=9,password=on,websocket=on -display vnc=unix:/v,id=x -vnc :2,vnc=:3,share=ignore")
    )
    assert words(cmdline) == "-vnc none,password=on,websocket=on -vnc none,id=x -vnc none,share=ignore"
    assert [(vnc.id, [a.port or a.path for a in vnc.addresses]) for vnc in taken] == [
        ("default", [5901]),
        ("x", ["/v"]),
        ("vnc2", [5902, 5903]),
    ]
    again, nowhere = with_vnc_detached(cmdline)
    assert again == cmdline
    assert [vnc.addresses for vnc in nowhere] == [(), (), ()]


@pytest.mark.parametrize(
    ("before", "address"),
    [
        ("-gdb unix:/g,server,nowait -S", "unix:/g,server,nowait"),
        ("-s -S", "tcp::1234"),
        ("-S", None),
        ("-gdb none -S", None),
    ],
)
def test_gdb(before: str, address: str | None) -> None:
    cmdline, found = without_gdb(line(before))
    assert (words(cmdline), found) == ("-S", address)


def test_a_whole_restart_of_a_libvirt_guest() -> None:
    cmdline = with_memory_backend_fd(parsed("libvirt-9"), "pc.ram", 40)
    cmdline = with_netdev_fds(cmdline, "hostnet0", (41,), (42,))
    cmdline, vnc = with_vnc_detached(cmdline)
    cmdline = for_incoming(with_machine_type(cmdline, "pc-q35-7.2"))
    assert len(vnc) == 1
    before, after = SAMPLES["libvirt-9"], cmdline.argv()
    changed = [
        (old, new)
        for old, new in zip([w for w in before if w != "-S"], after[: len(before) - 1], strict=True)
        if old != new
    ]
    assert [new for _, new in changed] == [
        '{"qom-type":"memory-backend-file","id":"pc.ram","share":true,"x-use-canonical-path-for-ramblock-id":false,'
        '"size":536870912,"mem-path":"/proc/self/fd/40"}',
        '{"type":"tap","vhost":true,"id":"hostnet0","fd":"41","vhostfd":"42"}',
        "none,audiodev=audio1",
    ]
    assert after[-3:] == ["-S", "-incoming", "defer"]
    assert CommandLine.parse(after) == cmdline
