"""The helper that becomes the new program: a process of its own, single-threaded, because most of what it does to
itself (namespaces, credentials, chroot) must happen between fork and exec and cannot be done in a threaded parent.

    launch.py ── socket 3: header, descriptors (SCM_RIGHTS), JSON ──► here
              ◄── JSON lines: {"pid"}, {"unmet"} before exec, or {"step", "errno", "text"} ── here; closed by exec

The order matters: the cgroup first, so that all later memory counts there; what needs privileges of the host before
the user namespace is joined; credentials after everything that needs them; the seal (no_new_privs) last. Nothing that
fails and would give the program more, or other, than its likeness has is passed over: see FATAL.

It imports as little as it can: starting it is most of the time that a launch takes.

Out of scope: deciding what is wanted (launch.py), and what the program does.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import signal
import socket
import struct
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from cpr.linux import syscalls as sc
from cpr.linux.credentials import set_credentials

if TYPE_CHECKING:
    from collections.abc import Callable

SOCKET = 3
HEADER = struct.Struct("=II")
"""Bytes of JSON, number of descriptors."""
CHUNK = 64
"""Descriptors in one message; the kernel allows 253 (SCM_MAX_FD)."""

FATAL = frozenset(
    {"session", "descriptors", "cgroup", "namespaces", "root", "cwd", "security label", "credentials",
     "no_new_privs", "executable", "exec"}
)  # fmt: skip
"""Steps that end the launch when they fail; all others are reported as unmet, and the program runs."""

JOIN_ORDER = (
    ("cgroup", sc.CLONE_NEWCGROUP),
    ("ipc", sc.CLONE_NEWIPC),
    ("uts", sc.CLONE_NEWUTS),
    ("net", sc.CLONE_NEWNET),
    ("pid", sc.CLONE_NEWPID),
    ("time", sc.CLONE_NEWTIME),
    ("mnt", sc.CLONE_NEWNS),
)


class StepError(Exception):
    """A step that must not fail did."""

    def __init__(self, step: str, number: int, text: str) -> None:
        super().__init__(step, number, text)
        self.step = step
        self.number = number
        self.text = text


class Launcher:
    """One launch. `spec` is what launch.py sent; `fds` the descriptors it refers to by index."""

    def __init__(self, sock: socket.socket, spec: dict[str, Any], fds: list[int]) -> None:
        self.sock = sock
        self.spec = spec
        self.fds = fds
        self.unmet: list[str] = []
        self.forked = False
        """Our parent is the first helper, which has ended or is about to."""

    def run(self) -> NoReturn:
        spec = self.spec
        self.step("session", os.setsid)
        self.step("descriptors", self.place_descriptors)
        self.step("cgroup", self.enter_cgroups)
        self.step("oom_score_adj", self.set_oom_score_adj)
        waiting = self.step("namespaces", self.join, dict(spec["namespaces"]), False)
        self.step("affinity", os.sched_setaffinity, 0, spec["affinity"])
        self.step("scheduling", self.set_scheduling)
        self.step("ioprio", sc.ioprio_set, sc.IOPRIO_WHO_PROCESS, 0, spec["ioprio"])
        for name, (_, hard) in spec["limits"].items():
            self.step(name, set_hard_limit, name, hard)
        self.step("namespaces", self.join, waiting, True)
        self.step("root", self.change_root)
        there = self.change_directory(True)
        os.umask(spec["umask"])
        self.step("security label", self.set_security_label)
        self.unmet += self.step("credentials", set_credentials, spec)
        if not there:
            self.change_directory(False)
        if spec["no_new_privs"]:
            self.step("no_new_privs", sc.prctl, sc.PR_SET_NO_NEW_PRIVS, 1)
        elif sc.prctl(sc.PR_GET_NO_NEW_PRIVS):
            self.unmet.append("no_new_privs: it is set here and cannot be taken back")
        self.step("executable", self.check_executable)
        for name, (soft, _) in spec["limits"].items():
            self.step(name, set_soft_limit, name, soft)
        reset_signals(spec["ignored"])
        if spec["ends_with_us"] and not self.forked:
            self.step("parent", sc.prctl, sc.PR_SET_PDEATHSIG, signal.SIGKILL)
        self.say({"unmet": self.unmet})  # who asked for it has died: EPIPE, and nothing is executed
        arguments = [os.fsencode(a) for a in spec["argv"]]
        environ = [os.fsencode(e) for e in spec["environ"]]
        self.step("exec", sc.execve, os.fsencode(spec["executable"]), arguments, environ)
        raise AssertionError("execve returned")

    def step(self, name: str, do: Callable[..., Any], *arguments: Any) -> Any:
        """Do it. What fails is fatal, or is noted."""
        try:
            return do(*arguments)
        except OSError as error:
            number, text = error.errno or errno.EIO, error.strerror or str(error)
            if error.filename:
                text += f": {os.fsdecode(error.filename)}"
            if name in FATAL:
                raise StepError(name, number, text) from None
            if not any(line.startswith(f"{name}: ") for line in self.unmet):
                self.unmet.append(f"{name}: {text}")
            return None

    def say(self, message: dict[str, Any]) -> None:
        self.sock.sendall(json.dumps(message).encode() + b"\n")

    # descriptors ---------------------------------------------------------------------------------------------

    def place_descriptors(self) -> None:
        """Everything out of the way of the wanted numbers, then each to its number; what else is open is closed."""
        wanted: dict[int, int] = {int(number): index for number, index in self.spec["descriptors"]}
        targets = {0, 1, 2, *wanted}
        self.fds = [out_of_the_way(fd, targets) for fd in self.fds]
        self.sock = socket.socket(fileno=out_of_the_way(self.sock.detach(), targets))
        null = out_of_the_way(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC), targets)
        for number in sorted(targets):
            os.dup2(self.fds[wanted[number]] if number in wanted else null, number, inheritable=True)
        os.close(null)
        ours = {*self.fds, self.sock.fileno()}
        for number in [int(name) for name in os.listdir("/proc/self/fd")]:
            if number not in ours and number not in targets:
                try:
                    os.close(number)
                except OSError:  # the one that listed them
                    pass
        for fd in ours:
            os.set_inheritable(fd, False)

    # surroundings --------------------------------------------------------------------------------------------

    def enter_cgroups(self) -> None:
        for directory in self.spec["cgroups"]:
            write(os.path.join(directory, "cgroup.procs"), b"0")

    def set_oom_score_adj(self) -> None:
        write("/proc/self/oom_score_adj", str(self.spec["oom_score_adj"]).encode())

    def set_scheduling(self) -> None:
        sc.sched_setattr(0, *self.spec["scheduling"])

    def join(self, wanted: dict[str, int], last: bool) -> dict[str, int]:
        """Join namespaces, {name: index of its descriptor}; returns those that need the user namespace first.

        One that belongs to another user namespace can be joined only by who has CAP_SYS_ADMIN in that; one of ours
        only before we leave ours. So both are tried, and the user namespace is joined in between.
        """
        if last and "user" in wanted:
            self.setns("user", wanted.pop("user"), sc.CLONE_NEWUSER)
        left = {}
        for name, kind in JOIN_ORDER:
            if name not in wanted:
                continue
            try:
                self.setns(name, wanted[name], kind)
            except PermissionError:
                if last or "user" not in wanted:
                    raise
                left[name] = wanted[name]
                continue
            if name == "pid":
                self.fork()
        if "user" in wanted:
            left["user"] = wanted["user"]
        return left

    def setns(self, name: str, index: int, kind: int) -> None:
        try:
            sc.setns(self.fds[index], kind)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}, joining {name}") from None

    def fork(self) -> None:
        """Go on as a child, the first of us that is inside the pid namespace, with the same parent as ours."""
        try:
            pid = sc.clone3(sc.CLONE_PARENT, 0)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.EPERM):
                raise
            pid = os.fork()  # a container's seccomp filter, or we are the first of a namespace ourselves
            self.forked = True
        if pid:
            self.say({"pid": pid})
            os._exit(0)

    def change_root(self) -> None:
        root = self.fds[self.spec["root"]]
        wanted, now = os.fstat(root), os.stat("/")
        if (wanted.st_dev, wanted.st_ino) != (now.st_dev, now.st_ino):
            os.fchdir(root)
            os.chroot(".")

    def change_directory(self, retry: bool) -> bool:
        """Into the very directory, by descriptor. False: try later, as it may be closed to root and open to the
        user whom we become (NFS)."""
        try:
            self.step("cwd", os.fchdir, self.fds[self.spec["cwd"]])
        except StepError as error:
            if retry and error.number == errno.EACCES:
                return False
            raise
        return True

    def set_security_label(self) -> None:
        """AppArmor labels end with their mode in brackets; all others are taken as SELinux's."""
        label = self.spec["security_label"]
        if label is None:
            return
        proc = self.fds[self.spec["proc"]]
        name, bracket, _ = label.rpartition(" (")
        if bracket:
            try:
                write("self/attr/apparmor/exec", f"exec {name}".encode(), dir_fd=proc)
            except FileNotFoundError:  # before kernel 5.8
                write("self/attr/exec", f"exec {name}".encode(), dir_fd=proc)
        else:
            write("self/attr/exec", os.fsencode(label), dir_fd=proc)

    def check_executable(self) -> None:
        """The path leads to the very file, as seen from here (mount namespace, root, user)."""
        path, identity = self.spec["executable"], self.spec["identity"]
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
        finally:
            os.close(fd)
        if identity is not None and [status.st_dev, status.st_ino] != identity:
            raise StepError("executable-not-the-same", errno.ESTALE, f"{path} is another file there")


