"""Starting a program in the likeness of a process: what is wanted is worked out here, and done by launcher.py.

The new process is our child, is in the cgroups before it execs, and never has a privilege that the likeness lacks.
All that it needs of the old process (directories, namespaces) is held by descriptor before the helper starts.

Out of scope: what the program is and which arguments it gets.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpr.linux import cgroup, launcher, proc, procfile
from cpr.linux.fds import Fd, open_pidfd
from cpr.linux.ours import PACKAGE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from cpr.linux.traits import Likeness

_PROGRAM = "from cpr.linux.launcher import main; main()"
"""Not `-m`, whose machinery alone takes as long to import as all else that the helper needs."""

_ABOVE = 10
"""What the helper gets is first moved above the numbers that posix_spawn's file actions write to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """A program that was exec'ed. `unmet` says what of the likeness could not be had: "<aspect>: <why>"."""

    pid: int
    pidfd: Fd
    start_time: int
    """Clock ticks since boot."""
    unmet: tuple[str, ...]


class LaunchError(OSError):
    """Nothing runs: `step` says where it ended (launcher.FATAL, "executable-not-the-same", "launcher")."""

    def __init__(self, step: str, number: int, text: str) -> None:
        super().__init__(number, f"{step}: {text}")
        self.step = step
        self.text = text


def launch(
    likeness: Likeness,
    *,
    argv: Sequence[str],
    environ: Iterable[tuple[str, str]],
    executable: tuple[str, tuple[int, int] | None],
    descriptors: Mapping[int, int | Fd] | None = None,
    stdin: int | Fd | None = None,
    stdout: int | Fd | None = None,
    stderr: int | Fd | None = None,
    mark: tuple[str, str] | None = None,
    ends_with_us: bool = False,
    places: Places | None = None,
    timeout: float = 30.0,
) -> Launched:
    """Start a program in a likeness, as our child; wait (at most `timeout` seconds) until it is exec'ed.

    `executable` is its path, as seen in the likeness's mount namespace and root, and its (st_dev, st_ino); None is
    believed as it is. `descriptors` are {number there: our descriptor}; 0, 1 and 2 may be among them, or given as
    `stdin`, ..., and are /dev/null if nobody names them. Everything else of ours is closed there.

    `mark` is a variable that the helper has in its environment from its first moment, so that it can be found before
    it is the program. `ends_with_us`: the kernel kills the program when the calling thread ends (not through exec of a
    set-user-id program, and not where a container refuses CLONE_PARENT).

    The likeness's process, if it still lives, gives working directory, root and namespaces, unless they were taken of
    it earlier (`places`); if it does not, the directory is found by its path, and a namespace that is not ours is an
    error.

    Raises:
        LaunchError: nothing runs.
    """
    standard = {0: stdin, 1: stdout, 2: stderr}
    wanted = {**(descriptors or {}), **{n: fd for n, fd in standard.items() if fd is not None}}
    until = time.monotonic() + timeout
    with contextlib.ExitStack() as held:
        if places is None:
            places = Places(likeness)
            held.callback(places.close)
        spec, numbers = _spec(likeness, wanted, places, held)
        spec |= {
            "argv": list(argv),
            "environ": [f"{name}={value}" for name, value in environ],
            "executable": executable[0],
            "identity": list(executable[1]) if executable[1] is not None else None,
            "ends_with_us": ends_with_us,
        }
        here, said, pid = _spawn(held, dict([mark] if mark else []))
        helper = held.enter_context(open_pidfd(pid))
        messages: list[dict[str, Any]] = []
        try:
            _send(here, spec, numbers, until)
            for message in _replies(here, until):
                messages.append(message)
        except BaseException as error:
            _end(pid, helper)
            for forked in [m["pid"] for m in messages if "pid" in m]:
                with open_pidfd(forked) as pidfd:
                    _end(forked, pidfd)
            if isinstance(error, TimeoutError):
                raise LaunchError("launcher", errno.ETIMEDOUT, f"not done within {timeout:g} s") from None
            raise
        return _result(likeness, messages, pid, helper, said)


class Places:
    """Directories, namespaces and id maps of a process, held by descriptor: with them it can be imitated after its end.

    Raises:
        LaunchError: it is gone and was in a namespace that we are not in, or it may not be looked into.
    """

    def __init__(self, likeness: Likeness) -> None:
        lives = _lives(likeness)
        process = f"/proc/{likeness.pid}"
        directory = os.O_PATH | os.O_DIRECTORY
        ours = proc.namespaces(os.getpid())
        differing = [n for n in likeness.namespaces if n in ours and likeness.namespaces[n] != ours[n]]
        if differing and not lives:
            raise LaunchError(
                "namespaces", errno.ESRCH, f"nobody is left in its {', '.join(differing)} namespace"
            )
        with contextlib.ExitStack() as held:

            def hold(step: str, path: str, flags: int) -> Fd:
                try:
                    return held.enter_context(Fd(os.open(path, flags | os.O_CLOEXEC)))
                except OSError as error:
                    raise LaunchError(step, error.errno or 0, f"{error.strerror}: {path}") from None

            self.cwd = hold("cwd", f"{process}/cwd" if lives else likeness.cwd, directory)
            self.root = hold("root", f"{process}/root" if lives else likeness.root, directory)
            self.namespaces = {
                name: hold("namespaces", f"{process}/ns/{name}", os.O_RDONLY) for name in differing
            }
            for name, fd in self.namespaces.items():
                found = os.fstat(fd.number)
                if (found.st_dev, found.st_ino) != likeness.namespaces[name]:
                    raise LaunchError("namespaces", errno.ESTALE, f"pid {likeness.pid} left its {name} namespace")
            self.id_maps = ("", "")
            """/proc/PID/uid_map and gid_map, where it is in another user namespace."""
            if "user" in differing:
                self.id_maps = (
                    procfile.read_text(likeness.pid, "uid_map"),
                    procfile.read_text(likeness.pid, "gid_map"),
                )
            held.pop_all()

    def close(self) -> None:
        """Let go. Safe to repeat."""
        for fd in (self.cwd, self.root, *self.namespaces.values()):
            fd.close()


def _spec(
    likeness: Likeness, wanted: Mapping[int, int | Fd], places: Places, held: contextlib.ExitStack
) -> tuple[dict[str, Any], list[int]]:
    """The message to the helper, and the descriptors it names by index; those we open are closed by `held`."""
    numbers = [fd.number if isinstance(fd, Fd) else fd for fd in wanted.values()]

    def send(fd: Fd) -> int:
        numbers.append(fd.number)
        return len(numbers) - 1

    try:
        proc_directory = held.enter_context(Fd(os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)))
    except OSError as error:
        raise LaunchError("launcher", error.errno or 0, f"{error.strerror}: /proc") from None
    spec: dict[str, Any] = {
        "descriptors": list(zip(wanted, range(len(wanted)), strict=True)),
        "cgroups": _cgroup_directories(likeness),
        "cwd": send(places.cwd),
        "root": send(places.root),
        "proc": send(proc_directory),
        "namespaces": [(name, send(fd)) for name, fd in places.namespaces.items()],
    }
    spec |= _credentials(likeness, places)
    label = likeness.security_label
    spec["security_label"] = None if label == proc.security_label(os.getpid()) else label
    s = likeness.scheduling
    spec |= {
        "umask": likeness.umask,
        "oom_score_adj": likeness.oom_score_adj,
        "affinity": sorted(likeness.affinity),
        "scheduling": [s.policy, int(s.reset_on_fork), s.nice, s.priority, s.runtime, s.deadline, s.period],
        "ioprio": likeness.ioprio,
        "limits": {name: list(values) for name, values in likeness.limits.items()},
        "no_new_privs": likeness.no_new_privs,
        "ignored": likeness.ignored,
    }
    return spec, numbers


def _lives(likeness: Likeness) -> bool:
    try:
        return proc.process_start_time(likeness.pid) == likeness.start_time and not proc.is_zombie(
            likeness.pid
        )
    except ProcessLookupError:
        return False


def _cgroup_directories(likeness: Likeness) -> list[str]:
    """Those that we are not in already."""
    ours = {(c.controllers, c.unified): c.path for c in proc.cgroups(os.getpid())}
    mounts = cgroup.own_mounts()
    directories = []
    for entry in likeness.cgroups:
        if ours.get((entry.controllers, entry.unified)) == entry.path:
            continue
        directory = cgroup.locate(entry, mounts)
        if directory is None:
            which = ",".join(entry.controllers) or "v2"
            raise LaunchError(
                "cgroup", errno.ENOENT, f"{entry.path} of the hierarchy {which} is not mounted here"
            )
        directories.append(directory)
    return directories


def _credentials(likeness: Likeness, places: Places) -> dict[str, Any]:
    """Ids as they are called inside the user namespace that is going to be joined."""
    other_user_namespace = "user" in places.namespaces
    uid_map, gid_map = map(parse_id_map, places.id_maps)

    def inside(ids: Iterable[int], id_map: list[tuple[int, int, int]]) -> list[int]:
        if not other_user_namespace:
            return list(ids)
        found = []
        for number in ids:
            rows = [(i, o) for i, o, size in id_map if o <= number < o + size]
            if not rows:
                raise LaunchError(
                    "credentials", errno.EINVAL, f"id {number} has no place in its user namespace"
                )
            found.append(number - rows[0][1] + rows[0][0])
        return found

    return {
        "uids": inside(likeness.uids, uid_map),
        "gids": inside(likeness.gids, gid_map),
        "groups": inside(likeness.groups, gid_map),
        "inheritable": likeness.inheritable,
        "permitted": likeness.permitted,
        "effective": likeness.effective,
        "bounding": likeness.bounding,
        "ambient": likeness.ambient,
        "securebits": likeness.securebits,
    }


def parse_id_map(text: str) -> list[tuple[int, int, int]]:
    """(first inside, first outside, how many) of /proc/PID/uid_map or gid_map; outside is as its reader sees it."""
    rows = (line.split() for line in text.split("\n"))
    return [(int(row[0]), int(row[1]), int(row[2])) for row in rows if len(row) == 3]


def _spawn(held: contextlib.ExitStack, marks: Mapping[str, str]) -> tuple[socket.socket, Fd, int]:
    """Start the helper: our end of its socket, the memfd that is its standard error, its pid."""
    here, there = socket.socketpair()
    held.enter_context(here)
    said = held.enter_context(Fd(os.memfd_create("cpr-launcher", os.MFD_CLOEXEC)))
    environ = {k: os.environ[k] for k in ("LD_LIBRARY_PATH", "PYTHONHOME") if k in os.environ}
    with there, _above(there.fileno()) as far, _above(said.number) as errors:
        try:
            pid = os.posix_spawn(
                sys.executable,
                [sys.executable, "-S", "-s", "-P", "-c", _PROGRAM],
                {**environ, **marks, "PYTHONPATH": PACKAGE, "PYTHONDONTWRITEBYTECODE": "1"},
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),
                    (os.POSIX_SPAWN_DUP2, errors.number, 2),
                    (os.POSIX_SPAWN_DUP2, far.number, launcher.SOCKET),
                ],
                setsigmask=[],
            )
        except OSError as error:
            raise LaunchError("launcher", error.errno or 0, f"{error.strerror}: {sys.executable}") from None
    return here, said, pid


def _above(number: int) -> Fd:
    return Fd(fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, _ABOVE))


def _send(sock: socket.socket, spec: dict[str, Any], numbers: list[int], until: float) -> None:
    """EPIPE is no error here: why the helper is gone shows in its answer, or in its end."""
    data = json.dumps(spec).encode()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        _wait(sock, until)
        sock.sendall(launcher.HEADER.pack(len(data), len(numbers)))
        for first in range(0, len(numbers), launcher.CHUNK):
            socket.send_fds(sock, [b"\0"], numbers[first : first + launcher.CHUNK])
        sock.sendall(data)


def _wait(sock: socket.socket, until: float) -> None:
    sock.settimeout(max(0.001, until - time.monotonic()))


def _replies(sock: socket.socket, until: float) -> Iterator[dict[str, Any]]:
    """Everything that the helper says until its end of the socket is closed: by exec, or with its life."""
    data = b""
    while True:
        _wait(sock, until)
        try:
            part = sock.recv(65536)
        except ConnectionResetError:
            part = b""
        if not part:
            return
        *lines, data = (data + part).split(b"\n")
        yield from map(json.loads, lines)


def _end(pid: int, pidfd: Fd) -> int:
    """Kill and reap. Returns the wait status."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd.number, signal.SIGKILL)
    return _reap(pid)


