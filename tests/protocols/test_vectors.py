"""The published test vectors: generated files are up to date, and weft agrees with every one of them."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from a2a.types import a2a_pb2 as pb
from google.protobuf import json_format
from google.protobuf.message import Message as ProtoMessage

from weft.core.blobs import BlobRef
from weft_protocols import a2a, events, ids, mcp, records, states, subjects
from weft_protocols import headers as h
from weft_protocols.errors import A2A_ERRORS, InvalidName, InvalidParams, InvalidRequest, ParseError, ToolError
from weft_protocols.states import State

VECTORS = Path(__file__).parents[2] / "protocols" / "vectors"


def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vectors_generate", VECTORS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generating_the_vectors_again_gives_the_same_bytes(generator: ModuleType) -> None:
    made: dict[Path, bytes] = generator.render()
    stale = [path.name for path, content in made.items() if path.read_bytes() != content]
    assert stale == [], "run: python protocols/vectors/generate.py"
    assert set(VECTORS.glob("*.json")) <= made.keys()


def test_task_ids() -> None:
    for case in load("ids")["task_id"]:
        names = b"".join(case[key].encode() + b"\0" for key in ("caller", "agent", "message_id"))
        assert hashlib.sha256(names).hexdigest()[:32] == case["task_id"]
        assert ids.task_id(case["caller"], case["agent"], case["message_id"]) == case["task_id"]


def test_other_derived_ids() -> None:
    vectors = load("ids")
    for case in vectors["child_message_id"]:
        assert ids.child_message_id(case["parent_task"], case["key"]) == case["message_id"]
    for case in vectors["idempotency_key"]:
        assert ids.idempotency_key(case["task"], case["key"]) == case["idempotency_key"]
    for case in vectors["step_token"]:
        assert subjects.step_token(case["key"]) == case["token"]


def test_slices() -> None:
    for case in load("ids")["slice"]:
        assert f"{case['crc32'] % 100:02d}" == ids.slice_of(case["context_id"]) == case["slice"]


def test_subjects_that_are_built_and_parsed() -> None:
    vectors = load("subjects")
    assert [case["kind"] for case in vectors["valid"]] == list(subjects.GRAMMAR)
    for case in vectors["valid"]:
        kind = subjects.GRAMMAR[case["kind"]]
        assert subjects.parse(case["subject"]) == subjects.Parsed(case["kind"], case["tokens"])
        assert (kind.wildcard, kind.writer) == (case["pattern"], case["writer"])


@pytest.mark.parametrize("subject", load("subjects")["invalid"], ids=ascii)
def test_subjects_that_do_not_parse(subject: str) -> None:
    with pytest.raises(InvalidName):
        subjects.parse(subject)


def test_subjects_under_patterns() -> None:
    for case in load("subjects")["matches"]:
        assert subjects.matches(case["pattern"], case["subject"]) == case["matches"], case


def test_headers_that_are_written() -> None:
    for case in load("headers")["written"]:
        assert h.block(h.fields([(name, value) for name, value in case["fields"]])).hex() == case["block"]


def test_headers_that_are_read() -> None:
    for case in load("headers")["read"]:
        block = bytes.fromhex(case["block"])
        for name, expected in case["values"].items():
            quick = h.get(block, name.encode())
            assert (None if quick is None else quick.decode()) == expected, case
            assert h.parse(block).get(name.lower()) == expected, case


def test_headers_that_are_refused() -> None:
    for case in load("headers")["refused"]:
        with pytest.raises(InvalidRequest):
            h.fields({case["name"]: case["value"]})


def test_status_lines() -> None:
    for case in load("headers")["status"]:
        assert h.status(bytes.fromhex(case["block"])) == (case["code"], case["text"])


def kind_of(name: str) -> type[ProtoMessage]:
    kind: type[ProtoMessage] = getattr(pb, name.rpartition(".")[2])
    assert kind.DESCRIPTOR.full_name == name
    return kind


@pytest.mark.parametrize("case", load("messages")["cases"], ids=lambda case: case["name"])
def test_messages_in_both_encodings(case: dict[str, Any]) -> None:
    kind, body = kind_of(case["type"]), bytes.fromhex(case["protobuf"])
    from_json = a2a.decode(kind, json.dumps(case["json"]).encode(), h.JSON)
    assert a2a.decode(kind, body) == from_json
    assert a2a.encode(from_json) == body
    assert json.loads(a2a.encode(from_json, h.JSON)) == case["json"]


@pytest.mark.parametrize("case", load("errors")["cases"], ids=lambda case: case["message"])
def test_error_bodies(case: dict[str, Any]) -> None:
    error = a2a.error_from_body(case["reason"], bytes.fromhex(case["status"]))
    assert (error.reason, error.message, error.metadata) == (case["reason"], case["message"], case["metadata"])
    assert [dataclasses.asdict(violation) for violation in error.violations] == case["violations"]
    assert error.spec.code == case["code"]
    assert a2a.error_body(error).hex() == case["status"]


def test_there_is_a_body_for_every_error() -> None:
    assert {case["reason"] for case in load("errors")["cases"]} == A2A_ERRORS.keys()


def record_of(case: dict[str, Any]) -> Any:
    kind = getattr(records, case["type"])
    values = {k: bytes.fromhex(v["hex"]) if isinstance(v, dict) else v for k, v in case["fields"].items()}
    return kind(**values)


def test_records() -> None:
    for case in load("records")["cases"]:
        record = record_of(case)
        assert record.encode().hex() == case["msgpack"]
        assert type(record).decode(bytes.fromhex(case["msgpack"])) == record


def test_records_of_other_versions() -> None:
    vectors = load("records")
    for case in vectors["tolerated"]:
        assert getattr(records, case["type"]).decode(bytes.fromhex(case["msgpack"])) == record_of(case)
    for case in vectors["refused"]:
        with pytest.raises(ParseError):
            getattr(records, case["type"]).decode(bytes.fromhex(case["msgpack"]))


def test_states() -> None:
    vectors = load("states")
    assert len(vectors["states"]) == len(State)
    for case in vectors["states"]:
        state = State(case["number"])
        assert pb.TaskState.Name(case["number"]) == case["name"]
        assert (state.label, state.terminal, state.interrupted) == (
            case["label"],
            case["terminal"],
            case["interrupted"],
        )
        assert sorted(s.label for s in State if states.may_follow(state, s)) == case["next"]
    assert set(vectors["end_labels"]) == states.END_LABELS


def events_of(forms: list[dict[str, Any]]) -> list[pb.StreamResponse]:
    return [json_format.ParseDict(form, pb.StreamResponse()) for form in forms]


@pytest.mark.parametrize("case", load("folds")["cases"], ids=lambda case: case["name"])
def test_folds(case: dict[str, Any]) -> None:
    start = None if case["start"] is None else json_format.ParseDict(case["start"], pb.Task())
    folded = a2a.fold(events_of(case["events"]), start)
    assert folded == json_format.ParseDict(case["task"], pb.Task())


def test_folds_of_events_as_they_arrive() -> None:
    for case in load("folds")["arrivals"]:
        first: dict[int, dict[str, Any]] = {}
        for arrived in case["arrived"]:
            first.setdefault(arrived["n"], arrived["event"])
        assert sorted(first) == case["order"]
        folded = a2a.fold(events_of([first[n] for n in sorted(first)]))
        assert folded == json_format.ParseDict(case["task"], pb.Task())


def test_pages() -> None:
    vectors = load("pages")
    for case in vectors["cases"]:
        page = events.unpack(bytes.fromhex(case["page"]))
        assert [(e.n, e.state, e.seq, e.data.hex()) for e in page] == [
            (e["n"], e["state"], e["seq"], e["body"]) for e in case["events"]
        ]
        for event, expected in zip(page, case["events"], strict=True):
            read = h.parse(event.headers)
            assert {name: read.get(name.lower()) for name in expected["headers"]} == expected["headers"]
        assert events.pack(page).hex() == case["page"]
    for page_ in vectors["refused"]:
        with pytest.raises(ParseError):
            events.unpack(bytes.fromhex(page_))


@pytest.mark.parametrize("case", load("groups")["cases"], ids=lambda case: case["name"])
def test_groups(case: dict[str, Any]) -> None:
    found = events.read_stored(bytes.fromhex(case["body"]), case["headers"].encode(), seq=7)
    assert [(event.n, event.state, event.seq) for event in found] == [(e["n"], e["state"], 7) for e in case["events"]]
    for event, expected in zip(found, case["events"], strict=True):
        assert event.data.hex() == expected.get("body", case["body"])


@pytest.mark.parametrize("case", load("blobs")["cases"], ids=lambda case: case["name"])
def test_blob_references(case: dict[str, Any]) -> None:
    data = case["content"]["repeat"].encode() * case["content"]["times"]
    assert (ids.digest(data), len(data)) == (case["sha256"], case["size"])
    ref = BlobRef.parse(case["url"])
    assert ref == BlobRef(case["writer"], case["sha256"], case["chunks"], case["size"])
    assert ref.url == case["url"]
    assert [subjects.blob(ref.writer, ref.sha256, n) for n in range(ref.chunks)] == case["subjects"]


@pytest.mark.parametrize("url", load("blobs")["refused"], ids=ascii)
def test_what_is_not_a_blob_reference(url: str) -> None:
    with pytest.raises(InvalidParams, match="not a blob reference"):
        BlobRef.parse(url)


@pytest.mark.parametrize("case", load("mcp")["requests"], ids=lambda case: case["subject"])
def test_tool_requests(case: dict[str, Any]) -> None:
    headers = {name.lower(): value for name, value in case["headers"].items()}
    found = mcp.inspect(case["subject"], headers, case["body"])
    assert (found.target.caller, found.target.server) == (case["caller"], case["server"])
    assert (found.id, found.method, found.name) == ("r1", case["method"], case["name"])


@pytest.mark.parametrize("case", load("mcp")["refused"], ids=lambda case: case["what"])
def test_tool_requests_that_are_refused(case: dict[str, Any]) -> None:
    headers = {name.lower(): value for name, value in case["headers"].items()}
    with pytest.raises(ToolError) as refused:
        mcp.inspect(case["subject"], headers, case["body"])
    assert refused.value.code == case["code"]


def test_values_of_tool_headers() -> None:
    vectors = load("mcp")
    for case in vectors["header_values"]:
        assert mcp.encode_value(case["value"]) == case["header"]
        assert mcp.decode_value(case["header"]) == case["value"]
    assert [mcp.decode_value(value) for value in vectors["broken_header_values"]] == [None] * 4
    for case in vectors["controls"]:
        assert mcp.parse_control(case["subject"]) == (case["caller"], case["request"])


def test_names_of_tools_and_servers() -> None:
    vectors = load("mcp")
    for server, name, joined in vectors["aggregate"]["tools"]:
        assert mcp.split(joined) == (server, name)
    for server, uri, joined in vectors["aggregate"]["resources"]:
        assert mcp.split_uri(joined) == (server, uri)
    for name in vectors["aggregate"]["refused"]:
        with pytest.raises(ToolError):
            mcp.split(name)
    for name in vectors["servers"]["valid"]:
        assert mcp.check_server(name) == name
    for name in vectors["servers"]["refused"]:
        with pytest.raises(InvalidName):
            mcp.check_server(name)
