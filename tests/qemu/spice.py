"""A client of SPICE, as far as the main channel's first message: a real one draws, this one is a client to the server.

The link protocol as in spice-protocol's spice/protocol.h: numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import os
import struct
from typing import TYPE_CHECKING, Self

from tests.qemu.parties import connected

if TYPE_CHECKING:
    from tests.qemu.parties import Address

MAGIC = b"REDQ"
_HEADER = struct.Struct("<4sIII")
_LINK = struct.Struct("<IBBIII")
MAIN_CHANNEL = 1
_KEY_AT, _KEY_BYTES, _EXPONENT = 29, 128, 65537
"""The modulus in the SubjectPublicKeyInfo of a server's RSA key of 1024 bits, and the exponent that it always has."""


def _mask(seed: bytes, size: int) -> bytes:
    """MGF1 with SHA-1 (RFC 8017, B.2.1)."""
    blocks = (hashlib.sha1(seed + number.to_bytes(4, "big")).digest() for number in range(size // 20 + 1))  # noqa: S324
    return b"".join(blocks)[:size]


def _xor(a: bytes, b: bytes) -> bytes:
    return bytes(x ^ y for x, y in zip(a, b, strict=True))


def ticket(password: bytes, key: bytes) -> bytes:
    """The password for a server with this public key: RSA with OAEP (RFC 8017, 7.1.1)."""
    message = password + b"\0"
    label = hashlib.sha1(b"").digest()  # noqa: S324
    block = label + bytes(_KEY_BYTES - len(message) - 2 * 20 - 2) + b"\1" + message
    seed = os.urandom(20)
    masked = _xor(block, _mask(seed, len(block)))
    number = int.from_bytes(b"\0" + _xor(seed, _mask(masked, 20)) + masked, "big")
    modulus = int.from_bytes(key[_KEY_AT : _KEY_AT + _KEY_BYTES], "big")
    return pow(number, _EXPONENT, modulus).to_bytes(_KEY_BYTES, "big")


class SpiceClient:
    """Connected to the main channel. `greeted` says that the server has sent something behind the link."""

    def __init__(self, address: Address, password: str = "") -> None:
        """Raises OSError, ConnectionError where it is not SPICE."""
        self._socket = connected(address)
        self._socket.settimeout(20)
        self._socket.sendall(_HEADER.pack(MAGIC, 2, 2, _LINK.size) + _LINK.pack(0, MAIN_CHANNEL, 0, 0, 0, _LINK.size))
        magic, _, _, size = _HEADER.unpack(self._read(_HEADER.size))
        reply = self._read(size)
        (error,) = struct.unpack_from("<I", reply)
        self._socket.sendall(ticket(password.encode(), reply[4:166]))
        (refused,) = struct.unpack("<I", self._read(4))
        if magic != MAGIC or error or refused:
            raise ConnectionError(f"SPICE: {magic!r}, link error {error}, ticket {refused}")
        self.greeted = bool(self._read(6))

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self._socket.recv(size - len(data))
            if not more:
                raise ConnectionError("SPICE: hung up")
            data += more
        return data

    def hung_up(self, seconds: float = 10.0) -> bool:
        """Whether the server hangs up."""
        self._socket.settimeout(seconds)
        try:
            while self._socket.recv(65536):
                pass
        except TimeoutError:
            return False
        except ConnectionError:
            pass
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
