"""Booting another kernel from this one: which there are, whether we may, load, jump.

    for kernel in installed_kernels(): ...
    obstacles()                                  # () where nothing is known to be in the way
    load(kernel.image, kernel.initrd, next_command_line(running_command_line()))
    jump(systemd=systemd_runs())

Loading is done before any guest is paused; the jump ends everything on this host and syncs first.

`root` is where proc, sys, boot, dev and run are looked up, for trees recorded elsewhere.

Out of scope: what outlasts the jump (persistence.py), and when to make it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import struct
from dataclasses import dataclass
from typing import NoReturn

from cpr import kernelargs
from cpr.errors import KexecFailed
from cpr.linux import process, syscalls

COMMAND_LINE_BYTES = 2048
"""COMMAND_LINE_SIZE of x86 and arm64, the closing NUL included; kexec refuses a longer one (EINVAL)."""
TOOL_SECONDS = 120.0
ASK_SECONDS = 5.0
NOT_FOR_THE_NEXT = ("BOOT_IMAGE", "initrd", "kexec_jump_back_entry", "elfcorehdr")
"""What boot loaders and kexec itself put on a command line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """An installed kernel; `initrd` is empty where none belongs to it."""

    release: str
    """As uname(2) will say it."""
    image: str
    initrd: str = ""


def installed_kernels(*, root: str = "/") -> tuple[Kernel, ...]:
    """Kernels of /boot, the newest release first.

    vmlinuz-RELEASE with initrd.img-RELEASE (Debian), initramfs-RELEASE.img (Fedora) or initrd-RELEASE (SUSE). Rescue
    images are left out. Links are, too: what they lead to is in the list.
    """
    boot = os.path.join(root, "boot")
    try:
        names = os.listdir(boot)
    except OSError:
        return ()
    found = []
    for name in names:
        path = os.path.join(boot, name)
        match = re.fullmatch(r"(?:vmlinuz|vmlinux|Image|image)-(.+)", name)
        if match is None or match[1].startswith("0-rescue") or os.path.islink(path) or not os.path.isfile(path):
            continue
        label = match[1]
        candidates = (f"initrd.img-{label}", f"initramfs-{label}.img", f"initrd-{label}")
        initrds = [p for p in (os.path.join(boot, c) for c in candidates) if os.path.isfile(p)]
        release = image_release(path) or label
        found.append(Kernel(release=release, image=path, initrd=initrds[0] if initrds else ""))
    return tuple(sorted(found, key=lambda k: (_version(k.release), k.image), reverse=True))


def _version(release: str) -> list[tuple[int, int, str]]:
    """Order of releases: runs of digits by number; before a letter comes the end, as 6.1 comes before 6.1-rc..."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.findall(r"\d+|[^\d]+", release)]


def image_release(path: str) -> str:
    """The release that an x86 bzImage says it is, e.g. 6.12.57+deb13-amd64; "" where it is none, or unreadable.

    Documentation/arch/x86/boot.rst: `HdrS` at 0x202, kernel_version at 0x20e leads to the text, less 0x200.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(0x8200)
    except OSError:
        return ""
    if len(head) < 0x210 or head[0x202:0x206] != b"HdrS":
        return ""
    (pointer,) = struct.unpack_from("<H", head, 0x20E)
    text = head[pointer + 0x200 :].split(b"\0")[0] if pointer else b""
    words = text.decode("ascii", "replace").split()
    return words[0] if words else ""


def running_release() -> str:
    return os.uname().release


def running_command_line(*, root: str = "/") -> str:
    """What this kernel was booted with. OSError."""
    with open(os.path.join(root, "proc/cmdline"), errors="surrogateescape") as file:
        return file.read().strip()


def next_command_line(current: str, append: str = "") -> str:
    """`current` without what belongs to its boot loader, with `append` before a `--` (what follows is for init)."""
    kept = [w for w in kernelargs.words(current) if w.partition("=")[0].strip('"') not in NOT_FOR_THE_NEXT]
    end = kept.index("--") if "--" in kept else len(kept)
    return " ".join([*kept[:end], *kernelargs.words(append), *kept[end:]])


