"""A task's stored events, and pages of them as SubscribeToTask answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from a2a.types import a2a_pb2 as pb

from weft_protocols import a2a
from weft_protocols import headers as h
from weft_protocols.errors import A2AError, FieldViolation, ParseError


@dataclass(frozen=True, slots=True)
class RawEvent:
    """One event as it is stored."""

    n: int
    """Number within the task, contiguous from 1."""
    state: str
    """`Weft-State`, empty where the event does not change the state."""
    data: bytes
    headers: bytes | None
    seq: int
    """Stream sequence, 0 where unknown."""

    @staticmethod
    def of(data: bytes, headers: bytes | None, *, seq: int | None = None) -> RawEvent:
        """A stored event from its bytes and headers; the sequence from `Nats-Sequence` unless given."""
        n = h.get(headers, b"Weft-Event")
        state = h.get(headers, b"Weft-State")
        if seq is None:
            seq = int(h.get(headers, b"Nats-Sequence") or 0)
        return RawEvent(int(n) if n else 0, state.decode() if state else "", data, headers, seq)

    def decode(self) -> pb.StreamResponse:
        """The event's A2A message."""
        content_type = h.get(self.headers, b"Content-Type")
        return a2a.decode(pb.StreamResponse, self.data, content_type.decode() if content_type else h.PROTOBUF)

    @property
    def error(self) -> A2AError | None:
        """The A2A error the event carries, if any."""
        reason = h.get(self.headers, b"A2A-Error")
        if reason is None:
            return None
        update = self.decode().status_update
        text = a2a.message_from_proto(update.status.message).text if update.status.HasField("message") else ""
        details = a2a.struct_to_dict(update.metadata).get("weft.error", {}) if update.HasField("metadata") else {}
        violations = details.pop("violations", {})
        details.pop("reason", None)
        return A2AError.from_reason(
            reason.decode(),
            text,
            metadata={name: str(value) for name, value in details.items()},
            violations=tuple(FieldViolation(name, str(value)) for name, value in violations.items()),
        )


def pack(events: Iterable[RawEvent]) -> bytes:
    """A page: for each event a varint length and a header block, then a varint length and the body.

    The block holds what a reader needs of the stored headers, so that a page and the live feed read alike.
    """
    out = bytearray()
    for event in events:
        lines = {h.EVENT: str(event.n), h.SEQUENCE: str(event.seq)}
        if event.state:
            lines[h.STATE] = event.state
        for name in (h.ERROR, h.CONTENT_TYPE, h.SNAPSHOT, h.REPLICA, h.ATTEMPT, h.IN_REPLY_TO):
            if (value := h.get(event.headers, name.encode())) is not None:
                lines[name] = value.decode()
        block = h.block(h.fields(lines))
        out += _varint(len(block)) + block + _varint(len(event.data)) + event.data
    return bytes(out)


def unpack(data: bytes) -> list[RawEvent]:
    """The events of a page made by `pack`; ParseError if it is not one."""
    events, at = [], 0
    try:
        while at < len(data):
            size, at = _read_varint(data, at)
            block, at = data[at : at + size], at + size
            size, at = _read_varint(data, at)
            body, at = data[at : at + size], at + size
            events.append(RawEvent.of(body, block))
    except (IndexError, ValueError) as error:
        raise ParseError(f"not a page of events: {error}") from error
    if at != len(data):
        raise ParseError("not a page of events: it ends in the middle of one")
    return events


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
