"""A program started in the likeness of a child of ours is like it, by /proc, and never more privileged."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

import pytest

from cpr.linux import cgroup, launcher, likeness, proc
from cpr.linux import syscalls as sc
from cpr.linux.capabilities import mask
from cpr.linux.fds import Fd, descriptor_table
from cpr.linux.likeness import LaunchError, Likeness, differences, likeness_of
from cpr.linux.process import Process, open_process
from tests.kernel.support import (
    FOREVER,
    SLEEP,
    can,
    child,
    eventually,
    identity,
    me,
    needs,
    needs_namespaces,
    needs_other_users,
    needs_user_namespaces,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


class Started(Process):
    unmet: tuple[str, ...] = ()


@contextlib.contextmanager
def started(like: Likeness, **changes: Any) -> Iterator[Started]:
    arguments: dict[str, Any] = {
        "argv": FOREVER, "environ": (("A", "1"),), "executable": (SLEEP, identity(SLEEP)), **changes
    }  # fmt: skip
    launched = likeness.launch(like, **arguments)
    process = Started.of(launched)
    process.unmet = launched.unmet
    try:
        yield process
    finally:
        process.kill()
        assert process.wait_dead(5)
        process.close()


def credentials(
    uid: int, gid: int, groups: list[int], *, caps: int = 0, ambient: int = 0, bounding: int | None = None,
    no_new_privs: bool = False,
) -> Any:  # fmt: skip
    """A preparation of a child: another user with capabilities, by the book, without our own code for it."""

    def prepare() -> None:
        os.setgroups(groups)
        os.setresgid(gid, gid, gid)
        if bounding is not None:
            for number in range(64):
                with contextlib.suppress(OSError):
                    if sc.prctl(sc.PR_CAPBSET_READ, number) and not bounding >> number & 1:
                        sc.prctl(sc.PR_CAPBSET_DROP, number)
        sc.prctl(sc.PR_SET_KEEPCAPS, 1)
        os.setresuid(uid, uid, uid)
        sc.capset(caps, caps, ambient)
        for number in range(64):
            if ambient >> number & 1:
                sc.prctl(sc.PR_CAP_AMBIENT, sc.PR_CAP_AMBIENT_RAISE, number)
        if no_new_privs:
            sc.prctl(sc.PR_SET_NO_NEW_PRIVS, 1)

    return prepare


def test_like_ourselves() -> None:
    like = me()
    with started(like) as new:
        assert new.unmet == ()
        assert differences(like, likeness_of(new.pid)) == ()
        assert proc.parent_of(new.pid) == os.getpid()
        assert new.start_time == proc.process_start_time(new.pid)
        assert proc.read_stat(new.pid).session == new.pid
        new.kill()
        assert new.wait_dead(5)
        assert new.status == -signal.SIGKILL


def test_odd_bytes_in_arguments_and_environment() -> None:
    argv = ("sh", "-c", "sleep 1000; :", "\udcff", "", 'q"\n')
    environ = (("ODD", "\udcfe=\n"), ("TWICE", "1"), ("TWICE", "2"), ("EMPTY", ""))
    shell = os.path.realpath("/bin/sh")
    with started(me(), argv=argv, environ=environ, executable=(shell, identity(shell))) as new:
        assert proc.read_argv(new.pid) == argv
        assert proc.read_environ(new.pid) == environ
        for pid in eventual_children(new.pid):
            os.kill(pid, signal.SIGKILL)


def eventual_children(pid: int) -> tuple[int, ...]:
    eventually(lambda: bool(proc.children(pid)))
    return proc.children(pid)


@needs_other_users
def test_another_user_without_capabilities() -> None:
    prepare = credentials(1234, 2345, [7, 9], bounding=mask("CAP_NET_ADMIN", "CAP_CHOWN"), no_new_privs=True)
    with child(prepare=prepare) as pid:
        like = likeness_of(pid)
        assert like.uids == (1234,) * 4
        assert like.groups == (7, 9)
        assert like.no_new_privs
        with started(like) as new:
            assert new.unmet == ()
            assert differences(like, likeness_of(new.pid)) == ()


@needs_other_users
def test_ambient_capabilities_of_another_user() -> None:
    ambient = mask("CAP_NET_ADMIN", "CAP_SYS_RAWIO")
    with child(prepare=credentials(1234, 2345, [2345], caps=ambient, ambient=ambient)) as pid:
        like = likeness_of(pid)
        assert like.effective == like.permitted == like.inheritable == like.ambient == ambient
        with started(like) as new:
            assert new.unmet == ()
            assert differences(like, likeness_of(new.pid)) == ()


@needs_other_users
def test_permitted_without_ambient_is_lost_at_exec_and_told() -> None:
    """As of a program that became another user by itself and kept capabilities."""
    some = mask("CAP_NET_ADMIN")
    like = dataclasses.replace(
        me(),
        uids=(1234,) * 4,
        gids=(1234,) * 4,
        groups=(1234,),
        permitted=some,
        effective=some,
        inheritable=0,
    )
    with started(like) as new:
        assert {line.partition(":")[0] for line in new.unmet} == {"permitted", "effective"}
        status = proc.read_status(new.pid)
        assert status.permitted == status.effective == status.ambient == 0
        assert differences(like, likeness_of(new.pid), unmet=new.unmet) == ()


@needs_other_users
def test_root_that_gave_up_capabilities_does_not_regain_them() -> None:
    """Exec gives root inheritable | bounding: a likeness with less permitted than that must not come back with more."""
    like = dataclasses.replace(me(), permitted=mask("CAP_CHOWN"), effective=0, inheritable=mask("CAP_KILL"))
    with started(like) as new:
        status = proc.read_status(new.pid)
        assert status.permitted == mask("CAP_CHOWN")
        assert status.bounding == mask("CAP_CHOWN")
        assert status.inheritable == 0
        assert "bounding" in {line.partition(":")[0] for line in new.unmet}
        assert differences(like, likeness_of(new.pid), unmet=new.unmet) == ()


@needs_other_users
def test_set_user_id_program_is_killed() -> None:
    """A program that would gain privileges is not left running."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        os.chmod(directory, 0o755)
        program = os.path.join(directory, "sleep")
        with open(SLEEP, "rb") as source, open(program, "wb") as copy:
            copy.write(source.read())
        os.chmod(program, 0o4755)
        if os.statvfs(directory).f_flag & os.ST_NOSUID:
            pytest.skip("set-user-id is not honoured there")
        like = dataclasses.replace(me(), uids=(1234,) * 4, permitted=0, effective=0, inheritable=0, ambient=0)
        with pytest.raises(LaunchError, match="gained") as caught:
            likeness.launch(like, argv=FOREVER, environ=(), executable=(program, identity(program)))
        assert caught.value.step == "credentials"


