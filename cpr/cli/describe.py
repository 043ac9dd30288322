"""The same in words: lines of text for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpr.checks.registry import blockers
from cpr.checks.words import size, some
from cpr.cli.output import colored, facts, finding_lines, moment, table
from cpr.model import Severity
from cpr.progress import milliseconds
from cpr.reboot.story import Place

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cpr.app import Departure, Examined, Modes, Prepared, RebootCheck, Saved, Story, Update
    from cpr.journal import Record
    from cpr.model import Binary, Guest, Outcome, Plan
    from cpr.reboot.manifest import SavedGuest


def list_lines(guests: Iterable[Examined]) -> list[str]:
    """`cpr list`."""
    rows = [
        (
            str(e.candidate.process.pid),
            e.candidate.name or "-",
            _version(e.candidate.binary if e.guest is None else e.guest.binary),
            _installed(e),
            {True: "yes", False: "no", None: "?"}[e.outdated],
            ram_summary(e.guest) if e.guest else "?",
            _engine(e),
        )
        for e in guests
    ]
    if not rows:
        return ["no guests on this host"]
    lines = table(("PID", "NAME", "RUNNING", "INSTALLED", "OUTDATED", "RAM", "ENGINE"), rows)
    hidden = [f"{e.label}: {some(what)}" for e in guests if (what := _unreadable(e))]
    return [*lines, *(f"not readable without privileges: {text}" for text in hidden)]


def _unreadable(examined: Examined) -> tuple[str, ...]:
    return examined.guest.unreadable if examined.guest else examined.candidate.unreadable


def _version(binary: Binary | None) -> str:
    if binary is None:
        return "none"
    gone = " (deleted)" if binary.deleted else " (replaced)" if binary.replaced else ""
    return (binary.version or "?") + gone


def _installed(examined: Examined) -> str:
    if examined.target is not None:
        return _version(examined.target.binary)
    return _version(examined.guest.installed) if examined.guest else "?"


def ram_summary(guest: Guest) -> str:
    """`4 GiB memfd`, the backings once each; private memory is said so."""
    kinds = dict.fromkeys(f"{b.backing}{'' if b.shared else ' private'}" for b in guest.ram)
    return f"{size(sum(b.size for b in guest.ram))} {'+'.join(kinds)}".strip()


def _engine(examined: Examined) -> str:
    if examined.plan is not None:
        return examined.plan.engine
    if examined.blockers:
        return f"none: {some(dict.fromkeys(f.check for f in examined.blockers), 3)}"
    return f"?: {examined.error.message}" if examined.error else "?"


def check_lines(examined: Iterable[Examined]) -> list[str]:
    """`cpr check`."""
    lines: list[str] = []
    for one in examined:
        lines += [*([""] if lines else []), f"{headline(one)}: {verdict(one)}"]
        lines += finding_lines(one.findings)
    return lines


def headline(examined: Examined) -> str:
    """The guest and where it would go."""
    running = examined.guest.binary if examined.guest else examined.candidate.binary
    name = examined.guest.label if examined.guest else f"{examined.label} (pid {examined.candidate.process.pid})"
    there = f" -> {examined.target.binary.version or '?'}" if examined.target else ""
    return colored(name, "bold") + f", QEMU {running.version or '?'}{there}"


def verdict(examined: Examined) -> str:
    """Whether it can be updated."""
    if examined.plan is not None:
        heard = [f for f in examined.findings if f.severity is Severity.WARNING]
        same = "; it runs this very QEMU already" if examined.outdated is False else ""
        return f"can be updated with {examined.plan.engine}" + (f", {len(heard)} warning(s)" if heard else "") + same
    if examined.blockers:
        return f"cannot be updated, {len(examined.blockers)} blocker(s)"
    if examined.error is not None:
        return f"{examined.error.message}" + (f" (hint: {examined.error.hint})" if examined.error.hint else "")
    return "nothing to do: it runs the installed QEMU"


def show_lines(examined: Examined) -> list[str]:
    """`cpr show`."""
    guest = examined.guest
    assert guest is not None
    lines = [headline(examined)]
    lines += facts(
        {
            "uuid": guest.uuid,
            "state": guest.runstate,
            "machine": f"{guest.machine}, {guest.accelerator}, {len(guest.vcpus)} vCPU(s)",
            "running": _binary(guest.binary),
            "installed": _binary(guest.installed),
            "monitor": f"{guest.monitor or 'none'}{', held by a client' if guest.monitor_held else ''}",
            "user": str(guest.uid),
            "cgroup": some(guest.cgroups),
            "supervised by": some(f"{s.kind} {s.who}".strip() for s in guest.supervisors),
            "migration": some(guest.blocked_reasons) and f"blocked: {some(guest.blocked_reasons)}",
            "unreadable": some(guest.unreadable),
        }
    )
    lines += _section("memory", (
        (b.id, size(b.size), b.qom_type, f"{b.backing}, {'shared' if b.shared else 'private'}",
         b.path or (f"fd {b.fd}" if b.fd is not None else "-"))
        for b in guest.ram
    ))  # fmt: skip
    lines += _section("devices", ((d.id, d.type) for d in guest.devices))
    lines += _section("drives", ((c.device, c.node, " <- ".join(c.files) or "no medium") for c in guest.chains))
    lines += _section("network", ((n.id, n.type, n.ifname or "-") for n in guest.netdevs))
    lines += _section("character devices", (
        (c.label, c.backend, (c.monitor and f"monitor ({c.monitor})") or "-", "connected" if c.connected else "-",
         c.filename)
        for c in guest.chardevs
    ))  # fmt: skip
    lines += _section("displays", (("vnc", v.id, v.auth, f"{v.clients} client(s)") for v in guest.vnc))
    lines += _section("descriptors", ((str(f.number), f.kind, f.owner or "-", f.target) for f in guest.open_files))
    lines += ["", "findings:" if examined.findings else "findings: none", *finding_lines(examined.findings)]
    return [*lines, "", f"next: {next_command(examined)}"]


def _binary(binary: Binary | None) -> str:
    if binary is None:
        return "none"
    package = f", {binary.package}" if binary.package else ""
    return f"{_version(binary)}{package}, {binary.path}"


def _section(title: str, rows: Iterable[tuple[str, ...]]) -> list[str]:
    found = list(rows)
    if not found:
        return []
    return ["", f"{title}:", *(f"  {line}" for line in table(found[0], found[1:]))]


def next_command(examined: Examined) -> str:
    """What somebody who has read this would do now."""
    pid = examined.candidate.process.pid
    name = examined.candidate.name or str(pid)
    if examined.plan is not None and examined.outdated is False:
        return "cpr list  (this guest runs the installed QEMU already)"
    if examined.plan is not None:
        return f"cpr update --dry-run {name}, then cpr update {name}"
    return f"cpr check {name}  (after what stands in the way is gone)"


def info_lines(modes: Modes) -> list[str]:
    """`cpr info`: the modes, and the blockers of those that are missing."""
    lines = [headline(modes.examined)]
    lines.append(f"  restart: {', '.join(modes.restart) or 'no'}")
    for name, findings in modes.examined.engines:
        lines += finding_lines(blockers(findings, name), "    ")
    if not modes.examined.engines and modes.examined.error is not None:
        lines.append(f"    {modes.examined.error.message}")
    lines.append(f"  reboot: {'yes' if modes.can_reboot else 'no'} ({modes.words})")
    return lines + finding_lines(modes.reboot.blockers, "    ")


def reboot_check_lines(it: RebootCheck) -> list[str]:
    """`cpr check --kexec`: the kernel and the host, then each guest."""
    kernel = it.kexec
    lines = [f"jump into {colored(kernel.release or kernel.image or 'no kernel', 'bold')}"]
    lines += facts({"kernel": kernel.image, "initrd": kernel.initrd, "command line": kernel.command_line})
    lines += finding_lines(it.host)
    for one in it.guests:
        lines += ["", f"{headline(one)}: {reboot_verdict(one)}", *finding_lines(one.findings)]
    lines += [f"\n{c.name or c.process.pid}: will be lost, as asked (--abandon)" for c in it.abandoned]
    if not it.guests:
        lines += ["", "no guests to save"]
    return [*lines, "", "this host can go on with a new kernel under its guests" if it.possible else "nothing is saved"]


def reboot_verdict(examined: Examined) -> str:
    """Whether it can be saved and restored."""
    if examined.blockers:
        return f"cannot be saved, {len(examined.blockers)} blocker(s)"
    if examined.error is not None:
        return f"{examined.error.message}" + (f" (hint: {examined.error.hint})" if examined.error.hint else "")
    heard = [f for f in examined.findings if f.severity is Severity.WARNING]
    return "can be saved, and restored after the boot" + (f", {len(heard)} warning(s)" if heard else "")


def plan_lines(examined: Examined) -> list[str]:
    """A plan, the commit step marked."""
    assert examined.plan is not None
    plan: Plan = examined.plan
    lines = [f"{headline(examined)}, engine {plan.engine} ({plan.reason})"]
    lines += [f"  passed over: {name}: {why}" for name, why in plan.passed_over]
    for number, step in enumerate(plan.steps, 1):
        marks = " [vCPUs stand still]" if step.blackout else ""
        marks += colored("  <- commit: no way back from here", "bold") if step.commit else ""
        lines.append(f"  {number:2}. {step.describe()}{marks}")
    return lines + finding_lines(plan.findings)


def prepared_lines(prepared: Prepared) -> list[str]:
    """What an update would do to each guest."""
    lines: list[str] = []
    for one in prepared.guests:
        lines += plan_lines(one) if one.plan else [f"{headline(one)}: {verdict(one)}", *finding_lines(one.findings)]
    return lines or ["no guests on this host"]


def outcome_line(outcome: Outcome) -> str:
    """`web1: updated by handover, 7.2.22 -> 11.1.3, pid 4242 -> 5151, paused 4.1 ms`."""
    parts = [f"{outcome.guest}: {str(outcome.status).replace('_', ' ')}"]
    if outcome.pid_after and outcome.pid_after != outcome.pid_before:
        before, after = outcome.binary_before, outcome.binary_after
        parts[0] += f" by {outcome.engine}" if outcome.engine else ""
        parts.append(f"QEMU {before.version if before else '?'} -> {after.version if after else '?'}")
        parts.append(f"pid {outcome.pid_before} -> {outcome.pid_after}")
    if outcome.blackout_seconds is not None:
        parts.append(f"paused {milliseconds(outcome.blackout_seconds)}")
    if outcome.error:
        parts.append(outcome.error)
    return ", ".join(parts)


def update_lines(update: Update) -> list[str]:
    """What became of each guest, and where it is now."""
    lines = []
    for one in update.outcomes:
        lines.append(outcome_line(one))
        lines += [f"  now: {one.where}"] if one.error or one.exit_code else []
        lines += [f"  hint: {one.hint}"] if one.hint else []
        lines += [f"  {text}" for text in one.notes]
    return lines or ["nothing to do"]


def departure_lines(it: Departure) -> list[str]:
    """`cpr update --kexec`, before the jump: where every guest is, and how it comes back."""
    manifest = it.manifest
    lines: list[str] = []
    notes = {outcome.pid_before: outcome.notes for outcome in it.update.outcomes}
    for guest in manifest.guests:
        lines += [f"{guest.label}: saved", f"  now: it runs nowhere; {_lies(guest)}"]
        lines += [f"  {text}" for text in notes.get(guest.pid, ())]
    back = it.restored_by or "`cpr restore`"
    way = f"from {manifest.release_before} into {manifest.release}"
    lines.append(f"the host jumps {way}; there {back} brings them back")
    return [*lines, f"cpr log {manifest.run} tells how they stand"]


def _lies(guest: SavedGuest) -> str:
    """Where the two halves of a saved guest are."""
    state = f"its state is in {guest.state.path} ({size(guest.state.size)})" if guest.state else "it has no state"
    if any(r.volatile for r in guest.ram):
        return f"{state}, with all of its RAM"
    return f"{state}, its RAM in {some([r.path for r in guest.ram])}"


def saved_line(it: Saved) -> str:
    """`cpr save`."""
    guest = it.guest
    assert guest is not None
    state = size(guest.state.size) if guest.state else "?"
    if any(r.volatile for r in guest.ram):
        where = f"with its RAM to {guest.state_path} ({state})"
    else:
        where = f"to {it.path} ({state}), its RAM stays in {some([r.path for r in guest.ram])}"
    return f"{guest.label}: saved {where}; cpr load {it.path} goes on"


def run_row(record: Record) -> tuple[str, ...]:
    """A line of `cpr runs`."""
    header = record.header
    result = str((record.outcome or {}).get("status", "open: cpr recover ends it")).replace("_", " ")
    return (
        record.run,
        str(header["guest"].get("name") or record.pid),
        str(header.get("engine", "")),
        str((header.get("binary_before") or {}).get("version") or "?"),
        str((header.get("binary_after") or {}).get("version") or "?"),
        result,
    )


def journal_lines(record: Record) -> list[str]:
    """`cpr log`: one guest of a run."""
    run, guest, engine, before, after, result = run_row(record)
    lines = [f"run {run}: {guest} (pid {record.pid}), {engine}, QEMU {before} -> {after}: {result}"]
    for index, step in enumerate(record.header.get("steps", [])):
        began, ended = record.times.get((index, "doing")), record.times.get((index, "done"))
        took = milliseconds(ended - began) if began is not None and ended is not None else "-"
        mark = "  <- commit" if step.get("commit") else ""
        lines.append(f"  {record.steps.get(index, 'not reached'):11}  {took:>8}  {step.get('text', '')}{mark}")
    lines += [f"  error: {text}" for text in record.errors]
    if record.outcome and record.outcome.get("where"):
        lines.append(f"  then: {record.outcome['where']}")
    return lines


def reboot_row(it: Story) -> tuple[str, ...]:
    """A line of `cpr runs`: all guests of a reboot, or the one that was saved by hand."""
    manifest = it.manifest
    guests = some([g.label for g in manifest.guests], 3)
    result = standing(it)
    if it.worker:
        result = f"{it.worker} is working on it"
    elif it.next:
        result += f": {it.next}"
    if it.by_hand and manifest.guests:
        before, after = manifest.guests[0].binary_before, manifest.guests[0].binary_after
        return (manifest.run, guests, "save", before.version or "?", after.version or "?", result)
    return (manifest.run, guests, "reboot", manifest.release_before, manifest.release, result)


def standing(it: Story) -> str:
    """`2 back, 1 waiting`."""
    return ", ".join(f"{count} {str(place).replace('_', ' ')}" for place, count in it.counts.items())


def reboot_lines(it: Story) -> list[str]:
    """`cpr log`: a reboot, or a save by hand."""
    manifest = it.manifest
    what = f"saved to {it.file}" if it.by_hand else f"kernel {manifest.release_before} -> {manifest.release}"
    booted = "" if it.here else ", the host was booted since"
    lines = [f"run {manifest.run}: {what}, {moment(manifest.time)}, {manifest.phase}{booted}: {standing(it)}"]
    for guest in manifest.guests:
        versions = f"QEMU {guest.binary_before.version or '?'} -> {guest.binary_after.version or '?'}"
        lines.append(f"  {guest.label} (pid {guest.pid}), {versions}: {_place_words(it, guest)}")
        if guest.restore.words:
            lines.append(f"    {guest.restore.words}")
        if it.place(guest) is Place.WAITING:
            lines.append(f"    {_lies(guest)}")
    if it.worker:
        lines.append(f"  now: {it.worker} is working on it")
    return [*lines, *([f"  next: {it.next}"] if it.next else [])]


def _place_words(it: Story, guest: SavedGuest) -> str:
    place, restore = it.place(guest), guest.restore
    words = str(place).replace("_", " ")
    if place in (Place.BACK, Place.LOADED):
        words += f" as pid {restore.pid}"
    elif restore.tries:
        words += f", {restore.tries} attempt(s)"
    return words + (f", {moment(restore.time)}" if restore.time else "")
