"""A task's stored events, groups of them in one message, and pages of them as SubscribeToTask answers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from a2a.types import a2a_pb2 as pb

from weft_protocols import a2a
from weft_protocols import headers as h
from weft_protocols.errors import A2AError, FieldViolation, ParseError

_WANTED: Final = re.compile(
    rb"\r\n(weft-event|weft-state|weft-group|content-type|a2a-error):[ \t]*([^\r\n]*?)[ \t]*(?=\r\n)", re.I
)
"""What every reader needs of an event's headers, in one pass: this is done for each event that arrives."""
_SHORT: Final = tuple(bytes((value,)) for value in range(0x80))
MAX_GROUP: Final = 256
"""Events of one message at most."""


class RawEvent(NamedTuple):
    """One event as it is stored; `read_stored` gives those of a stored message."""

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
        """An event from its bytes and headers; the sequence from `Nats-Sequence` unless given."""
        return _parse(data, headers, seq)[0]

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


def _parse(data: bytes, headers: bytes | None, seq: int | None) -> tuple[RawEvent, int]:
    """The event that headers and bytes make, and the size of the group it stands for; 0 where it is alone."""
    number, state, content_type, reason, size = 0, "", h.PROTOBUF, "", 0
    for name, value in _WANTED.findall(headers or b""):
        if len(name) == 9:
            reason = reason or value.decode("utf-8", "replace")
        elif len(name) == 12:
            content_type = value.decode("utf-8", "replace") or h.PROTOBUF
        elif name[5] in b"eE":
            number = number or _number(value)
        elif name[5] in b"gG":
            size = size or _number(value)
        else:
            state = state or value.decode("utf-8", "replace")
    return RawEvent(number, state, data, headers, seq or 0, content_type, reason), size


def read_stored(data: bytes, headers: bytes | None, *, seq: int | None = None) -> list[RawEvent]:
    """The events of a stored message, one or a group, each with the sequence and the stamps of the message.

    A group that cannot be taken apart reads as the one event its headers name, with bytes that are none.
    """
    whole, size = _parse(data, headers, seq)
    if not size or headers is None:
        return [whole]
    try:
        blocks = _blocks(data) if size <= MAX_GROUP else []
    except ParseError:
        blocks = []
    if len(blocks) != size:
        return [whole]
    at = headers.rfind(b"\r\nNats-Stream:")
    stamps = headers[at:] if at >= 0 else b"\r\n\r\n"
    found = [RawEvent.of(body, block.removesuffix(b"\r\n\r\n") + stamps, seq=seq) for block, body in blocks]
    return found if found[-1].n == whole.n else [whole]


def group(events: Sequence[tuple[bytes, bytes]]) -> tuple[bytes, bytes]:
    """Header lines and body of one message for several events, given as (header lines, body) by number.

    The lines are those of the last event, so that who needs only the task's state reads a group as that event.
    """
    out = bytearray()
    for lines, body in events:
        size = len(lines) + 12
        out += b"%bNATS/1.0\r\n%b\r\n%b%b" % (_varint(size), lines, _varint(len(body)), body)
    return b"%bWeft-Group: %d\r\n" % (events[-1][0], len(events)), bytes(out)


_TOLD: Final = (
    h.ERROR,
    h.CONTENT_TYPE,
    h.SNAPSHOT,
    h.REPLICA,
    h.ATTEMPT,
    h.IN_REPLY_TO,
    h.QUESTION,
    h.DEAD_LETTER,
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
        for name in _TOLD:
            if (value := h.get(event.headers, name.encode())) is not None:
                lines[name] = value.decode()
        block = h.block(h.fields(lines))
        out += _varint(len(block)) + block + _varint(len(event.data)) + event.data
    return bytes(out)


def unpack(data: bytes) -> list[RawEvent]:
    """The events of a page made by `pack`; ParseError if it is not one."""
    return [RawEvent.of(body, block) for block, body in _blocks(data)]


def _blocks(data: bytes) -> list[tuple[bytes, bytes]]:
    blocks, at = [], 0
    try:
        while at < len(data):
            size, at = _read_varint(data, at)
            block, at = data[at : at + size], at + size
            size, at = _read_varint(data, at)
            body, at = data[at : at + size], at + size
            blocks.append((block, body))
    except (IndexError, ValueError) as error:
        raise ParseError(f"not a page of events: {error}") from error
    if at != len(data):
        raise ParseError("not a page of events: it ends in the middle of one")
    return blocks


def _number(value: bytes | None) -> int:
    """A header's number; 0 where it is absent or none, since agents write what they like."""
    return int(value) if value is not None and value.isdigit() and len(value) < 20 else 0


def _varint(value: int) -> bytes:
    if value < 0x80:
        return _SHORT[value]
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
