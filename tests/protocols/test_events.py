"""Pages of stored events: they come back as they were, and nothing else is taken for one."""

from typing import Any

import pytest
from a2a.types import a2a_pb2 as pb
from hypothesis import example, given
from hypothesis import strategies as st

from weft_protocols import a2a, events
from weft_protocols import headers as h
from weft_protocols.errors import ParseError, VersionNotSupported
from weft_protocols.events import RawEvent

LABELS = st.sampled_from(["", "working", "completed", "message"])
CARRIED = st.dictionaries(
    st.sampled_from([h.ERROR, h.SNAPSHOT, h.REPLICA, h.ATTEMPT, h.IN_REPLY_TO]), st.text("ab1", min_size=1)
)


@st.composite
def stored(draw: st.DrawFn) -> RawEvent:
    n, state, seq = draw(st.integers(1, 10**6)), draw(LABELS), draw(st.integers(1, 2**60))
    lines = {h.EVENT: str(n), **({h.STATE: state} if state else {}), **draw(CARRIED)}
    block = h.block(h.fields({h.EXPECTED_SEQUENCE: "7", **lines}))
    return RawEvent(n, state, draw(st.binary(max_size=300)), block, seq)


@given(st.lists(stored(), max_size=5))
def test_a_page_comes_back_as_it_was(page: list[RawEvent]) -> None:
    read = events.unpack(events.pack(page))
    assert [(e.n, e.state, e.seq, e.data) for e in read] == [(e.n, e.state, e.seq, e.data) for e in page]
    for before, after in zip(page, read, strict=True):
        for name in (h.ERROR, h.SNAPSHOT, h.REPLICA, h.ATTEMPT, h.IN_REPLY_TO):
            assert h.get(after.headers, name.encode()) == h.get(before.headers, name.encode())
        assert h.get(after.headers, h.EXPECTED_SEQUENCE.encode()) is None


@given(st.lists(stored(), min_size=1, max_size=3), st.data())
def test_a_page_cut_short_is_not_a_page(page: list[RawEvent], data: st.DataObject) -> None:
    packed = events.pack(page)
    ends = {len(events.pack(page[:i])) for i in range(len(page) + 1)}
    cut = data.draw(st.integers(0, len(packed)).filter(lambda at: at not in ends))
    with pytest.raises(ParseError, match="not a page of events"):
        events.unpack(packed[:cut])


@given(st.binary(max_size=80))
@example(b"\xff" * 40)
@example(b"\x00\x00")
@example(b"\x19NATS/1.0\r\nWeft-Event: x\r\n\r\n\x00")
@example(b"\x1aNATS/1.0\r\nWeft-Event: \xb2\r\n\r\n\x00")
def test_any_bytes_are_a_page_or_a_parse_error(data: bytes) -> None:
    try:
        assert all(isinstance(event, RawEvent) for event in events.unpack(data))
    except ParseError:
        pass


def test_an_event_knows_its_error() -> None:
    event = pb.StreamResponse(status_update={"status": {"state": pb.TASK_STATE_REJECTED}})
    event.status_update.status.message.parts.add(text="send A2A-Version: 1.0")
    block = h.block(h.fields({h.EVENT: "1", h.STATE: "rejected", h.ERROR: "VERSION_NOT_SUPPORTED"}))
    error = RawEvent.of(a2a.encode(event), block, seq=3).error
    assert isinstance(error, VersionNotSupported)
    assert str(error) == "send A2A-Version: 1.0"


def test_the_sequence_of_a_live_event_is_in_its_headers() -> None:
    block = h.block(h.fields({h.EVENT: "2", h.SEQUENCE: "77"}))
    assert (RawEvent.of(b"", block).n, RawEvent.of(b"", block).seq) == (2, 77)
    assert RawEvent.of(b"", block, seq=5).seq == 5


def test_an_event_in_json_is_read_as_json() -> None:
    event = pb.StreamResponse(message={"message_id": "m", "parts": [pb.Part(text="pong")]})
    block = h.block(h.fields({h.EVENT: "1", h.CONTENT_TYPE: h.JSON}))
    assert RawEvent.of(a2a.encode(event, h.JSON), block).decode() == event