def set_hard_limit(name: str, hard: int) -> None:
    """The hard limit while we may still raise it; the soft one stays, as low ones would hamper ourselves."""
    number = RLIMITS[name] if name in RLIMITS else getattr(resource, name)
    soft_now, hard_now = resource.getrlimit(number)
    if hard == hard_now:
        return
    infinity = resource.RLIM_INFINITY
    low = hard if soft_now == infinity or (hard != infinity and soft_now > hard) else soft_now
    try:
        resource.setrlimit(number, (low, hard))
    except (PermissionError, ValueError):
        raise OSError(
            errno.EPERM, f"hard limit {hard} wanted, {hard_now} had, and no right to raise it"
        ) from None


def set_soft_limit(name: str, soft: int) -> None:
    number = RLIMITS[name] if name in RLIMITS else getattr(resource, name)
    soft_now, hard_now = resource.getrlimit(number)
    infinity = resource.RLIM_INFINITY
    if hard_now != infinity and (soft == infinity or soft > hard_now):
        soft = hard_now
    if soft != soft_now:
        resource.setrlimit(number, (soft, hard_now))


RLIMITS = {"RLIMIT_LOCKS": 10}
"""Those that Python's `resource` lacks."""


def out_of_the_way(fd: int, targets: set[int]) -> int:
    """The descriptor, or a close-on-exec duplicate of it, at a number that nobody wants. The old one is closed."""
    passed = []
    while fd in targets:
        passed.append(fd)
        fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, SOCKET)
    for number in passed:
        os.close(number)
    return fd


