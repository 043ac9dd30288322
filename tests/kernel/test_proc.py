"""Facts of /proc, held against what we know of ourselves and of our children."""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import shutil
import socket
import tempfile
import threading

import pytest

from cpr.linux import proc, sockdiag
from cpr.linux import syscalls as sc
from tests.kernel.support import SLEEP, child, eventually, identity, kill, needs_namespaces

ME = os.getpid()


def test_ourselves() -> None:
    status = proc.read_status(ME)
    umask = os.umask(0o22)
    os.umask(umask)
    assert status.uids[:3] == os.getresuid()
    assert status.gids[:3] == os.getresgid()
    assert sorted(status.groups) == sorted(os.getgroups())
    assert status.umask == umask
    assert (status.effective, status.permitted, status.inheritable) == sc.capget()
    assert status.threads == len(proc.threads(ME))
    assert proc.parent_of(ME) == os.getppid()
    assert proc.cwd(ME) == os.getcwd()
    assert proc.affinity(ME) == os.sched_getaffinity(0)
    assert proc.scheduling(ME).nice == os.nice(0)
    assert proc.exe(ME).identity == identity("/proc/self/exe")
    assert proc.namespaces(ME)["net"] == identity("/proc/self/ns/net")
    for name, value in proc.limits(ME).items():
        if hasattr(resource, name):
            assert value == resource.getrlimit(getattr(resource, name)), name
    assert len(proc.boot_id()) == 36


def test_maps_know_a_shared_memfd() -> None:
    number = os.memfd_create("ram")
    os.truncate(number, 1 << 20)
    with mmap.mmap(number, 1 << 20):
        inode = os.fstat(number).st_ino
        (found,) = [m for m in proc.read_maps(ME) if m.inode == inode and m.path == "/memfd:ram"]
        assert (found.size, found.shared, found.deleted, found.perms) == (1 << 20, True, True, "rw-s")
    os.close(number)


def test_a_program_that_was_replaced_and_one_with_a_misleading_name() -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        for name in ("prog", "prog (deleted)"):
            program = os.path.join(directory, name)
            shutil.copy(SLEEP, program)
            with child(argv=(program, "1000")) as pid:
                facts = proc.exe(pid)
                assert (facts.path, facts.deleted, facts.identity) == (program, False, identity(program))
                os.unlink(program)
                shutil.copy(SLEEP, program)
                facts = proc.exe(pid)
                assert (facts.path, facts.deleted) == (program, True)
                assert facts.identity != identity(program)


def test_zombie() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    try:
        eventually(lambda: proc.is_zombie(pid))
        assert proc.read_argv(pid) == ()
        assert proc.read_status(pid).umask is None
        with pytest.raises((ProcessLookupError, FileNotFoundError)):
            proc.exe(pid)
        entry = next(e for e in proc.processes() if e.pid == pid)
        assert entry.zombie
        assert entry.argv == ()
        assert pid in proc.children(ME)
    finally:
        os.waitpid(pid, 0)


READERS = [
    proc.process_start_time, proc.read_maps, proc.read_status, proc.read_argv, proc.read_environ, proc.cwd, proc.root,
    proc.exe, proc.namespaces, proc.cgroups, proc.limits, proc.oom_score_adj, proc.affinity, proc.scheduling,
    proc.threads, proc.security_label, proc.read_net_unix, proc.read_net_tcp, proc.parent_of, proc.children,
    proc.is_zombie, proc.unit_of, proc.memory_room, proc.ioprio,
]  # fmt: skip


@pytest.mark.parametrize("reader", READERS, ids=lambda r: r.__name__)
def test_nobody_there(reader: object) -> None:
    with pytest.raises(ProcessLookupError):
        reader(2**22 - 1)  # type: ignore[operator]


@pytest.mark.parametrize("reader", READERS, ids=lambda r: r.__name__)
def test_vanishing_while_read(reader: object) -> None:
    """Read as fast as we can while the process dies: facts, or ProcessLookupError, or a zombie's lack of files."""
    for delay in (0.001, 0.003):
        pid = os.posix_spawn("/bin/sleep", ["sleep", "1000"], {})
        reaper = threading.Timer(delay, kill, (pid,))
        reaper.start()
        try:
            for _ in range(100_000):
                with contextlib.suppress(FileNotFoundError):
                    reader(pid)  # type: ignore[operator]
        except ProcessLookupError:
            pass
        reaper.join()
        assert not os.path.exists(f"/proc/{pid}")