@needs_other_users
def test_no_right_to_become_that_user() -> None:
    def without_right() -> None:
        for name in ("CAP_SETUID", "CAP_SETGID"):
            sc.prctl(sc.PR_CAPBSET_DROP, mask(name).bit_length() - 1)
        like = me()
        for change in ({"uids": (1234,) * 4}, {"gids": (1234,) * 4}, {"groups": (1, 2, 3)}):
            with pytest.raises(LaunchError) as caught:
                likeness.launch(
                    dataclasses.replace(like, **change), argv=FOREVER, environ=(), executable=(SLEEP, None)
                )
            assert (caught.value.step, caught.value.errno) == ("credentials", 1)
            assert "no right" in str(caught.value)

    assert can(without_right)


def test_limits_niceness_affinity_umask_and_directory() -> None:
    with tempfile.TemporaryDirectory() as directory:
        cpu = min(os.sched_getaffinity(0))

        def prepare() -> None:
            os.chdir(directory)
            os.umask(0o027)
            os.nice(5)
            os.sched_setaffinity(0, {cpu})
            sc.ioprio_set(sc.IOPRIO_WHO_PROCESS, 0, 2 << 13 | 6)
            resource.setrlimit(resource.RLIMIT_NOFILE, (77, 99))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 4096))
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 8192))

        with child(prepare=prepare) as pid:
            like = likeness_of(pid)
            assert like.cwd == os.path.realpath(directory)
            assert like.umask == 0o027
            assert like.scheduling.nice == 5
            assert like.affinity == {cpu}
            assert like.limits["RLIMIT_NOFILE"] == (77, 99)
            with started(like) as new:
                assert new.unmet == ()
                assert differences(like, likeness_of(new.pid)) == ()
                assert proc.limits(new.pid) == like.limits