def write(path: str, data: bytes, *, dir_fd: int | None = None) -> None:
    """One write(2), as control files want it. OSError bears the path."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=dir_fd)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None


def reset_signals(ignored: int) -> None:
    """What Python, and our caller's caller, ignore or block would be inherited; what is to be ignored is a mask."""
    for number in signal.valid_signals():
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            try:
                signal.signal(number, signal.SIG_IGN if ignored >> (number - 1) & 1 else signal.SIG_DFL)
            except (OSError, ValueError):
                pass
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    size, count = HEADER.unpack(receive_exactly(sock, HEADER.size))
    fds: list[int] = []
    while len(fds) < count:
        _, got, flags, _ = socket.recv_fds(sock, 1, CHUNK)
        if not got or flags & socket.MSG_CTRUNC:
            raise OSError(errno.EMFILE, "descriptors were lost on the way")
        fds += got
    return json.loads(receive_exactly(sock, size)), fds


def receive_exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = sock.recv(min(size - len(data), 1 << 16))
        if not part:
            sys.exit("the caller went away")
        data += part
    return bytes(data)


def main() -> NoReturn:
    os.set_inheritable(SOCKET, False)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sock = socket.socket(fileno=SOCKET)
    spec, fds = receive(sock)
    launcher = Launcher(sock, spec, fds)
    try:
        launcher.run()
    except StepError as error:
        launcher.say({"step": error.step, "errno": error.number, "text": error.text})
    except Exception as error:
        launcher.say({"step": "launcher", "errno": errno.EIO, "text": f"{type(error).__name__}: {error}"})
    os._exit(127)


if __name__ == "__main__":
    main()
