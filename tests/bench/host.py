"""Facts about the machine that belong in a table's header."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Host:
    """The machine at one time. load: averages of 1, 5 and 15 minutes."""

    kernel: str
    cpus: int
    cpu: str
    date: str
    load: tuple[float, float, float]


def host() -> Host:
    """The machine as it is now."""
    uname = os.uname()
    with open("/proc/cpuinfo") as file:
        models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return Host(
        kernel=f"{uname.sysname} {uname.release.split('-')[0]}",
        cpus=len(os.sched_getaffinity(0)),
        cpu=models[0] if models else uname.machine,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        load=os.getloadavg(),
    )


def load_words(load: tuple[float, float, float]) -> str:
    """The three averages as uptime prints them."""
    return " ".join(f"{average:.2f}" for average in load)
