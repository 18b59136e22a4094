"""Messages on their way out and in: parts, and blobs for the large ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from a2a.types import a2a_pb2 as pb

from weft.core import blobs
from weft.core.broker import Broker
from weft_protocols import a2a
from weft_protocols.errors import InvalidParams, TooLarge

FORM = "weft.blob"
"""Part metadata that says what a blob's bytes are: text, data or raw."""


async def to_message(
    broker: Broker,
    content: Any,
    *,
    message_id: str,
    context_id: str,
    task_id: str = "",
    metadata: Mapping[str, Any] | None = None,
) -> pb.Message:
    """An A2A message from what a caller passed: text, bytes, a part, several, or any JSON value."""
    try:
        parts = [a2a.part_to_proto(part) for part in a2a.parts_of(content)]
    except (TypeError, ValueError) as error:
        raise InvalidParams(f"the message cannot be sent: {error}") from error
    message = pb.Message(
        message_id=message_id,
        context_id=context_id,
        task_id=task_id,
        role=pb.ROLE_USER,
        parts=await shrink(broker, parts),
    )
    if metadata:
        message.metadata.update(metadata)
    return message


async def shrink(broker: Broker, parts: Iterable[pb.Part]) -> list[pb.Part]:
    """The parts, those over the limit replaced by references to blobs."""
    made = []
    for part in parts:
        if part.ByteSize() <= blobs.LIMIT:  # the way of nearly every part
            made.append(part)
            continue
        form = part.WhichOneof("content") or "raw"
        if form == "url":
            made.append(part)
            continue
        data = {"text": lambda p: p.text.encode(), "raw": lambda p: p.raw}.get(form, _data_bytes)(part)
        ref = await blobs.put(broker, data)
        small = pb.Part(url=ref.url, media_type=part.media_type, filename=part.filename)
        if part.HasField("metadata"):
            small.metadata.CopyFrom(part.metadata)
        small.metadata.update({FORM: form})
        made.append(small)
    return made


async def expand(broker: Broker, parts: Sequence[pb.Part]) -> list[pb.Part]:
    """The parts, references to blobs replaced by what they refer to."""
    if not any(part.url.startswith(blobs.SCHEME) for part in parts):
        return list(parts)
    made = []
    for part in parts:
        if not part.url.startswith(blobs.SCHEME):
            made.append(part)
            continue
        data = await blobs.get(broker, blobs.BlobRef.parse(part.url))
        form = part.metadata[FORM] if part.HasField("metadata") and FORM in part.metadata else "raw"
        full = pb.Part(media_type=part.media_type, filename=part.filename)
        if form == "text":
            full.text = data.decode()
        elif form == "data":
            full.data.ParseFromString(data)
        else:
            full.raw = data
        made.append(full)
    return made


async def expand_artifact(broker: Broker, artifact: pb.Artifact) -> None:
    """Put the bytes back in place of an artifact's references to blobs."""
    if any(part.url.startswith(blobs.SCHEME) for part in artifact.parts):
        parts = await expand(broker, artifact.parts)
        del artifact.parts[:]
        artifact.parts.extend(parts)


async def expand_task(broker: Broker, task: pb.Task) -> pb.Task:
    """The task, all its artifacts' blobs put back."""
    for artifact in task.artifacts:
        await expand_artifact(broker, artifact)
    return task


def _data_bytes(part: pb.Part) -> bytes:
    return part.data.SerializeToString()


def check_size(body: bytes, limit: int) -> bytes:
    """`body`; TooLarge if the broker would not take it."""
    if len(body) + 4096 > limit:
        raise TooLarge(
            f"the message has {len(body)} bytes and the broker takes {limit}; send large content as a part of its own"
        )
    return body
