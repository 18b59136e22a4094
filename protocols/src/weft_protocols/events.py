"""A task's stored events, and pages of them as SubscribeToTask answers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

from a2a.types import a2a_pb2 as pb

from weft_protocols import a2a
from weft_protocols import headers as h
from weft_protocols.errors import A2AError, FieldViolation, ParseError

_WANTED: Final = re.compile(
    rb"\r\n(weft-event|weft-state|content-type|a2a-error):[ \t]*([^\r\n]*?)[ \t]*(?=\r\n)", re.I
)
"""What every reader needs of an event's headers, in one pass: this is done for each event that arrives."""


class RawEvent(NamedTuple):
    """One event as it is stored."""

    n: int
    """Number within the task, contiguous from 1."""
    state: str
    """`Weft-State`, empty where the event does not change the state."""
    data: bytes
    headers: bytes | None
    stored_at: int = 0
    """Stream sequence where it is not in the headers."""
    content_type: str = h.PROTOBUF
    reason: str = ""
    """`A2A-Error`, empty for an event that is none."""

    @property
    def seq(self) -> int:
        """Stream sequence, 0 where unknown."""
        return self.stored_at or _number(h.stamped(self.headers, b"Nats-Sequence"))

    @staticmethod
    def of(data: bytes, headers: bytes | None, *, seq: int | None = None) -> RawEvent:
        """A stored event from its bytes and headers; the sequence from `Nats-Sequence` unless given."""
        number, state, content_type, reason = 0, "", h.PROTOBUF, ""
        for name, value in _WANTED.findall(headers or b""):
            if len(name) == 9:
                reason = reason or value.decode("utf-8", "replace")
            elif len(name) == 12:
                content_type = value.decode("utf-8", "replace") or h.PROTOBUF
            elif name[5] in b"eE":
                number = number or _number(value)
            else:
                state = state or value.decode("utf-8", "replace")
        return RawEvent(number, state, data, headers, seq or 0, content_type, reason)

    def decode(self) -> pb.StreamResponse:
        """The event's A2A message."""
        return a2a.decode(pb.StreamResponse, self.data, self.content_type)

    @property
    def error(self) -> A2AError | None:
        """The A2A error the event carries, if any."""
        if not self.reason:
            return None
        update = self.decode().status_update
        text = a2a.message_from_proto(update.status.message).text if update.status.HasField("message") else ""
        found = a2a.struct_to_dict(update.metadata).get("weft.error") if update.HasField("metadata") else None
        details = found if isinstance(found, dict) else {}
        violations = details.pop("violations", None)
        details.pop("reason", None)
        return A2AError.from_reason(
            self.reason,
            text,
            metadata={name: str(value) for name, value in details.items()},
            violations=tuple(FieldViolation(name, str(value)) for name, value in violations.items())
            if isinstance(violations, dict)
            else (),
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


def _number(value: bytes | None) -> int:
    """A header's number; 0 where it is absent or none, since agents write what they like."""
    return int(value) if value is not None and value.isdigit() and len(value) < 20 else 0


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