@given(st.binary(max_size=30), st.binary(max_size=30), st.binary(max_size=30))
@example(b"1" * 5000, b"\xff", b"")
@example(b"-1", b"working", b"1_0")
@example("\u00b2".encode(), b"", b"")
def test_headers_an_agent_made_up_break_no_reader(number: bytes, state: bytes, sequence: bytes) -> None:
    lines = b"\r\n".join(
        (b"NATS/1.0", b"Weft-Event: " + number, b"Weft-State: " + state, b"Nats-Sequence: " + sequence)
    )
    event = RawEvent.of(b"", lines + b"\r\n\r\n")
    assert event.n >= 0
    assert event.seq >= 0
    assert isinstance(event.state, str)


@pytest.mark.parametrize("found", ["text", 7, [], {"violations": "x"}, {"violations": [1]}, None], ids=str)
def test_error_details_an_agent_made_up_break_no_reader(found: Any) -> None:
    event = pb.StreamResponse(status_update={"status": {"state": pb.TASK_STATE_REJECTED}})
    event.status_update.metadata.update({"weft.error": found})
    block = b"NATS/1.0\r\nWeft-Event: 1\r\nA2A-Error: NOT_A_REASON\xff\r\n\r\n"
    error = RawEvent.of(a2a.encode(event), block).error
    assert error is not None
    assert error.reason == "INTERNAL_ERROR"
    assert error.violations == ()


def test_error_details_come_through() -> None:
    event = pb.StreamResponse(status_update={"status": {"state": pb.TASK_STATE_REJECTED}})
    details: Any = {"reason": "INVALID_PARAMS", "supported": "1.0", "violations": {"depth": "must be positive"}}
    event.status_update.metadata.update({"weft.error": details})
    error = RawEvent.of(a2a.encode(event), h.block(h.fields({h.EVENT: "1", h.ERROR: "INVALID_PARAMS"}))).error
    assert error is not None
    assert error.metadata == {"supported": "1.0"}
    assert [(v.field, v.description) for v in error.violations] == [("depth", "must be positive")]


def test_an_agent_cannot_forge_the_sequence_of_its_event() -> None:
    forged = h.fields({h.EVENT: "1", h.SEQUENCE: "999"})
    stamped = h.fields({"Nats-Stream": "MESH", h.SEQUENCE: "7"})
    assert RawEvent.of(b"", h.block(forged, stamped)).seq == 7


@given(
    st.lists(st.tuples(st.sampled_from(["", "working", "completed"]), st.binary(max_size=300)), min_size=2, max_size=9)
)
def test_a_group_reads_as_its_events_with_the_stamps_of_the_message(written: list[tuple[str, bytes]]) -> None:
    each = [
        (h.fields({h.EVENT: str(n), **({h.STATE: state} if state else {})}), data)
        for n, (state, data) in enumerate(written, 1)
    ]
    lines, body = events.group(each)
    stamps = h.fields({"Nats-Stream": "MESH", h.SEQUENCE: "77", h.TIMESTAMP: "2026-01-01T00:00:00Z"})
    found = events.read_stored(body, h.block(h.fields({h.EXPECTED_SEQUENCE: "5"}), lines, stamps))
    assert [(event.n, event.state, event.data) for event in found] == [
        (n, state, data) for n, (state, data) in enumerate(written, 1)
    ]
    assert {event.seq for event in found} == {77}
    assert {h.stamped(event.headers, b"Nats-Time-Stamp") for event in found} == {b"2026-01-01T00:00:00Z"}


def test_a_group_larger_than_any_host_makes_reads_as_one_event() -> None:
    each = [(h.fields({h.EVENT: str(n)}), b"") for n in range(1, events.MAX_GROUP + 2)]
    lines, body = events.group(each)
    assert [event.n for event in events.read_stored(body, h.block(lines))] == [events.MAX_GROUP + 1]