def test_batch_scheduling_that_is_reset_on_fork() -> None:
    def prepare() -> None:
        sc.sched_setattr(0, os.SCHED_BATCH, sc.SCHED_FLAG_RESET_ON_FORK, 3, 0, 0, 0, 0)

    with child(prepare=prepare) as pid:
        like = likeness_of(pid)
        assert like.scheduling.reset_on_fork
        with started(like) as new:
            assert proc.scheduling(new.pid) == like.scheduling


def test_a_deleted_working_directory() -> None:
    directory = tempfile.mkdtemp()
    with child(cwd=directory) as pid:
        os.rmdir(directory)
        like = likeness_of(pid)
        assert like.cwd.endswith(" (deleted)")
        with started(like) as new:
            assert proc.cwd(new.pid) == like.cwd
            assert differences(like, likeness_of(new.pid)) == ()


def test_the_likeness_of_a_dead_process_goes_by_paths() -> None:
    with tempfile.TemporaryDirectory() as directory, child(cwd=directory) as pid:
        like = likeness_of(pid)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: proc.is_zombie(pid))
        with started(like) as new:
            assert proc.cwd(new.pid) == os.path.realpath(directory)
    with pytest.raises(LaunchError) as caught:
        likeness.launch(like, argv=FOREVER, environ=(), executable=(SLEEP, None))
    assert caught.value.step == "cwd"


def test_a_hard_limit_that_cannot_be_raised_is_told() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if can(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard + 1))):
        pytest.skip("we may raise limits")
    like = me()
    like = dataclasses.replace(like, limits={**like.limits, "RLIMIT_NOFILE": (hard + 5, hard + 5)})
    with started(like) as new:
        assert [line.partition(":")[0] for line in new.unmet] == ["RLIMIT_NOFILE"]
        assert proc.limits(new.pid)["RLIMIT_NOFILE"] == (hard, hard)
        assert differences(like, likeness_of(new.pid))
        assert differences(like, likeness_of(new.pid), unmet=new.unmet) == ()


def test_oom_score_adj() -> None:
    like = dataclasses.replace(me(), oom_score_adj=321)
    with started(like) as new:
        assert proc.oom_score_adj(new.pid) == 321
    lower = dataclasses.replace(like, oom_score_adj=-1000)
    with started(lower) as new:
        if proc.oom_score_adj(new.pid) != -1000:
            assert [line.partition(":")[0] for line in new.unmet] == ["oom_score_adj"]


def test_signals_are_as_a_program_expects_them() -> None:
    """Whatever we ignore or block, and what Python does: the new program begins as its likeness."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        for ignored in (0, 1 << (signal.SIGQUIT - 1) | 1 << (signal.SIGTSTP - 1)):
            with started(dataclasses.replace(me(), ignored=ignored)) as new:
                with open(f"/proc/{new.pid}/status") as file:
                    lines = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
                beyond = (1 << 31) - 1  # 32 and 33 are libc's own; whoever started us may ignore those
                assert int(lines["SigIgn"], 16) & beyond == ignored
                assert int(lines["SigBlk"], 16) == 0
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        signal.signal(signal.SIGHUP, before)


# descriptors -----------------------------------------------------------------------------------------------------


def test_descriptors_at_exact_numbers_with_overlaps() -> None:
    """Targets that are each other's sources, that the launcher uses itself, and high ones."""
    with contextlib.ExitStack() as held:
        files = [held.enter_context(Fd(os.memfd_create(f"file{i}"))) for i in range(4)]
        numbers = [fd.number for fd in files]
        wanted = {
            numbers[0]: files[1],
            numbers[1]: files[0],
            3: files[2],
            4: files[3],
            5: files[2],
            150: files[3],
            1: files[0],
        }
        leak = held.enter_context(Fd(os.memfd_create("leak", 0)))
        os.set_inheritable(leak.number, True)
        with started(me(), descriptors=wanted, stderr=files[1]) as new:
            # the loader still opens and closes libraries at a free number
            eventually(lambda: {row.number for row in descriptor_table(new.pid)} == {0, 2, *wanted})
            table = {row.number: row for row in descriptor_table(new.pid)}
            for number, fd in {**wanted, 2: files[1]}.items():
                assert table[number].inode == os.fstat(fd.number).st_ino, number
                assert not table[number].close_on_exec
            assert table[0].target == "/dev/null"


