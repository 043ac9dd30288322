"""System calls that Python's `os`, `signal` and `resource` lack: one thin function each, under the call's own name.

They take and return plain values, raise OSError and nothing else. Constants bear the kernel's names. This module
imports nothing that is slow to import: the launcher of a new program stands on it alone.

Out of scope: sequences of calls and what they are for; capabilities.py has the names of capabilities.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import sys

_libc = ctypes.CDLL(None, use_errno=True)
_BIG_WORD = sys.byteorder == "big" and os.uname().machine not in ("s390x",)
"""f_type of struct statfs is a word of 8 bytes, but of 4 on s390x (arch/s390/include/uapi/asm/statfs.h)."""

_MACHINE = os.uname().machine
_GENERIC = {
    "kcmp": 272,
    "sched_setattr": 274,
    "sched_getattr": 275,
    "ioprio_set": 30,
    "ioprio_get": 31,
    "statx": 291,
    "kexec_file_load": 294,
    "kexec_load": 104,
    "userfaultfd": 282,
}
_NUMBERS: dict[str, dict[str, int]] = {
    "x86_64": {
        "kcmp": 312,
        "sched_setattr": 314,
        "sched_getattr": 315,
        "ioprio_set": 251,
        "ioprio_get": 252,
        "statx": 332,
        "kexec_file_load": 320,
        "kexec_load": 246,
        "userfaultfd": 323,
    },
    "s390x": {
        "kcmp": 343,
        "sched_setattr": 345,
        "sched_getattr": 346,
        "ioprio_set": 282,
        "ioprio_get": 283,
        "statx": 379,
        "kexec_file_load": 381,
        "kexec_load": 277,
        "userfaultfd": 355,
    },
    "ppc64le": {
        "kcmp": 354,
        "sched_setattr": 355,
        "sched_getattr": 356,
        "ioprio_set": 273,
        "ioprio_get": 274,
        "statx": 383,
        "kexec_file_load": 382,
        "kexec_load": 268,
        "userfaultfd": 364,
    },
    "aarch64": _GENERIC,
    "riscv64": _GENERIC,
    "loongarch64": _GENERIC,
}
"""Numbers that differ by architecture; those from 424 on are the same everywhere (kernel 5.1)."""

NR_PIDFD_GETFD = 438
NR_CLONE3 = 435
NR_CLOSE_RANGE = 436

CLONE_NEWTIME = 0x00000080
CLONE_PARENT = 0x00008000
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

CLOSE_RANGE_CLOEXEC = 4

PR_SET_PDEATHSIG = 1
PR_GET_KEEPCAPS = 7
PR_SET_KEEPCAPS = 8
PR_SET_NAME = 15
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_GET_SECUREBITS = 27
PR_SET_SECUREBITS = 28
PR_SET_NO_NEW_PRIVS = 38
PR_GET_NO_NEW_PRIVS = 39
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_IS_SET = 1
PR_CAP_AMBIENT_RAISE = 2
PR_CAP_AMBIENT_LOWER = 3
PR_CAP_AMBIENT_CLEAR_ALL = 4

_LINUX_CAPABILITY_VERSION_3 = 0x20080522

IOPRIO_WHO_PROCESS = 1

SCHED_DEADLINE = 6
SCHED_FLAG_RESET_ON_FORK = 1

KCMP_FILE = 0

AT_FDCWD = -100
STATX_MNT_ID = 0x00001000
STATX_ATTR_DAX = 0x00200000

KEXEC_FILE_UNLOAD = 0x00000001
KEXEC_FILE_NO_INITRAMFS = 0x00000004

LINUX_REBOOT_CMD_KEXEC = 0x45584543

TUNGETIFF = 0x800454D2
TIOCGPTN = 0x80045430
FS_IOC_GETFSUUID = 0x80111500
IFF_TUN = 0x0001
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
IFF_MULTI_QUEUE = 0x0100
if _MACHINE.startswith("ppc"):
    TUNGETIFF, TIOCGPTN, FS_IOC_GETFSUUID = 0x400454D2, 0x40045430, 0x40111500


def _checked(result: int, call: str) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{os.strerror(number)} ({call})")
    return result


def syscall(number: int, *arguments: int | ctypes.Array[ctypes.c_char], call: str) -> int:
    """syscall(2) with word-sized arguments; a buffer is passed by its address.

    Raises:
        OSError: with `call` in its text.
    """
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _checked(int(_libc.syscall(ctypes.c_long(number), *words)), call)


def _number(call: str) -> int:
    try:
        return _NUMBERS[_MACHINE][call]
    except KeyError:
        raise OSError(errno.ENOSYS, f"{os.strerror(errno.ENOSYS)} ({call} on {_MACHINE})") from None


def pidfd_getfd(pidfd: int, target: int) -> int:
    """A close-on-exec duplicate of the target process's descriptor (kernel 5.6; needs PTRACE_MODE_ATTACH)."""
    return syscall(NR_PIDFD_GETFD, pidfd, target, 0, call="pidfd_getfd")


