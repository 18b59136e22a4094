"""The A2A over NATS binding: A2A messages to and from bytes and headers (`protocols/spec/a2a-over-nats.md`).

Bodies are the messages of package `lf.a2a.v1`, binary by default or ProtoJSON where `Content-Type` says so.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypeVar, cast

from a2a.types import a2a_pb2 as pb
from google.protobuf import json_format, struct_pb2
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as ProtoMessage
from google.rpc import error_details_pb2, status_pb2

from weft_protocols import headers as h
from weft_protocols import parts as p
from weft_protocols.errors import (
    A2A_DOMAIN,
    A2AError,
    ContentTypeNotSupported,
    FieldViolation,
    InvalidParams,
    ParseError,
    UsageError,
    VersionNotSupported,
)
from weft_protocols.states import BY_LABEL, State

M = TypeVar("M", bound=ProtoMessage)

BINDING: Final = "https://weft.dev/a2a/bindings/nats/v1"
"""`protocolBinding` of this binding in an agent card."""
SKILL: Final = "weft.skill"
"""Message metadata that names the skill to run."""
SCHEMA_EXTENSION: Final = "https://weft.dev/a2a/extensions/skill-schemas/v1"
"""Card extension whose params hold the input schema of each skill."""
MAX_DEPTH: Final = 30
"""Levels of lists and objects in one value; protobuf decoders give up at a hundred nested messages."""


def encode(message: ProtoMessage, content_type: str = h.PROTOBUF) -> bytes:
    """Bytes of an A2A message in the given content type; InvalidParams if JSON cannot hold it."""
    if content_type != h.JSON:
        return message.SerializeToString()
    try:
        return json_format.MessageToJson(message, indent=None).encode()
    except (json_format.SerializeToJsonError, ValueError) as error:
        raise InvalidParams(f"a {message.DESCRIPTOR.name} cannot be written as JSON: {error}") from error


def decode(kind: type[M], data: bytes, content_type: str = h.PROTOBUF) -> M:
    """The A2A message in `data`.

    Raises:
        ParseError: the bytes are not that message.
        ContentTypeNotSupported: neither protobuf nor JSON.
    """
    base = content_type.partition(";")[0].strip().lower()
    try:
        if base in ("", h.PROTOBUF):
            return kind.FromString(data)
        if base in (h.JSON, "application/a2a+json"):
            if data.lstrip()[:1] != b"{":
                raise ParseError(f"the body is not a {kind.DESCRIPTOR.name}: it must be a JSON object")
            return json_format.Parse(data, kind(), ignore_unknown_fields=True)
    except (DecodeError, json_format.ParseError, UnicodeDecodeError) as error:
        raise ParseError(f"the body is not a {kind.DESCRIPTOR.name} in {base or h.PROTOBUF}: {error}") from error
    raise ContentTypeNotSupported(f"content type {content_type!r} is not supported; use {h.PROTOBUF} or {h.JSON}")


def check_version(value: str) -> None:
    """VersionNotSupported unless `value` (of `A2A-Version`) is a 1.0; absent means 0.3 by the specification."""
    if value == h.A2A_VERSION:
        return
    major_minor = ".".join(value.split(".")[:2]) if value else "0.3"
    if major_minor != h.A2A_VERSION:
        raise VersionNotSupported(
            f"A2A version {value or '(none, which means 0.3)'} is not supported; send A2A-Version: {h.A2A_VERSION}",
            metadata={"supported": h.A2A_VERSION},
        )


def error_body(error: A2AError) -> bytes:
    """`google.rpc.Status` of an error, with ErrorInfo and, for wrong fields, BadRequest."""
    status = status_pb2.Status(code=error.spec.code, message=error.message)
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=A2A_DOMAIN, metadata=error.metadata)
    status.details.add().Pack(info)
    if error.violations:
        bad = error_details_pb2.BadRequest()
        for violation in error.violations:
            bad.field_violations.add(field=violation.field, description=violation.description)
        status.details.add().Pack(bad)
    return bytes(status.SerializeToString())


def error_from_body(reason: str, data: bytes) -> A2AError:
    """The error in a reply whose `A2A-Error` header is `reason`."""
    status = status_pb2.Status()
    try:
        status.ParseFromString(data)
    except DecodeError:
        return A2AError.from_reason(reason)
    metadata: dict[str, str] = {}
    violations: tuple[FieldViolation, ...] = ()
    for detail in status.details:
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        try:
            if detail.Unpack(info):
                metadata = dict(info.metadata)
            elif detail.Unpack(bad):
                violations = tuple(FieldViolation(v.field, v.description) for v in bad.field_violations)
        except DecodeError:
            continue  # the reason is in the header; a broken detail only tells less
    return A2AError.from_reason(reason, status.message, metadata=metadata, violations=violations)


def part_to_proto(part: p.Part) -> pb.Part:
    """Protobuf form of a part; UsageError if it holds something that is not JSON or not text."""
    try:
        return _part_to_proto(part)
    except (json_format.ParseError, ValueError, TypeError, OverflowError) as error:
        raise UsageError(f"a {type(part).__name__} part holds a value that A2A cannot carry: {error}") from error


def _part_to_proto(part: p.Part) -> pb.Part:
    made = pb.Part(media_type=part.media_type)
    if isinstance(part, p.Text):
        made.text = part.text
    elif isinstance(part, p.Data):
        json_format.ParseDict(_readable(part.data), made.data)
    else:
        made.filename = part.name
        if part.content is not None:
            made.raw = part.content
        else:
            made.url = part.url
    if part.metadata:
        made.metadata.update(_readable(part.metadata))
    return made


def _readable(value: Any) -> Any:
    """`value`; ValueError for what could be sent and not be read: NaN, infinities, and nesting over the limit."""
    waiting = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        if isinstance(item, float) and not math.isfinite(item):
            raise ValueError(f"{item} is not a number of JSON")
        if depth > MAX_DEPTH:
            raise ValueError(f"it nests more than {MAX_DEPTH} levels")
        if isinstance(item, dict):
            waiting.extend((inner, depth + 1) for inner in item.values())
        elif isinstance(item, list | tuple):
            waiting.extend((inner, depth + 1) for inner in item)
    return value


def part_from_proto(part: pb.Part) -> p.Part:
    """Plain form of a part."""
    metadata = struct_to_dict(part.metadata) if part.HasField("metadata") else {}
    which = part.WhichOneof("content")
    if which == "text":
        return p.Text(part.text, part.media_type, metadata)
    if which == "data":
        return p.Data(_plain(part.data), part.media_type, metadata)
    if which == "raw":
        return p.File(part.filename, part.raw, "", part.media_type, metadata)
    return p.File(part.filename, None, part.url, part.media_type, metadata)


def _whole(value: Any) -> Any:
    """JSON numbers without a fraction as int: protobuf's Value knows only doubles."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    return value


