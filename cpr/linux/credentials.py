"""Becoming another user with exactly the recorded groups and capabilities, or fewer, never more.

Runs in the launcher, between fork and exec, as one thread; imports as little as that.

Out of scope: joining the user namespace, no_new_privs, security labels (launcher.py).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from cpr.linux import syscalls as sc

if TYPE_CHECKING:
    from collections.abc import Callable

SECBIT_NOROOT = 1
SETS = ("inheritable", "permitted", "effective", "bounding", "ambient")


def set_credentials(wanted: dict[str, Any]) -> list[str]:
    """Groups, gids, bounding set, uids and capabilities, so that exec leaves what was recorded.

    `wanted` has uids and gids (real, effective, saved, file system), groups, the masks of `SETS`, and securebits
    (None: as they are). Returns what could not be had, each line begun by the aspect: only ever less than wanted.

    Raises:
        OSError: no right to become that user or group, or to give up part of the bounding set.
    """
    uids, gids = wanted["uids"], wanted["gids"]
    if sorted(os.getgroups()) != sorted(wanted["groups"]):
        _permitted(f"to have the groups {wanted['groups']}", os.setgroups, wanted["groups"])
    if list(os.getresgid()) != gids[:3]:
        _permitted(f"to become gid {gids[1]}", os.setresgid, *gids[:3])
    sets, unmet = before_exec(wanted)
    effective, permitted, inheritable = sc.capget()
    possible = sets["inheritable"] & (inheritable | permitted)
    if possible != inheritable:  # while the bounding set still allows it
        sc.capset(effective, permitted, possible)
    for number in bits(read_bounding() & ~sets["bounding"]):
        _permitted(f"to drop capability {number} from the bounding set", sc.prctl, sc.PR_CAPBSET_DROP, number)
    if wanted["securebits"] is not None and sc.prctl(sc.PR_GET_SECUREBITS) != wanted["securebits"]:
        sc.prctl(sc.PR_SET_SECUREBITS, wanted["securebits"])
    if list(os.getresuid()) != uids[:3]:
        sc.prctl(sc.PR_SET_KEEPCAPS, 1)
        _permitted(f"to become uid {uids[1]}", os.setresuid, *uids[:3])
    _, permitted, _ = sc.capget()
    kept = sets["permitted"] & permitted
    sc.capset(sets["effective"] & kept, kept, possible)
    ambient = sets["ambient"] & kept & possible
    sc.prctl(sc.PR_CAP_AMBIENT, sc.PR_CAP_AMBIENT_CLEAR_ALL)
    for number in bits(ambient):
        try:
            sc.prctl(sc.PR_CAP_AMBIENT, sc.PR_CAP_AMBIENT_RAISE, number)
        except PermissionError:  # SECBIT_NO_CAP_AMBIENT_RAISE
            ambient &= ~(1 << number)
    had = {"permitted": kept, "inheritable": possible, "ambient": ambient, "bounding": read_bounding()}
    for name, mask in had.items():
        if sets[name] & ~mask:
            unmet.append(f"{name}: we do not have capabilities {sets[name] & ~mask:#x} ourselves")
    for name, ids in (("uids", uids), ("gids", gids)):
        if ids[3] != ids[1] or ids[2] != ids[1]:
            unmet.append(f"{name}: exec makes saved and file system ids the effective one, {ids[1]}")
    return unmet


def _permitted(what: str, call: Callable[..., object], *arguments: Any) -> None:
    """Call, and let EPERM say what was not permitted."""
    try:
        call(*arguments)
    except PermissionError as error:
        raise PermissionError(error.errno, f"no right {what}") from None


def before_exec(wanted: dict[str, Any]) -> tuple[dict[str, int], list[str]]:
    """The sets to have before exec, and what exec will make of them otherwise than wanted (capabilities(7)).

    Root regains inheritable | bounding at exec (unless SECBIT_NOROOT), so both are cut down to what was permitted.
    Others keep the ambient set alone: permitted beyond it came from file capabilities, and does so again, or is lost.
    """
    sets: dict[str, int] = {name: wanted[name] for name in SETS}
    unmet = []
    if 0 in wanted["uids"][:2] and not (wanted["securebits"] or 0) & SECBIT_NOROOT:
        for name in ("bounding", "inheritable"):
            beyond = sets[name] & ~sets["permitted"]
            if beyond:
                unmet.append(f"{name}: without capabilities {beyond:#x}, which root would gain by exec")
                sets[name] &= sets["permitted"]
        permitted = sets["inheritable"] | sets["bounding"]
        effective = permitted if wanted["uids"][1] == 0 else sets["ambient"]
    else:
        permitted = effective = sets["ambient"]
    for name, then in (("permitted", permitted), ("effective", effective)):
        if sets[name] & ~then:
            unmet.append(f"{name}: exec takes capabilities {sets[name] & ~then:#x} away")
        elif then & ~sets[name]:
            unmet.append(f"{name}: exec raises all that is permitted")
    return sets, unmet


def bits(mask: int) -> list[int]:
    return [n for n in range(mask.bit_length()) if mask >> n & 1]


def read_bounding() -> int:
    """Our bounding set as a mask."""
    mask = 0
    for number in range(64):
        try:
            mask |= sc.prctl(sc.PR_CAPBSET_READ, number) << number
        except OSError:  # EINVAL: the last one was before it
            break
    return mask