def kcmp(pid1: int, pid2: int, type: int, first: int, second: int) -> int:
    """0 where two processes' resources are one, e.g. open file descriptions by KCMP_FILE (CONFIG_KCMP)."""
    return syscall(_number("kcmp"), pid1, pid2, type, first, second, call="kcmp")


def close_range(first: int, last: int, flags: int) -> None:
    """close_range(2), kernel 5.9; CLOSE_RANGE_CLOEXEC 5.11."""
    syscall(NR_CLOSE_RANGE, first, last, flags, call="close_range")


def clone3(flags: int, exit_signal: int) -> int:
    """Fork (kernel 5.3): 0 in the child. With CLONE_PARENT `exit_signal` must be 0; the child is then our sibling."""
    arguments = struct.pack("=11Q", flags, 0, 0, 0, exit_signal, 0, 0, 0, 0, 0, 0)
    buffer = ctypes.create_string_buffer(arguments, len(arguments))
    return syscall(NR_CLONE3, buffer, len(arguments), call="clone3")


def setns(fd: int, nstype: int) -> None:
    """Join the namespace that `fd` (of /proc/PID/ns, or a pidfd) stands for."""
    _checked(_libc.setns(ctypes.c_int(fd), ctypes.c_int(nstype)), "setns")


def unshare(flags: int) -> None:
    """unshare(2)."""
    _checked(_libc.unshare(ctypes.c_int(flags)), "unshare")


def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
    """prctl(2) for options that take numbers."""
    words = [ctypes.c_ulong(a) for a in (arg2, arg3, arg4, arg5)]
    return _checked(int(_libc.prctl(ctypes.c_int(option), *words)), "prctl")


def capget(pid: int = 0) -> tuple[int, int, int]:
    """(effective, permitted, inheritable) as bit masks; pid 0 is the calling thread."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", _LINUX_CAPABILITY_VERSION_3, pid), 8)
    data = ctypes.create_string_buffer(24)
    _checked(_libc.capget(header, data), "capget")
    low = struct.unpack_from("=3I", data.raw, 0)
    high = struct.unpack_from("=3I", data.raw, 12)
    effective, permitted, inheritable = (lo | hi << 32 for lo, hi in zip(low, high, strict=True))
    return effective, permitted, inheritable


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """Set the calling thread's capabilities."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", _LINUX_CAPABILITY_VERSION_3, 0), 8)
    masks = (effective, permitted, inheritable)
    words = [m & 0xFFFFFFFF for m in masks] + [m >> 32 for m in masks]
    _checked(_libc.capset(header, ctypes.create_string_buffer(struct.pack("=6I", *words), 24)), "capset")


def ioprio_get(which: int, who: int) -> int:
    """I/O priority: class << 13 | data; 0 where none was set."""
    return syscall(_number("ioprio_get"), which, who, call="ioprio_get")


def ioprio_set(which: int, who: int, ioprio: int) -> None:
    syscall(_number("ioprio_set"), which, who, ioprio, call="ioprio_set")


_SCHED_ATTR = struct.Struct("=IIQiIQQQ")


def sched_getattr(pid: int) -> tuple[int, int, int, int, int, int, int]:
    """(policy, flags, nice, priority, runtime, deadline, period) of a thread; the last three in ns (kernel 3.14)."""
    buffer = ctypes.create_string_buffer(_SCHED_ATTR.size)
    syscall(_number("sched_getattr"), pid, buffer, _SCHED_ATTR.size, 0, call="sched_getattr")
    _, policy, flags, nice, priority, runtime, deadline, period = _SCHED_ATTR.unpack(buffer.raw)
    return policy, flags, nice, priority, runtime, deadline, period


def sched_setattr(
    pid: int, policy: int, flags: int, nice: int, priority: int, runtime: int, deadline: int, period: int
) -> None:
    packed = _SCHED_ATTR.pack(_SCHED_ATTR.size, policy, flags, nice, priority, runtime, deadline, period)
    buffer = ctypes.create_string_buffer(packed, len(packed))
    syscall(_number("sched_setattr"), pid, buffer, 0, call="sched_setattr")