def _plain(value: struct_pb2.Value | struct_pb2.Struct) -> Any:
    """JSON value of a protobuf Value or Struct; InvalidParams for NaN and infinities, which JSON has not."""
    try:
        return _whole(json_format.MessageToDict(value))
    except (json_format.SerializeToJsonError, ValueError) as error:
        raise InvalidParams(f"a value is not JSON: {error}") from error


def struct_to_dict(struct: struct_pb2.Struct) -> dict[str, Any]:
    """A protobuf Struct as a dict; InvalidParams if it holds NaN or an infinity."""
    found: dict[str, Any] = _plain(struct)
    return found


def parts_of(content: Any) -> tuple[p.Part, ...]:
    """Parts for what a handler returned or a caller passed: text, bytes, a part, several, or any JSON value."""
    if isinstance(content, str):
        return (p.Text(content),)
    if isinstance(content, bytes | bytearray):
        return (p.File(content=bytes(content), media_type="application/octet-stream"),)
    if isinstance(content, p.Text | p.Data | p.File):
        return (content,)
    if isinstance(content, list | tuple) and content and all(isinstance(i, p.Text | p.Data | p.File) for i in content):
        return tuple(content)
    return (p.Data(content),)


def message_to_proto(message: p.Message, *, task_id: str = "", context_id: str = "") -> pb.Message:
    """Protobuf form of a message."""
    made = pb.Message(
        message_id=message.id,
        role=pb.ROLE_AGENT if message.role == "agent" else pb.ROLE_USER,
        task_id=task_id,
        context_id=context_id,
        parts=[part_to_proto(part) for part in message.parts],
    )
    if message.metadata:
        made.metadata.update(message.metadata)
    return made


def message_from_proto(message: pb.Message) -> p.Message:
    """Plain form of a message."""
    return p.Message(
        message.message_id,
        "agent" if message.role == pb.ROLE_AGENT else "user",
        tuple(part_from_proto(part) for part in message.parts),
        struct_to_dict(message.metadata) if message.HasField("metadata") else {},
    )


def artifact_from_proto(artifact: pb.Artifact) -> p.Artifact:
    """Plain form of an artifact."""
    return p.Artifact(
        artifact.artifact_id,
        artifact.name,
        tuple(part_from_proto(part) for part in artifact.parts),
        artifact.description,
        struct_to_dict(artifact.metadata) if artifact.HasField("metadata") else {},
    )


def apply(task: pb.Task, event: pb.StreamResponse) -> pb.Task:
    """Fold one event into a task, in place, and return it (A2A v1.0.1, section 3.1.2).

    A chunk with `append` extends the artifact of its id, any other replaces it.
    """
    which = event.WhichOneof("payload")
    if which == "status_update":
        update = event.status_update
        task.id = task.id or update.task_id
        task.context_id = task.context_id or update.context_id
        task.status.CopyFrom(update.status)
        if update.status.HasField("message"):
            task.history.append(update.status.message)
        if update.HasField("metadata"):
            task.metadata.MergeFrom(update.metadata)
    elif which == "artifact_update":
        chunk = event.artifact_update
        known = next((a for a in task.artifacts if a.artifact_id == chunk.artifact.artifact_id), None)
        if known is None:
            task.artifacts.append(chunk.artifact)
        elif chunk.append:
            known.parts.extend(chunk.artifact.parts)
            if chunk.artifact.HasField("metadata"):
                known.metadata.MergeFrom(chunk.artifact.metadata)
        else:
            known.CopyFrom(chunk.artifact)
    elif which == "task":
        task.CopyFrom(event.task)
    elif which == "message":
        task.id = task.id or event.message.task_id
        task.context_id = task.context_id or event.message.context_id
        task.status.state = pb.TASK_STATE_COMPLETED
        task.status.message.CopyFrom(event.message)
        task.history.append(event.message)
    return task