def test_processes_lists_us_and_survives_races() -> None:
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(10):
            entries = {e.pid: e for e in proc.processes()}
            assert entries[ME].start_time == proc.process_start_time(ME)
            assert entries[ME].uid == os.geteuid()
    finally:
        stop.set()
        thread.join()


def unix_diag() -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sockdiag.unix_socket(os.fstat(sock.fileno()).st_ino)
        except OSError:
            return False
    return True


needs_unix_diag = pytest.mark.skipif(not unix_diag(), reason="no unix_diag here")


@needs_unix_diag
def test_backlog_of_a_unix_listener() -> None:
    with contextlib.ExitStack() as held, tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "sock et")
        listener = held.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(5)
        inode = os.fstat(listener.fileno()).st_ino
        assert proc.unix_backlog(inode) == 0
        for expected in (1, 2, 3):
            held.enter_context(socket.socket(socket.AF_UNIX)).connect(path)
            assert proc.unix_backlog(inode) == expected
        accepted = held.enter_context(listener.accept()[0])
        assert proc.unix_backlog(inode, ME) == 2
        by_inode = {s.inode: s for s in proc.read_net_unix(ME)}
        assert by_inode[inode] == proc.UnixSocket(
            inode=inode, path=path, type="stream", listening=True, connected=False
        )
        other = by_inode[os.fstat(accepted.fileno()).st_ino]
        assert (other.path, other.listening, other.connected) == (path, False, True)
        diag = sockdiag.unix_socket(inode)
        assert (diag.name, diag.state) == (path, 10)
        with pytest.raises(FileNotFoundError):
            proc.unix_backlog(1)


@needs_unix_diag
@needs_namespaces
def test_backlog_in_another_network_namespace() -> None:
    code = (
        "import socket,os,sys; l=socket.socket(socket.AF_UNIX); l.bind('\\0there'); l.listen(3);"
        "c=socket.socket(socket.AF_UNIX); c.connect('\\0there'); print(os.fstat(l.fileno()).st_ino, flush=True);"
        "sys.stdin.read()"
    )
    from tests.kernel.support import python

    with python(code, preexec_fn=lambda: sc.unshare(sc.CLONE_NEWNET)) as process:
        assert process.stdout is not None
        inode = int(process.stdout.readline())
        with pytest.raises(FileNotFoundError):
            proc.unix_backlog(inode)
        assert proc.unix_backlog(inode, process.pid) == 1
        assert identity("/proc/self/ns/net") == identity(f"/proc/{os.getppid()}/ns/net")
        assert [s.path for s in proc.read_net_unix(process.pid) if s.inode == inode] == ["@there"]


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_tcp_listener_and_its_backlog(family: int, host: str) -> None:
    with contextlib.ExitStack() as held:
        listener = held.enter_context(socket.socket(family))
        try:
            listener.bind((host, 0))
        except OSError:
            pytest.skip(f"no {host} here")
        listener.listen(5)
        port = listener.getsockname()[1]
        for _ in range(2):
            held.enter_context(socket.create_connection((host, port)))
        inode = os.fstat(listener.fileno()).st_ino
        found = next(s for s in proc.read_net_tcp(ME) if s.inode == inode)
        assert (found.local, found.state, found.backlog, found.family) == ((host, port), "LISTEN", 2, family)
        established = [s for s in proc.read_net_tcp(ME) if s.remote == (host, port)]
        assert {s.state for s in established} == {"ESTABLISHED"}


def test_thread_names() -> None:
    ready, done = threading.Event(), threading.Event()

    def named() -> None:
        sc.prctl(sc.PR_SET_NAME, _address(b"CPU 0/TCG\0"))
        ready.set()
        done.wait()

    thread = threading.Thread(target=named)
    thread.start()
    ready.wait()
    assert {t.tid: t.comm for t in proc.threads(ME)}[thread.native_id or 0] == "CPU 0/TCG"
    done.set()
    thread.join()


def _address(text: bytes) -> int:
    import ctypes

    _address.kept = ctypes.create_string_buffer(text)  # type: ignore[attr-defined]
    return ctypes.addressof(_address.kept)  # type: ignore[attr-defined]
