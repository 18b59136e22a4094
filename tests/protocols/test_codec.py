"""Bodies in both encodings: they say the same, and hostile ones end in an error with a name."""

import contextlib

import pytest
from a2a.types import a2a_pb2 as pb
from google.protobuf.message import Message as ProtoMessage
from hypothesis import example, given
from hypothesis import strategies as st

from weft_protocols import a2a
from weft_protocols import headers as h
from weft_protocols.errors import (
    ContentTypeNotSupported,
    InvalidParams,
    ParseError,
    VersionNotSupported,
)

KINDS: list[type[ProtoMessage]] = [pb.SendMessageRequest, pb.StreamResponse, pb.Task, pb.CancelTaskRequest]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(st.binary(max_size=80), st.sampled_from(KINDS), st.sampled_from([h.PROTOBUF, h.JSON]))
@example(b"null", pb.Task, h.JSON)
@example(b"[]", pb.Task, h.JSON)
@example(b'"x"', pb.Task, h.JSON)
@example(b"7", pb.Task, h.JSON)
@example(b"\xff\xfe", pb.Task, h.JSON)
@example(b'{"status": {"state": "TASK_STATE_WORKING"', pb.Task, h.JSON)
@example(b'{"metadata": ' + b"[" * 5000 + b"]" * 5000 + b"}", pb.Task, h.JSON)
@example(b'{"id": "\\ud800"}', pb.Task, h.JSON)
def test_any_bytes_are_a_message_or_a_parse_error(data: bytes, kind: type[ProtoMessage], content_type: str) -> None:
    with contextlib.suppress(ParseError):
        assert isinstance(a2a.decode(kind, data, content_type), kind)
        assert content_type == h.PROTOBUF or data.lstrip().startswith(b"{")


@given(TEXT, TEXT, st.sampled_from(["", h.PROTOBUF, h.JSON, "application/a2a+json", "Application/JSON; charset=utf-8"]))
def test_a_message_reads_the_same_in_every_encoding(id_: str, text: str, content_type: str) -> None:
    request = pb.SendMessageRequest(message=pb.Message(message_id=id_, parts=[pb.Part(text=text)]))
    base = h.JSON if "json" in content_type.lower() else h.PROTOBUF
    assert a2a.decode(pb.SendMessageRequest, a2a.encode(request, base), content_type) == request


def test_json_takes_one_line() -> None:
    request = pb.SendMessageRequest(message=pb.Message(message_id="1", parts=[pb.Part(text="a\nb")]))
    assert b"\n" not in a2a.encode(request, h.JSON)


def test_fields_of_a_newer_protocol_are_ignored() -> None:
    assert a2a.decode(pb.GetTaskRequest, b'{"id": "x", "addedLater": {"y": 1}}', h.JSON).id == "x"
    unknown = pb.GetTaskRequest(id="x").SerializeToString() + b"\xfa\x3e\x01y"
    assert a2a.decode(pb.GetTaskRequest, unknown).id == "x"


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-protobuf", "application/jsonl", "nonsense"])
def test_other_content_types_are_refused_with_what_is_supported(content_type: str) -> None:
    with pytest.raises(ContentTypeNotSupported, match="application/protobuf or application/json"):
        a2a.decode(pb.Task, b"", content_type)


def test_what_json_cannot_hold_is_refused_by_name() -> None:
    part = pb.Part(data={"number_value": float("nan")})
    with pytest.raises(InvalidParams, match="Part cannot be written as JSON"):
        a2a.encode(part, h.JSON)


@pytest.mark.parametrize("version", ["1.0", "1.0.1", "1.0.99"])
def test_every_patch_of_our_version_is_ours(version: str) -> None:
    a2a.check_version(version)


@pytest.mark.parametrize("version", ["", "0.3", "0.3.0", "1", "1.1", "2.0", "1.0x", "v1.0"])
def test_any_other_version_is_refused_with_the_supported_one(version: str) -> None:
    with pytest.raises(VersionNotSupported) as caught:
        a2a.check_version(version)
    assert caught.value.metadata == {"supported": h.A2A_VERSION}
