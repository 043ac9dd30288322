"""`cpr check --kexec` and `cpr info` of real guests: refused or accepted with the right words, and not touched.

This machine need not be able to jump: what it says of itself is asked, not held against anything.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.lab import tap
from tests.qemu.moving import untouched
from tests.qemu.surveying import bare, start, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab
    from tests.qemu.conftest import Command

MEMORY = "32M"
VOLATILE = "ram-volatile-over-kexec"


def judged(cpr: Command, *guests: object, **named: Any) -> dict[str, dict[str, Any]]:
    """Each guest of the document of `cpr check --kexec` by name, `findings` by check."""
    result = cpr("check", "--kexec", "--json", *guests)
    document = result.json
    # nothing restores guests in a container, and who knows what else runs on this host
    assert result.code in (0, 3), result
    assert document["mode"] == "reboot"
    found = {g["name"]: g for g in document["guests"]}
    for guest in found.values():
        by_check: dict[str, list[dict[str, Any]]] = {}
        for finding in guest["findings"]:
            by_check.setdefault(finding["check"], []).append(finding)
            assert finding["hint"] or finding["severity"] != "blocker", "a blocker has a way out"
        guest["blockers"] = sorted({f["check"] for f in guest["findings"] if f["severity"] == "blocker"})
        guest["findings"] = by_check
        assert guest["exit_code"] == (3 if guest["blockers"] else 0)
    return found


@contextlib.contextmanager
def below(path: str, lab: Lab) -> Iterator[Path]:
    """A file of this lab in a directory of the host."""
    file = Path(path, lab.directory.name)
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)


def test_every_kind_of_ram(lab: Lab, builds: Callable[[str], QemuBuild], cpr: Command) -> None:
    """What a file on a disk is depends on where the lab lies: on a disk it is kept, on tmpfs it is not."""
    old, middle, new = builds("7.2"), builds("10.0"), builds("11.1.a")
    with below("/dev/shm", lab) as shm:
        file = "memory-backend-file,mem-path="
        guests = [
            lab.counting(new, name="plain", memory=MEMORY, backend=None),
            lab.counting(old, name="memfd", memory=MEMORY, backend="memory-backend-memfd,share=on"),
            lab.counting(middle, name="shm", memory=MEMORY, backend=f"{file}{shm},share=on"),
            lab.counting(middle, name="private", memory=MEMORY, backend=f"{file}{lab.directory}/private,share=off"),
            lab.counting(new, name="disk", memory=MEMORY, backend=f"{file}{lab.directory}/ram,share=on"),
        ]
        with untouched(lab, *guests):
            found = judged(cpr, *(g.pid for g in guests))
    assert list(found) == ["plain", "memfd", "shm", "private", "disk"]
    words = {name: [f["message"] for f in found[name]["findings"].get(VOLATILE, ())] for name in found}
    for name, what in {
        "plain": r"32 MiB of RAM \(anonymous.*ends with its process",
        "memfd": r"32 MiB of RAM \(memfd.*a memfd is RAM of this kernel",
        "shm": rf"32 MiB of RAM \(tmpfs at {shm}\) would be lost: files on tmpfs are RAM of this kernel",
        "private": r"private copy-on-write mapping.*share=off",
    }.items():
        assert VOLATILE in found[name]["blockers"], name
        assert any(re.search(what, message) for message in words[name]), words[name]
        assert "device DAX" in found[name]["findings"][VOLATILE][0]["hint"]
        assert "descriptor-not-recreated" not in found[name]["findings"], "said once"
    disk = found["disk"]
    assert disk["blockers"] == ([] if on_disk(lab.directory) else ["disk-volatile-over-kexec", VOLATILE])
    if not disk["blockers"]:
        [warning] = disk["findings"]["ram-on-disk"]
        assert warning["severity"] == "warning"
        assert "page by page" in warning["message"]


def on_disk(path: Path) -> bool:
    """As df sees it: not through the code under test."""
    return os.stat(path).st_dev not in {os.stat(p).st_dev for p in ("/dev/shm", "/run") if os.path.ismount(p)}


@pytest.mark.usefixtures("huge_pages")
def test_huge_pages(lab: Lab, builds: Callable[[str], QemuBuild], cpr: Command) -> None:
    backend = "memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M"
    guest = lab.counting(builds("7.2"), memory=MEMORY, backend=backend)
    with untouched(lab, guest):
        found = judged(cpr, guest.pid)["guest"]
    assert VOLATILE in found["blockers"]


def test_who_is_lost(lab: Lab, builds: Callable[[str], QemuBuild], cpr: Command) -> None:
    """A guest that is neither named nor abandoned by name would be lost; `cpr info` asks nothing of the host."""
    one, other = start(lab, builds("7.2"), "-S", name="one"), start(lab, builds("7.2"), "-S", name="other")
    for words, lost in (((), True), (("--abandon", other.pid), False)):
        document = cpr("check", one.pid, "--kexec", "--json", *words).json
        subjects = [f["subject"] for f in document["findings"] if f["check"] == "guest-not-saved"]
        assert (f"other (pid {other.pid})" in subjects) is lost
        assert [g["pid"] for g in document["guests"]] == [one.pid]
        assert (document["exit_code"], document["status"]) == (3, "blocked")
    assert (document["abandoned"], document["kernel"]["command_line"] != "") == (["other"], True)
    said = cpr("check", one.pid, "--kexec", "--append", "ro memmap=1G!4G", "--kernel", "/no/such/kernel")
    assert said.code == 3, said
    assert "command line  ro memmap=1G!4G" in said.out
    assert "[kexec-kernel-missing] /no/such/kernel" in said.out
    assert "nothing is saved" in said.out
    info = cpr("info", one.pid)
    assert info.code == 0, info
    assert re.search(r"reboot: no \(pc.ram: anonymous memory ends with its process\)", info.out), info.out
    assert "guest-not-saved" not in info.out
    assert one.alive
    assert other.alive


def test_what_was_passed_in_by_number(lab: Lab, builds: Callable[[str], QemuBuild], cpr: Command) -> None:
    """A set of descriptors and a dialled socket without a name are refused; a listener gets its path back."""
    image = lab.directory / "image"
    image.write_bytes(bytes(1 << 20))
    ours, theirs = socket.socketpair()
    with ours, theirs, socket.socket(socket.AF_UNIX) as listener, open(image, "rb") as file:
        listener.bind(str(lab.directory / "l"))
        listener.listen()
        orphan = start(
            lab,
            builds("10.0"),
            *("-add-fd", f"fd={file.fileno()},set=2,opaque=rdonly:image"),
            *("-drive", "file=/dev/fdset/2,if=none,id=d0,format=raw,readonly=on"),
            *("-chardev", f"socket,id=by-fd,fd={theirs.fileno()}", "-chardev", "null,id=none"),
            *("-chardev", f"socket,id=served,fd={listener.fileno()},server=on,wait=off"),
            pass_fds=[file.fileno(), theirs.fileno(), listener.fileno()],
        )
        found = judged(cpr, orphan.pid)["guest"]["findings"]
        refused = {f["subject"]: f for f in found["descriptor-not-recreated"]}
        assert set(refused) == {"-add-fd set 2", "chardev by-fd"}
        assert all(f["severity"] == "blocker" for f in refused.values())
        assert "path" in refused["chardev by-fd"]["hint"]
        assert "guest.log" in found["stdio-after-boot"][0]["message"]
        assert orphan.alive


def test_taps(lab: Lab, builds: Callable[[str], QemuBuild], cpr: Command) -> None:
    """A tap that the host has made is opened by its name again; one that goes with its descriptor is not there."""
    if reason := tap.why_not():
        pytest.skip(reason)
    with tap.Tap() as by_name, tap.Tap() as by_number, passing_tap() as (passing, name):
        given = by_number.open()
        words = []
        for number, how in enumerate(
            (f"ifname={by_name.name},script=no,downscript=no", f"fd={given},vhost=off", f"fd={passing}")
        ):
            words += ["-netdev", f"tap,id=n{number},{how}", "-device", f"virtio-net-pci,netdev=n{number}"]
        orphan = start(lab, builds("7.2"), *words, pass_fds=[given, passing])
        os.close(given)
        found = judged(cpr, orphan.pid)["guest"]["findings"]
        assert [f["subject"] for f in found["needed-after-boot"]] == [by_name.name, by_number.name]
        [refused] = found["descriptor-not-recreated"]
        assert (refused["subject"], refused["severity"]) == ("netdev n2", "blocker")
        assert name in refused["message"]
        assert "ip tuntap add" in refused["hint"]
        assert orphan.alive
        orphan.kill()
        assert orphan.wait(10)


@contextlib.contextmanager
def passing_tap() -> Iterator[tuple[int, str]]:
    """A tap (descriptor, name) that is gone with its last descriptor."""
    name = f"cprx{os.getpid()}"
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        flags = tap.IFF_TAP | tap.IFF_NO_PI | tap.IFF_VNET_HDR
        fcntl.ioctl(fd, tap.TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        yield fd, name
    finally:
        os.close(fd)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_namespaces_of_its_own(lab: Lab, builds: Callable[[str], QemuBuild], cpr: Command) -> None:
    words = [*bare(builds("7.2")), "-S", "-name", "own"]
    socket_path = lab.directory / "own.qmp"
    orphan = lab.start(["unshare", "--mount", "--net", *words, "-qmp", f"unix:{socket_path},server=on,wait=off"])
    until(socket_path.exists)
    [finding] = judged(cpr, orphan.pid)["own"]["findings"]["namespace-own"]
    assert (finding["severity"], finding["subject"]) == ("blocker", "mnt, net")
    assert "--abandon" in finding["hint"]
    assert orphan.alive
