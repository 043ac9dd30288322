"""Kernel command lines: words, numbers, and the memory that memmap= makes persistent."""

from __future__ import annotations

import pytest

from cpr.kernelargs import arguments, exposed_ranges, memmap_word, memparse, persistent_ranges, words

MIB = 1 << 20
GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("768M!1G", (768 * MIB, "!1G")),
        ("0x30000000!", (768 * MIB, "!")),
        ("0X10k", (16 << 10, "")),
        ("1g", (GIB, "")),
        ("2T", (2 << 40, "")),
        ("4096", (4096, "")),
        ("010", (8, "")),
        ("08M", (0, "8M")),
        ("0", (0, "")),
        ("1E!", (1 << 60, "!")),
    ],
)
def test_memparse(text: str, expected: tuple[int, str]) -> None:
    assert memparse(text) == expected


@pytest.mark.parametrize("text", ["", "!1G", "M", "-1", "x10"])
def test_memparse_of_what_is_no_number(text: str) -> None:
    with pytest.raises(ValueError, match="not a number"):
        memparse(text)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", ()),
        ("root=/dev/vda ro quiet", ()),
        ("ro memmap=768M!1G quiet", ((GIB, 768 * MIB),)),
        ("memmap=0x30000000!0x40000000", ((GIB, 768 * MIB),)),
        ("memmap=805306368!1073741824", ((GIB, 768 * MIB),)),
        ("memmap=512M!4G memmap=512M!8G", ((4 * GIB, 512 * MIB), (8 * GIB, 512 * MIB))),
        ("memmap=512M!8G,512M!4G", ((4 * GIB, 512 * MIB), (8 * GIB, 512 * MIB))),
        ("memmap=1G!4G,1G!5G", ((4 * GIB, 2 * GIB),)),
        ("memmap=2G!4G memmap=1G!4G", ((4 * GIB, 2 * GIB),)),
        ("memmap=64K$0x18690000,1G!4G", ((4 * GIB, GIB),)),
        ("memmap=1G@4G memmap=1G#4G memmap=1G$4G", ()),
        ("memmap=1G!4G memmap=exactmap memmap=1G!8G", ((8 * GIB, GIB),)),
        ('memmap="1G!4G"', ((4 * GIB, GIB),)),
        ('"memmap=1G!4G"', ((4 * GIB, GIB),)),
        ('dyndbg="file a +p; memmap=1G!4G"', ()),
        ("init=/bin/sh -- memmap=1G!4G", ()),
        ("memmap=0!4G memmap=!4G memmap=1G! memmap memmap= memmap=nonsense", ()),
        ("xmemmap=1G!4G mem=4G MEMMAP=1G!4G", ()),
    ],
)
def test_persistent_ranges(line: str, expected: tuple[tuple[int, int], ...]) -> None:
    assert persistent_ranges(line) == expected


def test_words_and_arguments() -> None:
    line = 'a  b="c d" "e=f g"\tquiet -- x=1\n'
    assert words(line) == ("a", 'b="c d"', '"e=f g"', "quiet", "--", "x=1")
    assert arguments(line) == (("a", ""), ("b", "c d"), ("e", "f g"), ("quiet", ""))


FOUR = "memmap=1G!10G memmap=1G!12G memmap=1G!14G,1G!16G"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ro quiet", ()),
        ("memmap=1G!4G", ()),
        (FOUR, ()),
        (f"{FOUR} memmap=1G!4G", ((4 * GIB, GIB),)),
        (f"{FOUR} memmap=1G!4G,1G!6G", ((4 * GIB, GIB), (6 * GIB, GIB))),
        (f"{FOUR},1G!4G", ()),
        (f"{FOUR},1G!4G memmap=1G!6G", ()),
        (f"{FOUR} memmap=1G!4G nokaslr", ()),
        (f"nokaslr {FOUR} memmap=1G!4G", ()),
        (f"{FOUR} memmap=1G!4G -- nokaslr", ((4 * GIB, GIB),)),
        (f"memmap=64K$0x18690000 {FOUR}", ()),
        (f"memmap=64K@0x18690000 {FOUR}", ()),
        (f"memmap=64K$0x18690000,64K#1M {FOUR}", ((14 * GIB, GIB), (16 * GIB, GIB))),
        (f"memmap=8G memmap=2G@4G {FOUR}", ()),
        ("memmap=exactmap,1G!4G", ((4 * GIB, GIB),)),
        ("memmap=nonsense,1G!4G", ((4 * GIB, GIB),)),
    ],
)
def test_exposed_ranges(line: str, expected: tuple[tuple[int, int], ...]) -> None:
    assert exposed_ranges(line) == expected


@pytest.mark.parametrize(
    ("start", "size", "word"),
    [
        (GIB, 768 * MIB, "memmap=768M!1G"),
        (0x40001000, 0x800, "memmap=2K!1048580K"),
        (0x40001001, 1, "memmap=0x1!0x40001001"),
    ],
)
def test_a_word_for_a_range_is_read_as_that_range(start: int, size: int, word: str) -> None:
    assert memmap_word(start, size) == word
    assert persistent_ranges(word) == ((start, size),)
