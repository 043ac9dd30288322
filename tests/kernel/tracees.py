"""Children to be traced: they count, wait in many ways, and tell what they saw."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpr.linux.maps import read_maps
from cpr.linux.process import Process, open_process

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAM = r"""
import ctypes, errno, json, os, signal, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
threads, births = int(sys.argv[1]), sys.argv[2] == "births"
seen = {"wrong": [], "handled": 0, "queued": [], "ticks": 0, "woken": 0, "born": 0}
stop = threading.Event()

def handler(number, frame):
    seen["handled"] += 1

signal.signal(signal.SIGUSR1, handler)

class TimeSpec(ctypes.Structure):
    _fields_ = [("s", ctypes.c_long), ("ns", ctypes.c_long)]

def expect(what, result, wanted):
    if result not in wanted:
        seen["wrong"].append([what, result, ctypes.get_errno()])

pipes = [os.pipe() for _ in range(threads)]
word = ctypes.c_int(1)
epoll = libc.epoll_create1(0)

def reading(i):
    buffer = ctypes.create_string_buffer(1)
    while not stop.is_set():
        expect("read", libc.read(pipes[i][0], buffer, 1), (1,))
        seen["woken"] += 1

def sleeping(i):
    while not stop.is_set():
        left = TimeSpec(0, 30_000_000)
        began = time.monotonic()
        expect("nanosleep", libc.nanosleep(ctypes.byref(left), ctypes.byref(left)), (0,))
        if time.monotonic() - began < 0.0299:
            seen["wrong"].append(["nanosleep", "too short"])

def polling(i):
    while not stop.is_set():
        entry = ctypes.create_string_buffer(struct.pack("=ihh", pipes[i][0], 1, 0), 8)
        expect("poll", libc.poll(entry, 1, 25), (0,))

def ppolling(i):
    while not stop.is_set():
        entry = ctypes.create_string_buffer(struct.pack("=ihh", pipes[i][0], 1, 0), 8)
        limit, mask = TimeSpec(0, 25_000_000), ctypes.c_ulong(2**64 - 1)
        expect("ppoll", libc.ppoll(entry, 1, ctypes.byref(limit), ctypes.byref(mask)), (0,))

def selecting(i):
    while not stop.is_set():
        limit = TimeSpec(0, 20_000)
        expect("select", libc.select(0, None, None, None, ctypes.byref(limit)), (0,))

def epolling(i):
    event = ctypes.create_string_buffer(12)
    expect("epoll_wait", libc.epoll_wait(epoll, event, 1, -1), (1,))

def futex(i):
    while not stop.is_set():
        limit = TimeSpec(0, 35_000_000)
        result = libc.syscall(202, ctypes.byref(word), 0, 1, ctypes.byref(limit), None, 0)
        if result != -1 or ctypes.get_errno() != errno.ETIMEDOUT:
            seen["wrong"].append(["futex", result, ctypes.get_errno()])

def counting(i):
    while not stop.is_set():
        for _ in range(1000):
            seen["ticks"] += 1
        time.sleep(0.0005)

def breeding(i):
    while not stop.is_set():
        one = threading.Thread(target=time.sleep, args=(0.001,))
        one.start()
        one.join()
        seen["born"] += 1

REAL_TIME = range(signal.SIGRTMIN, signal.SIGRTMIN + 3)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, *REAL_TIME])

kinds = [counting, reading, sleeping, polling, ppolling, selecting, epolling, futex]
for i in range(threads - 1):
    threading.Thread(target=kinds[i % len(kinds)], args=(i,), daemon=True).start()
if births:
    threading.Thread(target=breeding, args=(0,), daemon=True).start()
noted, note = os.pipe()  # each run of the handler in C writes the number; that in Python runs once for several
os.set_blocking(note, False)
os.set_blocking(noted, False)
rt = []
def told():
    try:
        rt.extend(os.read(noted, 1 << 20))
    except BlockingIOError:
        pass
    return json.dumps({**seen, "queued": [number for number in rt if number in REAL_TIME]})
if sys.argv[3] == "handle":
    for number in REAL_TIME:
        signal.signal(number, lambda number, frame: None)
    signal.set_wakeup_fd(note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1, *REAL_TIME])
print("up", flush=True)
if threads == 1:
    os.set_blocking(0, False)
    while True:
        for _ in range(1000):
            seen["ticks"] += 1
        time.sleep(0.0005)
        try:
            line = os.read(0, 100).decode()
        except BlockingIOError:
            continue
        for _ in line.split():
            print(told(), flush=True)
        if not line:
            break
for line in sys.stdin:
    if line.startswith("wake"):
        for _, end in pipes[1 :: len(kinds)]:
            os.write(end, b"x")
        continue
    print(told(), flush=True)
"""


@dataclass
class Child:
    popen: subprocess.Popen[str]
    process: Process

    @property
    def pid(self) -> int:
        return self.popen.pid

    def seen(self) -> dict[str, Any]:
        """What it saw until now; that it answers shows that it lives."""
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.popen.stdin.write("tell\n")
        self.popen.stdin.flush()
        return dict(json.loads(self.popen.stdout.readline()))

    def wake(self) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write("wake\n")
        self.popen.stdin.flush()


@contextlib.contextmanager
def counting_child(
    threads: int = 1, *, births: bool = False, handle: bool = False, prefix: str = ""
) -> Iterator[Child]:
    """A child that counts; its threads wait in all ways, are born and die, and handle signals, as wanted."""
    words = [str(threads), "births" if births else "-", "handle" if handle else "-"]
    with subprocess.Popen(
        [sys.executable, "-c", prefix + PROGRAM, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as popen:
        try:
            assert popen.stdout is not None
            assert popen.stdout.readline() == "up\n"
            with open_process(popen.pid) as process:
                yield Child(popen, process)
        finally:
            popen.kill()


def code_of(pid: int) -> str:
    """A hash of everything executable."""
    digest = hashlib.sha256()
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for mapping in read_maps(pid):
            if "x" in mapping.perms and mapping.path != "[vsyscall]":
                memory.seek(mapping.start)
                digest.update(memory.read(mapping.size))
    return digest.hexdigest()


def layout_of(pid: int) -> list[str]:
    """Its mappings, without the heaps that Python grows and shrinks by itself."""
    return [f"{m.start:x}-{m.end:x} {m.perms} {m.path}" for m in read_maps(pid) if m.inode or m.path.startswith("[v")]


_libc = ctypes.CDLL(None, use_errno=True)


def send_queued(pid: int, number: int) -> bool:
    """sigqueue(3): a real-time signal is queued, not merged. False: the queue is full."""
    return int(_libc.sigqueue(pid, number, ctypes.c_void_p(0))) == 0


def deny_execve() -> str:
    """Python code that has the kernel kill the process when it calls execve or execveat."""
    return """
import ctypes, struct
def load(offset): return struct.pack("=HBBI", 0x20, 0, 0, offset)
def jump(value, hit): return struct.pack("=HBBI", 0x15, hit, 0, value)
def give(value): return struct.pack("=HBBI", 0x06, 0, 0, value)
rules = load(0) + jump(59, 2) + jump(322, 1) + give(0x7FFF0000) + give(0x80000000)
rules = ctypes.create_string_buffer(rules, len(rules))
class Program(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
the = Program(5, ctypes.addressof(rules))
c = ctypes.CDLL(None, use_errno=True)
assert c.prctl(38, 1, 0, 0, 0) == 0
assert c.prctl(22, 2, ctypes.byref(the), 0, 0) == 0
"""


def stopped(pid: int) -> bool:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "T"


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
