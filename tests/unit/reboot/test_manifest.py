"""The manifest: written and read again, cut, damaged, forged, of other versions."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cpr.errors import Exit, ManifestError, NotFound
from cpr.reboot import manifest as m
from cpr.reboot.manifest import Restore, Result, namespaces_of_its_own, read, with_restore, write
from tests.unit.reboot.saved import guest, likeness, manifest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def directory(tmp_path: Path) -> str:
    return str(tmp_path / "cpr")


def resealed(change: Callable[[dict[str, Any]], None]) -> bytes:
    """A manifest whose body was changed, with the right checksum."""
    body = json.loads(m.encode(manifest()))["body"]
    change(body)
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    document = {"format": m.FORMAT, "sha256": hashlib.sha256(text.encode()).hexdigest(), "body": body}
    return json.dumps(document).encode()


def test_what_is_written_is_read(directory: str) -> None:
    written = manifest()
    path = write(directory, written)
    assert read(directory) == written
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
    assert os.listdir(directory) == ["manifest.json"]
    assert read(directory).guests[0].likeness.argv[-1] == "odd\udcff"


def test_what_became_of_a_guest_is_written_over_it(directory: str) -> None:
    first = manifest()
    write(directory, first)
    assert [g.label for g in first.open] == ["web1", "db1"]
    second = with_restore(first, 4343, Restore(result=Result.RESTORED, time=5.0, pid=99, tries=1))
    third = with_restore(second, 4242, Restore(words="dax0.0 is missing", time=6.0, tries=2))
    write(directory, third)
    again = read(directory)
    assert again == third
    assert [(g.label, g.restore.words) for g in again.open] == [("web1", "dax0.0 is missing")]
    with pytest.raises(NotFound):
        with_restore(first, 1, Restore())


def test_there_is_none(directory: str) -> None:
    for _ in range(2):
        with pytest.raises(NotFound, match="no manifest") as caught:
            read(directory)
        assert caught.value.code is Exit.NOT_FOUND
        m.make_directory(directory)


def test_a_write_that_fails_leaves_the_old_one(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake fsync: the disk is full or breaks."""
    write(directory, manifest())

    def broken(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="No space"):
        write(directory, manifest(guest()))
    monkeypatch.undo()
    assert len(read(directory).guests) == 2
    assert os.listdir(directory) == ["manifest.json"]


def test_every_truncation_is_noticed() -> None:
    data = m.encode(manifest(guest()))
    for length in {*range(0, len(data) - 2, 211), 0, 1, len(data) - 3}:
        with pytest.raises(ManifestError):
            m.decode(data[:length])


def test_every_flipped_byte_is_noticed_or_means_nothing() -> None:
    original = manifest(guest())
    data = m.encode(original)
    for position in range(0, len(data), 97):
        flipped = bytearray(data)
        flipped[position] ^= 1
        with contextlib.suppress(ManifestError):
            assert m.decode(bytes(flipped)) == original


def test_a_damaged_manifest_is_as_good_as_none_and_says_so() -> None:
    with pytest.raises(ManifestError) as caught:
        m.decode(m.encode(manifest())[:-20])
    assert caught.value.code is Exit.NOT_FOUND
    assert "not touched" in caught.value.where


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "cut short"),
        (b"null", "format"),
        (b"[]", "format"),
        (b"[" * 100_000, "cut short"),
        (b"\xff\xfe", "cut short"),
        (b'{"format": "cpr.journal/1"}', "cpr.journal/1"),
        (b'{"format": "cpr.manifest/2", "sha256": "", "body": {}}', "cpr.manifest/2"),
        (b'{"format": "cpr.manifest/1"}', "checksum"),
        (b'{"format": "cpr.manifest/1", "sha256": 5, "body": {}}', "checksum"),
    ],
)
def test_what_is_no_manifest(data: bytes, words: str) -> None:
    with pytest.raises(ManifestError, match=words) as caught:
        m.decode(data)
    assert caught.value.hint


def test_another_version_is_told_apart_from_damage() -> None:
    with pytest.raises(ManifestError) as caught:
        m.decode(b'{"format": "cpr.manifest/7"}')
    assert "release of cpr" in caught.value.hint


def set_in(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(body: Any) -> None:
        for step in path[:-1]:
            body = body[step]
        body[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("boot_id",), 5, "body.boot_id"),
        (("guests",), {}, "body.guests"),
        (("guests", 0), [], r"guests\[0\]"),
        (("guests", 0, "pid"), "4242", r"guests\[0\].pid"),
        (("guests", 0, "pid"), True, r"guests\[0\].pid"),
        (("guests", 0, "pid"), 4343, "twice"),
        (("guests", 0, "state", "size"), 1.5, "state.size"),
        (("guests", 0, "ram", 0, "storage", "kind"), "cheese", "cheese"),
        (("guests", 0, "ram", 0, "storage", "device"), [1, 2, 3], "3 members"),
        (("guests", 0, "ram", 0, "stamp", "digests"), ["a"] * 9, "9 digests"),
        (("guests", 0, "ram", 0, "stamp"), [], "stamp"),
        (("guests", 0, "likeness", "limits"), [], "likeness.limits"),
        (("guests", 0, "likeness", "limits", "RLIMIT_CORE"), [0], "RLIMIT_CORE"),
        (("guests", 0, "likeness", "affinity"), ["0"], "affinity"),
        (("guests", 0, "restore", "result"), "fine", "fine"),
        (("time",), None, "body.time"),
    ],
)
def test_wrong_types_are_named(path: tuple[str | int, ...], value: Any, words: str) -> None:
    with pytest.raises(ManifestError, match=words):
        m.decode(resealed(set_in(*path, to=value)))


