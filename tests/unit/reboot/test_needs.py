"""What is missing in this boot is named before a QEMU is started: of this machine's interfaces, sockets and files."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cpr.errors import Exit, Interrupted
from cpr.linux.syscalls import IFF_NO_PI, IFF_TAP
from cpr.linux.tun import TUNSETIFF
from cpr.model import Backing
from cpr.reboot import needs
from cpr.reboot.afresh import afresh
from cpr.reboot.files import disk, seal
from cpr.reboot.manifest import Restore, Result
from cpr.reboot.verifying import KEEP, NotRestorable, verify
from tests.unit import values
from tests.unit.checks.facts import DEVDAX, guest, netdev, target
from tests.unit.reboot import saved

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


DAX = replace(values.ram(), backing=Backing.DEVDAX, storage=DEVDAX)


def missing(*words: str, **changes: Any) -> tuple[str, ...]:
    """What a guest with these words on its command line lacks."""
    known = guest(*words, **{"ram": (DAX,), **changes})
    return needs.unmet(saved.guest(), known, afresh(known, target()))


def tap_named(name: str) -> tuple[str, ...]:
    words = ("-netdev", f"tap,id=net0,ifname={name},script=no,downscript=no")
    return missing(*words, netdevs=(netdev(ifname=name, fds=(), persistent=True),))


def test_nothing_is_missing() -> None:
    assert missing() == ()


def test_interfaces() -> None:
    (reason,) = tap_named("cpr-gone0")
    assert "the tap interface cpr-gone0 is not there" in reason
    (reason,) = missing("-netdev", "bridge,id=net0,br=cpr-gone1", netdevs=(netdev("bridge", fds=()),))
    assert "the bridge cpr-gone1 is not there" in reason


@pytest.mark.skipif(not os.path.isdir("/sys/class/net/lo"), reason="/sys does not show our network namespace")
def test_interfaces_of_another_kind() -> None:
    assert tap_named("lo") == ("the interface lo is there, and is no tap",)
    (reason,) = missing("-netdev", "bridge,id=net0,br=lo", netdevs=(netdev("bridge", fds=()),))
    assert "no bridge" in reason


def test_a_tap_that_is_there() -> None:
    name = f"cpr-t{os.getpid()}"
    try:
        number = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        pytest.skip(f"/dev/net/tun: {error.strerror}")
    try:
        fcntl.ioctl(number, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
        assert tap_named(name) == ()
    except PermissionError:
        pytest.skip("no right to make a tap")
    finally:
        os.close(number)


def test_sockets_of_helpers(tmp_path: Path) -> None:
    words = ("-chardev", "socket,id=tpm,path=tpm.sock", "-chardev", "socket,id=abstract,path=cpr-test,abstract=on")
    path, abstract = tmp_path / "tpm.sock", f"\0cpr-test-{os.getpid()}"
    words = (*words[:3], words[3].replace("cpr-test", abstract[1:]))
    one, other = missing(*words, cwd=str(tmp_path))
    assert f"the socket {path} is not there" in one
    assert f"nobody listens at @{abstract[1:]}" in other
    path.write_text("")
    assert f"{path} is there, and is no socket" in missing(*words, cwd=str(tmp_path))
    path.unlink()
    with socket.socket(socket.AF_UNIX) as named, socket.socket(socket.AF_UNIX) as hidden:
        named.bind(str(path))
        named.listen()
        hidden.bind(abstract)
        hidden.listen()
        assert missing(*words, cwd=str(tmp_path)) == ()


def test_a_socket_of_its_own_is_not_waited_for(tmp_path: Path) -> None:
    path = f"{tmp_path}/s"
    words = ("-chardev", f"socket,id=a,path={path},server=on,wait=off", "-chardev", f"socket,id=b,path={path}")
    assert missing(*words) == ()


def test_addresses() -> None:
    """Of this host: what listens elsewhere is not known."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        here, there = f"socket,id=c,host=127.0.0.1,port={port}", "socket,id=d,host=198.18.0.1,port=9"
        words = ("-chardev", here, "-chardev", there)
        assert missing(*words) == ()
    (reason,) = missing(*words)
    assert f"nobody listens at 127.0.0.1:{port}" in reason


def test_files(tmp_path: Path) -> None:
    """Firmware that is gone is told here; a disk is not, of which more is known."""
    image = tmp_path / "disk"
    image.write_text("x")
    known = guest(
        *("-kernel", "vmlinuz", "-drive", f"file={image},if=none,id=d0,format=raw"),
        ram=(DAX,),
        cwd=str(tmp_path),
    )
    it = replace(saved.guest(), disks=(disk(str(image)),))
    made = afresh(known, target())
    image.unlink()
    (reason,) = needs.unmet(it, known, made)
    assert f"{tmp_path}/vmlinuz is not there" in reason
    (tmp_path / "vmlinuz").write_text("x")
    assert needs.unmet(it, known, made) == ()
    (reason,) = missing(cwd=str(tmp_path / "gone"))
    assert "its working directory" in reason


def test_kvm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(needs, "KVM", str(tmp_path / "kvm"))
    assert missing() == ()
    (reason,) = missing(accelerator="kvm")
    assert "modprobe" in reason
    (tmp_path / "kvm").write_text("")
    assert missing(accelerator="kvm") == ()


# -- waiting, and the refusal


def lacking(path: Path) -> Callable[[Callable[[], None]], tuple[str, ...]]:
    known = guest("-kernel", str(path), ram=(DAX,))
    made = afresh(known, target())
    return lambda attend: needs.awaited(saved.guest(), known, made, attend)


def test_what_comes_a_moment_later_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    timer = threading.Timer(0.3, lambda: path.write_text("x"))
    timer.start()
    assert lacking(path)(lambda: None) == ()
    timer.join()


def test_what_does_not_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "PATIENCE_SECONDS", 0.3)
    (reason,) = lacking(tmp_path / "vmlinuz")(lambda: None)
    assert "vmlinuz" in reason

    def interrupted() -> None:
        raise Interrupted("interrupted")

    with pytest.raises(Interrupted):
        lacking(tmp_path / "vmlinuz")(interrupted)


def test_the_refusal_has_all_reasons_and_the_way_out() -> None:
    """Beside what verify finds itself, and not where the guest was restored already."""
    own = replace(saved.guest(1 << 30), own_namespaces=(), vfio=(), ram=(), disks=())
    with pytest.raises(NotRestorable) as caught:
        verify(own, saved.manifest(own), more=("tap0 is not there",), hint="make it")
    assert caught.value.reasons[-1] == "tap0 is not there"
    assert len(caught.value.reasons) == 2, "its state is not there either"
    assert (caught.value.hint, caught.value.code) == (KEEP, Exit.BLOCKED)
    back = replace(own, restore=Restore(result=Result.RESTORED, pid=7))
    with pytest.raises(NotRestorable) as caught:
        verify(back, saved.manifest(back), more=("tap0 is not there",), hint="make it")
    assert "tap0" not in caught.value.message


def test_only_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"state")
    own = replace(
        saved.guest(1 << 30), own_namespaces=(), vfio=(), ram=(), disks=(), state=seal(str(tmp_path / "state"))
    )
    verify(own, saved.manifest(own))
    with pytest.raises(NotRestorable) as caught:
        verify(own, saved.manifest(own), more=("tap0 is not there",), hint="make it")
    assert (caught.value.reasons, caught.value.hint) == (("tap0 is not there",), "make it")
    assert "not touched" in caught.value.where
