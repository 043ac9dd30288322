"""From options to `Choices`: the host's settings lie below, what is said on the command line above."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cpr.errors import UsageError

if TYPE_CHECKING:
    from cpr.app import Choices, Jump


def jump(
    *,
    kexec: bool,
    kernel: str = "",
    initrd: str = "",
    append: str = "",
    reuse_cmdline: bool = False,
    abandon: list[str] | None = None,
    save_ram: str = "",
    engine: str | None = None,
) -> Jump | None:
    """What is asked for of the next kernel; None without --kexec. Raises `UsageError` for what cannot be meant."""
    from cpr.app import Jump

    if not kexec:
        said = {
            "--kernel": kernel,
            "--initrd": initrd,
            "--append": append,
            "--reuse-cmdline": reuse_cmdline,
            "--abandon": abandon,
            "--save-ram": save_ram,
        }
        for name, value in said.items():
            if value:
                raise UsageError(f"{name} is about the next kernel of the host", hint="say --kexec as well")
        return None
    if engine is not None:
        raise UsageError(f"--engine {engine}: engines restart a QEMU on this host; a jump (--kexec) needs none")
    if initrd and not kernel:
        raise UsageError("--initrd without --kernel", hint="name the kernel that it belongs to")
    return Jump(
        kernel=kernel,
        initrd=initrd,
        append=append,
        reuse=reuse_cmdline,
        abandon=tuple(abandon or ()),
        save_ram=os.path.abspath(save_ram) if save_ram else "",
    )


def choices(
    *,
    qemu: str = "",
    qemu_option: list[str] | None = None,
    engine: str | None = None,
    ignore: list[str] | None = None,
    timeout: float | None = None,
    max_downtime: float | None = None,
    jobs: int | None = None,
    blocked: str = "fail",
    manager_events: str | None = None,
) -> Choices:
    """Raises `UsageError` for what cannot be meant."""
    from cpr import config
    from cpr.app import Choices

    settings = config.load()
    for name, number in (("timeout", timeout), ("max-downtime", max_downtime), ("jobs", jobs)):
        if number is not None and not number > 0:
            raise UsageError(f"--{name} {number:g}: has to be greater than zero")
    if blocked not in ("fail", "skip"):
        raise UsageError(f"--blocked {blocked}: fail or skip")
    if manager_events not in (None, *config.MANAGER_EVENTS):
        raise UsageError(f"--manager-events {manager_events}: {' or '.join(config.MANAGER_EVENTS)}")
    return Choices(
        qemu=qemu,
        qemu_options=tuple(qemu_option or ()),
        engine=engine or settings.engine,
        ignore=tuple(ignore or ()),
        timeout=settings.timeout if timeout is None else timeout,
        max_downtime=settings.max_downtime if max_downtime is None else max_downtime,
        jobs=settings.jobs if jobs is None else jobs,
        skip_blocked=blocked == "skip",
        show_events=(manager_events or settings.manager_events) == "show",
    )
