"""What is said in front of the jump: where every guest is, and how it comes back."""

from __future__ import annotations

from dataclasses import replace

from cpr.app import Departure, Update
from cpr.app.reboot import SAVED
from cpr.cli import describe, documents
from cpr.model import Outcome, Status
from cpr.reboot.manifest import Phase
from tests.unit.reboot.saved import guest, manifest

KNOWN = replace(manifest(guest(), guest(4343, "db1")), phase=Phase.JUMPING)
OUTCOMES = tuple(
    Outcome(guest=g.label, uuid=g.uuid, status=Status.SAVED, exit_code=0, where=SAVED, pid_before=g.pid, notes=("n",))
    for g in KNOWN.guests
)
PATH = "/var/lib/cpr/reboot/20261120T101500-3f2a/manifest.json"


def departure(restored_by: str) -> Departure:
    return Departure(
        update=Update(run_id=KNOWN.run, outcomes=OUTCOMES), manifest=KNOWN, path=PATH, restored_by=restored_by
    )


def test_in_words() -> None:
    lines = describe.departure_lines(departure("cpr-restore.service"))
    assert lines[:3] == [
        "web1: saved",
        "  now: it runs nowhere; its state is in /var/lib/cpr/web1.state (293.0 KiB), its RAM in /dev/dax0.0",
        "  n",
    ]
    assert lines[-2:] == [
        "the host jumps from 6.12.8 into 7.2.1; there cpr-restore.service brings them back",
        "cpr log 20261120T101500-3f2a tells how they stand",
    ]
    assert "`cpr restore` brings them back" in "\n".join(describe.departure_lines(departure("")))


def test_as_a_document() -> None:
    document = documents.departure(departure("cpr-restore.service"))
    assert (document["run"], document["mode"], document["status"]) == (KNOWN.run, "reboot", "ok")
    assert (document["kernel_before"], document["kernel_after"], document["manifest"]) == ("6.12.8", "7.2.1", PATH)
    assert (document["restored_by"], document["next"]) == ("cpr-restore.service", None)
    first, second = document["guests"]
    assert (first["name"], first["status"], first["pid_before"], second["name"]) == ("web1", "saved", 4242, "db1")
    assert (first["state"], first["state_bytes"]) == ("/var/lib/cpr/web1.state", 300_000)
    assert first["ram"] == [{"id": "ram0", "size": 8192, "path": "/dev/dax0.0", "volatile": False}]
    by_hand = documents.departure(departure(""))
    assert (by_hand["restored_by"], by_hand["next"]) == (None, "cpr restore")