def test_many_descriptors() -> None:
    """More than one message of descriptors holds."""
    count = launcher.CHUNK * 4 + 3
    with Fd(os.memfd_create("many")) as fd:
        wanted = dict.fromkeys(range(10, 10 + count), fd)
        with started(me(), descriptors=wanted) as new:
            eventually(lambda: len(descriptor_table(new.pid)) == count + 3)


def test_the_open_file_description_is_shared() -> None:
    with Fd(os.memfd_create("shared")) as fd:
        os.write(fd.number, b"hello")
        with started(me(), descriptors={7: fd}) as new:
            assert next(row.position for row in descriptor_table(new.pid) if row.number == 7) == 5
            os.lseek(fd.number, 2, os.SEEK_SET)
            assert next(row.position for row in descriptor_table(new.pid) if row.number == 7) == 2


def test_a_path_only_descriptor_and_a_listener_pass() -> None:
    with Fd(os.open("/", os.O_PATH)) as path, socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0cpr-test-launch" + str(os.getpid()))
        listener.listen(2)
        with started(me(), descriptors={8: path, 9: listener.fileno()}) as new:
            table = {row.number: row for row in descriptor_table(new.pid)}
            assert table[8].flags & os.O_PATH
            assert table[9].inode == os.fstat(listener.fileno()).st_ino


# namespaces and cgroups --------------------------------------------------------------------------------------------


@needs_namespaces
def test_mount_net_uts_and_ipc_namespaces() -> None:
    with tempfile.TemporaryDirectory() as directory:

        def prepare() -> None:
            sc.unshare(sc.CLONE_NEWNS | sc.CLONE_NEWNET | sc.CLONE_NEWUTS | sc.CLONE_NEWIPC)
            script = "mount --make-rprivate / && mount -t tmpfs none $1 && cp $2 $1/prog"
            subprocess.run(["sh", "-ec", script, "sh", directory, SLEEP], check=True)
            os.chdir(directory)

        with child(prepare=prepare) as pid:
            like = likeness_of(pid)
            program = os.path.join(directory, "prog")
            there = identity(f"/proc/{pid}/root{program}")
            assert not os.path.exists(program)
            with started(like, executable=(program, there)) as new:
                assert new.unmet == ()
                assert differences(like, likeness_of(new.pid)) == ()
                assert proc.exe(new.pid).identity == there
                assert proc.parent_of(new.pid) == os.getpid()
            with pytest.raises(LaunchError) as caught:
                likeness.launch(like, argv=FOREVER, environ=(), executable=(program, identity(SLEEP)))
            assert caught.value.step == "executable-not-the-same"


def _can_chroot() -> None:
    os.chroot("/")


@needs("chroot", _can_chroot)
def test_another_root() -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        static = _static_program(directory)

        def prepare() -> None:
            os.chdir(directory)
            os.chroot(".")

        with child(argv=(static, "1000"), prepare=prepare) as pid:
            like = likeness_of(pid)
            with started(
                like, argv=(static, "1000"), executable=(static, identity(directory + static))
            ) as new:
                assert new.unmet == ()
                assert differences(like, likeness_of(new.pid)) == ()
                assert proc.root(new.pid) == os.path.realpath(directory)


def _static_program(directory: str) -> str:
    """A program of nothing but pause(), as no library is in an empty root."""
    if os.uname().machine != "x86_64":
        pytest.skip("no such program for this machine at hand")
    code = bytes.fromhex("b8220000000f05ebf7")  # mov $34, %eax; syscall; jmp back
    import struct

    entry = 0x400078
    head = (
        b"\x7fELF\x02\x01\x01"
        + bytes(9)
        + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    )
    head += struct.pack("<IIQQQQQQ", 1, 5, 0, 0x400000, 0x400000, 0x78 + len(code), 0x78 + len(code), 0x1000)
    with open(os.path.join(directory, "pause"), "wb") as file:
        file.write(head + code)
    os.chmod(file.name, 0o755)
    return "/pause"