@pytest.mark.parametrize("key", ["run", "boot_id", "guests", "time"])
def test_what_is_missing_is_named(key: str) -> None:
    with pytest.raises(ManifestError, match=f"no {key}"):
        m.decode(resealed(lambda body: body.pop(key)))


def test_a_later_addition_is_passed_over() -> None:
    def add(body: dict[str, Any]) -> None:
        body["weather"] = {"wind": 3}
        body["guests"][0]["colour"] = "blue"
        body["guests"][0]["ram"][0]["storage"]["new"] = [1]
        body["guests"][0]["likeness"]["new"] = None

    assert m.decode(resealed(add)) == manifest()


def test_a_field_with_a_default_may_be_missing() -> None:
    found = m.decode(resealed(lambda body: body["guests"][0].pop("vfio")))
    assert found.guests[0].vfio == ()


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_manifest_that_others_may_write(directory: str, mode: int) -> None:
    os.chmod(write(directory, manifest()), mode)
    with pytest.raises(ManifestError, match="written by others"):
        read(directory)


def test_a_directory_that_others_may_write(directory: str) -> None:
    write(directory, manifest())
    os.chmod(directory, 0o777)
    with pytest.raises(ManifestError, match="written by others"):
        read(directory)
    with pytest.raises(ManifestError, match="ours alone"):
        write(directory, manifest())


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")
def test_somebody_elses_manifest(directory: str) -> None:
    path = write(directory, manifest())
    os.chown(path, 1234, 0)
    with pytest.raises(ManifestError, match="uid 1234"):
        read(directory)
    os.chown(path, 0, 0)
    os.chown(directory, 1234, 0)
    with pytest.raises(ManifestError, match="uid 1234"):
        read(directory)


def test_planted_files(directory: str, tmp_path: Path) -> None:
    path = write(directory, manifest())
    os.rename(path, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", path)
    with pytest.raises(ManifestError):
        read(directory)
    write(directory, manifest(guest()))
    assert not os.path.islink(path)
    assert len(json.loads((tmp_path / "elsewhere").read_bytes())["body"]["guests"]) == 2, "the link was not followed"
    os.unlink(path)
    os.mkfifo(path)
    with pytest.raises(ManifestError, match="not what it should be"):
        read(directory)
    os.unlink(path)
    os.mkdir(path)
    with pytest.raises(ManifestError, match="not what it should be"):
        read(directory)


def test_one_that_is_too_long(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(directory, manifest())
    monkeypatch.setattr(m, "MAX_BYTES", 100)
    with pytest.raises(ManifestError, match="more than"):
        read(directory)


def test_namespaces_of_its_own() -> None:
    own = likeness()
    assert namespaces_of_its_own(own, own.namespaces) == ()
    other = {**own.namespaces, "net": (0, 0), "mnt": (0, 1)}
    assert namespaces_of_its_own(own, other) == ("mnt", "net")
    assert namespaces_of_its_own(replace(own, namespaces={"odd": (1, 1)}), other) == ()


def test_what_became_of_a_guest_is_noted_on_disk(directory: str) -> None:
    path = write(directory, manifest())
    before = time.time()
    known = m.noted(path, manifest(), 4343, result=Result.LOADED, pid=7)
    assert m.read_file(path) == known
    first, second = known.guests
    assert first.restore == Restore()
    assert (second.restore.result, second.restore.pid) == (Result.LOADED, 7)
    assert before <= second.restore.time <= time.time()
    again = m.noted(path, known, 4343, result=Result.RESTORED)
    assert again.guests[1].restore.pid == 7, "what is not named stays"
    with pytest.raises(NotFound):
        m.noted(path, known, 1, result=Result.RESTORED)


def test_ram_that_went_into_the_state(directory: str) -> None:
    """It has no stamp: a release that does not know `volatile` refuses the guest for that."""
    plain = guest()
    volatile = replace(plain.ram[0], volatile=True, stamp=None, path="")
    copied = replace(plain, ram=(volatile,), ram_copy=m.RamCopy.MAPPED, state_path="/srv/ram/x.state")
    write(directory, manifest(copied))
    assert read(directory).guests == (copied,)
    body = json.loads(m.encode(manifest(plain)))["body"]["guests"][0]
    assert (body["ram_copy"], body["ram"][0]["volatile"]) == ("none", False)
