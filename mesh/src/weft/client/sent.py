"""A message that was accepted, new or sent before, and what A2A's send operations return for it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Final, Self

from a2a.types import a2a_pb2 as pb

from weft.client import content, reads
from weft.client.handle import Handle
from weft.client.mesh import Mesh
from weft.client.requests import check_task_id
from weft.client.watch import as_update
from weft_protocols.errors import FieldViolation, InvalidParams, Unavailable, UnsupportedOperation
from weft_protocols.events import RawEvent
from weft_protocols.states import MESSAGE, State

FIRST_WORD: Final = 5.0
"""Seconds a stream waits for the first event, to see whether the agent answers with a message instead of a task."""


class Sent:
    """A message at its task. `Sent.new` and `Sent.follow_up` make it; use it as a context."""

    def __init__(self, handle: Handle, said: pb.Message, *, over: bool = False, at: int = 0) -> None:
        self.handle = handle
        self._said = said
        """The message as its sender has it, blobs and all, with the ids of its task."""
        self._over = over
        """Whether the task had already done with it, since it was sent before."""
        self._at = at
        """Unix nanoseconds when a new task was submitted."""

    @classmethod
    async def new(
        cls,
        mesh: Mesh,
        request: pb.SendMessageRequest,
        *,
        agent: str,
        deadline: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Self:
        """Send a message without a task; it gets one, or has one, if it was sent before."""
        at = time.time_ns()
        handle = await mesh.submit_request(agent, _stored(request), deadline=deadline, headers=headers)
        over = False
        if handle.repeated:
            try:
                joined = await mesh.join(agent, handle.id)
            except Unavailable:
                pass  # nobody reads now: it is followed from its first event, which can be waited for
            except BaseException:
                await handle.aclose()
                raise
            else:
                await handle.aclose()
                handle, handle.repeated = joined, True
                over = state_of(handle).terminal or state_of(handle).interrupted
        return cls(handle, _said(request, handle), over=over, at=at)

    @classmethod
    async def follow_up(
        cls,
        mesh: Mesh,
        request: pb.SendMessageRequest,
        *,
        agent: str,
        deadline: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Self:
        """Send a message to its task, unless the task has it.

        Raises:
            TaskNotFound, UnsupportedOperation: there is no such task of this caller, or it has ended.
            InvalidParams: the message names another context.
        """
        message = request.message
        check_task_id(message.task_id, "SendMessage", field="message.task_id")
        handle = await mesh.join(agent, message.task_id)
        try:
            task = _snapshot(handle)
            if message.context_id not in ("", task.context_id):
                wrong = FieldViolation("message.context_id", f"task {task.id} belongs to {task.context_id}")
                text = f"SendMessage: {wrong.field}: {wrong.description}, not to {message.context_id}"
                raise InvalidParams(text, violations=(wrong,))
            said = _said(request, handle)
            ids = [one.message_id if one.role == pb.ROLE_USER else "" for one in task.history]
            state = state_of(handle)
            # What created the task is no follow-up, so an ended task has not taken it as one.
            if message.message_id in (ids[1:] if state.terminal else ids):
                handle.repeated = True
                answered = "" in ids[ids.index(message.message_id) :]
                return cls(handle, said, over=state.terminal or (state.interrupted and answered))
            if state.terminal:
                raise UnsupportedOperation(f"task {task.id} of {agent} has ended as {state.label}; send a new message")
            await handle.follow_up(_stored(request), deadline=deadline, headers=headers)
            task.history.append(said)
            return cls(handle, said)
        except BaseException:
            await handle.aclose()
            raise

    async def stopped(self, timeout: float) -> None:
        """Wait until the task ended or waits for its caller; raises what `Handle.result` does."""
        if not self._over:
            await self.handle.stopped(timeout)
        elif state_of(self.handle) in (State.REJECTED, State.FAILED):
            end = await self._end()
            if end is not None and (error := end.error) is not None:
                raise error

    async def answer(self) -> pb.Message | None:
        """The message that the agent answered with instead of a task, if it did."""
        handle = self.handle
        if handle.snapshot is None or handle.since != 1 or not state_of(handle).terminal:
            return await handle.answer()
        end = await self._end()
        if end is None or end.state != MESSAGE:
            return None
        event = end.decode()
        await content.expand_event(handle.mesh.broker, event)
        return event.message

    async def _end(self) -> RawEvent | None:
        """The last event of a task that had ended when it was joined."""
        handle = self.handle
        mesh, before = handle.mesh, handle.since - 1
        log = await reads.events_after(mesh.broker, handle.agent, handle.id, caller=mesh.caller, after=before)
        return log[-1] if log else None

    async def now(self, task: pb.Task, *, history_length: int | None) -> None:
        """Put the task as it is now into `task`, which is empty."""
        if self.handle.snapshot is not None and not self._over:
            await self.handle.catch_up()
        await self.current(task, history_length=history_length)

    async def current(self, task: pb.Task, *, history_length: int | None) -> None:
        """Put the task as far as it was heard of into `task`, which is empty."""
        await self.handle.folded(task)
        if self.handle.snapshot is None and history_length != 0:
            task.history.insert(0, self._said)
        if not task.status.state:
            self._submitted(task)
        trim(task, history_length)

    def first(self, *, history_length: int | None) -> pb.StreamResponse:
        """The Task a stream begins with: as the message found it, before any of the events that follow."""
        made = pb.StreamResponse()
        task = made.task
        if self.handle.snapshot is not None:
            task.CopyFrom(self.handle.snapshot)
        else:
            task.id, task.context_id = self.handle.id, self.handle.context_id
            self._submitted(task)
            if history_length != 0:
                task.history.append(self._said)
        trim(task, history_length)
        return made

    async def stream(self, *, history_length: int | None) -> AsyncGenerator[tuple[int, pb.StreamResponse], None]:
        """The task and then its numbered events until it ends or waits, or the one message of the answer."""
        handle = self.handle
        begun = handle.snapshot is None and await handle.begun(FIRST_WORD)
        if self._over:
            await self.stopped(0)
            answer = await self.answer()
            if answer is not None:
                yield 1, pb.StreamResponse(message=answer)
            else:
                yield handle.since, self.first(history_length=history_length)
            return
        async with aclosing(handle.raw_events()) as events:
            early = await anext(events, None) if begun else None  # an agent that refuses is heard before the Task
            if early is not None and early[1].HasField("message"):
                yield early[0].n, early[1]
                return
            if early is None or not early[1].HasField("task"):
                yield handle.since, self.first(history_length=history_length)
            if early is not None:
                yield early[0].n, early[1]
            async for raw, event in events:
                yield raw.n, as_update(raw, event)

    def _submitted(self, task: pb.Task) -> None:
        task.status.state = pb.TASK_STATE_SUBMITTED
        task.status.timestamp.seconds, task.status.timestamp.nanos = divmod(self._at, 1_000_000_000)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.handle.aclose()


def trim(task: pb.Task, history_length: int | None) -> None:
    """Leave all but the last messages out of a task's history (A2A v1.0.1, 3.2.4)."""
    if history_length is not None and len(task.history) > history_length:
        del task.history[: len(task.history) - history_length]


def state_of(handle: Handle) -> State:
    """State of a joined task when it was joined."""
    return State(_snapshot(handle).status.state)


def _snapshot(handle: Handle) -> pb.Task:
    if handle.snapshot is None:
        raise ValueError(f"task {handle.id} was not joined")
    return handle.snapshot


def _stored(request: pb.SendMessageRequest) -> pb.SendMessageRequest:
    """The request as it is stored: neither a routing name nor the secrets of a webhook are the agent's."""
    made = pb.SendMessageRequest()
    made.CopyFrom(request)
    made.ClearField("tenant")
    if made.HasField("configuration"):
        made.configuration.ClearField("task_push_notification_config")
    return made


def _said(request: pb.SendMessageRequest, handle: Handle) -> pb.Message:
    message = pb.Message()
    message.CopyFrom(request.message)
    message.task_id, message.context_id = handle.id, handle.context_id
    return message
