"""Which variables are not passed on, and which of them are told."""

from __future__ import annotations

import pytest

from cpr.qemu.variables import DROPPED, foreign

PLANTED = (
    "CPR_FD_state", "CPR_FD_a\nb", "QEMU_FD_serial0", "QEMU_BOOL_mon", "QEMU_CPR_STATE", "QEMU_CPR_EXEC_STATE",
    "QEMU_ADDR_pc.ram", "QEMU_LEN_pc.ram", "QEMU_START_FREEZE", "CPR_RUN_PENDING",
)  # fmt: skip
LEFT = ("CPR_RUN", "CPR_PIDFILE", "CPR_QEMU_OPTIONS", "CPR_NETDEVS", "CPR_CONNECTIONS")


@pytest.mark.parametrize("name", [*PLANTED, *LEFT])
def test_dropped(name: str) -> None:
    assert DROPPED.match(name)


@pytest.mark.parametrize("name", ["PATH", "QEMU_AUDIO_DRV", "CPR_RUN_DIR", "MY_CPR_FD_x", "QEMU_START_FREEZE_", "X"])
def test_passed_on(name: str) -> None:
    assert not DROPPED.match(name)


def test_what_an_update_left_to_be_read_is_not_told() -> None:
    environ = [(name, "1") for name in ("PATH", *PLANTED, *LEFT, "CPR_FD_state")]
    assert foreign(environ) == tuple(sorted(PLANTED))
