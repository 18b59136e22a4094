"""Header names and the NATS header block: built and read as bytes, since every message passes here.

NATS keeps the case of header names, so names are sent in the case written here and compared without case.
Values are UTF-8 without CR, LF or NUL; white space around them does not count. Of a repeated name the first
counts, as it does for the broker. A block is at most `MAX_BLOCK` bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

from weft_protocols.errors import InvalidRequest

VERSION: Final = "A2A-Version"
EXTENSIONS: Final = "A2A-Extensions"
METHOD: Final = "A2A-Method"
ERROR: Final = "A2A-Error"
CONTENT_TYPE: Final = "Content-Type"
ACCEPT: Final = "Accept"
TRACEPARENT: Final = "traceparent"
TRACESTATE: Final = "tracestate"
ORIGIN: Final = "Weft-Origin"
DEADLINE: Final = "Weft-Deadline"
CHAIN: Final = "Weft-Chain"
SEEN: Final = "Weft-Seen"
BUDGET: Final = "Weft-Budget"
EVENT: Final = "Weft-Event"
GROUP: Final = "Weft-Group"
STATE: Final = "Weft-State"
SNAPSHOT: Final = "Weft-Snapshot"
QUESTION: Final = "Weft-Question"
IN_REPLY_TO: Final = "Weft-In-Reply-To"
DEAD_LETTER: Final = "Weft-Dead-Letter"
INPUT_HASH: Final = "Weft-Input-Hash"
MESSAGE_ID: Final = "Weft-Message-Id"
REPLICA: Final = "Weft-Replica"
ATTEMPT: Final = "Weft-Attempt"
CLAIM: Final = "Weft-Claim"

EXPECTED_SEQUENCE: Final = "Nats-Expected-Last-Subject-Sequence"
EXPECTED_SUBJECT: Final = "Nats-Expected-Last-Subject-Sequence-Subject"
DEDUPLICATION_ID: Final = "Nats-Msg-Id"
SEQUENCE: Final = "Nats-Sequence"
SUBJECT: Final = "Nats-Subject"
TIMESTAMP: Final = "Nats-Time-Stamp"

A2A_VERSION: Final = "1.0"
WAKE: Final = "Wake"
"""Value of `A2A-Method`: what a suspended task waits for has happened."""
PROTOBUF: Final = "application/protobuf"
JSON: Final = "application/json"
MAX_BLOCK: Final = 4096
"""Bytes of one header block."""
_PREFIX: Final = b"NATS/1.0\r\n"
_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")
"""A header name (RFC 9110, section 5.1)."""


def fields(values: Mapping[str, str] | Iterable[tuple[str, str]]) -> bytes:
    """Header lines without the block's first and last line, ready to be joined.

    Raises:
        InvalidRequest: a name or value has a character headers cannot carry; it could forge another header.
    """
    out = bytearray()
    for name, value in values.items() if isinstance(values, Mapping) else values:
        if "\r" in value or "\n" in value or "\0" in value or not _NAME.match(name):
            raise InvalidRequest(f"header {name!r} has a line break or another character headers cannot carry")
        try:
            out += f"{name}: {value}\r\n".encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"header {name!r} is not UTF-8 text: {error.reason}") from error
    return bytes(out)


def block(*lines: bytes) -> bytes:
    """A header block from lines made by `fields`; InvalidRequest if it is over `MAX_BLOCK`."""
    made = b"".join((_PREFIX, *lines, b"\r\n"))
    if len(made) > MAX_BLOCK:
        raise InvalidRequest(f"the headers take {len(made)} bytes; a block may have {MAX_BLOCK}")
    return made


def get(headers: bytes | None, name: bytes) -> bytes | None:
    """One value out of a raw block, the name compared without case; None if absent. Cheap: no parsing."""
    if not headers:
        return None
    at = headers.lower().find(b"\r\n" + name.lower() + b":")
    if at < 0:
        return None
    start = at + len(name) + 3
    end = headers.find(b"\r\n", start)
    return headers[start : end if end >= 0 else None].strip()


def stamped(headers: bytes | None, name: bytes) -> bytes | None:
    """The last value of a name: for what the broker appends (`Nats-Sequence` …), which a sender may have forged."""
    if not headers:
        return None
    at = headers.lower().rfind(b"\r\n" + name.lower() + b":")
    return None if at < 0 else get(headers[at:], name)


def parse(headers: bytes | None) -> dict[str, str]:
    """All headers of a raw block with lower-case names; the first value of a repeated name."""
    found: dict[str, str] = {}
    if headers:
        for line in headers.split(b"\r\n")[1:]:
            name, colon, value = line.partition(b":")
            if colon:
                # Case and white space are taken off the bytes: Unicode would make other names equal to ours.
                found.setdefault(name.lower().decode("utf-8", "replace"), value.strip().decode("utf-8", "replace"))
    return found


def status(headers: bytes | None) -> tuple[int, str]:
    """Status code and description of the block's first line; (0, "") where it has none."""
    if not headers or headers[:9] != b"NATS/1.0 ":
        return 0, ""
    line = headers[9 : headers.find(b"\r\n", 9)].decode("utf-8", "replace")
    code, _, text = line.partition(" ")
    return (int(code), text) if code.isdigit() else (0, line)
