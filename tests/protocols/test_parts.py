"""Parts, messages and artifacts: plain values and their protobuf form say the same."""

from typing import Any

import pytest
from a2a.types import a2a_pb2 as pb
from google.protobuf import struct_pb2
from hypothesis import example, given
from hypothesis import strategies as st

from weft_protocols import a2a, parts
from weft_protocols.errors import InvalidParams, UsageError
from weft_protocols.parts import Data, File, Message, Text

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBER = st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(allow_nan=False, allow_infinity=False, width=64)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=10,
)
META = st.dictionaries(TEXT, JSON, max_size=2)
PART = st.one_of(
    st.builds(Text, TEXT, TEXT, META),
    st.builds(Data, JSON, TEXT, META),
    st.builds(File, TEXT, st.binary(max_size=20), st.just(""), TEXT, META),
    st.builds(File, TEXT, st.none(), TEXT, TEXT, META),
)


def over_the_wire(part: parts.Part) -> parts.Part:
    return a2a.part_from_proto(pb.Part.FromString(a2a.part_to_proto(part).SerializeToString()))


@given(PART)
@example(Data(None))
@example(Data({}))
@example(Data([]))
@example(Data(0))
@example(Text(""))
@example(File("", b""))
def test_a_part_comes_back_as_it_was(part: parts.Part) -> None:
    assert over_the_wire(part) == part


@given(PART)
def test_a_part_survives_json_as_well(part: parts.Part) -> None:
    body = a2a.encode(a2a.part_to_proto(part), "application/json")
    assert a2a.part_from_proto(a2a.decode(pb.Part, body, "application/json")) == part


@given(st.integers(-(2**53) + 1, 2**53 - 1))
def test_whole_numbers_come_back_as_int(number: int) -> None:
    back = over_the_wire(Data({"n": number, "list": [number]}))
    assert isinstance(back, Data)
    assert type(back.data["n"]) is int
    assert type(back.data["list"][0]) is int


@pytest.mark.parametrize("number", [2.0**53, 1e300, -1e300, 0.5])
def test_numbers_that_are_not_exact_integers_stay_floats(number: float) -> None:
    back = over_the_wire(Data(number))
    assert isinstance(back, Data)
    assert type(back.data) is float


def nested(depth: int) -> Any:
    value: Any = "x"
    for level in range(depth):
        value = [value] if level % 2 else {"k": value}
    return value


def test_the_deepest_value_that_can_be_sent_can_be_read_inside_a_task() -> None:
    part = a2a.part_to_proto(Data(nested(a2a.MAX_DEPTH)))
    event = pb.StreamResponse(artifact_update={"artifact": {"artifact_id": "a", "parts": [part]}})
    read = a2a.decode(pb.StreamResponse, a2a.encode(event))
    assert a2a.part_from_proto(read.artifact_update.artifact.parts[0]) == Data(nested(a2a.MAX_DEPTH))


CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    "part",
    [
        Data(float("nan")),
        Data({"x": [float("inf")]}),
        Data(nested(a2a.MAX_DEPTH + 1)),
        Data(CYCLE),
        Data(object()),
        Data({1, 2}),
        Data(b"bytes"),
        Data({1: 2}),
        Data(10**400),
        Data("\ud800"),
        Text("\ud800"),
        Text("x", metadata={"x": object()}),
        Text("x", metadata={"x": float("nan")}),
    ],
    ids=[
        "nan",
        "infinity",
        "too deep",
        "cycle",
        "object",
        "set",
        "bytes",
        "number as key",
        "huge number",
        "surrogate in data",
        "surrogate in text",
        "object in metadata",
        "nan in metadata",
    ],
)
def test_what_no_receiver_could_read_is_refused_by_name(part: parts.Part) -> None:
    with pytest.raises(UsageError, match=f"a {type(part).__name__} part holds a value"):
        a2a.part_to_proto(part)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_json_has_not_are_the_senders_error(number: float) -> None:
    value = struct_pb2.Value(number_value=number)
    with pytest.raises(InvalidParams, match="not JSON"):
        a2a.part_from_proto(pb.Part(data=value))
    message = pb.Message()
    message.metadata.fields["x"].CopyFrom(value)
    with pytest.raises(InvalidParams, match="not JSON"):
        a2a.message_from_proto(message)


def test_a_part_without_content_is_an_empty_file() -> None:
    assert a2a.part_from_proto(pb.Part(media_type="x/y")) == File(media_type="x/y")


@given(TEXT, st.sampled_from(["user", "agent"]), st.lists(PART, max_size=3), META)
def test_a_message_comes_back_as_it_was(id_: str, role: str, content: list[parts.Part], meta: dict[str, Any]) -> None:
    message = Message(id_, role, tuple(content), meta)
    proto = pb.Message.FromString(a2a.message_to_proto(message, task_id="t", context_id="c").SerializeToString())
    assert a2a.message_from_proto(proto) == message
    assert (proto.task_id, proto.context_id) == ("t", "c")


@given(TEXT, TEXT, st.lists(PART, max_size=3))
def test_an_artifact_comes_back_as_it_was(id_: str, name: str, content: list[parts.Part]) -> None:
    artifact = a2a.artifact_from_proto(a2a.artifact_to_proto(id_, name, content, description="d"))
    assert artifact == parts.Artifact(id_, name, tuple(content), "d")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("hello", (Text("hello"),)),
        (b"\x00", (File(content=b"\x00", media_type="application/octet-stream"),)),
        (bytearray(b"x"), (File(content=b"x", media_type="application/octet-stream"),)),
        (Text("x"), (Text("x"),)),
        ([Text("x"), Data(1)], (Text("x"), Data(1))),
        ([], (Data([]),)),
        (["x", 1], (Data(["x", 1]),)),
        ({"a": 1}, (Data({"a": 1}),)),
        (None, (Data(None),)),
    ],
    ids=["text", "bytes", "bytearray", "part", "parts", "empty list", "list", "object", "nothing"],
)
def test_anything_a_handler_returns_becomes_parts(content: Any, expected: tuple[parts.Part, ...]) -> None:
    assert a2a.parts_of(content) == expected


def test_a_view_prefers_artifacts_to_the_last_message() -> None:
    task = pb.Task(id="t", status={"state": pb.TASK_STATE_COMPLETED})
    task.status.message.parts.add(text="said")
    assert a2a.view(task, agent="a").text == "said"
    task.artifacts.add(artifact_id="1").parts.add(text="made")
    assert a2a.view(task, agent="a").text == "made"
    task.artifacts[0].parts.add(text=" in chunks")
    task.artifacts.add(artifact_id="2").parts.add(data={"number_value": 2})
    assert (a2a.view(task, agent="a").text, a2a.view(task, agent="a").data) == ("made in chunks", 2)