# -- may we


def obstacles(*, root: str = "/") -> tuple[str, ...]:
    """Why no kernel can be loaded, in words; nothing is loaded or changed. Empty: only trying tells more."""
    disabled = _switch(root, "kexec_load_disabled")
    if disabled == 1:
        return ("kexec_load_disabled is set (sysctl kernel.kexec_load_disabled); only a reboot clears it",)
    if _switch(root, "kexec_load_limit_reboot") == 0:
        return ("no kernel may be loaded any more (sysctl kernel.kexec_load_limit_reboot is 0)",)
    by_file = syscalls.kexec_refusal("kexec_file_load")
    if by_file == errno.EINVAL:
        return ()
    by_tools = syscalls.kexec_refusal("kexec_load")
    if by_file == errno.ENOSYS and by_tools == errno.ENOSYS:
        return ("this kernel was built without kexec (CONFIG_KEXEC, CONFIG_KEXEC_FILE)",)
    if by_file == errno.ENOSYS and by_tools == errno.EINVAL:
        return ()
    if by_file == errno.ENOSYS and lockdown(root=root) not in ("", "none"):
        return (f"this kernel has no kexec_file_load, and lockdown ({lockdown(root=root)}) forbids kexec_load",)
    if errno.EPERM in (by_file, by_tools):
        return ("kexec is not permitted: CAP_SYS_BOOT is missing",)
    return (f"the kernel refuses kexec: {os.strerror(by_file)}",)


def lockdown(*, root: str = "/") -> str:
    """none, integrity or confidentiality; "" where there is no lockdown (or securityfs is not mounted)."""
    match = re.search(r"\[(\w+)\]", _text(os.path.join(root, "sys/kernel/security/lockdown")))
    return match[1] if match else ""


def loaded(*, root: str = "/") -> bool:
    """Whether a kernel waits to be jumped into."""
    return _text(os.path.join(root, "sys/kernel/kexec_loaded")).strip() == "1"


def live_update(*, root: str = "/") -> bool:
    """Whether this kernel has /dev/liveupdate, by which memfds can outlast a kexec (6.19, CONFIG_LIVEUPDATE)."""
    try:
        return stat.S_ISCHR(os.stat(os.path.join(root, "dev/liveupdate")).st_mode)
    except OSError:
        return False


def systemd_runs(*, root: str = "/") -> bool:
    """sd_booted(3)."""
    return os.path.isdir(os.path.join(root, "run/systemd/system"))


def _switch(root: str, name: str) -> int | None:
    try:
        return int(_text(os.path.join(root, "proc/sys/kernel", name)))
    except ValueError:
        return None


