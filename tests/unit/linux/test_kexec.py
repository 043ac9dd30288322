"""Kernels and command lines in fake trees; loading against a fake kernel. Nothing here may ever really jump."""

from __future__ import annotations

import errno
import os
import stat
import struct
from typing import TYPE_CHECKING, Any

import pytest

from cpr.errors import KexecFailed
from cpr.linux import kexec, syscalls
from cpr.linux.process import Completed, RunFailed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def bzimage(release: str) -> bytes:
    """The head of an x86 kernel, as far as its release is found by it."""
    head = bytearray(0x300)
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x20E, 0x300 - 0x200)
    return bytes(head) + f"{release} (builder@host) #1 SMP".encode() + b"\0" + bytes(64)


def tree(root: Path, files: dict[str, bytes | str]) -> str:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(root)


def test_installed_kernels(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "boot/vmlinuz-6.1.0-9-amd64": b"",
            "boot/initrd.img-6.1.0-9-amd64": b"",
            "boot/vmlinuz-6.1.0-10-amd64": bzimage("6.1.0-10-amd64"),
            "boot/vmlinuz-6.12.8-200.fc41.x86_64": b"",
            "boot/initramfs-6.12.8-200.fc41.x86_64.img": b"",
            "boot/vmlinuz-linux": bzimage("7.2.1-arch1-1"),
            "boot/initramfs-linux.img": b"",
            "boot/vmlinuz-0-rescue-abc": b"",
            "boot/System.map-6.1.0-9-amd64": b"",
            "boot/vmlinuz-6.4.0-suse": b"",
            "boot/initrd-6.4.0-suse": b"",
        },
    )
    os.symlink("vmlinuz-6.1.0-9-amd64", tmp_path / "boot/vmlinuz-current")
    (tmp_path / "boot/vmlinuz-directory").mkdir()
    found = [(k.release, os.path.basename(k.image), os.path.basename(k.initrd))
             for k in kexec.installed_kernels(root=root)]  # fmt: skip
    assert found == [
        ("7.2.1-arch1-1", "vmlinuz-linux", "initramfs-linux.img"),
        ("6.12.8-200.fc41.x86_64", "vmlinuz-6.12.8-200.fc41.x86_64", "initramfs-6.12.8-200.fc41.x86_64.img"),
        ("6.4.0-suse", "vmlinuz-6.4.0-suse", "initrd-6.4.0-suse"),
        ("6.1.0-10-amd64", "vmlinuz-6.1.0-10-amd64", ""),
        ("6.1.0-9-amd64", "vmlinuz-6.1.0-9-amd64", "initrd.img-6.1.0-9-amd64"),
    ]
    assert kexec.installed_kernels(root=str(tmp_path / "nowhere")) == ()


@pytest.mark.parametrize("data", [b"", b"MZ" * 300, bytes(0x202) + b"HdrS" + bytes(600), bzimage("x")[:0x20F]])
def test_an_image_without_a_release(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "image").write_bytes(data)
    assert kexec.image_release(str(tmp_path / "image")) == ""


@pytest.mark.parametrize(
    ("current", "append", "expected"),
    [
        ("BOOT_IMAGE=/boot/vmlinuz-6.1 root=/dev/vda1 ro", "", "root=/dev/vda1 ro"),
        ("BOOT_IMAGE=(hd0,gpt2)/vmlinuz initrd=\\initrd.img ro elfcorehdr=0x1M", "", "ro"),
        ("ro memmap=1G!4G", "memmap=1G!8G quiet", "ro memmap=1G!4G memmap=1G!8G quiet"),
        ("ro -- --verbose", "quiet", "ro quiet -- --verbose"),
        ('ro dyndbg="file a +p"', "", 'ro dyndbg="file a +p"'),
        ("", "root=/dev/vda", "root=/dev/vda"),
    ],
)
def test_next_command_line(current: str, append: str, expected: str) -> None:
    assert kexec.next_command_line(current, append) == expected


