"""A tap device between this machine and a guest, and users of the guest who notice an interruption.

Needs root and /dev/net/tun.  Devices are called after the process that made them, so that
what a killed test left behind is recognized and removed by the next.  Addresses are from 198.18.0.0/15, which
RFC 2544 sets aside for tests.

Out of scope: bridges, routing beyond the device, vhost.
"""

import contextlib
import fcntl
import ipaddress
import itertools
import os
import re
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from tests.lab import debian, tools
from tests.lab.console import largest_gap
from tests.lab.linux import PACED_PORT

NETWORK = ipaddress.ip_network("198.18.0.0/15")

# linux/if_tun.h
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x0100, 0x1000, 0x4000

ICMP_ECHOREPLY, ICMP_ECHO = 0, 8

_number = itertools.count()


def why_not() -> str | None:
    """Why no tap device can be made here, or None if one can."""
    if os.geteuid() != 0:
        return "needs root"
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError as error:
        return str(error)
    return None


class Tap:
    """A tap device, up, with an address; `guest` is the one for the other end.  A context manager.

    multi_queue: make it one that several queues can be opened of (QEMU's ``queues=``).
    """

    bits = 30  # of the network mask

    def __init__(self, *, multi_queue: bool = False) -> None:
        remove_leftovers()
        self.name = f"cpr{os.getpid()}-{next(_number)}"
        self.multi_queue = multi_queue
        self._ip("tuntap", "add", "dev", self.name, "mode", "tap", *(["multi_queue"] if multi_queue else []))
        try:
            # no two devices have the same index, so no two have the same network
            index = socket.if_nametoindex(self.name) % (NETWORK.num_addresses // 4)
            self.host = str(NETWORK[4 * index + 1])
            self.guest = str(NETWORK[4 * index + 2])
            self._ip("address", "add", f"{self.host}/{self.bits}", "dev", self.name)
            self._ip("link", "set", self.name, "up")
        except BaseException:
            self.close()
            raise

    @property
    def guest_word(self) -> str:
        """What tells the Linux guest its address."""
        return f"cpr.ip={self.guest}/{self.bits}"

    def arguments(self, options: str = "") -> list[str]:
        """QEMU's options for a virtio-net on the device; `options` (``,mq=on``) go to the virtio-net."""
        netdev = f"tap,id=net0,ifname={self.name},script=no,downscript=no"
        return ["-netdev", netdev, "-device", f"virtio-net-pci,netdev=net0,romfile={options}"]

    def open(self) -> int:
        """A descriptor of the device (of one more queue if multi_queue), for ``-netdev tap,fd=``."""
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (IFF_MULTI_QUEUE if self.multi_queue else 0)
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", self.name.encode(), flags))
        except OSError:
            os.close(fd)
            raise
        return fd

    def close(self) -> None:
        """Remove the device, whoever still has it open."""
        if Path("/sys/class/net", self.name).exists():
            self._ip("link", "delete", self.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def _ip(*words: str) -> None:
        debian.run([*tools.command("ip"), *words])


def remove_leftovers() -> None:
    """Remove the devices of processes that are gone."""
    for name in os.listdir("/sys/class/net"):
        match = re.fullmatch(r"cpr(\d+)-\d+", name)
        if match and not Path("/proc", match[1]).exists():
            debian.run([*tools.command("ip"), "link", "delete", name])


class Watcher:
    """Somebody who uses the guest in a thread, until closed.  A context manager.

    `arrivals` are the times (time.monotonic) at which the guest was heard.
    """

    def __init__(self) -> None:
        self.arrivals: list[float] = []
        self.error: Exception | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def work(self) -> None:
        """What the thread does, until `closing`."""
        raise NotImplementedError

    @property
    def closing(self) -> bool:
        """It is time to end."""
        return self._closing.is_set()

    @property
    def sound(self) -> bool:
        """Nothing went wrong so far."""
        return self.error is None

    @property
    def longest_silence(self) -> float:
        """The longest time nothing was heard, between the first and the last that was, in seconds."""
        return self.silence()

    def silence(self, since: float = 0, until: float | None = None) -> float:
        """The longest time nothing was heard, as far as it lies in the window."""
        return largest_gap(list(self.arrivals), since, until)

    def wait(self, happened: Callable[[], object], seconds: float = 10) -> None:
        """Return once `happened()`; TimeoutError after `seconds`, or the watcher's own error."""
        end = time.monotonic() + seconds
        while not happened():
            if self.error:
                raise self.error
            if time.monotonic() > end:
                raise TimeoutError(f"{type(self).__name__}: not within {seconds} s")
            time.sleep(0.005)

    def wait_arrivals(self, count: int = 5, seconds: float = 10) -> None:
        """Wait until the guest was heard `count` times more."""
        end = len(self.arrivals) + count
        self.wait(lambda: len(self.arrivals) >= end, seconds)

    def close(self) -> None:
        """End it.  What it saw stays."""
        self._closing.set()
        self._thread.join(5)

    def _run(self) -> None:
        try:
            self.work()
        except Exception as error:  # it is the test's to judge
            self.error = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Pinger(Watcher):
    """Pings an address every `interval` seconds.

    patience: after how many seconds a ping without an answer is lost.
    """

    def __init__(self, address: str, interval: float = 0.01, patience: float = 1.0) -> None:
        super().__init__()
        self.address = address
        self.interval = interval
        self.patience = patience
        self.departures: list[float] = []
        self.answered: dict[int, float] = {}

    @property
    def sent(self) -> int:
        """How many pings were sent."""
        return len(self.departures)

    @property
    def lost(self) -> int:
        """How many of them are lost.  One that is younger than `patience` may still be answered."""
        before = time.monotonic() - self.patience
        departures = list(self.departures)
        return sum(when < before and number not in self.answered for number, when in enumerate(departures))

    def work(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as wire:
            wire.setblocking(False)
            identity = id(self) & 0xFFFF
            due = time.monotonic()
            while not self.closing:
                now = time.monotonic()
                if now >= due:
                    number = self.sent
                    self.departures.append(now)
                    with contextlib.suppress(OSError):  # no route while a device is being replaced, say
                        wire.sendto(echo_request(identity, number), (self.address, 0))
                    due = max(due + self.interval, now)
                if select.select([wire], [], [], max(0.0, due - time.monotonic()))[0]:
                    self._receive(wire, identity)

    def _receive(self, wire: socket.socket, identity: int) -> None:
        packet, sender = wire.recvfrom(2048)
        header = (packet[0] & 15) * 4
        kind, _, _, who = struct.unpack_from("!BBHH", packet, header)
        if kind == ICMP_ECHOREPLY and who == identity and sender[0] == self.address:
            now = time.monotonic()
            (number,) = struct.unpack_from("!Q", packet, header + 8)
            self.answered[number] = now
            self.arrivals.append(now)


def echo_request(identity: int, number: int) -> bytes:
    """An ICMP echo request carrying `number`."""
    body = struct.pack("!Q", number)
    words = struct.unpack("!8H", struct.pack("!BBHHH", ICMP_ECHO, 0, 0, identity, number & 0xFFFF) + body)
    total = sum(words)
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~(total + (total >> 16)) & 0xFFFF
    return struct.pack("!BBHHH", ICMP_ECHO, 0, checksum, identity, number & 0xFFFF) + body


class Stream(Watcher):
    """Reads the Linux guest's stream of numbers over one TCP connection and compares every byte.

    port: PACED_PORT or FLOOD_PORT of ``linux``.  `error` is a ValueError if a byte is wrong, ConnectionError
    if the guest hangs up.
    """

    def __init__(self, address: str, port: int = PACED_PORT) -> None:
        super().__init__()
        self.address = address, port
        self.received = 0

    def work(self) -> None:
        expected = numbers()
        with self._connect() as wire:
            wire.settimeout(0.1)
            while not self.closing:
                try:
                    data = wire.recv(65536)
                except TimeoutError:
                    continue
                if not data:
                    raise ConnectionError(f"the guest hung up after {self.received} bytes")
                self.arrivals.append(time.monotonic())
                if data != expected(len(data)):
                    raise ValueError(f"a byte after the first {self.received} is wrong: {data[:80]!r}")
                self.received += len(data)

    def _connect(self, seconds: float = 10) -> socket.socket:
        end = time.monotonic() + seconds
        while True:
            try:
                return socket.create_connection(self.address, seconds)
            except ConnectionRefusedError:  # the guest may just have begun
                if time.monotonic() > end or self.closing:
                    raise
                time.sleep(0.02)


def numbers() -> Callable[[int], bytes]:
    """A function that returns the next `length` bytes of what ``seq 1`` prints."""
    lines = _lines()
    rest = bytearray()

    def take(length: int) -> bytes:
        while len(rest) < length:
            rest.extend(next(lines))
        taken = bytes(rest[:length])
        del rest[:length]
        return taken

    return take


def _lines() -> Iterator[bytes]:
    for first in itertools.count(1, 1000):
        yield b"".join(b"%d\n" % number for number in range(first, first + 1000))