def _text(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except (OSError, UnicodeDecodeError):
        return ""


# -- load and jump


def load(image: str, initrd: str, command_line: str) -> str:
    """Load a kernel to be jumped into, in the place of one that was; seconds go by. Says which way it was done.

    kexec_file_load(2), which verifies signatures; `kexec -c -l` where this kernel has it not.

    Raises:
        KexecFailed: what failed, in words; a kernel loaded before may be gone.
    """
    line = os.fsencode(command_line)
    if len(line) >= COMMAND_LINE_BYTES or b"\0" in line:
        raise KexecFailed(f"the command line for {image} has {len(line)} bytes, {COMMAND_LINE_BYTES - 1} are possible")
    with contextlib.ExitStack() as held:
        numbers = []
        for path in filter(None, (image, initrd)):
            try:
                numbers.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            except OSError as error:
                raise KexecFailed(f"{path}: {error.strerror}", errno=error.errno or 0) from None
            held.callback(os.close, numbers[-1])
        flags = 0 if initrd else syscalls.KEXEC_FILE_NO_INITRAMFS
        try:
            syscalls.kexec_file_load(numbers[0], numbers[1] if initrd else -1, line, flags)
        except OSError as error:
            if error.errno != errno.ENOSYS:
                _refused(image, error)
        else:
            return "kexec_file_load"
    _tool(["-c", "-l", image, *([f"--initrd={initrd}"] if initrd else []), f"--command-line={command_line}"])
    return "kexec -c -l"


_MEANINGS = {
    errno.EPERM: "not permitted: CAP_SYS_BOOT is missing, kexec is disabled, or lockdown wants a signed kernel",
    errno.ENOEXEC: "not a kernel that this one can load",
    errno.EKEYREJECTED: "its signature is not by a key that this kernel trusts",
    errno.ENOKEY: "it is signed by a key that this kernel does not have",
    errno.ENODATA: "it is not signed, and this kernel (secure boot, lockdown) wants that",
    errno.EBADMSG: "its signature is damaged",
    errno.EBUSY: "somebody else is loading a kernel",
    errno.EADDRNOTAVAIL: "there is no room in memory where it has to lie",
    errno.ENOMEM: "out of memory",
    errno.EINVAL: "the kernel refuses it or its command line",
}
"""kernel/kexec_file.c kimage_validate_signature, crypto/asymmetric_keys/verify_pefile.c."""


def _refused(image: str, error: OSError) -> NoReturn:
    number = error.errno or 0
    why = _MEANINGS.get(number, os.strerror(number))
    hint = "dmesg has the kernel's own words"
    raise KexecFailed(f"{image} cannot be loaded: {why}", errno=number, hint=hint) from None


def _tool(arguments: list[str]) -> None:
    try:
        process.run(["kexec", *arguments], timeout=TOOL_SECONDS)
    except FileNotFoundError:
        why = "this kernel has no kexec_file_load, and kexec is not installed"
        raise KexecFailed(why, errno=errno.ENOSYS, hint="install kexec-tools") from None
    except (process.RunFailed, OSError) as error:
        raise KexecFailed(str(error)) from None


def unload() -> None:
    """Forget the loaded kernel; nothing where there is none. Raises KexecFailed."""
    try:
        syscalls.kexec_file_load(-1, -1, b"", syscalls.KEXEC_FILE_UNLOAD)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            why = f"the loaded kernel cannot be dropped: {error.strerror}"
            raise KexecFailed(why, errno=error.errno or 0) from None
        _tool(["-u"])


def going_down(*, root: str = "/") -> bool:
    """Whether systemd is on its way to a shutdown, reboot or kexec, or has one queued; it may be cancelled still."""
    if not systemd_runs(root=root):
        return False
    state = _systemctl("is-system-running").strip()
    if state in ("initializing", "starting"):  # manager_state() of core/manager.c tells that before the other
        jobs = [line.split()[1:3] for line in _systemctl("list-jobs", "--no-legend", "--plain").splitlines()]
        return ["shutdown.target", "start"] in jobs
    return state == "stopping"


def _systemctl(*words: str) -> str:
    """What it says, whatever its exit status (`is-system-running`: 1 for all states but one); "" where it is silent."""
    try:
        done = process.run(["systemctl", *words], timeout=ASK_SECONDS, check=False)
    except (process.RunFailed, OSError):
        return ""
    return done.stdout.decode(errors="replace")


def jump(*, systemd: bool, root: str = "/") -> None:
    """Into the loaded kernel. By systemd it is asked for, and comes some time after this returns; else now.

    Raises:
        KexecFailed: no kernel is loaded (systemd would choose one by itself), or it is not permitted.
    """
    if not loaded(root=root):
        raise KexecFailed("no kernel is loaded")
    os.sync()
    if systemd:
        try:
            process.run(["systemctl", "--no-ask-password", "kexec"], timeout=TOOL_SECONDS)
        except (process.RunFailed, OSError) as error:
            if not going_down(root=root):  # it was slow to answer, and has begun all the same
                raise KexecFailed(f"systemd does not jump: {error}") from None
        return
    try:
        syscalls.reboot(syscalls.LINUX_REBOOT_CMD_KEXEC)
    except OSError as error:
        raise KexecFailed(f"the jump was refused: {error.strerror}", errno=error.errno or 0) from None