@pytest.mark.parametrize(
    ("files", "by_file", "by_tools", "words"),
    [
        ({}, errno.EINVAL, errno.EINVAL, ""),
        ({}, errno.ENOSYS, errno.EINVAL, ""),
        ({"proc/sys/kernel/kexec_load_disabled": "0\n"}, errno.EINVAL, errno.EPERM, ""),
        ({"proc/sys/kernel/kexec_load_disabled": "1\n"}, errno.EPERM, errno.EPERM, "kexec_load_disabled"),
        ({"proc/sys/kernel/kexec_load_limit_reboot": "0\n"}, errno.EINVAL, errno.EINVAL, "kexec_load_limit_reboot"),
        ({"proc/sys/kernel/kexec_load_limit_reboot": "-1\n"}, errno.EINVAL, errno.EINVAL, ""),
        ({}, errno.ENOSYS, errno.ENOSYS, "built without"),
        ({}, errno.EPERM, errno.EPERM, "CAP_SYS_BOOT"),
        ({"sys/kernel/security/lockdown": "none [integrity] confidentiality\n"}, errno.EINVAL, errno.EPERM, ""),
        ({"sys/kernel/security/lockdown": "none [integrity] confidentiality\n"}, errno.ENOSYS, errno.EPERM, "lockdown"),
        ({}, errno.EIO, errno.EIO, "Input/output error"),
    ],
)
def test_obstacles_with_a_fake_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], by_file: int, by_tools: int, words: str
) -> None:
    answers = {"kexec_file_load": by_file, "kexec_load": by_tools}
    monkeypatch.setattr(syscalls, "kexec_refusal", answers.__getitem__)
    found = kexec.obstacles(root=tree(tmp_path, dict(files)))
    assert bool(found) is bool(words)
    assert all(words in line for line in found)


def test_probing_the_real_kernel_loads_nothing() -> None:
    before = kexec.loaded()
    assert syscalls.kexec_refusal("kexec_file_load") in (errno.EINVAL, errno.EPERM, errno.ENOSYS)
    assert syscalls.kexec_refusal("kexec_load") in (errno.EINVAL, errno.EPERM, errno.ENOSYS)
    kexec.obstacles()
    assert kexec.loaded() is before


