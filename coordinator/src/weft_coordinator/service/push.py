"""Push notification configs: created, read, listed and deleted (A2A v1.0.1, sections 3.1.7 to 3.1.10).

A config is one message of stream `MESH_PUSH`, which is at the same time the job of delivering to it: gateways
pull it, and what they have delivered is on a subject beside it (binding, "Push notifications").
"""

from __future__ import annotations

import base64
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Protocol

from a2a.types import a2a_pb2 as pb
from google.protobuf import empty_pb2
from google.protobuf.message import Message as ProtoMessage

from weft.core.broker import Broker
from weft_coordinator.decide.index import Entry
from weft_protocols import a2a, push, subjects
from weft_protocols import headers as h
from weft_protocols.errors import (
    ApiError,
    Backpressure,
    Conflict,
    FieldViolation,
    InvalidParams,
    TaskNotFound,
)
from weft_protocols.records import PushJob
from weft_protocols.resources import PUSH

Find = Callable[[str], Awaitable[Entry]]
"""The task of an id. Raises TaskNotFound for one the request's caller may not see."""
METHODS: Final = frozenset(
    {
        "CreateTaskPushNotificationConfig",
        "GetTaskPushNotificationConfig",
        "ListTaskPushNotificationConfigs",
        "DeleteTaskPushNotificationConfig",
    }
)
DEFAULT_SIZE: Final = 50
MAX_SIZE: Final = 100
TRIES: Final = 8
"""Times a config is written again because somebody else wrote it first."""
_NO_MESSAGE: Final = 10037


class Request(Protocol):
    """What is needed of a request (`weft_coordinator.service.reads.Request`)."""

    @property
    def method(self) -> str:
        """Name of the operation."""
        ...

    @property
    def headers(self) -> dict[str, str]:
        """By lower-case name."""
        ...

    @property
    def data(self) -> bytes:
        """The body."""
        ...

    @property
    def content_type(self) -> str:
        """Encoding of the body."""
        ...


@dataclass(frozen=True, slots=True)
class _Stored:
    """A config in the stream."""

    job: PushJob
    seq: int

    @property
    def config(self) -> pb.TaskPushNotificationConfig:
        return a2a.decode(pb.TaskPushNotificationConfig, self.job.config)


