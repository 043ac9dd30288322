"""Which mirror apt is configured with, read from what apt itself says."""

from pathlib import Path

import pytest

from tests.lab import LabError, debian, elf, linux, qemu

TARGETS = """\
MetaKey: main/binary-amd64/Packages
Codename: bookworm-security
Label: Debian-Security
Origin: Debian
Component: main
Repo-URI: http://mirror.example/debian-security/

MetaKey: main/binary-amd64/Packages
Description: http://vendor.example/apt bookworm/main amd64 Packages
Codename: bookworm
Label: Vendor
Origin: Vendor
Component: main
Repo-URI: http://vendor.example/apt/

MetaKey: main/binary-amd64/Packages
Codename: bookworm
Label: Debian
Origin: Debian
Component: main
Repo-URI: http://mirror.example/debian/
"""
BOOKWORM = {"ID": "debian", "VERSION_CODENAME": "bookworm", "PRETTY_NAME": "Debian GNU/Linux 12 (bookworm)"}


def test_index_targets_are_read_by_stanza() -> None:
    stanzas = debian.parse_index_targets(TARGETS)
    assert [stanza["Label"] for stanza in stanzas] == ["Debian-Security", "Vendor", "Debian"]
    assert stanzas[1]["Description"] == "http://vendor.example/apt bookworm/main amd64 Packages"
    assert debian.parse_index_targets("\n") == []


def test_mirror_is_debians_and_neither_security_nor_a_vendors() -> None:
    mirror = debian.choose_mirror(debian.parse_index_targets(TARGETS), BOOKWORM)
    assert mirror == debian.Mirror("http://mirror.example/debian/", "bookworm")


def test_no_lists_and_other_systems_are_explained() -> None:
    with pytest.raises(LabError, match="apt-get update"):
        debian.choose_mirror([], BOOKWORM)
    with pytest.raises(LabError, match="this is Other 1"):
        debian.choose_mirror([], {"ID": "other", "PRETTY_NAME": "Other 1"})


def test_backports_come_with_what_they_build_upon() -> None:
    mirror = debian.Mirror("http://mirror.example/debian/", "bookworm")
    assert mirror.sources("trixie-backports", "/k.gpg").splitlines() == [
        "deb [target=Packages signed-by=/k.gpg] http://mirror.example/debian/ trixie main",
        "deb [target=Packages signed-by=/k.gpg] http://mirror.example/debian/ trixie-backports main",
    ]
    assert mirror.sources("sid", None) == "deb [target=Packages] http://mirror.example/debian/ sid main\n"


def test_failed_program_is_reported_with_its_last_words() -> None:
    with pytest.raises(LabError, match=r"exit status 3\nout of luck"):
        debian.run(["sh", "-c", "echo out of luck >&2; exit 3"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "QEMU emulator version 10.0.13 (Debian 1:10.0.13+ds-0+deb13u1)",
            ("10.0.13", "1:10.0.13+ds-0+deb13u1"),
        ),
        ("QEMU emulator version 9.2.0\nCopyright", ("9.2.0", "9.2.0")),
    ],
)
def test_version_of_qemu(text: str, expected: tuple[str, str]) -> None:
    assert qemu.parse_version(text) == expected


def test_loader_list() -> None:
    text = "\tlinux-vdso.so.1 (0x7f)\n\tliba.so.1 => /x/liba.so.1 (0x00007f)\n\t/lib64/ld.so (0x7)\n"
    assert elf.parse_loader_list(text) == {"liba.so.1": Path("/x/liba.so.1")}
    with pytest.raises(LabError, match=r"libb\.so"):
        elf.parse_loader_list("\tlibb.so => not found\n")


def test_modules_needed_by_a_module() -> None:
    assert linux.needed_modules(b"\0license=GPL\0depends=net-failover,virtio\0name=x\0") == [
        "net_failover",
        "virtio",
    ]
    assert linux.needed_modules(b"\0depends=\0") == []