@needs_namespaces
def test_pid_namespace_and_still_our_child() -> None:
    def prepare() -> None:
        sc.unshare(sc.CLONE_NEWPID)

    # whom unshare(CLONE_NEWPID) puts there is the next child: a shell that forks
    with child(argv=("sh", "-c", "sleep 1000; :"), prepare=prepare) as shell:
        (first,) = eventual_children(shell)
        like = likeness_of(first)
        assert proc.read_status(first).ns_pids[1:] == (1,)
        with started(like) as new:
            assert new.unmet == ()
            assert differences(like, likeness_of(new.pid)) == ()
            assert len(proc.read_status(new.pid).ns_pids) == 2
            assert proc.parent_of(new.pid) == os.getpid()
            new.kill()
            assert new.wait_dead(5)
            assert new.status == -signal.SIGKILL
        with open_process(first) as process:
            process.kill()
            assert process.wait_dead(5)


def _unshare_time_and_cgroup() -> None:
    sc.unshare(sc.CLONE_NEWCGROUP | sc.CLONE_NEWTIME)


@needs("make time and cgroup namespaces", _unshare_time_and_cgroup)
def test_time_and_cgroup_namespaces() -> None:
    with child(prepare=_unshare_time_and_cgroup) as pid:
        like = likeness_of(pid)
        assert like.namespaces["cgroup"] != me().namespaces["cgroup"]
        with started(like) as new:
            assert new.unmet == ()
            assert differences(like, likeness_of(new.pid)) == ()


@needs_user_namespaces
@needs_namespaces
def test_user_namespace_and_one_that_belongs_to_it() -> None:
    # the maps are written by us from outside, so the child waits for them
    ready, go = os.pipe()

    def prepare() -> None:
        sc.unshare(sc.CLONE_NEWUSER | sc.CLONE_NEWNET)
        os.write(go, b"x")
        eventually(
            lambda: os.path.getsize("/proc/self/uid_map") >= 0 and bool(open("/proc/self/gid_map").read())
        )
        os.setgroups([5])
        os.setresgid(7, 7, 7)
        os.setresuid(6, 6, 6)

    import threading

    def write_maps() -> None:
        os.read(ready, 1)
        pid = max(p for p in proc.children(os.getpid()))
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{pid}/{name}", "w") as file:
                file.write("0 100000 1000")

    helper = threading.Thread(target=write_maps)
    helper.start()
    try:
        with child(prepare=prepare) as pid:
            helper.join()
            like = likeness_of(pid)
            assert like.uids == (100006,) * 4
            assert like.groups == (100005,)
            with started(like) as new:
                assert new.unmet == ()
                assert differences(like, likeness_of(new.pid)) == ()
    finally:
        os.close(ready)
        os.close(go)


def test_a_namespace_that_nobody_is_left_in() -> None:
    like = dataclasses.replace(me(), pid=2**22, namespaces={**me().namespaces, "net": (4, 1)})
    with pytest.raises(LaunchError) as caught:
        likeness.launch(like, argv=FOREVER, environ=(), executable=(SLEEP, None))
    assert caught.value.step == "namespaces"


@contextlib.contextmanager
def cgroup_below(controller: str) -> Iterator[tuple[cgroup.Cgroup, str]]:
    """A fresh cgroup below ours in the hierarchy of a controller (v1), or in that of v2 (no controller)."""
    entries = [
        e for e in proc.cgroups(os.getpid()) if (controller in e.controllers if controller else e.unified)
    ]
    if not entries:
        pytest.skip(f"no hierarchy of {controller or 'v2'}")
    try:
        directory = os.path.join(proc.cgroup_dir(entries[0]), f"cpr-test-{os.getpid()}-{time.monotonic_ns()}")
        os.mkdir(directory)
    except OSError as error:
        pytest.skip(f"no cgroup can be made: {error}")
    path = entries[0].path.rstrip("/") + "/" + os.path.basename(directory)
    try:
        yield dataclasses.replace(entries[0], path=path), directory
    finally:
        for sub, _, _ in os.walk(directory, topdown=False):
            eventually(lambda d=sub: can_remove(d))  # type: ignore[misc]