class PushConfigs:
    """The push notification configs of all tasks; every operation is about one task of the request's caller."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def answer(self, request: Request, find: Find) -> ProtoMessage:
        """The answer to one of `METHODS`. Raises TaskNotFound and InvalidParams."""
        if request.method == "CreateTaskPushNotificationConfig":
            return await self._create(request, find)
        if request.method == "GetTaskPushNotificationConfig":
            return await self._get(request, find)
        if request.method == "ListTaskPushNotificationConfigs":
            return await self._list(request, find)
        return await self._delete(request, find)

    async def _create(self, request: Request, find: Find) -> pb.TaskPushNotificationConfig:
        asked = a2a.decode(pb.TaskPushNotificationConfig, request.data, request.content_type)
        after = _after(request)
        _check(asked)
        entry = await find(asked.task_id)
        made = pb.TaskPushNotificationConfig()
        made.CopyFrom(asked)
        made.ClearField("tenant")
        made.id = asked.id or push.default_id(asked.task_id, asked.url)
        subject = _subject(entry, made.id)
        for _ in range(TRIES):
            known = await self._last(subject)
            if known is None:
                await self._check_room(entry)
            # What replaces a config goes on where that one was.
            series = known.job.series if known is not None else uuid.uuid4().hex
            job = PushJob(made.SerializeToString(), series, after if known is None else known.job.after)
            expected = h.block(h.fields({h.EXPECTED_SEQUENCE: str(known.seq if known is not None else 0)}))
            try:
                await self._broker.publish(subject, job.encode(), headers=expected)
            except Conflict:
                continue
            return made
        raise Backpressure(f"config {made.id[:64]} of task {entry.task} is being changed by others; try again")

    async def _get(self, request: Request, find: Find) -> pb.TaskPushNotificationConfig:
        asked = a2a.decode(pb.GetTaskPushNotificationConfigRequest, request.data, request.content_type)
        _named(request.method, asked.task_id, asked.id)
        entry = await find(asked.task_id)
        found = await self._last(_subject(entry, asked.id))
        if found is None:
            raise TaskNotFound(f"task {entry.task} has no push notification config {asked.id[:64]}")
        return found.config

    async def _list(self, request: Request, find: Find) -> pb.ListTaskPushNotificationConfigsResponse:
        asked = a2a.decode(pb.ListTaskPushNotificationConfigsRequest, request.data, request.content_type)
        size, last = _page(asked)
        entry = await find(asked.task_id)
        configs = sorted((one.config for one in await self._all(entry)), key=lambda one: one.id)
        rest = [one for one in configs if one.id > last] if last else configs
        more = len(rest) > size
        token = base64.urlsafe_b64encode(rest[size - 1].id.encode()).decode() if more else ""
        return pb.ListTaskPushNotificationConfigsResponse(configs=rest[:size], next_page_token=token)

    async def _delete(self, request: Request, find: Find) -> empty_pb2.Empty:
        asked = a2a.decode(pb.DeleteTaskPushNotificationConfigRequest, request.data, request.content_type)
        _named(request.method, asked.task_id, asked.id)
        entry = await find(asked.task_id)
        token = subjects.step_token(asked.id)
        for build in (subjects.push, subjects.pushed):
            subject = build(entry.caller, entry.agent, entry.task, token)
            await self._broker.api(f"STREAM.PURGE.{PUSH}", {"filter": subject})
        return empty_pb2.Empty()

    async def _check_room(self, entry: Entry) -> None:
        if len(await self._all(entry)) >= push.PER_TASK:
            raise InvalidParams(f"task {entry.task} has {push.PER_TASK} push notification configs; delete one first")

    async def _all(self, entry: Entry) -> list[_Stored]:
        """The configs of a task. More than a task may have cannot be there but for a moment."""
        pattern = subjects.push(entry.caller, entry.agent, entry.task, "*")
        found: list[_Stored] = []
        start = 1
        while (one := await self._read({"seq": start, "next_by_subj": pattern})) is not None:
            found.append(one)
            start = one.seq + 1
        return found

    async def _last(self, subject: str) -> _Stored | None:
        return await self._read({"last_by_subj": subject})

    async def _read(self, which: dict[str, str | int]) -> _Stored | None:
        """A stored config, read from the stream's leader: what was just written is there."""
        try:
            message = (await self._broker.api(f"STREAM.MSG.GET.{PUSH}", which))["message"]
        except ApiError as error:
            if error.err_code == _NO_MESSAGE:
                return None
            raise
        return _Stored(PushJob.decode(base64.b64decode(message.get("data", ""))), int(message["seq"]))


def _check(config: pb.TaskPushNotificationConfig) -> None:
    """InvalidParams names every wrong field."""
    wrong = push.violations(config)
    if not config.task_id:
        wrong = (FieldViolation("task_id", "missing"), *wrong)
    if wrong:
        text = "; ".join(f"{violation.field}: {violation.description}" for violation in wrong)
        raise InvalidParams(f"CreateTaskPushNotificationConfig: {text}", violations=wrong)


def _named(method: str, task_id: str, config_id: str) -> None:
    wrong = tuple(
        FieldViolation(name, "missing") for name, value in (("task_id", task_id), ("id", config_id)) if not value
    )
    if wrong:
        raise InvalidParams(f"{method}: {' and '.join(one.field for one in wrong)} missing", violations=wrong)


def _after(request: Request) -> int:
    after = request.headers.get("weft-event", "0")
    if not after.isascii() or not after.isdigit() or len(after) > 18:
        raise InvalidParams(f"{request.method}: {h.EVENT} is {after[:32]!r}; it must be the number of an event")
    return int(after)


def _page(asked: pb.ListTaskPushNotificationConfigsRequest) -> tuple[int, str]:
    """Size of the page, and id of the last config of the one before."""
    wrong: list[FieldViolation] = []
    last = ""
    if not asked.task_id:
        wrong.append(FieldViolation("task_id", "missing"))
    if not 0 <= asked.page_size <= MAX_SIZE:
        wrong.append(FieldViolation("page_size", f"{asked.page_size} is not within 1 and {MAX_SIZE}"))
    if asked.page_token:
        try:
            last = base64.b64decode(asked.page_token, altchars=b"-_", validate=True).decode()
        except ValueError:
            wrong.append(FieldViolation("page_token", "it was not made by this mesh; begin again without a token"))
    if wrong:
        text = "; ".join(f"{violation.field}: {violation.description}" for violation in wrong)
        raise InvalidParams(f"ListTaskPushNotificationConfigs: {text}", violations=tuple(wrong))
    return asked.page_size or DEFAULT_SIZE, last


def _subject(entry: Entry, config_id: str) -> str:
    return subjects.push(entry.caller, entry.agent, entry.task, subjects.step_token(config_id))
