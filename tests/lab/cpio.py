"""An initramfs written by hand: the `newc` format of cpio, uncompressed.

Root owns everything in it and device nodes are only headers, so no root and no cpio program is needed.
Format: Documentation/driver-api/early-userspace/buffer-format.rst of Linux.

Out of scope: reading, hard links, compression (the kernel unpacks this faster than any).
"""

import stat
from pathlib import Path, PurePosixPath


class Archive:
    """Collects entries; `data()` is the archive.  Directories that lead to an entry come by themselves."""

    def __init__(self) -> None:
        self._entries = bytearray()
        self._names: set[str] = set()

    def directory(self, name: str) -> None:
        """Add a directory, unless it is there already."""
        if name not in self._names:
            self._add(name, stat.S_IFDIR | 0o755, b"")

    def file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._add(name, stat.S_IFREG | mode, content)

    def copy(self, name: str, source: Path) -> None:
        """Add a regular file with the content and the mode of `source`."""
        self.file(name, source.read_bytes(), stat.S_IMODE(source.stat().st_mode))

    def symlink(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, name: str, major: int, minor: int) -> None:
        """Add a device node."""
        self._add(name, stat.S_IFCHR | 0o600, b"", (major, minor))

    def data(self) -> bytes:
        """The whole archive."""
        return bytes(self._entries) + entry(0, "TRAILER!!!", 0, b"")

    def _add(self, name: str, mode: int, content: bytes, device: tuple[int, int] = (0, 0)) -> None:
        if name in self._names:
            raise FileExistsError(name)
        if (parent := str(PurePosixPath(name).parent)) != ".":
            self.directory(parent)
        self._names.add(name)
        self._entries += entry(len(self._names), name, mode, content, device)


def entry(inode: int, name: str, mode: int, content: bytes, device: tuple[int, int] = (0, 0)) -> bytes:
    """One entry: header and name, then content, each padded to four bytes."""
    encoded = name.encode() + b"\0"
    # inode, mode, uid, gid, links, mtime, size, device of the file system, device, name's length, checksum
    fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(encoded), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
    return padded(header) + padded(content)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
