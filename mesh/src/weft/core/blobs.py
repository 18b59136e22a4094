"""Large parts, content-addressed: `weft-blob:{writer}/{sha256}?chunks=N&size=B` instead of bytes in a message.

Knowing the digest is the right to read: it is the key the chunks are sealed with (XSalsa20-Poly1305), and their
subjects carry only the digest of the digest, because the broker lets every account read every blob's subject. A
blob written twice is the same blob: its chunks are written only where they are absent.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Final

from weft.core.broker import Broker
from weft_protocols import headers as h
from weft_protocols import subjects
from weft_protocols.errors import Conflict, InvalidParams, TaskNotFound, TooLarge
from weft_protocols.resources import BLOBS

LIMIT: Final = 256 * 1024
"""Bytes of a part above which it travels as a blob."""
CHUNK: Final = 512 * 1024
"""Bytes of one chunk: half of the smallest default message limit."""
LARGEST: Final = 256 * 1024 * 1024
"""Bytes of the largest blob; it is held in memory as a whole."""
SCHEME: Final = "weft-blob:"
_URL: Final = re.compile(r"weft-blob:([A-Za-z0-9_-]{1,64})/([0-9a-f]{64})\?chunks=([0-9]{1,5})&size=([0-9]{1,12})\Z")
_ABSENT: Final = h.block(h.fields({h.EXPECTED_SEQUENCE: "0"}))


@dataclass(frozen=True, slots=True)
class BlobRef:
    """Where a blob is."""

    writer: str
    sha256: str
    chunks: int
    size: int

    @property
    def url(self) -> str:
        """The reference as a part's URL."""
        return f"{SCHEME}{self.writer}/{self.sha256}?chunks={self.chunks}&size={self.size}"

    def subject(self, n: int) -> str:
        """Subject of a chunk."""
        return subjects.blob(self.writer, hashlib.sha256(bytes.fromhex(self.sha256)).hexdigest(), n)

    @staticmethod
    def parse(url: str) -> BlobRef:
        """The reference in a URL; InvalidParams if it is none."""
        match = _URL.match(url)
        if match is None:
            raise InvalidParams(f"{url[:200]!r} is not a blob reference (weft-blob:writer/sha256?chunks=N&size=B)")
        return BlobRef(match[1], match[2], int(match[3]), int(match[4]))


async def put(broker: Broker, data: bytes) -> BlobRef:
    """Store `data` under this connection's identity and return where it is.

    Raises:
        TooLarge: over `LARGEST`.
        and what `Broker.publish` raises.
    """
    if len(data) > LARGEST:
        raise TooLarge(f"a part has {len(data)} bytes and may have {LARGEST}; pass a URL where the content is")
    key = hashlib.sha256(data).digest()
    chunks = max(1, -(-len(data) // CHUNK))
    ref = BlobRef(broker.settings.identity, key.hex(), chunks, len(data))
    for n in range(chunks):
        try:
            piece = _sealed(key, n, data[n * CHUNK : (n + 1) * CHUNK])
            await broker.publish(ref.subject(n), piece, headers=_ABSENT)
        except Conflict:
            continue
    return ref


async def get(broker: Broker, ref: BlobRef) -> bytes:
    """The bytes of a blob.

    Raises:
        TaskNotFound: a chunk is gone (blobs leave after the time the stream keeps them).
        InvalidParams: the reference is wrong, or the bytes do not have the digest they were asked by.
    """
    if ref.size > LARGEST or not -(-ref.size // CHUNK) <= ref.chunks <= max(1, ref.size):
        raise InvalidParams(
            f"blob {ref.sha256[:12]}… cannot have {ref.size} bytes in {ref.chunks} chunks "
            f"(at most {LARGEST} bytes, {CHUNK} a chunk)"
        )
    key = bytes.fromhex(ref.sha256)
    pieces = []
    left = ref.size
    for n in range(ref.chunks):
        found = await broker.last(BLOBS, ref.subject(n))
        if found is None:
            raise TaskNotFound(f"blob {ref.sha256[:12]}… of {ref.writer} is gone (chunk {n} of {ref.chunks})")
        pieces.append(_opened(key, n, found.data))
        left -= len(pieces[-1])
        if left < 0:
            raise _altered(ref.sha256)
    data = b"".join(pieces)
    if left or hashlib.sha256(data).digest() != key:
        raise _altered(ref.sha256)
    return data


def _sealed(key: bytes, n: int, piece: bytes) -> bytes:
    """A chunk as it is stored. The key belongs to this content alone, so the chunk's number is a safe nonce."""
    from nacl.secret import SecretBox

    box = SecretBox(key)
    return bytes(box.encrypt(piece, n.to_bytes(SecretBox.NONCE_SIZE, "big")).ciphertext)


def _opened(key: bytes, n: int, sealed: bytes) -> bytes:
    from nacl.exceptions import CryptoError
    from nacl.secret import SecretBox

    try:
        return bytes(SecretBox(key).decrypt(sealed, n.to_bytes(SecretBox.NONCE_SIZE, "big")))
    except CryptoError as error:
        raise _altered(key.hex()) from error


def _altered(digest: str) -> InvalidParams:
    return InvalidParams(f"blob {digest[:12]}… is not what its digest says")
