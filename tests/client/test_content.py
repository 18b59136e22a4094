"""Messages on their way out and in: what can be sent, and large parts as blobs."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from a2a.types import a2a_pb2 as pb

from weft.client import content
from weft.core import blobs
from weft.core.blobs import BlobRef
from weft.core.broker import Broker
from weft.testing.broker import BrokerMesh
from weft_protocols import a2a
from weft_protocols.errors import InvalidParams, TaskNotFound, TooLarge
from weft_protocols.parts import Data, File, Text

pytestmark = pytest.mark.anyio

LARGE = blobs.LIMIT + 1


@pytest.fixture
async def broker(mesh: BrokerMesh) -> AsyncIterator[Broker]:
    made = await mesh.connect("local")
    yield made
    await made.close()


async def sent(broker: Broker, what: Any, **options: Any) -> pb.Message:
    message = content.to_message(what, message_id="m", context_id="c", **options)
    await content.shrink_message(broker, message)
    return message


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("text", (Text("text"),)),
        (b"bytes", (File("", b"bytes", "", "application/octet-stream"),)),
        (Text("t", "text/html", {"a": 1}), (Text("t", "text/html", {"a": 1}),)),
        ([Text("a"), Data({"b": [1, None]}), File("f", url="https://x")], None),
        ({"a": [1, 2.5, "x", None, True]}, (Data({"a": [1, 2.5, "x", None, True]}),)),
        ([1, 2], (Data([1, 2]),)),
        (None, (Data(None),)),
        (7, (Data(7),)),
    ],
)
async def test_text_bytes_parts_and_json_values_can_be_sent(broker: Broker, what: Any, parts: Any) -> None:
    message = await sent(broker, what)
    assert a2a.message_from_proto(message).parts == (tuple(what) if parts is None else parts)
    assert (message.message_id, message.context_id, message.role) == ("m", "c", pb.ROLE_USER)


@pytest.mark.parametrize("what", [object(), {1, 2}, float("nan"), {"a": float("inf")}, {"a": object()}, "\ud800", 1j])
async def test_what_cannot_be_sent_is_named(broker: Broker, what: Any) -> None:
    with pytest.raises(InvalidParams, match="cannot be sent"):
        await sent(broker, what)


@pytest.mark.parametrize("metadata", [{"a": object()}, {"a": float("nan")}, {"a": {1, 2}}, {"a": b"bytes"}])
async def test_metadata_that_cannot_be_sent_is_named(broker: Broker, metadata: dict[str, Any]) -> None:
    with pytest.raises(InvalidParams, match="cannot be sent"):
        await sent(broker, "x", metadata=metadata)


async def test_small_parts_travel_in_the_message(broker: Broker) -> None:
    message = await sent(broker, [Text("x" * (blobs.LIMIT - 100)), Data({"a": 1})])
    assert [part.WhichOneof("content") for part in message.parts] == ["text", "data"]


@pytest.mark.parametrize(
    "part",
    [
        Text("größe" * LARGE, "text/plain", {"page": 3, "tags": ["a"]}),
        Text("x" * LARGE),
        Data({"rows": list(range(60_000)), "text": "x" * 1000}, "application/json", {"a": "b"}),
        Data("x" * LARGE),
        File("report.pdf", bytes(LARGE), "", "application/pdf", {"page": 1}),
    ],
)
async def test_large_parts_travel_as_blobs_and_arrive_as_they_were(broker: Broker, part: Any) -> None:
    message = await sent(broker, part)
    (reference,) = message.parts
    assert reference.url.startswith("weft-blob:local/")
    assert reference.ByteSize() < 1000
    assert reference.media_type == part.media_type
    restored = await content.expand(broker, message.parts)
    assert a2a.part_from_proto(restored[0]) == part


async def test_the_marks_of_a_reference_do_not_show_in_what_was_restored(broker: Broker) -> None:
    restored = await content.expand(broker, (await sent(broker, Text("x" * LARGE))).parts)
    assert not restored[0].HasField("metadata")


async def test_a_url_is_left_alone_however_long_it_is(broker: Broker) -> None:
    part = File("f", url="https://example.com/" + "x" * LARGE)
    message = await sent(broker, part)
    assert a2a.part_from_proto((await content.expand(broker, message.parts))[0]) == part


async def test_a_blob_without_a_form_is_bytes(broker: Broker) -> None:
    ref = await blobs.put(broker, b"some bytes of nobody's form")
    restored = await content.expand(broker, [pb.Part(url=ref.url, filename="f")])
    assert a2a.part_from_proto(restored[0]) == File("f", b"some bytes of nobody's form")


@pytest.mark.parametrize("form", ["text", "data"])
async def test_a_blob_that_is_not_of_its_form_is_refused(broker: Broker, form: str) -> None:
    ref = await blobs.put(broker, b"\xff\xfe not it")
    part = pb.Part(url=ref.url)
    part.metadata.update({content.FORM: form})
    with pytest.raises(InvalidParams, match=f"is not {form}"):
        await content.expand(broker, [part])


async def test_a_message_whose_blob_is_gone_or_wrong_is_refused(broker: Broker, unique: Callable[[str], str]) -> None:
    digest = hashlib.sha256(unique("gone").encode()).hexdigest()
    with pytest.raises(TaskNotFound, match="is gone"):
        await content.expand(broker, [pb.Part(url=BlobRef("local", digest, 1, 10).url)])
    with pytest.raises(InvalidParams, match="not a blob reference"):
        await content.expand(broker, [pb.Part(url="weft-blob:nonsense")])


async def test_a_task_can_be_read_though_one_of_its_blobs_is_gone(broker: Broker, unique: Callable[[str], str]) -> None:
    digest = hashlib.sha256(unique("gone").encode()).hexdigest()
    gone = BlobRef("local", digest, 1, 10).url
    there = (await blobs.put(broker, b"the rest of it")).url
    task = pb.Task(id="t")
    task.artifacts.add(artifact_id="a").parts.extend([pb.Part(url=gone), pb.Part(url=there)])
    task.status.message.parts.add(url=there)
    task.history.add().parts.add(url=there)
    view = a2a.view(await content.expand_task(broker, task), agent="a")
    lost, found = view.artifacts[0].parts
    assert (lost, found) == (File(url=gone), File(content=b"the rest of it"))
    assert view.message is not None
    assert view.message.parts == view.history[0].parts == (File(content=b"the rest of it"),)


async def test_an_event_is_restored_whatever_it_carries(broker: Broker) -> None:
    url = (await blobs.put(broker, b"bytes")).url
    status, artifact, answer = pb.StreamResponse(), pb.StreamResponse(), pb.StreamResponse()
    status.status_update.status.message.parts.add(url=url)
    artifact.artifact_update.artifact.parts.add(url=url)
    answer.message.parts.add(url=url)
    for event in (status, artifact, answer):
        await content.expand_event(broker, event)
    assert status.status_update.status.message.parts[0].raw == b"bytes"
    assert artifact.artifact_update.artifact.parts[0].raw == b"bytes"
    assert answer.message.parts[0].raw == b"bytes"


def test_a_message_over_the_limit_says_what_to_do() -> None:
    assert content.check_size(b"x" * 100, 10_000) == b"x" * 100
    with pytest.raises(TooLarge, match="as a part of its own"):
        content.check_size(b"x" * 9_000, 10_000)
