"""Messages on their way out and in: parts, and blobs for the large ones."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from a2a.types import a2a_pb2 as pb
from google.protobuf.message import DecodeError

from weft.core import blobs
from weft.core.broker import Broker
from weft_protocols import a2a
from weft_protocols.errors import InvalidParams, TaskNotFound, TooLarge

log = logging.getLogger("weft.client")

FORM = "weft.blob"
"""Part metadata that says what a blob's bytes are: text, data or raw."""
SMALLER: Final = (blobs.LIMIT // 8, blobs.LIMIT // 64)
"""Bytes above which parts become blobs, one after the other, while a message of many parts is too large."""
HEADROOM: Final = 16 * 1024
"""Bytes of a message to the broker left to headers and to what a request has besides its message."""


def to_message(
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
        message = pb.Message(message_id=message_id, context_id=context_id, task_id=task_id, role=pb.ROLE_USER)
        if metadata:
            message.metadata.update(metadata)
            if not all(isinstance(value, str) for value in metadata.values()):
                a2a.struct_to_dict(message.metadata)  # what its reader will do
    except (TypeError, ValueError, InvalidParams) as error:
        raise InvalidParams(f"the message cannot be sent: {error}") from error
    message.parts.extend(parts)
    return message


async def shrink_message(broker: Broker, message: pb.Message) -> None:
    """Replace the message's large parts by references to blobs, and smaller ones where it is too large otherwise."""
    for limit in (blobs.LIMIT, *SMALLER):
        if message.ByteSize() <= (blobs.LIMIT if limit == blobs.LIMIT else broker.max_payload - HEADROOM):
            return  # the way of nearly every message
        parts = await shrink(broker, message.parts, limit=limit)
        del message.parts[:]
        message.parts.extend(parts)


async def shrink(broker: Broker, parts: Iterable[pb.Part], *, limit: int = blobs.LIMIT) -> list[pb.Part]:
    """The parts, those over the limit (in bytes) replaced by references to blobs."""
    made = []
    for part in parts:
        if part.ByteSize() <= limit:  # the way of nearly every part
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
    """The parts, references to blobs replaced by what they refer to.

    Raises:
        TaskNotFound: a blob is gone.
        InvalidParams: a reference is wrong, or the blob is not what it says.
    """
    if not any(part.url.startswith(blobs.SCHEME) for part in parts):
        return list(parts)
    return [await _restored(broker, part) if part.url.startswith(blobs.SCHEME) else part for part in parts]


async def _restored(broker: Broker, part: pb.Part) -> pb.Part:
    ref = blobs.BlobRef.parse(part.url)
    data = await blobs.get(broker, ref)
    full = pb.Part(media_type=part.media_type, filename=part.filename)
    form = "raw"
    if part.HasField("metadata"):
        full.metadata.CopyFrom(part.metadata)
        if FORM in full.metadata:
            form = str(full.metadata[FORM])
            del full.metadata[FORM]
        if not full.metadata.fields:
            full.ClearField("metadata")
    try:
        if form == "text":
            full.text = data.decode()
        elif form == "data":
            full.data.ParseFromString(data)
        else:
            full.raw = data
    except (UnicodeDecodeError, DecodeError) as error:
        raise InvalidParams(f"blob {ref.sha256[:12]}… of {ref.writer} is not {form}: {error}") from error
    return full


async def expand_event(broker: Broker, event: pb.StreamResponse) -> None:
    """Put the bytes back in place of an event's references to blobs; see `expand_task`."""
    which = event.WhichOneof("payload")
    if which == "artifact_update":
        await _put_back(broker, event.artifact_update.artifact)
    elif which == "message":
        await _put_back(broker, event.message)
    elif which == "status_update" and event.status_update.status.HasField("message"):
        await _put_back(broker, event.status_update.status.message)


async def expand_task(broker: Broker, task: pb.Task) -> pb.Task:
    """The task, its blobs put back. A blob that is gone leaves its reference: the rest of the task can be read."""
    for artifact in task.artifacts:
        await _put_back(broker, artifact)
    if task.status.HasField("message"):
        await _put_back(broker, task.status.message)
    for message in task.history:
        await _put_back(broker, message)
    return task


async def _put_back(broker: Broker, holder: pb.Artifact | pb.Message) -> None:
    if not any(part.url.startswith(blobs.SCHEME) for part in holder.parts):
        return
    parts = []
    for part in holder.parts:
        try:
            parts += await expand(broker, [part])
        except TaskNotFound as error:
            log.warning("%s", error)
            parts.append(part)
    del holder.parts[:]
    holder.parts.extend(parts)


def _data_bytes(part: pb.Part) -> bytes:
    return part.data.SerializeToString()


def check_size(body: bytes, limit: int) -> bytes:
    """`body`; TooLarge if the broker would not take it."""
    if len(body) + 4096 > limit:
        raise TooLarge(
            f"the message has {len(body)} bytes and the broker takes {limit}; send large content as a part of its own"
        )
    return body
