"""The descriptor map: names that cannot be mistaken, hostile environments, and descriptors of a real process."""

from __future__ import annotations

import os
import random
import re
import subprocess
from pathlib import Path

import pytest

from cpr.engines import fdmap
from cpr.engines.fdmap import Entry, FdMap

AWKWARD = [
    "", "serial0", "compat_monitor0", "a:client", "a%3Aclient", "%", "%25", "_", "__", "___", "_3A", "a_", "_a", "a b",
    "ü", "日本", "\udcff", "a\udc80b", "=", "a=b", "a,b", "\n", "\x00", "-", "pc.ram", "client", "CPR_FD_",
    "Ａ", "٣", "x" * 300,
]  # fmt: skip
ALPHABET = "aZ09_:%=,.- \n\x00ü\udcff\udc80C3AF語"


def random_names(count: int) -> list[str]:
    chance = random.Random(20261121)  # noqa: S311 - the same every time
    return ["".join(chance.choices(ALPHABET, k=chance.randrange(9))) for _ in range(count)]


@pytest.mark.parametrize("name", AWKWARD)
def test_a_name_comes_back(name: str) -> None:
    assert fdmap.unescape(fdmap.escape(name)) == name
    assert re.fullmatch("[A-Za-z0-9_]*", fdmap.escape(name))
    assert fdmap.unquote(fdmap.quote(name)) == name


def test_random_names_come_back_and_share_nothing() -> None:
    names = {*AWKWARD, *random_names(20000)}
    names = {name for name in names if os.fsdecode(os.fsencode(name)) == name}
    assert len(names) > 10000
    words = {fdmap.escape(name) for name in names}
    assert len(words) == len(names)
    for name in names:
        assert fdmap.unescape(fdmap.escape(name)) == name
        assert fdmap.unquote(fdmap.quote(name)) == name


def test_kinds_of_names_share_nothing() -> None:
    """A label that looks like the end of another name does not become it."""
    labels = sorted({*AWKWARD, *random_names(2000)})
    made = [kind(label) for kind in (fdmap.chardev, fdmap.client, fdmap.pty, fdmap.ram, fdmap.vfio) for label in labels]
    made += [fdmap.STATE, *(fdmap.vnc(i) for i in range(20))]
    assert len(set(made)) == len(made)
    assert len({fdmap.vfio(a, b) for a in AWKWARD for b in AWKWARD}) == len(AWKWARD) ** 2


def test_plain_names_can_be_read() -> None:
    assert fdmap.client("serial0") == "chardev:serial0:client"
    assert fdmap.escape(fdmap.client("serial0")) == "chardev__serial0__client"
    assert fdmap.escape(fdmap.ram("pc.ram")) == "ram__pc_2Eram"
    assert fdmap.vnc(0) == "vnc:0"


@pytest.mark.parametrize("word", ["_41", "_3A", "_2e", "_", "a_", "_2", "a-b", "ü", "a b", "_zz", "a\n"])
def test_words_that_no_name_makes(word: str) -> None:
    """Each byte has one spelling, so a variable cannot be there twice in disguise."""
    with pytest.raises(ValueError, match="not an escaped name"):
        fdmap.unescape(word)


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(ValueError, match="surrogates"):
        fdmap.escape("\ud800")


def some_map() -> FdMap:
    names = [fdmap.STATE, fdmap.vnc(0), fdmap.ram("pc.ram"), *map(fdmap.client, AWKWARD)]
    return FdMap(run="20261120T101500-3f2a/42", entries={n: Entry(20 + i, i * 10**15) for i, n in enumerate(names)})


