"""Checks of A2A requests: required fields, numbers in range, values that can be read back (A2A v1.0.1, sections 3-5).

Written out field by field: every message passes here, and walking descriptors would cost more than sending it.
Fields are named as in the protocol buffers, from the request on: `message.parts[0]`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from a2a.types import a2a_pb2 as pb
from google.protobuf import struct_pb2

from weft_protocols import a2a, cards, push
from weft_protocols.errors import (
    ContentTypeNotSupported,
    ExtensionSupportRequired,
    FieldViolation,
    InvalidParams,
    PushNotificationNotSupported,
    TaskNotFound,
    UnsupportedOperation,
)
from weft_protocols.subjects import TASK_ID

MAX_ID: Final = 512
"""Characters of an id that a caller makes up: it travels in headers."""
MAX_PAGE: Final = 100
"""Entries of one page at most."""
_STATES: Final = frozenset(pb.TaskState.values())
_ROLES: Final = (pb.ROLE_USER, pb.ROLE_AGENT)
_BREAKS: Final = ("\r", "\n", "\0")
_MISSING: Final = "required and missing"
_NOT_FINITE: Final = re.compile(rb"[\xf0-\xff][\x7f\xff]")
"""The last bytes of every double that is no number; text has them rarely."""

Violations = list[FieldViolation]


@dataclass(frozen=True, slots=True)
class Facts:
    """What requests are checked against, of an agent's card."""

    card: pb.AgentCard
    required: frozenset[str]
    """URIs of the extensions a caller has to name."""
    takes_all: bool
    """Whether parts of any media type are taken."""
    streaming: bool
    push: bool
    extended: bool

    @staticmethod
    def of(card: pb.AgentCard) -> Facts:
        """The facts of a card."""
        able = card.capabilities
        return Facts(
            card,
            frozenset(extension.uri for extension in able.extensions if extension.required),
            cards.takes(card, "x-any/x-any"),
            able.streaming,
            able.push_notifications,
            able.extended_agent_card,
        )

    def check_extensions(self, asked: frozenset[str]) -> None:
        """ExtensionSupportRequired unless every required extension was asked for."""
        if missing := self.required - asked:
            listed = ", ".join(sorted(missing))
            raise ExtensionSupportRequired(
                f"agent {self.card.name} requires extension {listed}; name it in A2A-Extensions",
                metadata={"extensions": listed},
            )

    def check_streaming(self) -> None:
        """UnsupportedOperation where the card does not declare streaming."""
        if not self.streaming:
            raise UnsupportedOperation(f"agent {self.card.name} does not stream; use SendMessage and GetTask")

    def check_push(self) -> None:
        """PushNotificationNotSupported where the card does not declare push notifications."""
        if not self.push:
            raise PushNotificationNotSupported(f"agent {self.card.name} does not push; follow its tasks instead")

    def check_extended(self) -> None:
        """UnsupportedOperation where the card does not declare an extended card."""
        if not self.extended:
            raise UnsupportedOperation(f"agent {self.card.name} has no extended card; its public card is all there is")

    def check_input(self, message: pb.Message) -> None:
        """ContentTypeNotSupported where a part states a media type that neither the agent nor a skill takes."""
        if self.takes_all:
            return
        for at, part in enumerate(message.parts):
            if part.media_type and not cards.takes(self.card, part.media_type):
                modes = {*self.card.default_input_modes, *(m for skill in self.card.skills for m in skill.input_modes)}
                taken = ", ".join(sorted(modes))
                raise ContentTypeNotSupported(
                    f"message.parts[{at}] is {part.media_type}; agent {self.card.name} takes {taken}",
                    metadata={"mediaType": part.media_type},
                )


def check_send(request: pb.SendMessageRequest) -> None:
    """InvalidParams names every wrong field of a SendMessageRequest."""
    wrong: Violations = []
    if not request.HasField("message"):
        wrong.append(FieldViolation("message", _MISSING))
    else:
        _message(request.message, wrong)
    if request.HasField("configuration"):
        asked = request.configuration
        if asked.history_length < 0:
            wrong.append(_negative("configuration.history_length", asked.history_length))
        if asked.HasField("task_push_notification_config"):
            _push(asked.task_push_notification_config, wrong, at="configuration.task_push_notification_config.")
    if request.HasField("metadata"):
        _readable(request.metadata, wrong, "metadata")
    _raise("SendMessage", wrong)


def _message(message: pb.Message, wrong: Violations) -> None:
    if not message.message_id:
        wrong.append(FieldViolation("message.message_id", _MISSING))
    else:
        _id(message.message_id, wrong, "message.message_id")
    if message.context_id:
        _id(message.context_id, wrong, "message.context_id")
    if message.role not in _ROLES:
        wrong.append(FieldViolation("message.role", _MISSING if not message.role else f"{message.role} is no role"))
    if not message.parts:
        wrong.append(FieldViolation("message.parts", "at least one part is required"))
    for at, part in enumerate(message.parts):
        content = part.WhichOneof("content")
        if content is None:
            wrong.append(FieldViolation(f"message.parts[{at}]", "has none of text, raw, url and data"))
        elif content == "data":
            _readable(part.data, wrong, f"message.parts[{at}].data")
        if part.HasField("metadata"):
            _readable(part.metadata, wrong, f"message.parts[{at}].metadata")
    if message.HasField("metadata"):
        _readable(message.metadata, wrong, "message.metadata")


