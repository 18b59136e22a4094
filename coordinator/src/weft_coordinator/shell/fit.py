"""Makes a task fit into a reply: what is large in it becomes blobs, which its reader fetches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from a2a.types import a2a_pb2 as pb

from weft.client.content import FORM
from weft.core import blobs
from weft.core.broker import Broker
from weft_protocols.errors import TooLarge

SIZES: Final = (blobs.LIMIT, 64 * 1024, 16 * 1024, 4 * 1024)
"""Bytes over which a part becomes a blob, tried in this order."""


async def fit(broker: Broker, task: pb.Task, *, limit: int, size: Callable[[pb.Task], int]) -> pb.Task:
    """The task, in place, within `limit` of `size`: artifacts first, then the oldest history goes.

    Raises TooLarge if that is not enough.
    """
    if size(task) <= limit:
        return task
    for artifact in task.artifacts:
        _join_texts(artifact)
    for over in SIZES:
        for artifact in task.artifacts:
            for part in artifact.parts:
                if part.ByteSize() > over:
                    await _to_blob(broker, part)
        if size(task) <= limit:
            return task
    while task.history and size(task) > limit:
        del task.history[: max(1, len(task.history) // 4)]
    if size(task) > limit:
        raise TooLarge(
            f"task {task.id} has {size(task)} bytes and a reply takes {limit}; read its events with SubscribeToTask"
        )
    return task


def _join_texts(artifact: pb.Artifact) -> None:
    """One text part in place of several adjacent ones, which read as one: what was streamed in chunks."""
    parts: list[pb.Part] = []
    texts: list[str] = []
    for part in artifact.parts:
        if not (parts and _joins(parts[-1], part)):
            _close(parts, texts)
            parts.append(part)
        texts.append(part.text)
    _close(parts, texts)
    del artifact.parts[:]
    artifact.parts.extend(parts)


def _close(parts: list[pb.Part], texts: list[str]) -> None:
    if len(texts) > 1:
        parts[-1].text = "".join(texts)
    texts.clear()


def _joins(before: pb.Part, part: pb.Part) -> bool:
    texts = before.WhichOneof("content") == "text" == part.WhichOneof("content")
    plain = not before.HasField("metadata") and not part.HasField("metadata")
    return texts and plain and before.media_type == part.media_type


async def _to_blob(broker: Broker, part: pb.Part) -> None:
    """Replace a part's content by a reference, in the form `weft.client.content.expand` reads."""
    form = part.WhichOneof("content")
    if form is None or form == "url":
        return
    data = part.text.encode() if form == "text" else part.raw if form == "raw" else part.data.SerializeToString()
    ref = await blobs.put(broker, data)
    part.url = ref.url
    part.metadata.update({FORM: form})
