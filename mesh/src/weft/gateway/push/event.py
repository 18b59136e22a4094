"""From a task's log to what a webhook gets."""

from __future__ import annotations

import logging
from typing import Final

from a2a.types import a2a_pb2 as pb

from weft.client import content
from weft.client.watch import as_update, refuses
from weft.core import blobs
from weft.core.broker import Broker
from weft_protocols import a2a
from weft_protocols import headers as h
from weft_protocols.errors import A2AError
from weft_protocols.events import RawEvent

log = logging.getLogger("weft.push")
MEDIA_TYPE: Final = "application/a2a+json"
LARGEST: Final = 8 * 1024 * 1024
"""Bytes of blobs that are put back into one notification; above, their references are sent."""


def decoded(event: RawEvent, of: str) -> pb.StreamResponse | None:
    """The event to push; None for one that is none, or tells only the sender of a follow-up that it was refused."""
    if event.reason and refuses(event):
        return None
    try:
        proto = event.decode()
        a2a.encode(proto, h.JSON)  # values that JSON has not would be refused again and again
    except A2AError as error:
        log.warning("%s: event %d cannot be pushed: %s", of, event.n, error)
        return None
    if proto.WhichOneof("payload") is None:
        return None
    return proto if event.n == 1 else as_update(event, proto)


def blob_bytes(proto: pb.StreamResponse) -> int:
    """Bytes of the blobs an event refers to."""
    which = proto.WhichOneof("payload")
    if which == "artifact_update":
        parts = proto.artifact_update.artifact.parts
    elif which == "message":
        parts = proto.message.parts
    else:
        parts = proto.status_update.status.message.parts
    size = 0
    for part in parts:
        if part.url.startswith(blobs.SCHEME):
            try:
                size += max(1, blobs.BlobRef.parse(part.url).size)
            except A2AError:
                return LARGEST + 1
    return size


async def body_of(broker: Broker, proto: pb.StreamResponse, *, large: int) -> bytes:
    """The notification; its `large` bytes of blobs put back, where they are not too many and not damaged."""
    plain = a2a.encode(proto, h.JSON)
    if not 0 < large <= LARGEST:
        return plain
    try:
        await content.expand_event(broker, proto)
        return a2a.encode(proto, h.JSON)
    except A2AError as error:
        log.warning("a notification goes out with references to blobs: %s", error)
        return plain