def can_remove(directory: str) -> bool:
    try:
        os.rmdir(directory)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


@pytest.mark.parametrize("controller", ["memory", "pids", "cpu", ""])
def test_cgroup_before_exec(controller: str) -> None:
    with cgroup_below(controller) as (entry, directory):

        def prepare() -> None:
            with open(os.path.join(directory, "cgroup.procs"), "w") as file:
                file.write("0")

        with child(prepare=prepare) as pid:
            like = likeness_of(pid)
            assert entry in like.cgroups
            with started(like) as new:
                assert new.unmet == ()
                assert differences(like, likeness_of(new.pid)) == ()
                assert proc.cgroup_dir(entry) == directory


def test_a_cgroup_that_is_gone_is_fatal() -> None:
    entries = proc.cgroups(os.getpid())
    if not entries:
        pytest.skip("no cgroups")
    like = me()
    gone = dataclasses.replace(entries[0], path=entries[0].path.rstrip("/") + "/cpr-test-gone")
    like = dataclasses.replace(like, cgroups=(gone, *like.cgroups[1:]))
    with pytest.raises(LaunchError) as caught:
        likeness.launch(like, argv=FOREVER, environ=(), executable=(SLEEP, None))
    assert caught.value.step == "cgroup"


def test_room_in_cgroups() -> None:
    with cgroup_below("pids") as (_, directory):
        with open(os.path.join(directory, "pids.max"), "w") as file:
            file.write("10")

        def prepare() -> None:
            with open(os.path.join(directory, "cgroup.procs"), "w") as procs:
                procs.write("0")

        with child(prepare=prepare) as pid:
            assert proc.pids_room(pid) == 9
    with cgroup_below("memory") as (entry, directory):
        name = "memory.max" if entry.unified else "memory.limit_in_bytes"
        with open(os.path.join(directory, name), "w") as file:
            file.write(str(64 << 20))

        def prepare_memory() -> None:
            with open(os.path.join(directory, "cgroup.procs"), "w") as procs:
                procs.write("0")

        with child(prepare=prepare_memory) as pid:
            room = proc.memory_room(pid)
            assert room is not None
            assert 32 << 20 < room <= 64 << 20


# failures ----------------------------------------------------------------------------------------------------------


def test_failures_name_their_step() -> None:
    with tempfile.NamedTemporaryFile("w", dir="/var/tmp", suffix=".sh") as script:
        script.write("no program\n")
        script.flush()
        cases: list[tuple[tuple[str, tuple[int, int] | None], str, int]] = [
            (("/nosuch", None), "executable", 2),
            ((SLEEP, (1, 2)), "executable-not-the-same", 116),
            ((script.name, None), "exec", 13),
        ]
        for executable, step, number in cases:
            with pytest.raises(LaunchError) as caught:
                likeness.launch(me(), argv=FOREVER, environ=(), executable=executable)
            assert (caught.value.step, caught.value.errno) == (step, number)


def test_a_program_that_ends_at_once_is_no_failure() -> None:
    true = os.path.realpath("/bin/true")
    launched = likeness.launch(me(), argv=("true",), environ=(), executable=(true, identity(true)))
    process = Process.of(launched)
    assert process.wait_dead(5)
    assert process.status == 0
    process.close()


def test_a_helper_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from cpr.linux import launch as module

    monkeypatch.setattr(module, "_PROGRAM", "raise SystemExit('broken installation')")
    with pytest.raises(LaunchError, match="broken installation") as caught:
        likeness.launch(me(), argv=FOREVER, environ=(), executable=(SLEEP, None))
    assert caught.value.step == "launcher"


def test_a_helper_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    from cpr.linux import launch as module

    monkeypatch.setattr(module, "_PROGRAM", "import time; time.sleep(100)")
    with pytest.raises(LaunchError) as caught:
        likeness.launch(me(), argv=FOREVER, environ=(), executable=(SLEEP, None), timeout=0.3)
    assert (caught.value.step, caught.value.errno) == ("launcher", 110)


def test_no_descriptor_of_ours_is_left_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with started(me()):
        pass
    with pytest.raises(LaunchError):
        likeness.launch(me(), argv=FOREVER, environ=(), executable=("/nosuch", None))
    assert len(os.listdir("/proc/self/fd")) == before


