"""A guest whose only QMP socket is TCP, through which no descriptors pass: handover does without, re-exec says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.qemu.parties import Poller, Qmp, counted, free_port
from tests.qemu.test_connections import checks, polled

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.qemu import QemuBuild
    from tests.lab.start import Lab
    from tests.qemu.conftest import Command

    Builds = Callable[[str], QemuBuild]

full = pytest.mark.full


@full
def test_a_polling_tool_on_the_only_qmp_socket_which_is_tcp(lab: Lab, cpr: Command, builds: Builds) -> None:
    only = ("127.0.0.1", free_port())
    words = ("-qmp", f"tcp:127.0.0.1:{only[1]},server=on,wait=off")
    with counted(lab, builds("7.2"), *words, qmp=False) as guest:
        polled(lab, cpr, builds, ["11.1.a", "11.1.b"] * 2, [Poller(only)], guest)


def test_a_guest_whose_only_qmp_socket_is_tcp(lab: Lab, cpr: Command, builds: Builds) -> None:
    only = ("127.0.0.1", free_port())
    words = ("-qmp", f"tcp:127.0.0.1:{only[1]},server=on,wait=off")
    with counted(lab, builds("7.2"), *words, qmp=False) as guest:
        lines = []
        for key in ("11.1.a", "11.1.b"):
            result = cpr.update(guest.name, builds(key))
            assert result.code == 0, str(result)
            with open(f"/proc/{result.guest['pid_after']}/cmdline", "rb") as file:
                lines.append(file.read().count(b"cpr-control"))
            with Qmp(only) as monitor:
                assert monitor.execute("query-status")["status"] == "running"
                assert monitor.version == builds(key).version
        assert lines[0] == lines[1]
        guest.check(rounds=0)


def test_reexec_names_it(lab: Lab, cpr: Command, builds: Builds) -> None:
    only = ("127.0.0.1", free_port())
    words = ("-qmp", f"tcp:127.0.0.1:{only[1]},server=on,wait=off")
    with counted(lab, builds("7.2"), *words, qmp=False) as guest:
        result = cpr.update(guest.name, builds("11.1.a"), "--engine", "reexec")
        assert (result.code, checks(result)) == (3, {"monitor-tcp"}), str(result)
        assert guest.process.alive
        guest.check(rounds=0)