def test_a_map_comes_back() -> None:
    pairs = fdmap.encode(some_map())
    assert pairs[0] == ("CPR_RUN", "20261120T101500-3f2a/42")
    assert all(re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", key) for key, _ in pairs)
    back = fdmap.decode([("PATH", "/bin"), *pairs, ("CPR_FDX", "1"), ("QEMU_FD_serial0", "3"), ("CPR_PIDFILE", "/x")])
    assert (back.run, dict(back.entries)) == (some_map().run, dict(some_map().entries))


def test_two_names_may_share_a_descriptor() -> None:
    shared = FdMap(run="r1", entries={fdmap.ram("a"): Entry(3, 1), fdmap.ram("b"): Entry(3, 1)})
    assert dict(fdmap.decode(fdmap.encode(shared)).entries) == dict(shared.entries)


def test_no_map() -> None:
    assert dict(fdmap.decode([]).entries) == {}
    assert fdmap.decode([("PATH", "/bin")]).run == ""
    only = fdmap.decode([("CPR_RUN", "r1/42")])
    assert (only.run, dict(only.entries)) == ("r1/42", {})


@pytest.mark.parametrize(
    "bad",
    [
        FdMap(run="", entries={}),
        FdMap(run="a b", entries={}),
        FdMap(run="r1", entries={"": Entry(3, 1)}),
        FdMap(run="r1", entries={"a": Entry(-1, 1)}),
        FdMap(run="r1", entries={"a": Entry(1 << 31, 1)}),
        FdMap(run="r1", entries={"a": Entry(3, -1)}),
        FdMap(run="r1", entries={"a": Entry(3, 1 << 64)}),
        FdMap(run="r1", entries={"a": Entry(3, 1), "b": Entry(3, 2)}),
    ],
)
def test_what_could_not_be_read_back_is_not_written(bad: FdMap) -> None:
    with pytest.raises(ValueError):
        fdmap.encode(bad)


VALUES = [
    "", "3", "3,", ",1", "3,1,", "3,1,2", " 3,1", "3, 1", "3,1\n", "+3,1", "-3,1", "03,1", "3,01", "3.0,1", "0x3,1",
    "٣,1", "3,٣", "2147483648,1", "99999999999999,1", "3,18446744073709551616", "9" * 5000 + ",1", "3,1\x00", "nan,1",
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES)
def test_hostile_values(value: str) -> None:
    with pytest.raises(ValueError, match="no number and inode"):
        fdmap.decode([("CPR_RUN", "r1"), ("CPR_FD_state", value)])


@pytest.mark.parametrize(
    "pairs",
    [
        [("CPR_FD_state", "3,1")],
        [("CPR_RUN", "r1"), ("CPR_FD_", "3,1")],
        [("CPR_RUN", "r1"), ("CPR_FD_a", "3,1"), ("CPR_FD_a", "3,1")],
        [("CPR_RUN", "r1"), ("CPR_FD_a", "3,1"), ("CPR_FD_b", "3,2")],
        [("CPR_RUN", "r1"), ("CPR_FD__41", "3,1")],
        [("CPR_RUN", "r1"), ("CPR_RUN", "r1"), ("CPR_FD_a", "3,1")],
        [("CPR_RUN", ""), ("CPR_FD_a", "3,1")],
        [("CPR_RUN", "r1\n"), ("CPR_FD_a", "3,1")],
        [("CPR_RUN", "../" * 60), ("CPR_FD_a", "3,1")],
        [("CPR_RUN", "r1"), *((f"CPR_FD_a{i}", f"{i},1") for i in range(fdmap.MOST + 1))],
    ],
)
def test_hostile_environments(pairs: list[tuple[str, str]]) -> None:
    with pytest.raises(ValueError):
        fdmap.decode(pairs)


def test_random_environments_raise_nothing_but_value_errors() -> None:
    chance = random.Random(7)  # noqa: S311 - the same every time
    read = 0
    for _ in range(5000):
        pairs = [("CPR_RUN", "r1")]
        for _ in range(chance.randrange(4)):
            key = "CPR_FD_" + "".join(chance.choices("aA_4C:\n\udcff3", k=chance.randrange(6)))
            pairs.append((key, "".join(chance.choices("0123,-x", k=chance.randrange(7)))))
        try:
            found = fdmap.decode(pairs)
        except ValueError:
            continue
        read += 1
        assert dict(fdmap.decode(fdmap.encode(found)).entries) == dict(found.entries)
    assert read > 500


def test_a_number_counts_only_with_its_inode() -> None:
    known = FdMap(run="r1", entries={"a": Entry(5, 10), "b": Entry(6, 11), "c": Entry(7, 12)})
    found = fdmap.compare(known, {5: 10, 6: 99, 8: 12})
    assert dict(found.good) == {"a": 5}
    assert dict(found.wrong) == {
        "b": "descriptor 6 is another file (inode 99, not 11)",
        "c": "descriptor 7 is not open",
    }


def test_descriptors_of_a_process(tmp_path: Path) -> None:
    with open(tmp_path / "kept", "w") as kept, open(tmp_path / "other", "w") as other:
        with subprocess.Popen(["sleep", "60"], pass_fds=[kept.fileno(), other.fileno()]) as child:
            try:
                inode = os.fstat(kept.fileno()).st_ino
                entries = {
                    fdmap.STATE: Entry(kept.fileno(), inode),
                    fdmap.vnc(0): Entry(other.fileno(), inode),
                    fdmap.vnc(1): Entry(1000, inode),
                }
                found = fdmap.verify(child.pid, FdMap(run="r1", entries=entries))
                assert dict(found.good) == {"state": kept.fileno()}
                assert set(found.wrong) == {"vnc:0", "vnc:1"}
            finally:
                child.kill()
    with pytest.raises(ProcessLookupError):
        fdmap.verify(child.pid, FdMap(run="r1", entries=entries))