def execve(path: bytes, argv: list[bytes], environ: list[bytes]) -> None:
    """execve(2) with any bytes: no argument at all, entries without '=', names given twice. Returns only by OSError."""
    arguments = (ctypes.c_char_p * (len(argv) + 1))(*argv, None)
    environment = (ctypes.c_char_p * (len(environ) + 1))(*environ, None)
    _checked(_libc.execve(ctypes.c_char_p(path), arguments, environment), "execve")


def statfs_type(path: str) -> int:
    """f_type of statfs(2): the magic number of the file system that `path` lies on (include/uapi/linux/magic.h)."""
    buffer = ctypes.create_string_buffer(256)
    _checked(_libc.statfs(ctypes.c_char_p(os.fsencode(path)), buffer), "statfs")
    return int(struct.unpack_from("=I", buffer.raw, 4 if _BIG_WORD else 0)[0])


def statx_extra(path: str) -> tuple[int, int, int | None]:
    """(attributes, attributes_mask, mount id) of statx(2), which follows links; None before kernel 5.8."""
    buffer = ctypes.create_string_buffer(256)
    name = ctypes.create_string_buffer(os.fsencode(path))
    syscall(_number("statx"), AT_FDCWD, name, 0, STATX_MNT_ID, buffer, call="statx")
    mask, _, attributes = struct.unpack_from("=IIQ", buffer.raw, 0)
    (supported,) = struct.unpack_from("=Q", buffer.raw, 0x38)
    (mount,) = struct.unpack_from("=Q", buffer.raw, 0x90)
    return int(attributes), int(supported), int(mount) if mask & STATX_MNT_ID else None


def kexec_file_load(kernel_fd: int, initrd_fd: int, command_line: bytes, flags: int) -> None:
    """kexec_file_load(2), kernel 3.17: the kernel reads, verifies and places the image. The descriptors stay ours.

    `command_line` is given without its closing NUL byte.
    """
    text = ctypes.create_string_buffer(command_line)
    length = len(command_line) + 1
    syscall(_number("kexec_file_load"), kernel_fd, initrd_fd, length, text, flags, call="kexec_file_load")


def kexec_refusal(call: str) -> int:
    """The errno with which kexec_file_load(2) or kexec_load(2) refuses flags that no kernel knows; loads nothing.

    EINVAL: it got as far as the flags, so that it is there and we may (kernel/kexec_file.c, kernel/kexec.c: permission
    is asked first). EPERM, ENOSYS: it is not. Should a kernel come to know the flags, no descriptor is right and a
    million segments are too many.
    """
    try:
        if call == "kexec_file_load":
            syscall(_number(call), -1, -1, 0, 0, 1 << 62, call=call)
        else:
            syscall(_number("kexec_load"), 0, 1 << 20, 0, 0x8000, call=call)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def reboot(command: int) -> None:
    """reboot(2). With LINUX_REBOOT_CMD_KEXEC it does not return, and syncs nothing."""
    _checked(_libc.reboot(ctypes.c_int(command)), "reboot")


def userfaultfd(flags: int) -> int:
    """A new descriptor; one that hears of faults of the kernel's own needs CAP_SYS_PTRACE."""
    return syscall(_number("userfaultfd"), flags, call="userfaultfd")


def fs_uuid(fd: int) -> bytes:
    """FS_IOC_GETFSUUID (kernel 6.9): the UUID of the file system that a descriptor lies on. OSError: it tells none."""
    answer = fcntl.ioctl(fd, FS_IOC_GETFSUUID, bytes(17))
    return bytes(answer[1 : 1 + answer[0]])


def tun_interface(fd: int) -> tuple[str, int]:
    """TUNGETIFF: name and IFF_ flags of the interface behind a descriptor of /dev/net/tun.

    Raises:
        OSError: ENOTTY where it is no such descriptor, EBADFD where nothing is attached to it.
    """
    answer = fcntl.ioctl(fd, TUNGETIFF, bytes(40))
    name, flags = struct.unpack_from("=16sH", answer)
    return os.fsdecode(name.split(b"\0")[0]), int(flags)


def pty_number(fd: int) -> int:
    """TIOCGPTN: N of /dev/pts/N whose master the descriptor is. OSError ENOTTY where it is none."""
    return int(struct.unpack("=I", fcntl.ioctl(fd, TIOCGPTN, bytes(4)))[0])
