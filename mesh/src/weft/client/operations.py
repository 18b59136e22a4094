"""The operations of A2A 1.0 over a mesh: what every transport calls (A2A v1.0.1, section 3).

One `Operations` is one caller, who may speak to any agent. Requests are A2A's protobuf messages; they are checked
here, whatever carried them, and stay as they were. Errors are `A2AError` with the codes of every binding, and other
`WeftError` for what A2A has no name for (`Unavailable`, `Backpressure`, `AgentNotFound` …).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

from a2a.types import a2a_pb2 as pb
from google.protobuf.message import Message as ProtoMessage

from weft.client import content, reads
from weft.client.mesh import Mesh
from weft.client.requests import (
    Facts,
    check_get,
    check_list,
    check_push_config,
    check_push_key,
    check_push_list,
    check_send,
    check_task_id,
)
from weft.client.sent import Sent, state_of
from weft.client.watch import as_update
from weft_protocols import a2a
from weft_protocols import headers as h
from weft_protocols.errors import AgentNotFound, InvalidParams, UnsupportedOperation
from weft_protocols.subjects import TOKEN

M = TypeVar("M", bound=ProtoMessage)


@dataclass(frozen=True, slots=True)
class Call:
    """What comes with a request besides its body: A2A's service parameters, and how long to wait."""

    version: str = "1.0"
    """`A2A-Version`; empty counts as 0.3, which is refused."""
    extensions: frozenset[str] = frozenset()
    """URIs of the extensions the caller asks for (`A2A-Extensions`)."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Further headers for the agent, such as `traceparent` and `tracestate`."""
    deadline: float | None = None
    """Seconds from now after which the task is failed by its host."""
    wait: float = 300.0
    """Seconds a call that waits for its task waits at most; then DeadlineExceeded, and the task goes on."""


class Cards(Protocol):
    """Where agent cards come from."""

    async def card(self, agent: str) -> pb.AgentCard:
        """The current card of an agent. Raises AgentNotFound."""
        ...


DEFAULT: Final = Call()