def check_get(request: pb.GetTaskRequest) -> None:
    """InvalidParams, or TaskNotFound for an id that no task has."""
    if request.history_length < 0:
        _raise("GetTask", [_negative("history_length", request.history_length)])
    check_task_id(request.id, "GetTask")


def check_list(request: pb.ListTasksRequest) -> None:
    """InvalidParams names every wrong field of a ListTasksRequest."""
    wrong: Violations = []
    if request.HasField("page_size") and not 1 <= request.page_size <= MAX_PAGE:
        wrong.append(FieldViolation("page_size", f"{request.page_size} is not within 1 and {MAX_PAGE}"))
    if request.history_length < 0:
        wrong.append(_negative("history_length", request.history_length))
    if request.status not in _STATES:
        wrong.append(FieldViolation("status", f"{request.status} is no task state"))
    _raise("ListTasks", wrong)


def check_push_config(config: pb.TaskPushNotificationConfig) -> None:
    """InvalidParams names every wrong field of a config to be created; TaskNotFound as `check_get`."""
    wrong: Violations = []
    _push(config, wrong)
    if not config.task_id:
        wrong.append(FieldViolation("task_id", _MISSING))
    _raise("CreateTaskPushNotificationConfig", wrong)
    check_task_id(config.task_id, "CreateTaskPushNotificationConfig", field="task_id")


def check_push_key(task_id: str, config_id: str, *, what: str) -> None:
    """InvalidParams unless both ids are there; TaskNotFound as `check_get`."""
    wrong = [FieldViolation(name, _MISSING) for name, value in (("task_id", task_id), ("id", config_id)) if not value]
    _raise(what, wrong)
    check_task_id(task_id, what, field="task_id")


def check_push_list(request: pb.ListTaskPushNotificationConfigsRequest) -> None:
    """InvalidParams, or TaskNotFound as `check_get`."""
    what = "ListTaskPushNotificationConfigs"
    if not 0 <= request.page_size <= MAX_PAGE:
        _raise(what, [FieldViolation("page_size", f"{request.page_size} is not within 1 and {MAX_PAGE}")])
    check_task_id(request.task_id, what, field="task_id")


def check_task_id(task_id: str, what: str, *, field: str = "id") -> None:
    """InvalidParams for no id; TaskNotFound for one that no task has, since none is made of it."""
    if not task_id:
        _raise(what, [FieldViolation(field, _MISSING)])
    if not TASK_ID.match(task_id):
        raise TaskNotFound(f"there is no task {task_id[:64]!r}")


def _push(config: pb.TaskPushNotificationConfig, wrong: Violations, *, at: str = "") -> None:
    wrong += [FieldViolation(f"{at}{one.field}", one.description) for one in push.violations(config)]


def _id(value: str, wrong: Violations, field: str) -> None:
    if len(value) > MAX_ID:
        wrong.append(FieldViolation(field, f"has {len(value)} characters; {MAX_ID} are the most"))
    elif any(character in value for character in _BREAKS) or value != value.strip():
        wrong.append(FieldViolation(field, "holds a line break or a NUL, or begins or ends with white space"))


def _negative(field: str, value: int) -> FieldViolation:
    return FieldViolation(field, f"{value} is negative")


def _readable(value: struct_pb2.Struct | struct_pb2.Value, wrong: Violations, field: str) -> None:
    """A violation for what could be stored and not be read: NaN and infinities, and nesting over the limit."""
    data = value.SerializeToString()
    odd = _NOT_FINITE.search(data) is not None
    if not odd and len(data) < 4 * a2a.MAX_DEPTH:  # a level takes four bytes and more
        return
    level: Iterable[struct_pb2.Value]
    level = value.fields.values() if isinstance(value, struct_pb2.Struct) else (value,)
    for _ in range(a2a.MAX_DEPTH + 1 - isinstance(value, struct_pb2.Struct)):
        below: list[struct_pb2.Value] = []
        for item in level:
            kind = item.WhichOneof("kind")
            if kind == "struct_value":
                below.extend(item.struct_value.fields.values())
            elif kind == "list_value":
                below.extend(item.list_value.values)
            elif odd and kind == "number_value" and not math.isfinite(item.number_value):
                wrong.append(FieldViolation(field, f"{item.number_value} is not a number of JSON"))
                return
        if not below:
            return
        level = below
    wrong.append(FieldViolation(field, f"nests more than {a2a.MAX_DEPTH} levels"))


def _raise(what: str, wrong: Violations) -> None:
    if wrong:
        text = "; ".join(f"{violation.field}: {violation.description}" for violation in wrong)
        raise InvalidParams(f"{what}: {text}", violations=tuple(wrong))
