"""The JSON of every command: top level `"format": "cpr.NAME/1"`, snake_case, bytes and seconds as numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cpr.checks.registry import blockers
from cpr.cli.output import error_json, moment
from cpr.errors import Exit

if TYPE_CHECKING:
    from cpr.app import Departure, Examined, Modes, Prepared, RebootCheck, Saved, Started, Story, Update
    from cpr.journal import Record
    from cpr.model import Binary, Outcome, Plan, RamBlock
    from cpr.reboot.manifest import SavedGuest


def binary(it: Binary | None) -> dict[str, Any] | None:
    if it is None:
        return None
    return {
        "path": it.path,
        "version": it.version,
        "package": it.package or None,
        "build_id": it.build_id,
        "deleted": it.deleted,
        "replaced": it.replaced,
    }


def ram(block: RamBlock) -> dict[str, Any]:
    return {"id": block.id, "size": block.size, "backing": str(block.backing), "shared": block.shared}


def engines(examined: Examined) -> dict[str, Any]:
    return {name: [f.json() for f in blockers(findings, name)] or "ok" for name, findings in examined.engines}


def listed(examined: Examined) -> dict[str, Any]:
    """A guest of `cpr list --json`."""
    guest, candidate = examined.guest, examined.candidate
    return {
        "name": candidate.name,
        "uuid": candidate.uuid,
        "pid": candidate.process.pid,
        "binary": binary(guest.binary if guest else candidate.binary),
        "binary_installed": binary(guest.installed) if guest else None,
        "outdated": examined.outdated,
        "runstate": guest.runstate if guest else None,
        "ram": [ram(b) for b in guest.ram] if guest else [],
        "engines": engines(examined),
        "findings": [f.json() for f in examined.findings],
        "unreadable": list(guest.unreadable if guest else candidate.unreadable),
        "error": error_json(examined.error) if examined.error else None,
    }


def checked(examined: Examined) -> dict[str, Any]:
    """A guest of `cpr check --json`."""
    return {
        **listed(examined),
        "exit_code": int(examined.exit_code),
        "engine": examined.plan.engine if examined.plan else None,
        "binary_after": binary(examined.target.binary) if examined.target else None,
    }


def shown(examined: Examined) -> dict[str, Any]:
    """The guest of `cpr show --json`: every fact that the survey has."""
    import dataclasses

    facts = _plain(dataclasses.asdict(examined.guest)) if examined.guest else {}
    return {**checked(examined), "facts": facts}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


def modes(it: Modes) -> dict[str, Any]:
    """The guest of `cpr info --json`."""
    return {
        "name": it.examined.candidate.name,
        "uuid": it.examined.candidate.uuid,
        "pid": it.examined.candidate.process.pid,
        "restart": list(it.restart),
        "reboot": it.can_reboot,
        "reboot_reason": it.words,
        "reboot_blockers": [f.json() for f in it.reboot.blockers],
        "ram": [{"id": id, "kept": found.kept, "reason": found.reason} for id, found in it.ram],
        "engines": engines(it.examined),
        "error": error_json(it.examined.error) if it.examined.error else None,
    }


def reboot_check(it: RebootCheck) -> dict[str, Any]:
    """`cpr check --kexec --json`, but for status and exit code."""
    kernel = it.kexec
    return {
        "mode": "reboot",
        "kernel": {
            "image": kernel.image or None,
            "initrd": kernel.initrd or None,
            "release": kernel.release or None,
            "command_line": kernel.command_line,
        },
        "findings": [f.json() for f in it.host],
        "abandoned": [c.name or str(c.process.pid) for c in it.abandoned],
        "guests": [checked(e) for e in it.guests],
    }


def plan(it: Plan) -> dict[str, Any]:
    return {
        "engine": it.engine,
        "reason": it.reason,
        "passed_over": [{"engine": name, "reason": why} for name, why in it.passed_over],
        "ignored": list(it.ignored),
        "steps": [{"id": s.id, "text": s.describe(), "commit": s.commit, "blackout": s.blackout} for s in it.steps],
    }


def prepared(it: Prepared) -> dict[str, Any]:
    """`cpr update --dry-run --json`."""
    return {
        "run": None,
        "mode": "restart",
        "dry_run": True,
        "status": _status(int(it.exit_code)),
        "exit_code": int(it.exit_code),
        "guests": [{**checked(e), "plan": plan(e.plan) if e.plan else None} for e in it.guests],
    }


def updated(it: Update) -> dict[str, Any]:
    """`cpr update --json`."""
    return {
        "run": it.run_id,
        "mode": "restart",
        "status": _status(int(it.exit_code)),
        "exit_code": int(it.exit_code),
        "guests": [outcome(o) for o in it.outcomes],
    }


def departure(it: Departure) -> dict[str, Any]:
    """`cpr update --kexec --json`, in front of the jump."""
    known = {guest.pid: guest for guest in it.manifest.guests}
    guests = [{**outcome(o), **_lies(known[o.pid_before])} for o in it.update.outcomes]
    return {
        **updated(it.update),
        "mode": "reboot",
        "kernel_before": it.manifest.release_before,
        "kernel_after": it.manifest.release,
        "manifest": it.path,
        "restored_by": it.restored_by or None,
        "next": None if it.restored_by else "cpr restore",
        "guests": guests,
    }


def _lies(guest: SavedGuest) -> dict[str, Any]:
    """Where the two halves of a saved guest are."""
    return {
        "state": guest.state.path if guest.state else None,
        "state_bytes": guest.state.size if guest.state else None,
        "ram": [{"id": r.id, "size": r.size, "path": r.path or None, "volatile": r.volatile} for r in guest.ram],
        "ram_copy": str(guest.ram_copy),
    }


def outcome(it: Outcome) -> dict[str, Any]:
    return {
        "name": it.guest,
        "uuid": it.uuid,
        "status": str(it.status),
        "exit_code": int(it.exit_code),
        "where": it.where,
        "engine": it.engine or None,
        "pid_before": it.pid_before,
        "pid_after": it.pid_after,
        "runstate": it.runstate or None,
        "binary_before": binary(it.binary_before),
        "binary_after": binary(it.binary_after),
        "blackout_seconds": it.blackout_seconds,
        "total_seconds": round(it.total_seconds, 4),
        "findings": [f.json() for f in it.findings],
        "notes": list(it.notes),
        "error": it.error or None,
        "hint": it.hint or None,
    }


def started(it: Started) -> dict[str, Any]:
    """The guest of `cpr run --json`."""
    return {
        "name": it.name,
        "pid": it.pid,
        "qemu": it.qemu,
        "monitor": str(it.monitor),
        "log": it.log,
        "argv": list(it.argv),
        "notes": list(it.notes),
    }


def saved(it: Saved) -> dict[str, Any]:
    """`cpr save --json`."""
    guest, manifest = it.guest, it.manifest
    assert guest is not None
    assert manifest is not None
    return {
        "status": "saved",
        "exit_code": 0,
        "mode": str(manifest.mode),
        "guest": {"name": guest.name, "uuid": guest.uuid, "pid_before": guest.pid, "runstate": guest.runstate},
        **_lies(guest),
        "binary_before": binary(guest.binary_before),
        "binary_after": binary(guest.binary_after),
        "total_seconds": round(it.seconds, 4),
        "findings": [f.json() for f in it.examined.findings],
        "notes": list(it.notes),
    }


def run(records: tuple[Record, ...]) -> dict[str, Any]:
    """One run of `cpr runs --json`."""
    return {
        "run": records[0].run,
        "time": timestamp(records[0]),
        "mode": "restart",
        "guests": [journal(r, steps=False) for r in records],
    }


def journal(record: Record, *, steps: bool = True) -> dict[str, Any]:
    """One journal of `cpr log --json`."""
    header = record.header
    content: dict[str, Any] = {
        "guest": header.get("guest"),
        "engine": header.get("engine"),
        "binary_before": header.get("binary_before"),
        "binary_after": header.get("binary_after"),
        "open": record.open,
        "committed": record.committed,
        "outcome": record.outcome,
    }
    if steps:
        content["steps"] = [
            {**step, "state": record.steps.get(i), "time": record.times.get((i, "doing"))}
            for i, step in enumerate(header.get("steps", []))
        ]
        content["errors"] = list(record.errors)
    return content


def timestamp(record: Record) -> str:
    """When a run began, as RFC 3339."""
    return moment(float(record.header.get("time", 0)))


def reboot(it: Story) -> dict[str, Any]:
    """A reboot, or a save by hand, of `cpr runs --json` and `cpr log --json`."""
    manifest = it.manifest
    return {
        "run": manifest.run,
        "time": moment(manifest.time),
        "mode": "save" if it.by_hand else "reboot",
        "manifest": it.path,
        "kernel_before": manifest.release_before,
        "kernel_after": manifest.release or None,
        "phase": str(manifest.phase),
        "booted_since": not it.here,
        "open": it.open,
        "counts": {str(place): count for place, count in it.counts.items()},
        "worker": it.worker or None,
        "next": it.next or None,
        "guests": [saved_guest(it, guest) for guest in manifest.guests],
    }


def saved_guest(it: Story, guest: SavedGuest) -> dict[str, Any]:
    """A guest of a reboot."""
    restore = guest.restore
    return {
        "name": guest.name,
        "uuid": guest.uuid,
        "place": str(it.place(guest)),
        "pid_before": guest.pid,
        "pid_after": restore.pid or None,
        "runstate_before": guest.runstate,
        "binary_before": binary(guest.binary_before),
        "binary_after": binary(guest.binary_after),
        **_lies(guest),
        "attempts": restore.tries,
        "time": moment(restore.time) if restore.time else None,
        "error": restore.words or None,
    }


def verdict(code: Exit) -> dict[str, Any]:
    """What a look came to: nothing is blocked, something is, or could not be looked at."""
    known = {Exit.OK: "ok", Exit.WOULD_UPDATE: "ok", Exit.BLOCKED: "blocked"}
    return {"status": known.get(code, "error"), "exit_code": int(code)}


def _status(code: int) -> str:
    names = {
        0: "ok", 3: "blocked", 6: "rolled_back", 7: "needs_attention", 8: "differs", 9: "would_update", 75: "busy",
        130: "interrupted", 143: "interrupted",
    }  # fmt: skip
    return names.get(code, "error")
