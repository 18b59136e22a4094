"""Writes the test vectors and `errors.json`: `python protocols/vectors/generate.py`.

The vectors are what another implementation tests itself against (see `protocols/README.md`). They are made
from the cases below and nothing else: no clock, no randomness. `tests/protocols/test_vectors.py` checks that
the files are those this script makes, and that `weft_protocols` agrees with each of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import msgpack
from a2a.types import a2a_pb2 as pb
from google.protobuf import json_format
from google.protobuf.message import Message as ProtoMessage

from weft_protocols import a2a, errors, events, ids, mcp, records, subjects
from weft_protocols import headers as h
from weft_protocols.states import END_LABELS, TRANSITIONS, State

VECTORS = Path(__file__).parent
SPEC = VECTORS.parent / "spec"
TASK = ids.task_id("local", "analyst", "m-1")
CONTEXT = "b7d41c7e2a3f4d0c9a5e6f708192a3b4"


def render() -> dict[Path, bytes]:
    """Every generated file and its bytes."""
    files = {
        VECTORS / "ids.json": _ids(),
        VECTORS / "subjects.json": _subjects(),
        VECTORS / "headers.json": _headers(),
        VECTORS / "messages.json": _messages(),
        VECTORS / "errors.json": _error_bodies(),
        VECTORS / "records.json": _records(),
        VECTORS / "states.json": _states(),
        VECTORS / "folds.json": _folds(),
        VECTORS / "pages.json": _pages(),
        VECTORS / "groups.json": _groups(),
        VECTORS / "blobs.json": _blobs(),
        VECTORS / "mcp.json": _mcp(),
        SPEC / "errors.json": _error_table(),
    }
    return {path: (json.dumps(content, indent=2) + "\n").encode() for path, content in files.items()}


def _ids() -> dict[str, Any]:
    messages = [
        ("local", "analyst", "m-1"),
        ("local", "analyst", "M-1"),
        ("analyst", "local", "m-1"),
        ("local", "analyst", "6f1d0b0e-7a5c-4f7e-9d4b-2b8f3f5f0c11"),
        ("local", "analyst", "naïve ✓"),
        ("local", "analyst", "a\0b"),
        ("ab", "c", "x"),
        ("a", "bc", "x"),
        ("a" * 64, "b" * 64, "m" * 300),
    ]
    contexts = ["", "c-1", "c-2", CONTEXT, "Gespräch 7", "x" * 300]
    steps = ["fetch", "_ask", "fetch page", "a/b", "é", "k-fetch", "x" * 64, "x" * 65]
    return {
        "spec": "section 6",
        "task_id": [
            {"caller": c, "agent": a, "message_id": m, "task_id": ids.task_id(c, a, m)} for c, a, m in messages
        ],
        "child_message_id": [
            {"parent_task": TASK, "key": key, "message_id": ids.child_message_id(TASK, key)} for key in steps
        ],
        "idempotency_key": [
            {"task": TASK, "key": key, "idempotency_key": ids.idempotency_key(TASK, key)} for key in steps
        ],
        "slice": [{"context_id": c, "crc32": zlib.crc32(c.encode()), "slice": ids.slice_of(c)} for c in contexts],
        "step_token": [{"key": key, "token": subjects.step_token(key)} for key in steps],
    }


_SHA = hashlib.sha256(b"weft").hexdigest()
_TOKENS = {
    "agent": "analyst",
    "slice": "07",
    "caller": "local",
    "task": TASK,
    "origin": "o1",
    "key": "fetch",
    "replica": "r-2",
    "method": "GetTask",
    "operation": "register",
    "writer": "local",
    "sha256": _SHA,
    "n": "0",
    "config": "hook-1",
}
_INVALID = [
    "",
    "mesh",
    "mesh.",
    "mesh.task",
    "mesh.nope.a.b",
    "other.claim.analyst." + TASK,
    "Mesh.claim.analyst." + TASK,
    "mesh.CLAIM.analyst." + TASK,
    "mesh.claim.analyst",
    f"mesh.claim.analyst.{TASK}.more",
    f"mesh.claim..{TASK}",
    f"mesh.claim.*.{TASK}",
    "mesh.claim.analyst.>",
    f"mesh.claim.ana lyst.{TASK}",
    f"mesh.claim.análisis.{TASK}",
    f"mesh.claim.analyst.{TASK.upper()}",
    f"mesh.claim.analyst.{TASK[:-1]}",
    f"mesh.claim.analyst.{TASK}\n",
    f"mesh.claim.{'a' * 65}.{TASK}",
    f"mesh.task.analyst.7.local.{TASK}",
    f"mesh.task.analyst.007.local.{TASK}",
    f"mesh.task.analyst.٠٧.local.{TASK}",
    f"mesh.event.analyst.{TASK}.*.o1",
    f"mesh.blob.local.{_SHA[:-1]}.0",
    f"mesh.blob.local.{_SHA}.00",
    f"mesh.blob.local.{_SHA}.-1",
]
_MATCHES = [
    ("mesh.claim.analyst.*", f"mesh.claim.analyst.{TASK}", True),
    ("mesh.claim.*.*", f"mesh.claim.analyst.{TASK}", True),
    ("mesh.claim.analyst.>", f"mesh.claim.analyst.{TASK}", True),
    ("mesh.>", f"mesh.claim.analyst.{TASK}", True),
    ("mesh.claim.analyst.>", "mesh.claim.analyst", False),
    ("mesh.claim.*", f"mesh.claim.analyst.{TASK}", False),
    ("mesh.claim.other.*", f"mesh.claim.analyst.{TASK}", False),
    ("mesh.claim.*.*", f"mesh.event.analyst.{TASK}", False),
    ("mesh.event.*.*.local.*", f"mesh.event.analyst.{TASK}.*.o1", False),
]


def _subjects() -> dict[str, Any]:
    valid = []
    for kind in subjects.GRAMMAR.values():
        tokens = {token: _TOKENS[token] for token in kind.tokens}
        valid.append(
            {
                "kind": kind.name,
                "tokens": tokens,
                "subject": ".".join(("mesh", kind.name, *tokens.values())),
                "pattern": kind.wildcard,
                "writer": kind.writer,
            }
        )
    return {
        "spec": "section 3",
        "valid": valid,
        "invalid": _INVALID,
        "matches": [{"pattern": p, "subject": s, "matches": m} for p, s, m in _MATCHES],
        "live": {
            "event": f"mesh.event.analyst.{TASK}.local.o1",
            "republished": f"mesh.live.local.o1.analyst.{TASK}",
        },
        "consumers": [
            {"agent": "analyst", "lane": lane, "name": subjects.consumer("analyst", lane)} for lane in subjects.LANES
        ],
    }


def _headers() -> dict[str, Any]:
    create = [
        (h.EXPECTED_SEQUENCE, "0"),
        (h.VERSION, h.A2A_VERSION),
        (h.ORIGIN, "o1"),
        (h.DEADLINE, "1790000000000"),
        (h.CHAIN, f"planner/{ids.task_id('local', 'planner', 'm-0')}"),
        (h.TRACEPARENT, "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
    ]
    event = [
        (h.EXPECTED_SEQUENCE, "42"),
        (h.EXPECTED_SUBJECT, subjects.claim("analyst", TASK)),
        (h.EVENT, "3"),
        (h.STATE, "completed"),
    ]
    utf8 = [("X-Note", "naïve ✓"), ("A2A-Extensions", "https://example.com/e/v1, https://example.com/f/v1")]
    reads = [
        (b"NATS/1.0\r\nWeft-Event: 3\r\n\r\n", {"Weft-Event": "3", "Weft-State": None}),
        (b"NATS/1.0\r\nweft-EVENT:3\r\n\r\n", {"Weft-Event": "3"}),
        (b"NATS/1.0\r\nWeft-Event: \t 3 \r\n\r\n", {"Weft-Event": "3"}),
        (b"NATS/1.0\r\nWeft-Event: 3\r\nWeft-Event: 4\r\n\r\n", {"Weft-Event": "3"}),
        (b"NATS/1.0\r\nWeft-Event : 3\r\n\r\n", {"Weft-Event": None}),
        (b"NATS/1.0\r\nX: Weft-Event: 3\r\n\r\n", {"Weft-Event": None, "X": "Weft-Event: 3"}),
        (b"NATS/1.0\r\nX-Weft-Event: 3\r\n\r\n", {"Weft-Event": None}),
        (b"NATS/1.0\r\nWeft-Event:\r\n\r\n", {"Weft-Event": ""}),
        (b"NATS/1.0\r\nWeft-Event: 3", {"Weft-Event": "3"}),
        (b"NATS/1.0\r\nNo colon\r\nWeft-Event: 3\r\n\r\n", {"Weft-Event": "3"}),
        ("NATS/1.0\r\nWeft-\u212aey: 3\r\n\r\n".encode(), {"Weft-key": None}),
    ]
    refused = [("X-Note", "a\r\nA2A-Error: X"), ("X-Note", "a\nb"), ("X-Note", "a\0b"), ("", "x")]
    refused += [("X Note", "x"), ("X-Note:", "x"), ("X-Nöte", "x"), ("X\r\nY", "x"), ("X\0", "x")]
    statuses = [
        b"NATS/1.0 503\r\n\r\n",
        b"NATS/1.0 404 Message Not Found\r\n\r\n",
        b"NATS/1.0\r\nA: b\r\n\r\n",
    ]
    return {
        "spec": "section 5",
        "written": [
            {"fields": [list(pair) for pair in pairs], "block": h.block(h.fields(pairs)).hex()}
            for pairs in (create, event, utf8)
        ],
        "read": [{"block": block.hex(), "values": values} for block, values in reads],
        "refused": [{"name": name, "value": value} for name, value in refused],
        "status": [
            {"block": block.hex(), "code": h.status(block)[0], "text": h.status(block)[1]} for block in statuses
        ],
    }


def _status_update(state: str, text: str = "", **more: Any) -> dict[str, Any]:
    status: dict[str, Any] = {"state": state, "timestamp": "2026-01-02T03:04:05.678Z"}
    if text:
        status["message"] = {
            "messageId": f"{TASK}-1",
            "contextId": CONTEXT,
            "taskId": TASK,
            "role": "ROLE_AGENT",
            "parts": [{"text": text}],
        }
    return {"statusUpdate": {"taskId": TASK, "contextId": CONTEXT, "status": status, **more}}


def _artifact_update(artifact: str, *parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"artifactId": artifact, "parts": list(parts)}
    if "metadata" in more:
        made["metadata"] = more.pop("metadata")
    return {"artifactUpdate": {"taskId": TASK, "contextId": CONTEXT, "artifact": made, **more}}


_REQUEST = {
    "message": {
        "messageId": "m-1",
        "contextId": CONTEXT,
        "role": "ROLE_USER",
        "parts": [
            {"text": "Summarise the report.", "mediaType": "text/plain"},
            {"data": {"depth": 2}, "mediaType": "application/json"},
            {"raw": "AAEC/w==", "filename": "a.bin", "mediaType": "application/octet-stream"},
        ],
        "metadata": {"weft.skill": "summarize"},
    },
    "configuration": {"acceptedOutputModes": ["text/plain"], "historyLength": 0},
}
_FOLLOW_UP = {
    "message": {
        "messageId": "m-2",
        "contextId": CONTEXT,
        "taskId": TASK,
        "role": "ROLE_USER",
        "parts": [{"text": "The second one."}],
    }
}
_MESSAGE_EVENT = {
    "message": {
        "messageId": f"{TASK}-answer",
        "contextId": CONTEXT,
        "taskId": TASK,
        "role": "ROLE_AGENT",
        "parts": [{"text": "pong"}],
    }
}
_BLOB_PART = {
    "url": f"weft-blob:local/{_SHA}?chunks=2&size=524289",
    "mediaType": "text/plain",
    "metadata": {"weft.blob": "text"},
}


def _messages() -> dict[str, Any]:
    cases: list[tuple[str, type[ProtoMessage], dict[str, Any]]] = [
        ("a message that creates a task", pb.SendMessageRequest, _REQUEST),
        ("a follow-up", pb.SendMessageRequest, _FOLLOW_UP),
        ("a cancel", pb.CancelTaskRequest, {"id": TASK, "metadata": {"reason": "no longer needed"}}),
        ("a status event", pb.StreamResponse, _status_update("TASK_STATE_WORKING", "reading")),
        ("a terminal event", pb.StreamResponse, _status_update("TASK_STATE_COMPLETED")),
        (
            "an artifact event",
            pb.StreamResponse,
            _artifact_update("a-1", {"text": "done"}, lastChunk=True),
        ),
        (
            "a chunk that appends",
            pb.StreamResponse,
            _artifact_update("a-1", {"text": " and"}, append=True),
        ),
        ("a message as the whole answer", pb.StreamResponse, _MESSAGE_EVENT),
        ("a part that is a blob", pb.StreamResponse, _artifact_update("a-2", _BLOB_PART, lastChunk=True)),
        ("GetTask", pb.GetTaskRequest, {"id": TASK, "historyLength": 0}),
        ("ListTasks", pb.ListTasksRequest, {"status": "TASK_STATE_WORKING", "pageSize": 50}),
        ("SubscribeToTask", pb.SubscribeToTaskRequest, {"id": TASK}),
        ("an empty message", pb.GetTaskRequest, {}),
    ]
    return {"spec": "section 4", "cases": [_pair(name, kind, form) for name, kind, form in cases]}


def _pair(name: str, kind: type[ProtoMessage], form: dict[str, Any]) -> dict[str, Any]:
    message = json_format.ParseDict(form, kind())
    return {
        "name": name,
        "type": kind.DESCRIPTOR.full_name,
        "json": form,
        "protobuf": message.SerializeToString(deterministic=True).hex(),
    }


def _error_bodies() -> dict[str, Any]:
    cases = [_error_case(reason, f"about {spec.name}") for reason, spec in errors.A2A_ERRORS.items()]
    cases.append(_error_case("VERSION_NOT_SUPPORTED", "A2A version 0.3 is not supported", {"supported": "1.0"}))
    cases.append(
        _error_case(
            "INVALID_PARAMS",
            "wrong input: depth: must be positive",
            violations=(errors.FieldViolation("depth", "must be positive"),),
        )
    )
    return {"spec": "section 14", "cases": cases}


def _error_case(
    reason: str,
    message: str,
    metadata: dict[str, str] | None = None,
    *,
    violations: tuple[errors.FieldViolation, ...] = (),
) -> dict[str, Any]:
    error = errors.A2AError.from_reason(reason, message, metadata=metadata, violations=violations)
    return {
        "reason": reason,
        "code": error.spec.code,
        "message": message,
        "metadata": metadata or {},
        "violations": [{"field": v.field, "description": v.description} for v in violations],
        "status": a2a.error_body(error).hex(),
    }


def _error_table() -> dict[str, Any]:
    return {
        "domain": errors.A2A_DOMAIN,
        "errors": [
            {"name": s.name, "reason": s.reason, "code": s.code, "http": s.http, "grpc": s.grpc}
            for s in errors.A2A_ERRORS.values()
        ],
    }


def _records() -> dict[str, Any]:
    claim = records.Claim(
        replica="analyst-7f3a",
        version="1.2.0",
        attempt=2,
        caller="local",
        origin="o1",
        context=CONTEXT,
        slice=ids.slice_of(CONTEXT),
        message=41,
        delivery="$JS.ACK.MESH.analyst=work.2.41.7.1790000000000000000.0",
        at=1790000000000,
    )
    step = records.StepRecord(key="fetch", input="0" * 32, value=b"\xa2ok", attempts=1, ms=12)
    dead = records.DeadLetter(
        agent="analyst",
        task=TASK,
        caller="local",
        reason="attempts",
        error="KeyError: 'x'",
        attempts=3,
        replica="analyst-7f3a",
        version="1.2.0",
        message=41,
        at=1790000000000,
    )
    control = records.Control(op="cancel", reason="no longer needed")
    config = pb.TaskPushNotificationConfig(id="hook-1", task_id=TASK, url="https://example.com/hook")
    job = records.PushJob(config=config.SerializeToString(deterministic=True), series="6f1d0b0e7a5c4f7e", after=2)
    cursor = records.PushCursor(series="6f1d0b0e7a5c4f7e", n=3, at=45, ended=True, job=7)
    named = {
        "Claim": claim,
        "StepRecord": step,
        "DeadLetter": dead,
        "Control": control,
        "PushJob": job,
        "PushCursor": cursor,
    }
    newer = {**msgpack.unpackb(claim.encode()), "added_later": [1, {"x": None}]}
    shorter = {k: v for k, v in msgpack.unpackb(claim.encode()).items() if k not in ("state", "waiting", "at")}
    shorter_claim = records.Claim.decode(msgpack.packb(shorter))
    return {
        "spec": "section 17",
        "cases": [
            {"type": name, "fields": _fields_of(record), "msgpack": record.encode().hex()}
            for name, record in named.items()
        ],
        "tolerated": [
            {"type": "Claim", "msgpack": msgpack.packb(newer).hex(), "fields": _fields_of(claim)},
            {"type": "Claim", "msgpack": msgpack.packb(shorter).hex(), "fields": _fields_of(shorter_claim)},
        ],
        "refused": [
            {"type": "Claim", "msgpack": ""},
            {"type": "Claim", "msgpack": "c0"},
            {"type": "Claim", "msgpack": "93010203"},
            {"type": "Claim", "msgpack": msgpack.packb({"replica": "r"}).hex()},
            {"type": "Control", "msgpack": control.encode().hex()[:-2]},
            {"type": "Control", "msgpack": control.encode().hex() + "00"},
        ],
    }


def _fields_of(record: Any) -> dict[str, Any]:
    values = dataclasses.asdict(record)
    return {name: {"hex": value.hex()} if isinstance(value, bytes) else value for name, value in values.items()}


def _states() -> dict[str, Any]:
    return {
        "spec": "section 9",
        "states": [
            {
                "number": int(state),
                "name": f"TASK_STATE_{state.name}",
                "label": state.label,
                "terminal": state.terminal,
                "interrupted": state.interrupted,
                "next": sorted(after.label for after in TRANSITIONS[state]),
            }
            for state in State
        ],
        "end_labels": sorted(END_LABELS),
    }


def _folds() -> dict[str, Any]:
    working, done = _status_update("TASK_STATE_WORKING"), _status_update("TASK_STATE_COMPLETED")
    one, two = {"text": "one"}, {"text": "two"}
    cases: list[tuple[str, list[dict[str, Any]], dict[str, Any] | None]] = [
        ("no events", [], None),
        ("a task that completes", [working, _artifact_update("a-1", one, lastChunk=True), done], None),
        (
            "chunks that append",
            [_artifact_update("a-1", one), _artifact_update("a-1", two, append=True, lastChunk=True), done],
            None,
        ),
        (
            "an artifact that replaces",
            [_artifact_update("a-1", one), _artifact_update("a-1", two, lastChunk=True), done],
            None,
        ),
        (
            "two artifacts, interleaved",
            [
                _artifact_update("a-1", one),
                _artifact_update("a-2", two),
                _artifact_update("a-1", two, append=True),
                _artifact_update("a-2", one, append=True),
            ],
            None,
        ),
        ("append to what does not exist", [_artifact_update("a-9", one, append=True)], None),
        (
            "a question and its answer",
            [
                working,
                _status_update("TASK_STATE_INPUT_REQUIRED", "Which one?"),
                working,
                done,
            ],
            None,
        ),
        ("a message alone", [_MESSAGE_EVENT], None),
        (
            "metadata of status events",
            [
                _status_update("TASK_STATE_WORKING", metadata={"progress": 0.5}),
                _status_update("TASK_STATE_REJECTED", "no", metadata={"weft.error": {"reason": "X"}}),
            ],
            None,
        ),
        (
            "events on top of a snapshot",
            [_artifact_update("a-1", two, append=True), done],
            {"id": TASK, "contextId": CONTEXT, "artifacts": [{"artifactId": "a-1", "parts": [one]}]},
        ),
    ]
    return {
        "spec": "section 9",
        "cases": [_fold_case(name, forms, start) for name, forms, start in cases],
        "arrivals": [
            {
                "name": "out of order and more than once: readers go by number",
                "arrived": [
                    {"n": n, "event": form}
                    for n, form in ((2, _artifact_update("a-1", one)), (1, working), (2, done), (3, done))
                ],
                "order": [1, 2, 3],
                "task": _folded([working, _artifact_update("a-1", one), done], None),
            }
        ],
    }


def _fold_case(name: str, forms: list[dict[str, Any]], start: dict[str, Any] | None) -> dict[str, Any]:
    return {"name": name, "start": start, "events": forms, "task": _folded(forms, start)}


def _folded(forms: list[dict[str, Any]], start: dict[str, Any] | None) -> dict[str, Any]:
    parsed = [json_format.ParseDict(form, pb.StreamResponse()) for form in forms]
    snapshot = None if start is None else json_format.ParseDict(start, pb.Task())
    # Sorted: protobuf keeps the entries of a map in no order.
    task: dict[str, Any] = json.loads(json_format.MessageToJson(a2a.fold(parsed, snapshot), sort_keys=True))
    return task


def _pages() -> dict[str, Any]:
    working = json_format.ParseDict(_status_update("TASK_STATE_WORKING"), pb.StreamResponse())
    rejected = json_format.ParseDict(_status_update("TASK_STATE_REJECTED", "no"), pb.StreamResponse())
    stored = [
        (1, "working", a2a.encode(working), {}, 42),
        (
            2,
            "rejected",
            a2a.encode(rejected, h.JSON),
            {h.ERROR: "INVALID_PARAMS", h.CONTENT_TYPE: h.JSON},
            45,
        ),
    ]
    raw = [
        events.RawEvent(n, state, data, h.block(h.fields({h.EVENT: str(n), **more})), seq)
        for n, state, data, more, seq in stored
    ]
    return {
        "spec": "section 11",
        "cases": [
            {"name": "nothing newer", "page": "", "events": []},
            {
                "name": "two events",
                "page": events.pack(raw).hex(),
                "events": [
                    {"n": n, "state": state, "seq": seq, "headers": more, "body": data.hex()}
                    for n, state, data, more, seq in stored
                ],
            },
        ],
        "refused": [events.pack(raw).hex()[:-2], "ff", "05aabb"],
    }


def _groups() -> dict[str, Any]:
    working = json_format.ParseDict(_status_update("TASK_STATE_WORKING"), pb.StreamResponse())
    done = json_format.ParseDict(_status_update("TASK_STATE_COMPLETED"), pb.StreamResponse())
    stored = [
        (1, "working", h.fields({h.EVENT: "1", h.STATE: "working", h.REPLICA: "r1"}), a2a.encode(working)),
        (2, "", h.fields({h.EVENT: "2", h.CONTENT_TYPE: h.JSON}), b"{}"),
        (3, "completed", h.fields({h.EVENT: "3", h.STATE: "completed"}), a2a.encode(done)),
    ]
    lines, body = events.group([(lines, data) for _, _, lines, data in stored])
    listed = [{"n": n, "state": state, "body": data.hex()} for n, state, _, data in stored]
    as_one = {"n": 3, "state": "completed"}

    def case(name: str, headers: bytes, body: bytes, found: list[dict[str, Any]]) -> dict[str, Any]:
        return {"name": name, "headers": h.block(headers).decode(), "body": body.hex(), "events": found}

    other = events.group([(fields, data) for _, _, fields, data in reversed(stored)])[1]
    alone = {"n": 3, "state": "completed", "body": stored[2][3].hex()}
    return {
        "spec": "section 9",
        "cases": [
            case("three events", lines, body, listed),
            case("one event", stored[2][2], stored[2][3], [alone]),
            case("another number of events", lines.replace(b"Group: 3", b"Group: 2"), body, [as_one]),
            case("cut short", lines, body[:-1], [as_one]),
            case("the last is another event", lines, other, [as_one]),
        ],
    }


def _blobs() -> dict[str, Any]:
    chunk = 512 * 1024
    cases = []
    for name, content, size in (
        ("empty", b"", 0),
        ("one byte", b"x", 1),
        ("exactly one chunk", b"x", chunk),
        ("one byte more than a chunk", b"x", chunk + 1),
    ):
        data = content * size
        digest = hashlib.sha256(data).hexdigest()
        chunks = max(1, -(-size // chunk))
        cases.append(
            {
                "name": name,
                "content": {"repeat": content.decode(), "times": size},
                "writer": "local",
                "sha256": digest,
                "chunks": chunks,
                "size": size,
                "url": f"weft-blob:local/{digest}?chunks={chunks}&size={size}",
                "subjects": [f"mesh.blob.local.{digest}.{n}" for n in range(chunks)],
            }
        )
    refused = [
        "",
        f"weft-blob:local/{_SHA}",
        f"weft-blob:local/{_SHA.upper()}?chunks=1&size=1",
        f"weft-blob:lo.cal/{_SHA}?chunks=1&size=1",
        f"weft-blob:*/{_SHA}?chunks=1&size=1",
        f"weft-blob:local/{_SHA}?size=1&chunks=1",
        f"weft-blob:local/{_SHA}?chunks=-1&size=1",
        f"weft-blob:local/{_SHA}?chunks=1&size=1&x=1",
        f"weft-blob:local/{_SHA}?chunks=1&size=1\n",
        f"https://example.com/{_SHA}?chunks=1&size=1",
    ]
    return {"spec": "section 15", "cases": cases, "refused": refused}


def _mcp() -> dict[str, Any]:
    meta = {mcp.META_VERSION: mcp.VERSION, mcp.META_CAPABILITIES: {}}
    cases = []
    for server, method, name, more in (
        ("files", "tools/call", "read", {"arguments": {"path": "/a"}}),
        ("files", "tools/call", "read file", {"arguments": {}}),
        ("files", "tools/call", "_", {"arguments": {}}),
        ("files", "tools/call", "k-1", {"arguments": {}}),
        ("files", "tools/call", "größe", {"arguments": {}}),
        ("files", "tools/call", "=?base64?eA==?=", {"arguments": {}}),
        ("_", "tools/call", "files__read", {"arguments": {}}),
        ("files", "resources/read", "file:///a/b.txt", {}),
        ("files", "prompts/get", "summary", {}),
        ("_", "tools/list", "", {}),
        ("files", "resources/templates/list", "", {}),
        ("files", "subscriptions/listen", "", {"notifications": {"toolsListChanged": True}}),
        ("_", "server/discover", "", {}),
    ):
        named = {mcp.NAMED[method]: name} if method in mcp.NAMED else {}
        body = {"jsonrpc": "2.0", "id": "r1", "method": method, "params": {**named, **more, "_meta": meta}}
        cases.append(
            {
                "caller": "analyst",
                "server": server,
                "method": method,
                "name": name,
                "subject": mcp.request_subject("analyst", server, method=method, name=name),
                "headers": mcp.request_headers(method, name, "r1"),
                "body": body,
            }
        )
    good = cases[0]
    refused = [
        {"what": what, "code": code, **{**{key: good[key] for key in ("subject", "headers", "body")}, **changed}}
        for what, code, changed in (
            ("another name in the subject", mcp.MISMATCH, {"subject": f"{good['subject']}2"}),
            (
                "another method in the subject",
                mcp.MISMATCH,
                {"subject": "mcp.v1.req.default.analyst.files.tools.list.read"},
            ),
            (
                "another method in the header",
                mcp.MISMATCH,
                {"headers": {**good["headers"], "Mcp-Method": "tools/list"}},
            ),
            ("another name in the header", mcp.MISMATCH, {"headers": {**good["headers"], "Mcp-Name": "write"}}),
            ("no name in the header", mcp.MISMATCH, {"headers": {**good["headers"], "Mcp-Name": ""}}),
            ("another version in the header", mcp.MISMATCH, {"headers": {**good["headers"], mcp.VERSION_HEADER: "1"}}),
            ("no version in the body", mcp.INVALID_PARAMS, {"body": _without(good["body"], mcp.META_VERSION)}),
            ("no capabilities", mcp.INVALID_PARAMS, {"body": _without(good["body"], mcp.META_CAPABILITIES)}),
            ("a notification", mcp.INVALID_REQUEST, {"body": {k: v for k, v in good["body"].items() if k != "id"}}),
            ("a batch", mcp.INVALID_REQUEST, {"body": [good["body"]]}),
            ("a wildcard for the caller", mcp.INVALID_REQUEST, {"subject": good["subject"].replace("analyst", "*")}),
            ("too short a subject", mcp.INVALID_REQUEST, {"subject": "mcp.v1.req.default.analyst.files.read"}),
        )
    ]
    values = ["read", "a b", "größe", " a", "a ", "", "a\nb", "=?base64?eA==?=", "file:///a?b=c", "x" * 70]
    return {
        "spec": "mcp-over-nats.md, sections 3 to 5",
        "requests": cases,
        "refused": refused,
        "header_values": [{"value": value, "header": mcp.encode_value(value)} for value in values],
        "broken_header_values": ["=?base64?x?=", "=?base64?eA?=", "=?base64?/w==?=", "=?base64?eB==?="],
        "controls": [
            {"caller": "analyst", "request": "r1", "subject": mcp.control_subject("analyst", "r1"), "control": control}
            for control in mcp.CONTROLS_KNOWN
        ],
        "aggregate": {
            "tools": [["files", "read", mcp.joined("files", "read")], ["a_b", "_x", mcp.joined("a_b", "_x")]],
            "resources": [["files", "file:///a", mcp.joined_uri("files", "file:///a")]],
            "refused": ["read", "files__", "__read", "fi les__read", "a_"],
        },
        "servers": {"valid": ["files", "a_b", "a-", "0"], "refused": ["", "_", "a__b", "_a", "a_", "a.b", "a" * 33]},
    }


def _without(body: dict[str, Any], key: str) -> dict[str, Any]:
    meta = {name: value for name, value in body["params"]["_meta"].items() if name != key}
    return {**body, "params": {**body["params"], "_meta": meta}}


def main() -> None:
    """Write every file."""
    for path, content in render().items():
        path.write_bytes(content)


if __name__ == "__main__":
    main()