class Operations:
    """A caller's A2A operations (`mesh.caller`), on any agent.

    `tenant` of requests is not looked at: who takes requests from outside maps it to a caller, or refuses it.
    """

    def __init__(self, mesh: Mesh, cards: Cards) -> None:
        self.mesh = mesh
        self.cards = cards
        self._facts: dict[str, Facts] = {}

    async def send_message(
        self, agent: str, request: pb.SendMessageRequest, call: Call = DEFAULT
    ) -> pb.SendMessageResponse:
        """Send a message; the task once it ended or waits, or at once with `return_immediately`, or the answer.

        The same `message_id` sent again is the same task.

        Raises:
            AgentNotFound: nobody serves that name.
            InvalidParams: a field is missing or wrong, the context is not the task's; `violations` names it.
            TaskNotFound: follow-up to a task that does not exist or is somebody else's.
            UnsupportedOperation: follow-up to a task that has ended.
            ContentTypeNotSupported, VersionNotSupported, ExtensionSupportRequired, PushNotificationNotSupported.
            DeadlineExceeded: the task neither ended nor waits after `call.wait` seconds; it goes on.
            Backpressure, Unreachable, TimedOut: not accepted for sure; sending the same message again is safe.
        """
        facts = await self._admit(agent, call)
        length = _history_length(request)
        response = pb.SendMessageResponse()
        async with await self._send(agent, request, call=call, facts=facts) as sent:
            if request.configuration.return_immediately:
                await sent.now(response.task, history_length=length)
                return response
            await sent.stopped(call.wait)
            answer = await sent.answer()
            if answer is not None:
                response.message.CopyFrom(answer)
            else:
                await sent.current(response.task, history_length=length)
        return response

    async def send_streaming_message(
        self, agent: str, request: pb.SendMessageRequest, call: Call = DEFAULT
    ) -> AsyncGenerator[pb.StreamResponse, None]:
        """Send a message; its task and then its events until it ends or waits, or the one message of the answer.

        Close the generator to stop following: the task goes on. Nothing is sent before the first item is asked for.
        An agent that says nothing for `sent.FIRST_WORD` seconds has a task, and what it then answers is its end.
        Raises what `send_message` raises, but for `call.wait`, which does not bound a stream.
        """
        async with aclosing(self.numbered_send_streaming_message(agent, request, call)) as events:
            async for _, event in events:
                yield event

    async def numbered_send_streaming_message(
        self, agent: str, request: pb.SendMessageRequest, call: Call = DEFAULT
    ) -> AsyncGenerator[tuple[int, pb.StreamResponse], None]:
        """`send_streaming_message` with the number of each event.

        The first Task has the number of the last event it includes, 0 for a new task: what `after` resumes after.
        """
        facts = await self._admit(agent, call)
        facts.check_streaming()
        sent = await self._send(agent, request, call=call, facts=facts)
        async with sent, aclosing(sent.stream(history_length=_history_length(request))) as events:
            async for event in events:
                yield event

    async def get_task(self, agent: str, request: pb.GetTaskRequest, call: Call = DEFAULT) -> pb.Task:
        """A task as it is now. Raises TaskNotFound, InvalidParams; Unavailable if nobody reads."""
        await self._admit(agent, call)
        check_get(request)
        return (await reads.task(self.mesh.broker, agent, _untenanted(request), caller=self.mesh.caller)).task

    async def list_tasks(self, agent: str, request: pb.ListTasksRequest, call: Call = DEFAULT) -> pb.ListTasksResponse:
        """One page of the caller's tasks with this agent, newest status first. Raises InvalidParams, Unavailable."""
        await self._admit(agent, call)
        check_list(request)
        found = pb.ListTasksResponse.FromString(await self._ask("ListTasks", request, agent=agent, call=call))
        for task in found.tasks:
            await content.expand_task(self.mesh.broker, task)
        return found

    async def cancel_task(self, agent: str, request: pb.CancelTaskRequest, call: Call = DEFAULT) -> pb.Task:
        """Cancel a task; the task once it ended.

        Raises:
            TaskNotCancelable: it has ended already, or ends otherwise than canceled.
            TaskNotFound: no such task of this caller.
            DeadlineExceeded: it has not ended after `call.wait` seconds; the cancel stays in force.
        """
        await self._admit(agent, call)
        check_task_id(request.id, "CancelTask")
        async with await self.mesh.join(agent, request.id) as handle:
            await handle.stop(_untenanted(request), timeout=call.wait)
            return await handle.folded(pb.Task())

    async def subscribe_to_task(
        self,
        agent: str,
        request: pb.SubscribeToTaskRequest,
        call: Call = DEFAULT,
        *,
        after: int | None = None,
    ) -> AsyncGenerator[pb.StreamResponse, None]:
        """The task as it is, then its events until it ends or waits (A2A v1.0.1, 3.1.6 and 11.7).

        Args:
            after: resume after event n: no task first, the events from n + 1 on. 0 begins with the first.

        Raises:
            TaskNotFound: no such task of this caller.
            UnsupportedOperation: it has ended; with `after`: and has no later event.
        """
        async with aclosing(self.numbered_subscribe_to_task(agent, request, call, after=after)) as events:
            async for _, event in events:
                yield event

    async def numbered_subscribe_to_task(
        self,
        agent: str,
        request: pb.SubscribeToTaskRequest,
        call: Call = DEFAULT,
        *,
        after: int | None = None,
    ) -> AsyncGenerator[tuple[int, pb.StreamResponse], None]:
        """`subscribe_to_task` with the number of each event; the task has that of the last event it includes."""
        facts = await self._admit(agent, call)
        facts.check_streaming()
        check_task_id(request.id, "SubscribeToTask")
        following = self._joined(agent, request.id) if after is None else self._resumed(agent, request.id, after=after)
        async with aclosing(following) as events:
            async for event in events:
                yield event

    async def _joined(self, agent: str, task_id: str) -> AsyncGenerator[tuple[int, pb.StreamResponse], None]:
        async with await self.mesh.join(agent, task_id) as handle:
            if (state := state_of(handle)).terminal:
                raise UnsupportedOperation(f"task {task_id} has ended as {state.label}; read it with GetTask")
            yield handle.since, pb.StreamResponse(task=handle.snapshot)
            async with aclosing(handle.raw_events()) as events:
                async for raw, event in events:
                    yield raw.n, as_update(raw, event)

    async def _resumed(
        self, agent: str, task_id: str, *, after: int
    ) -> AsyncGenerator[tuple[int, pb.StreamResponse], None]:
        if after < 0:
            raise InvalidParams(f"SubscribeToTask: {after} is not the number of an event; they begin with 1")
        later = False
        async with aclosing(self.mesh.subscribe_raw(agent, task_id, after=after)) as events:
            async for raw, event in events:
                later = True
                yield raw.n, event if raw.n == 1 else as_update(raw, event)
        if not later:
            raise UnsupportedOperation(f"task {task_id} has ended and has no event after {after}")

    async def create_push_config(
        self, agent: str, request: pb.TaskPushNotificationConfig, call: Call = DEFAULT
    ) -> pb.TaskPushNotificationConfig:
        """Have a task's events pushed to a URL; the configuration with its id.

        Raises PushNotificationNotSupported, TaskNotFound, InvalidParams.
        """
        (await self._admit(agent, call)).check_push()
        check_push_config(request)
        return await self._create_push_config(agent, request, call=call)

    async def _create_push_config(
        self, agent: str, config: pb.TaskPushNotificationConfig, *, call: Call
    ) -> pb.TaskPushNotificationConfig:
        data = await self._ask("CreateTaskPushNotificationConfig", config, agent=agent, call=call)
        return pb.TaskPushNotificationConfig.FromString(data)

    async def get_push_config(
        self, agent: str, request: pb.GetTaskPushNotificationConfigRequest, call: Call = DEFAULT
    ) -> pb.TaskPushNotificationConfig:
        """One configuration. Raises PushNotificationNotSupported; TaskNotFound also for an unknown configuration."""
        (await self._admit(agent, call)).check_push()
        method = "GetTaskPushNotificationConfig"
        check_push_key(request.task_id, request.id, what=method)
        return pb.TaskPushNotificationConfig.FromString(await self._ask(method, request, agent=agent, call=call))

    async def list_push_configs(
        self, agent: str, request: pb.ListTaskPushNotificationConfigsRequest, call: Call = DEFAULT
    ) -> pb.ListTaskPushNotificationConfigsResponse:
        """The configurations of a task. Raises PushNotificationNotSupported, TaskNotFound, InvalidParams."""
        (await self._admit(agent, call)).check_push()
        check_push_list(request)
        data = await self._ask("ListTaskPushNotificationConfigs", request, agent=agent, call=call)
        return pb.ListTaskPushNotificationConfigsResponse.FromString(data)

    async def delete_push_config(
        self, agent: str, request: pb.DeleteTaskPushNotificationConfigRequest, call: Call = DEFAULT
    ) -> None:
        """Remove a configuration; removing it twice is no error. Raises PushNotificationNotSupported, TaskNotFound."""
        (await self._admit(agent, call)).check_push()
        method = "DeleteTaskPushNotificationConfig"
        check_push_key(request.task_id, request.id, what=method)
        await self._ask(method, request, agent=agent, call=call)

    async def get_extended_card(
        self, agent: str, request: pb.GetExtendedAgentCardRequest, call: Call = DEFAULT
    ) -> pb.AgentCard:
        """The agent's extended card. Raises UnsupportedOperation, ExtendedAgentCardNotConfigured."""
        (await self._admit(agent, call)).check_extended()
        return pb.AgentCard.FromString(await self._ask("GetExtendedAgentCard", request, agent=agent, call=call))

    async def _admit(self, agent: str, call: Call) -> Facts:
        """What every request is checked for before its body; the facts of the agent's card."""
        a2a.check_version(call.version)
        if not TOKEN.match(agent):
            raise AgentNotFound(f"there is no agent {agent[:64]!r}")
        card = await self.cards.card(agent)
        facts = self._facts.get(agent)
        if facts is None or facts.card != card:
            facts = self._facts[agent] = Facts.of(card)
        if facts.required:
            facts.check_extensions(call.extensions)
        return facts

    async def _send(self, agent: str, request: pb.SendMessageRequest, *, call: Call, facts: Facts) -> Sent:
        """Check and send a message; returns when it is accepted and its webhook, if it names one, is stored."""
        check_send(request)
        facts.check_input(request.message)
        push = request.configuration.HasField("task_push_notification_config")
        if push:
            facts.check_push()
        send = Sent.follow_up if request.message.task_id else Sent.new
        sent = await send(self.mesh, request, agent=agent, deadline=call.deadline, headers=_headers(call))
        if push:
            config = pb.TaskPushNotificationConfig()
            config.CopyFrom(request.configuration.task_push_notification_config)
            config.task_id = sent.handle.id
            config.id = config.id or sent.handle.id  # the message sent again must not make a second one
            try:
                await self._create_push_config(agent, config, call=call)
            except BaseException:
                await sent.handle.aclose()
                raise
        return sent

    async def _ask(self, method: str, request: ProtoMessage, *, agent: str, call: Call) -> bytes:
        """Body of the answer to an operation by request and reply."""
        headers = _headers(call)
        reply = await reads.call(
            self.mesh.broker,
            method,
            agent=agent,
            caller=self.mesh.caller,
            request=_untenanted(request),
            extra=h.fields(headers) if headers else b"",
        )
        return reply.data


def _headers(call: Call) -> Mapping[str, str]:
    if not call.extensions:
        return call.headers
    return {**call.headers, h.EXTENSIONS: ",".join(sorted(call.extensions))}


def _history_length(request: pb.SendMessageRequest) -> int | None:
    asked = request.configuration
    return asked.history_length if asked.HasField("history_length") else None


def _untenanted(request: M) -> M:
    """The request without its tenant, which is the business of whoever made it a caller's."""
    if not getattr(request, "tenant", ""):
        return request
    made = type(request)()
    made.CopyFrom(request)
    made.ClearField("tenant")
    return made


__all__ = ["Call", "Cards", "Operations"]
