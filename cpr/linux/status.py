"""/proc/PID/status and /proc/PID/stat: ids, credentials, capabilities, state, start time.

Out of scope: comparing them.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpr.linux import procfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """/proc/PID/status. uids and gids: real, effective, saved, file system. Capabilities as bit masks."""

    name: str
    state: str
    """One letter: R, S, D, T, t, Z, X, I."""
    ppid: int
    tracer: int
    """Pid of the ptracer, 0 for none."""
    umask: int | None
    """None of a zombie."""
    uids: tuple[int, int, int, int]
    gids: tuple[int, int, int, int]
    groups: tuple[int, ...]
    threads: int
    ns_pids: tuple[int, ...]
    """The pid in our pid namespace, then in each inner one."""
    rss: int
    """Bytes; 0 of a kernel thread and a zombie."""
    inheritable: int
    permitted: int
    effective: int
    bounding: int
    ambient: int
    no_new_privs: bool
    seccomp: int
    """0 off, 1 strict, 2 filter."""
    seccomp_filters: int | None
    """How many filters (kernel 5.9), None where not told."""
    ignored: int
    """Mask of ignored signals, bit n-1 for signal n."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stat:
    """The fields of /proc/PID/stat that are used."""

    pid: int
    comm: str
    state: str
    ppid: int
    process_group: int
    session: int
    tty: int
    """Device number of the controlling terminal, 0 for none."""
    start_time: int
    """Clock ticks (sysconf SC_CLK_TCK) since boot, as our own time namespace counts."""
    user_time: int
    """Clock ticks spent in user mode, those of a nested guest included."""


def parse_stat(text: str) -> Stat:
    """Parse /proc/PID/stat, whose second field may contain anything, blanks, brackets and newlines too.

    Raises:
        ValueError: it is cut short or no such file.
    """
    head, bracket, tail = text.rpartition(")")
    pid, opening, comm = head.partition(" (")
    fields = tail.split()
    if not bracket or not opening or len(fields) < 20:
        raise ValueError(f"not /proc/PID/stat: {text[:80]!r}")
    return Stat(
        pid=int(pid),
        comm=comm,
        state=fields[0],
        ppid=int(fields[1]),
        process_group=int(fields[2]),
        session=int(fields[3]),
        tty=int(fields[4]),
        start_time=int(fields[19]),
        user_time=int(fields[11]),
    )


def read_stat(pid: int) -> Stat:
    """Of a process, or of a thread by its tid. Raises ProcessLookupError."""
    return parse_stat(procfile.read_text(pid, "stat"))


def process_start_time(pid: int) -> int:
    """When it was started: clock ticks since boot (field 22 of stat). Raises ProcessLookupError."""
    return read_stat(pid).start_time


def _four(text: str) -> tuple[int, int, int, int]:
    real, effective, saved, fs = (int(word) for word in text.split())
    return real, effective, saved, fs


def parse_status(text: str) -> Status:
    """Parse /proc/PID/status.

    Raises:
        ValueError: a line that every kernel since 4.10 writes is missing or damaged.
    """
    lines: dict[str, str] = {}
    for line in text.split("\n"):
        key, colon, value = line.partition(":")
        if colon and key not in lines:
            lines[key] = value.strip()
    try:
        return Status(
            name=lines["Name"],
            state=lines["State"][:1],
            ppid=int(lines["PPid"]),
            tracer=int(lines["TracerPid"]),
            umask=int(lines["Umask"], 8) if "Umask" in lines else None,
            uids=_four(lines["Uid"]),
            gids=_four(lines["Gid"]),
            groups=tuple(int(word) for word in lines["Groups"].split()),
            threads=int(lines["Threads"]),
            ns_pids=tuple(int(word) for word in lines.get("NSpid", lines["Pid"]).split()),
            rss=int(lines.get("VmRSS", "0").split()[0]) * 1024,
            inheritable=int(lines["CapInh"], 16),
            permitted=int(lines["CapPrm"], 16),
            effective=int(lines["CapEff"], 16),
            bounding=int(lines["CapBnd"], 16),
            ambient=int(lines.get("CapAmb", "0"), 16),
            no_new_privs=lines.get("NoNewPrivs", "0") != "0",
            seccomp=int(lines.get("Seccomp", "0")),
            seccomp_filters=int(lines["Seccomp_filters"]) if "Seccomp_filters" in lines else None,
            ignored=int(lines["SigIgn"], 16),
        )
    except KeyError as error:
        raise ValueError(f"no {error.args[0]} in /proc/PID/status") from None
    except IndexError:
        raise ValueError("/proc/PID/status is damaged") from None


def read_status(pid: int) -> Status:
    """Of a process, or of a thread by its tid. Raises ProcessLookupError."""
    return parse_status(procfile.read_text(pid, "status"))


def parent_of(pid: int) -> int:
    """Its parent's pid, 0 where that lies outside our pid namespace. Raises ProcessLookupError."""
    return read_stat(pid).ppid


def is_stopped(pid: int) -> bool:
    """By SIGSTOP, or for its tracer. Raises ProcessLookupError."""
    return read_stat(pid).state in ("T", "t")


def is_zombie(pid: int) -> bool:
    """Ended, but not reaped. Raises ProcessLookupError where it is reaped too."""
    return read_stat(pid).state in ("Z", "X", "x")