def test_switches(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert (kexec.loaded(root=root), kexec.lockdown(root=root), kexec.live_update(root=root)) == (False, "", False)
    assert not kexec.systemd_runs(root=root)
    tree(tmp_path, {"sys/kernel/kexec_loaded": "1\n", "sys/kernel/security/lockdown": "[none] integrity\n",
                    "dev/liveupdate": "", "proc/cmdline": "ro quiet\n", "run/systemd/system/x": ""})  # fmt: skip
    assert (kexec.loaded(root=root), kexec.lockdown(root=root)) == (True, "none")
    assert not kexec.live_update(root=root), "a regular file of that name"
    assert kexec.systemd_runs(root=root)
    assert kexec.running_command_line(root=root) == "ro quiet"


class FakeKernel:
    """Takes or refuses what is loaded, and remembers it; `jumped` in place of the jump."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refusal: int = 0) -> None:
        self.refusal = refusal
        self.loads: list[tuple[str, str, bytes, int]] = []
        self.tools: list[list[str]] = []
        self.jumped: list[int] = []
        self.tool: Callable[[list[str]], None] = lambda _: None
        monkeypatch.setattr(syscalls, "kexec_file_load", self._load)
        monkeypatch.setattr(syscalls, "reboot", self.jumped.append)
        monkeypatch.setattr("cpr.linux.process.run", self._run)
        monkeypatch.setattr(os, "sync", lambda: None)

    def _load(self, kernel: int, initrd: int, line: bytes, flags: int) -> None:
        if self.refusal:
            raise OSError(self.refusal, os.strerror(self.refusal))
        names = [os.path.basename(os.readlink(f"/proc/self/fd/{n}")) if n >= 0 else "" for n in (kernel, initrd)]
        self.loads.append((names[0], names[1], line, flags))

    def _run(self, argv: list[str], **_: Any) -> None:
        self.tools.append(argv)
        self.tool(argv)


@pytest.fixture
def boot(tmp_path: Path) -> Path:
    tree(tmp_path, {"vmlinuz": b"k", "initrd": b"i"})
    return tmp_path


def test_load_and_unload(boot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeKernel(monkeypatch)
    assert kexec.load(str(boot / "vmlinuz"), str(boot / "initrd"), "ro quiet") == "kexec_file_load"
    assert kexec.load(str(boot / "vmlinuz"), "", "ro") == "kexec_file_load"
    kexec.unload()
    no_initrd, drop = syscalls.KEXEC_FILE_NO_INITRAMFS, syscalls.KEXEC_FILE_UNLOAD
    assert fake.loads == [("vmlinuz", "initrd", b"ro quiet", 0), ("vmlinuz", "", b"ro", no_initrd), ("", "", b"", drop)]
    assert fake.tools == []


def test_kexec_tools_where_the_kernel_has_no_kexec_file_load(boot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeKernel(monkeypatch, errno.ENOSYS)
    image, initrd = str(boot / "vmlinuz"), str(boot / "initrd")
    assert kexec.load(image, initrd, "ro") == "kexec -c -l"
    kexec.unload()
    load = ["kexec", "-c", "-l", image, f"--initrd={initrd}", "--command-line=ro"]
    assert fake.tools == [load, ["kexec", "-u"]]

    def missing(argv: list[str]) -> None:
        raise FileNotFoundError

    fake.tool = missing
    with pytest.raises(KexecFailed, match="kexec is not installed") as caught:
        kexec.load(image, initrd, "ro")
    assert "kexec-tools" in caught.value.hint

    def failing(argv: list[str]) -> None:
        raise RunFailed(Completed(argv=("kexec",), status=1, stdout=b"", stderr=b"kexec_load failed", seconds=0))

    fake.tool = failing
    with pytest.raises(KexecFailed, match="kexec_load failed"):
        kexec.load(image, initrd, "ro")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EPERM, "not permitted"),
        (errno.ENOEXEC, "not a kernel"),
        (errno.EKEYREJECTED, "signature"),
        (errno.ENOKEY, "key"),
        (errno.ENODATA, "not signed"),
        (errno.EADDRNOTAVAIL, "no room"),
        (errno.ENOTTY, "ioctl"),
    ],
)
def test_what_a_refusal_means(boot: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str) -> None:
    fake = FakeKernel(monkeypatch, number)
    with pytest.raises(KexecFailed, match=words) as caught:
        kexec.load(str(boot / "vmlinuz"), "", "ro")
    assert caught.value.errno == number
    assert fake.tools == []
    with pytest.raises(KexecFailed, match="cannot be dropped"):
        kexec.unload()


def test_files_and_lines_that_cannot_be_loaded(boot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeKernel(monkeypatch)
    with pytest.raises(KexecFailed, match=r"initrd-of-old: No such file"):
        kexec.load(str(boot / "vmlinuz"), str(boot / "initrd-of-old"), "ro")
    for line in ("x" * 2048, "a\0b"):
        with pytest.raises(KexecFailed, match="bytes"):
            kexec.load(str(boot / "vmlinuz"), "", line)
    assert fake.loads == []


def test_the_jump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeKernel(monkeypatch)
    root = str(tmp_path)
    for systemd in (False, True):
        with pytest.raises(KexecFailed, match="no kernel is loaded"):
            kexec.jump(systemd=systemd, root=root)
    assert (fake.jumped, fake.tools) == ([], [])
    tree(tmp_path, {"sys/kernel/kexec_loaded": "1\n"})
    kexec.jump(systemd=False, root=root)
    kexec.jump(systemd=True, root=root)
    assert (fake.jumped, fake.tools) == ([0x45584543], [["systemctl", "--no-ask-password", "kexec"]])

    def refused(_: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(syscalls, "reboot", refused)
    with pytest.raises(KexecFailed, match="refused"):
        kexec.jump(systemd=False, root=root)


def test_stat_of_liveupdate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake stat: making a device node wants root."""
    monkeypatch.setattr(os, "stat", lambda _: os.stat_result((stat.S_IFCHR, *([0] * 9))))
    found = kexec.live_update(root=str(tmp_path))
    monkeypatch.undo()
    assert found


def test_a_jump_that_systemd_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or not: systemctl fails in both cases."""
    root = tree(tmp_path, {"sys/kernel/kexec_loaded": "1\n", "run/systemd/system/x": ""})
    fake = FakeKernel(monkeypatch)

    def fails(argv: list[str]) -> None:
        if "kexec" in argv:
            raise RunFailed(Completed(argv=tuple(argv), status=1, stdout=b"", stderr=b"timed out", seconds=0.0))

    fake.tool = fails
    for state in ("stopping", "running"):
        monkeypatch.setattr(kexec, "going_down", lambda state=state, **_: state == "stopping")
        if state == "stopping":
            kexec.jump(systemd=True, root=root)
        else:
            with pytest.raises(KexecFailed, match="timed out"):
                kexec.jump(systemd=True, root=root)


@pytest.mark.parametrize(
    ("state", "job", "expected"),
    [
        ("stopping", "", True),
        ("running", "", False),
        ("degraded", "", False),
        ("starting", "7 shutdown.target start waiting", True),
        ("starting", "7 slow.service start running", False),
        ("initializing", "", False),
    ],
)
def test_whether_the_host_goes_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, job: str, expected: bool
) -> None:
    """A fake systemctl, which exits with 1 as the real one does unless all is well."""
    program = tmp_path / "systemctl"
    script = f'case "$1" in is-system-running) echo {state};; list-jobs) echo "{job}";; esac\nexit 1\n'
    program.write_text(f"#!/bin/sh\n{script}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert not kexec.going_down(root=str(tmp_path)), "no systemd runs"
    root = tree(tmp_path, {"run/systemd/system/x": ""})
    assert kexec.going_down(root=root) is expected
    program.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not kexec.going_down(root=root)
