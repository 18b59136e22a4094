"""Reads answered by request and reply: GetTask, ListTasks, and a task's log from after an event."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final, TypeVar

from a2a.types import a2a_pb2 as pb
from google.protobuf.message import Message as ProtoMessage

from weft.client import content
from weft.core.broker import Broker, Reply
from weft_protocols import a2a, events, subjects
from weft_protocols import headers as h
from weft_protocols.errors import TimedOut, Unavailable, Unreachable
from weft_protocols.events import RawEvent
from weft_protocols.parts import TaskView

log = logging.getLogger("weft.client")
ANY_AGENT: Final = "_"
"""Agent token of operations over all agents."""
M = TypeVar("M", bound=ProtoMessage)


@dataclass(frozen=True, slots=True)
class Page:
    """One page of tasks."""

    tasks: tuple[TaskView, ...]
    next_page_token: str
    """Empty on the last page."""
    total: int


async def call(
    broker: Broker,
    method: str,
    *,
    agent: str,
    caller: str,
    request: ProtoMessage,
    extra: bytes = b"",
    timeout: float = 5.0,
) -> Reply:
    """One A2A operation by request and reply. Raises its A2A error, or Unavailable if nobody answers."""
    if agent != ANY_AGENT:
        subjects.check_name(agent)
    subject = subjects.rpc(agent, method, caller)
    block = h.block(h.fields({h.VERSION: h.A2A_VERSION}), extra)
    try:
        reply = await broker.request(subject, request.SerializeToString(), headers=block, timeout=timeout)
    except (Unreachable, TimedOut) as error:
        raise Unavailable(
            f"{method} got no answer: the coordinator is not running or not reachable ({error}); see: mesh ps"
        ) from error
    reason = h.get(reply.headers, b"A2A-Error")
    if reason is not None:
        raise a2a.error_from_body(reason.decode(), reply.data)
    return reply


@dataclass(frozen=True, slots=True)
class Found:
    """A task as the read side folded it."""

    task: pb.Task
    agent: str
    events: int
    """Number of the last event included."""


async def task(broker: Broker, agent: str, request: pb.GetTaskRequest, *, caller: str) -> Found:
    """GetTask, blobs put back."""
    reply = await call(broker, "GetTask", agent=agent, caller=caller, request=request)
    found = await content.expand_task(broker, pb.Task.FromString(reply.data))
    named = h.get(reply.headers, b"Weft-Agent")
    return Found(found, named.decode() if named else agent, int(h.get(reply.headers, b"Weft-Event") or 0))


async def get(broker: Broker, agent: str, task_id: str, *, caller: str, history_length: int | None = None) -> TaskView:
    """GetTask, as plain values."""
    subjects.check_task_id(task_id)
    request = pb.GetTaskRequest(id=task_id)
    if history_length is not None:
        request.history_length = history_length
    found = await task(broker, agent, request, caller=caller)
    return a2a.view(found.task, agent=found.agent, events=found.events)


async def page(broker: Broker, agent: str | None, request: pb.ListTasksRequest, *, caller: str) -> Page:
    """ListTasks, of one agent or of all."""
    reply = await call(broker, "ListTasks", agent=agent or ANY_AGENT, caller=caller, request=request)
    answer = pb.ListTasksResponse.FromString(reply.data)
    names = (h.get(reply.headers, b"Weft-Agents") or b"").decode().split(",")
    views = tuple(
        a2a.view(task, agent=names[i] if i < len(names) else agent or "") for i, task in enumerate(answer.tasks)
    )
    return Page(views, answer.next_page_token, answer.total_size)


async def events_after(broker: Broker, agent: str, task_id: str, *, caller: str, after: int) -> list[RawEvent]:
    """One page of a task's stored events after number `after`, in order; empty when there is nothing newer."""
    request = pb.SubscribeToTaskRequest(id=task_id)
    extra = h.fields({h.EVENT: str(after)})
    reply = await call(broker, "SubscribeToTask", agent=agent, caller=caller, request=request, extra=extra)
    return events.unpack(reply.data)