# threads -----------------------------------------------------------------------------------------------------------


def test_thread_placement_is_read_and_applied() -> None:
    from tests.kernel.support import python

    code = (
        "import threading, time, sys\n"
        "threading.Thread(target=time.sleep, args=(100,), daemon=True).start()\n"
        "print('x', flush=True); time.sleep(100)"
    )
    cpu = max(os.sched_getaffinity(0))
    with python(code) as process, cgroup_below("cpu") as (entry, directory):
        assert process.stdout is not None
        process.stdout.readline()
        main, other = likeness.thread_placement(process.pid)
        assert main.tid == process.pid
        with open(os.path.join(directory, "tasks"), "w") as file:
            file.write(str(other.tid))
        os.sched_setaffinity(other.tid, {cpu})
        os.setpriority(os.PRIO_PROCESS, other.tid, 4)
        main, other = likeness.thread_placement(process.pid)
        assert entry in other.cgroups
        assert entry not in main.cgroups
        likeness.apply_placement(main.tid, other)
        now = likeness.thread_placement(process.pid)[0]
        assert (now.affinity, now.scheduling, set(now.cgroups)) == (
            frozenset({cpu}),
            other.scheduling,
            set(other.cgroups),
        )
        process.kill()
        process.wait()
        with pytest.raises(ProcessLookupError):
            likeness.apply_placement(main.tid, other)


def test_threaded_cgroup_of_v2() -> None:
    with cgroup_below("") as (entry, directory):
        inner = os.path.join(directory, "vcpu0")
        os.mkdir(inner)
        try:
            with open(os.path.join(inner, "cgroup.type"), "w") as file:
                file.write("threaded")
        except OSError as error:
            pytest.skip(f"no threaded cgroups: {error}")

        def prepare() -> None:
            with open(os.path.join(directory, "cgroup.procs"), "w") as procs:
                procs.write("0")

        with child(prepare=prepare) as pid:
            with open(os.path.join(inner, "cgroup.threads"), "w") as file:
                file.write(str(pid))
            like = likeness_of(pid)
            assert dataclasses.replace(entry, path=entry.path + "/vcpu0") in like.cgroups
            with started(like) as new:
                assert differences(like, likeness_of(new.pid)) == ()


CALLER = """
import os, signal, sys
from cpr.linux import launch, likeness
spawn = launch._spawn
def spawn_stopped(*arguments):
    result = spawn(*arguments)
    os.kill(result[2], signal.SIGSTOP)
    print(result[2], flush=True)
    return result
if sys.argv[1:2] == ["stopped"]:
    launch._spawn = spawn_stopped
launched = likeness.launch(
    likeness.likeness_of(os.getpid()), argv=["sleep", "1000"], environ=[], executable=(os.path.realpath("/bin/sleep"), None),
    mark=("MARK", "here"), ends_with_us="ends" in sys.argv,
)
print(launched.pid, flush=True)
signal.pause()
"""  # fmt: skip  # noqa: E501


@contextlib.contextmanager
def killed_caller(*words: str) -> Iterator[Process]:
    """What a caller has launched that was SIGKILLed then; it is seen to be ready for that."""
    with subprocess.Popen([sys.executable, "-c", CALLER, *words], stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        try:
            pid = int(caller.stdout.readline())
            launched = open_process(pid)
            eventually(lambda: proc.read_stat(pid).state in ("T" if "stopped" in words else "S"))
        finally:
            caller.kill()
    with launched:
        try:
            yield launched
        finally:
            launched.kill()
            assert launched.wait_dead(5)


def test_a_program_outlives_its_caller() -> None:
    with killed_caller() as program:
        assert not program.wait_dead(0.2)


def test_a_program_ends_with_its_caller() -> None:
    with killed_caller("ends") as program:
        assert program.wait_dead(5)


def test_a_helper_whose_caller_died_does_not_become_the_program() -> None:
    """And until then it can be found."""
    with killed_caller("stopped") as helper:
        eventually(lambda: dict(proc.read_environ(helper.pid)).get("MARK") == "here")
        assert helper.alive()
        helper.signal(signal.SIGCONT)
        assert helper.wait_dead(5)
