"""`./run demo`: a Linux guest is moved from the oldest QEMU to the newest before the reader's eyes.

Everything that is shown is the real thing: `cpr` is called as a user calls it, and what is said about the guest is
read from its console, its disk, its network and /proc. Out of scope: proving anything; that is what the tests are for.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from tests.lab import LabError, linux, qemu, tap
from tests.lab.console import Console
from tests.lab.start import Lab

if TYPE_CHECKING:
    from tests.lab.linux import LinuxLog

BOLD, DIM, OFF = (
    ("\033[1m", "\033[2m", "\033[0m") if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else ("",) * 3
)
SHOWN_SECONDS = 2.0


def say(text: str = "") -> None:
    print(text, flush=True)


def cpr(*words: str, show: bool = True, good: tuple[int, ...] = (0,)) -> str:
    """Call the command as a user would; its output, shown as it is."""
    say(f"\n{BOLD}$ cpr {shlex.join(words)}{OFF}")
    result = subprocess.run([sys.executable, "-m", "cpr", *words], stdout=subprocess.PIPE, text=True, check=False)
    if show:
        sys.stdout.write(result.stdout)
        sys.stdout.flush()
    if result.returncode not in good:
        raise LabError(f"cpr {words[0]} ended with {result.returncode}")
    return result.stdout


def watch(log: LinuxLog, seconds: float) -> None:
    """Show the console as it counts, a few lines a second."""
    end, shown = time.monotonic() + seconds, len(log.ticks)
    while time.monotonic() < end:
        time.sleep(0.25)
        for line in log.text[-400:].decode("ascii", "replace").splitlines()[-2:-1]:
            say(f"{DIM}  console: {line.strip()}{OFF}")
    say(f"{DIM}  ({len(log.ticks) - shown} ticks in {seconds:g} s){OFF}")


def main() -> int:
    try:
        return demo()
    except LabError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1


def demo() -> int:
    say("Getting a QEMU of each kind, a kernel and a busybox (cached after the first time) ...")
    builds = qemu.builds()
    oldest, newest = (f(builds.values(), key=_version) for f in (min, max))
    guest = linux.obtain()
    with Lab() as lab, tap.Tap() as network:
        os.environ["CPR_RUN_DIR"] = str(lab.directory / "run")
        os.environ.update(lab.environment)
        disk = lab.directory / "disk.qcow2"
        subprocess.run([qemu.qemu_img(), "create", "-q", "-f", "qcow2", disk, "64M"], check=True)
        console_path = lab.directory / "console"
        command = [
            *map(str, oldest.command),
            *[
                "-machine",
                "q35",
                "-accel",
                "tcg",
                "-cpu",
                "qemu64",
                "-m",
                "256M",
                "-smp",
                "2",
                "-nodefaults",
                "-display",
                "none",
            ],
            *f"-chardev socket,id=console,path={console_path},server=on,wait=off -serial chardev:console".split(),
            *f"-qmp unix:{lab.directory}/qmp,server=on,wait=off".split(),
            *f"-drive file={disk},if=virtio,format=qcow2".split(),
            *f"-netdev tap,id=net0,ifname={network.name},script=no,downscript=no".split(),
            *["-device", "virtio-net-pci,netdev=net0"],
            *guest.arguments(f"cpr.ip={network.guest}/{network.bits}"),
        ]
        say(f"\nThe guest: Linux with a disk it writes and verifies, and a network card, under QEMU {oldest.version}.")
        started = cpr("run", "--name", "demo", "--", *command, show=False)
        pid = int("".join(c if c.isdigit() else " " for c in started.split("pid", 1)[-1]).split()[0])
        lab.adopt(pid)
        sys.stdout.write(started)
        from tests.lab.linux import LinuxLog

        log = LinuxLog()
        with Console(log).connect(console_path):
            log.wait(lambda: len(log.ticks) > 20, 60, "no tick")
            log.wait(lambda: log.disk_ok >= 0, 60, "no word of the disk")
            return show(lab, network, log, pid, newest)


def show(lab: Lab, network: tap.Tap, log: LinuxLog, pid: int, newest: qemu.QemuBuild) -> int:
    watch(log, SHOWN_SECONDS)
    cpr("list")
    cpr("check", "demo", "--qemu", str(newest.binary))
    before = uptime(log)
    with tap.Pinger(network.guest) as pings, tap.Stream(network.guest) as stream:
        time.sleep(1.0)
        ticks = len(log.ticks)
        began = time.monotonic()
        text = cpr("update", "--restart", "demo", "--qemu", str(newest.binary), "-y", "--json", show=False)
        result: dict[str, Any] = json.loads(text)["guests"][0]
        lab.adopt(int(result["pid_after"]))
        time.sleep(1.0)
        watch(log, SHOWN_SECONDS)
    after = uptime(log)
    gap = log.largest_gap(began) * 1000
    say(f"\n{BOLD}What changed{OFF}")
    say(f"  QEMU          {result['binary_before']['version']} -> {result['binary_after']['version']}")
    say(f"  pid           {result['pid_before']} -> {result['pid_after']}")
    say(f"{BOLD}What did not{OFF}")
    say(f"  uptime        {before:.1f} s -> {after:.1f} s, boots seen: {len(log.boot_ids)}")
    say(f"  console       the same connection, {len(log.ticks) - ticks} more ticks, lost or repeated: {len(log.jumps)}")
    say(f"  disk          {log.disk_ok} blocks written and verified, bad: {len(log.disk_bad)}")
    say(f"  pings         {pings.sent} sent, {pings.lost} lost, longest silence {pings.longest_silence * 1000:.0f} ms")
    say(f"  TCP stream    {stream.received} bytes, every one as expected: {'yes' if stream.sound else 'NO'}")
    say(f"\n{BOLD}Blackout (vCPUs stood still): {result['blackout_seconds'] * 1000:.1f} ms{OFF}")
    say(f"  longest silence on the console: {gap:.0f} ms (under emulation translated code is lost and made again)")
    return 0 if log.sound and stream.sound and result["status"] == "updated" else 1


def uptime(log: LinuxLog) -> float:
    return log.ticks[-1].uptime


def _version(build: qemu.QemuBuild) -> tuple[int, ...]:
    return tuple(int(part) for part in build.version.split(".") if part.isdigit())


if __name__ == "__main__":
    sys.exit(main())