def _reap(pid: int) -> int:
    with contextlib.suppress(ChildProcessError):
        return os.waitpid(pid, 0)[1]
    return 0


def _result(likeness: Likeness, messages: list[dict[str, Any]], pid: int, helper: Fd, said: Fd) -> Launched:
    final = next((m["pid"] for m in messages if "pid" in m), None)
    error = next((m for m in messages if "step" in m), None)
    ready = next((m for m in messages if "unmet" in m), None)
    if final is not None:  # in a pid namespace: the helper forked and ended
        _reap(pid)
        pid = final
        pidfd = open_pidfd(pid)
    else:
        pidfd = helper.dup()
    if error is not None or ready is None:
        status = _end(pid, pidfd) if error is None else _reap(pid)
        pidfd.close()
        if error is not None:
            raise LaunchError(error["step"], error["errno"], error["text"])
        words = os.pread(said.number, 4096, max(0, os.fstat(said.number).st_size - 4096)).decode(
            errors="replace"
        )
        raise LaunchError("launcher", errno.ECHILD, f"it died (wait status {status}): {words.strip()}")
    gained = _gained(likeness, pid)
    if gained:
        _end(pid, pidfd)
        pidfd.close()
        raise LaunchError("credentials", errno.EPERM, f"the program was killed because it gained {gained}")
    start_time = proc.process_start_time(pid)
    return Launched(pid=pid, pidfd=pidfd, start_time=start_time, unmet=tuple(ready["unmet"]))


def _gained(likeness: Likeness, pid: int) -> str:
    """What exec gave it beyond the likeness: set-user-id and file capabilities of the program."""
    try:
        now = proc.read_status(pid)
    except ProcessLookupError:
        return ""
    if now.state in ("Z", "X"):
        return ""
    capabilities = (now.permitted | now.effective | now.ambient) & ~(likeness.permitted | likeness.effective)
    if capabilities:
        return f"capabilities {capabilities:#x}"
    for kind, before, after in (("uid", likeness.uids, now.uids), ("gid", likeness.gids, now.gids)):
        if not set(after) <= set(before):
            return f"{kind} {', '.join(str(i) for i in sorted(set(after) - set(before)))}"
    return ""