def fold(events: Iterable[pb.StreamResponse], start: pb.Task | None = None) -> pb.Task:
    """The task that a sequence of events describes, starting from a snapshot if there is one."""
    task = pb.Task()
    if start is not None:
        task.CopyFrom(start)
    status = None
    for event in events:
        if event.HasField("status_update"):
            update = event.status_update
            status = update
            if update.status.HasField("message"):
                task.history.append(update.status.message)
            if update.HasField("metadata"):
                task.metadata.MergeFrom(update.metadata)
        else:
            apply(task, event)
            if not event.HasField("artifact_update"):
                status = None
    if status is not None:
        # Only the last status counts: copying each is half the cost of folding.
        task.id = task.id or status.task_id
        task.context_id = task.context_id or status.context_id
        task.status.CopyFrom(status.status)
    return task


def view_of(events: Sequence[pb.StreamResponse], task_id: str, *, agent: str, last: int) -> p.TaskView:
    """`view(fold(events))` of task `task_id`, as a rule without making the A2A task in between: half the cost."""
    status: pb.TaskStatusUpdateEvent | None = None
    artifacts: dict[str, p.Artifact] = {}
    history: list[p.Message] = []
    metadata: dict[str, Any] = {}
    for event in events:
        if event.HasField("status_update"):
            status = event.status_update
            if status.status.HasField("message"):
                history.append(message_from_proto(status.status.message))
            if status.HasField("metadata"):
                metadata |= struct_to_dict(status.metadata)
        elif event.HasField("artifact_update") and not event.artifact_update.append:
            made = artifact_from_proto(event.artifact_update.artifact)
            artifacts[made.id] = made
        else:
            status = None
            break
    if status is None:
        task = fold(events)
        task.id = task.id or task_id
        return view(task, agent=agent, events=last)
    told = status.status
    return p.TaskView(
        id=status.task_id or task_id,
        agent=agent,
        context_id=status.context_id,
        state=State(told.state),
        message=history[-1] if told.HasField("message") else None,
        artifacts=tuple(artifacts.values()),
        history=tuple(history),
        updated=_rfc3339(told.timestamp.seconds, told.timestamp.nanos) if told.HasField("timestamp") else "",
        events=last,
        metadata=metadata,
    )


def view(task: pb.Task, *, agent: str, events: int = 0) -> p.TaskView:
    """A task as plain values."""
    status = task.status
    return p.TaskView(
        id=task.id,
        agent=agent,
        context_id=task.context_id,
        state=State(status.state),
        message=message_from_proto(status.message) if status.HasField("message") else None,
        artifacts=tuple(artifact_from_proto(a) for a in task.artifacts),
        history=tuple(message_from_proto(m) for m in task.history),
        updated=_rfc3339(status.timestamp.seconds, status.timestamp.nanos) if status.HasField("timestamp") else "",
        events=events,
        metadata=struct_to_dict(task.metadata) if task.HasField("metadata") else {},
    )


def _rfc3339(seconds: int, nanos: int) -> str:
    """A timestamp as ProtoJSON writes it, with milliseconds; empty for one outside its range."""
    if not (-62_135_596_800 <= seconds < 253_402_300_800 and 0 <= nanos < 1_000_000_000):
        return ""
    return f"{_second(seconds)}.{nanos // 1_000_000:03d}Z"


@functools.lru_cache(maxsize=256)
def _second(seconds: int) -> str:
    made = datetime.fromtimestamp(seconds, UTC)
    return f"{made.year:04d}-{made:%m-%dT%H:%M:%S}"


def state_of(event: pb.StreamResponse) -> State | None:
    """State an event puts its task in; None where it does not change it. A message alone completes."""
    which = event.WhichOneof("payload")
    if which == "status_update":
        return State(event.status_update.status.state)
    if which == "task":
        return State(event.task.status.state)
    return State.COMPLETED if which == "message" else None


def state_to_proto(state: State) -> pb.TaskState:
    """The protocol's enum value, which is the same number."""
    return cast("pb.TaskState", int(state))


def state_from_label(label: str) -> State:
    """State for a `Weft-State` header; `message` is completed."""
    return BY_LABEL.get(label, State.COMPLETED if label == "message" else State.UNSPECIFIED)


def artifact_to_proto(artifact_id: str, name: str, parts: Sequence[p.Part], *, description: str = "") -> pb.Artifact:
    """Protobuf form of an artifact."""
    return pb.Artifact(
        artifact_id=artifact_id, name=name, description=description, parts=[part_to_proto(part) for part in parts]
    )
