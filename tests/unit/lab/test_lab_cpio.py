"""The initramfs writer, byte by byte.  (That the kernel reads it is shown by the Linux guest.)"""

import pytest

from tests.lab.cpio import Archive, entry


def test_entry_has_its_fields_where_the_kernel_looks() -> None:
    written = entry(1, "ab", 0o100644, b"hello")
    assert written[:6] == b"070701"
    fields = [int(written[6 + 8 * n : 14 + 8 * n], 16) for n in range(13)]
    assert fields == [1, 0o100644, 0, 0, 1, 0, 5, 0, 0, 0, 0, 3, 0]
    assert written[110:] == b"ab\0" + bytes(3) + b"hello" + bytes(3)
    assert len(written) % 4 == 0


def test_device_node_carries_its_numbers() -> None:
    archive = Archive()
    archive.character_device("dev/console", 5, 1)
    data = archive.data()
    at = data.index(b"dev/console") - 110
    assert data[at + 6 + 8 * 9 : at + 6 + 8 * 11] == b"0000000500000001"


def test_directories_come_before_what_is_in_them_and_once() -> None:
    archive = Archive()
    archive.file("a/b/one", b"1")
    archive.file("a/b/two", b"2")
    archive.directory("a/b")
    data = archive.data()
    assert data.count(b"a/b\0") == 1
    assert data.index(b"a\0") < data.index(b"a/b\0") < data.index(b"a/b/one\0") < data.index(b"TRAILER!!!\0")
    with pytest.raises(FileExistsError):
        archive.file("a/b/one", b"again")
