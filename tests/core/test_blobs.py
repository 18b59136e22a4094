"""Large parts in chunks: stored once, read back whole or not at all."""

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from weft.core import blobs
from weft.core.blobs import CHUNK, BlobRef
from weft.core.broker import Broker
from weft.testing.broker import BrokerMesh
from weft_protocols import headers as h
from weft_protocols.errors import InvalidParams, TaskNotFound, TooLarge
from weft_protocols.resources import BLOBS

pytestmark = pytest.mark.anyio

ONCE = h.block(h.fields({h.EXPECTED_SEQUENCE: "0"}))
Count = Callable[[BlobRef], Awaitable[int]]


@pytest.fixture
async def local(mesh: BrokerMesh) -> AsyncIterator[Broker]:
    broker = await mesh.connect("local")
    yield broker
    await broker.close()


@pytest.fixture
async def count(mesh: BrokerMesh) -> AsyncIterator[Count]:
    """How many chunks of a blob are stored."""
    operator = await mesh.connect("coordinator")

    async def ask(ref: BlobRef) -> int:
        pattern = ref.subject(0).removesuffix("0") + "*"
        info = await operator.api(f"STREAM.INFO.{BLOBS}", {"subjects_filter": pattern})
        return sum((info["state"].get("subjects") or {}).values())

    yield ask
    await operator.close()


def content(unique: Callable[[str], str], size: int) -> bytes:
    """Bytes that no other test stores."""
    return hashlib.shake_128(unique("content").encode()).digest(size)


@pytest.mark.parametrize("size", [1, 1000, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 17])
async def test_what_is_put_is_got(local: Broker, unique: Callable[[str], str], count: Count, size: int) -> None:
    data = content(unique, size)
    ref = await blobs.put(local, data)
    assert (ref.writer, ref.size, ref.chunks) == ("local", size, -(-size // CHUNK))
    assert ref.sha256 == hashlib.sha256(data).hexdigest()
    assert await count(ref) == ref.chunks
    assert await blobs.get(local, BlobRef.parse(ref.url)) == data


async def test_nothing_at_all_is_a_blob_too(local: Broker) -> None:
    ref = await blobs.put(local, b"")
    assert (ref.size, ref.chunks) == (0, 1)
    assert await blobs.get(local, ref) == b""


async def test_the_same_bytes_are_stored_once(local: Broker, unique: Callable[[str], str], count: Count) -> None:
    data = content(unique, 2 * CHUNK)
    assert await blobs.put(local, data) == await blobs.put(local, data) == (ref := await blobs.put(local, data))
    assert await count(ref) == 2


async def test_a_blob_that_was_stored_halfway_is_completed(
    local: Broker, unique: Callable[[str], str], count: Count
) -> None:
    data = content(unique, 2 * CHUNK)
    whole = BlobRef("local", hashlib.sha256(data).hexdigest(), 2, len(data))
    key = bytes.fromhex(whole.sha256)
    await local.publish(whole.subject(1), blobs._sealed(key, 1, data[CHUNK:]), headers=ONCE)
    assert await blobs.put(local, data) == whole
    assert await count(whole) == 2
    assert await blobs.get(local, whole) == data


async def test_whoever_knows_the_reference_can_read(
    mesh: BrokerMesh, local: Broker, unique: Callable[[str], str]
) -> None:
    reader = unique("reader")
    await mesh.add_caller(reader)
    data = content(unique, CHUNK + 1)
    ref = await blobs.put(local, data)
    other = await mesh.connect(reader)
    try:
        assert await blobs.get(other, ref) == data
    finally:
        await other.close()


async def test_a_blob_or_a_chunk_that_is_gone_is_named(local: Broker, unique: Callable[[str], str]) -> None:
    data = content(unique, 2 * CHUNK)
    absent = BlobRef("local", hashlib.sha256(data).hexdigest(), 2, len(data))
    with pytest.raises(TaskNotFound, match="chunk 0 of 2"):
        await blobs.get(local, absent)
    key = bytes.fromhex(absent.sha256)
    await local.publish(absent.subject(0), blobs._sealed(key, 0, data[:CHUNK]), headers=ONCE)
    with pytest.raises(TaskNotFound, match="chunk 1 of 2"):
        await blobs.get(local, absent)


@pytest.mark.parametrize("what", ["garbage", "other content", "too much", "too little", "wrong place"])
async def test_bytes_that_are_not_what_the_digest_says_are_refused(
    local: Broker, unique: Callable[[str], str], what: str
) -> None:
    data = content(unique, 1000)
    ref = BlobRef("local", hashlib.sha256(data).hexdigest(), 1, len(data))
    key = bytes.fromhex(ref.sha256)
    stored = {
        "garbage": b"x" * 1016,
        "other content": blobs._sealed(key, 0, bytes(1000)),
        "too much": blobs._sealed(key, 0, data + b"x"),
        "too little": blobs._sealed(key, 0, data[:-1]),
        "wrong place": blobs._sealed(key, 1, data),
    }[what]
    await local.publish(ref.subject(0), stored, headers=ONCE)
    with pytest.raises(InvalidParams, match=r"not what its digest says"):
        await blobs.get(local, ref)


@pytest.mark.parametrize(("chunks", "size"), [(1, CHUNK + 1), (2, 1), (0, 1), (2, 0), (99_999, blobs.LARGEST + 1)])
async def test_a_reference_that_cannot_be_is_refused_before_anything_is_read(
    local: Broker, monkeypatch: pytest.MonkeyPatch, chunks: int, size: int
) -> None:
    async def read(*_: object, **__: object) -> None:
        raise AssertionError("it was read")

    monkeypatch.setattr(local, "last", read)
    with pytest.raises(InvalidParams, match=f"{size} bytes in {chunks} chunks"):
        await blobs.get(local, BlobRef("local", "0" * 64, chunks, size))


async def test_a_part_that_is_too_large_is_refused_before_it_is_stored(
    local: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs, "LARGEST", 1000)
    with pytest.raises(TooLarge, match="1001"):
        await blobs.put(local, bytes(1001))


async def test_the_broker_does_not_see_the_content(
    mesh: BrokerMesh, local: Broker, unique: Callable[[str], str]
) -> None:
    secret = b"the secret of this test " * 100
    ref = await blobs.put(local, secret)
    assert ref.sha256 not in ref.subject(0)
    stored = await local.last(BLOBS, ref.subject(0))
    assert stored is not None
    assert b"the secret" not in stored.data


@pytest.mark.parametrize(
    "url",
    [
        "",
        "weft-blob:",
        "http://example.com/a",
        f"weft-blob:local/{'0' * 63}?chunks=1&size=1",
        f"weft-blob:local/{'A' * 64}?chunks=1&size=1",
        f"weft-blob:lo.cal/{'0' * 64}?chunks=1&size=1",
        f"weft-blob:*/{'0' * 64}?chunks=1&size=1",
        f"weft-blob:local/{'0' * 64}?size=1&chunks=1",
        f"weft-blob:local/{'0' * 64}?chunks=1&size=1&x=1",
        f"weft-blob:local/{'0' * 64}?chunks=-1&size=1",
        f"weft-blob:local/{'0' * 64}?chunks=1&size=1\n",
    ],
)
def test_what_is_no_reference_is_refused(url: str) -> None:
    with pytest.raises(InvalidParams, match="not a blob reference"):
        BlobRef.parse(url)
