"""The SDK's request handler of one agent: its dispatchers on the one side, the mesh's operations on the other."""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NoReturn, TypeVar

from a2a.server.context import ServerCallContext
from a2a.server.events import Event
from a2a.server.request_handlers.request_handler import RequestHandler
from a2a.types import a2a_pb2 as pb

from weft.client.operations import Call, Operations
from weft.gateway.callers import Callers
from weft.gateway.context import Exchange, call_of, caller_of, exchange_of
from weft.gateway.errors import for_clients, to_sdk
from weft_protocols.errors import InternalError, InvalidAgentResponse, WeftError

log = logging.getLogger("weft.gateway")
T = TypeVar("T")
_Numbered = AsyncGenerator[tuple[int, pb.StreamResponse], None]


class MeshRequestHandler(RequestHandler):
    """A2A's operations on one agent, for any of the SDK's dispatchers.

    The caller is that of the context (`weft.gateway.context.make_context`). Errors are the SDK's, with what is in
    them fit for clients; their cause is the mesh's. What was not raised on purpose becomes an InternalError with
    nothing but the number under which the log has it.

    Args:
        agent: Name of the agent.
        callers: Operations of every caller.
    """

    def __init__(self, agent: str, callers: Callers) -> None:
        self.agent = agent
        self._callers = callers

    async def on_message_send(self, params: pb.SendMessageRequest, context: ServerCallContext) -> pb.Task | pb.Message:
        """SendMessage."""
        answer = await self._answer(Operations.send_message, params, context)
        return answer.task if answer.HasField("task") else answer.message

    def on_message_send_stream(
        self, params: pb.SendMessageRequest, context: ServerCallContext
    ) -> AsyncGenerator[Event, None]:
        """SendStreamingMessage."""

        def begin(operations: Operations, call: Call) -> _Numbered:
            return operations.numbered_send_streaming_message(self.agent, params, call)

        return self._open_stream(begin, params.tenant, context)

    def on_subscribe_to_task(
        self, params: pb.SubscribeToTaskRequest, context: ServerCallContext
    ) -> AsyncGenerator[Event, None]:
        """SubscribeToTask, after the event the client has last where it names one."""
        after = exchange_of(context).after

        def begin(operations: Operations, call: Call) -> _Numbered:
            return operations.numbered_subscribe_to_task(self.agent, params, call, after=after)

        return self._open_stream(begin, params.tenant, context)

    async def on_get_task(self, params: pb.GetTaskRequest, context: ServerCallContext) -> pb.Task:
        """GetTask."""
        return await self._answer(Operations.get_task, params, context)

    async def on_list_tasks(self, params: pb.ListTasksRequest, context: ServerCallContext) -> pb.ListTasksResponse:
        """ListTasks."""
        return await self._answer(Operations.list_tasks, params, context)

    async def on_cancel_task(self, params: pb.CancelTaskRequest, context: ServerCallContext) -> pb.Task:
        """CancelTask."""
        if (metadata := exchange_of(context).metadata) and not params.HasField("metadata"):
            params.metadata.update(metadata)
        return await self._answer(Operations.cancel_task, params, context)

    async def on_create_task_push_notification_config(
        self, params: pb.TaskPushNotificationConfig, context: ServerCallContext
    ) -> pb.TaskPushNotificationConfig:
        """CreateTaskPushNotificationConfig."""
        return await self._answer(Operations.create_push_config, params, context)

    async def on_get_task_push_notification_config(
        self, params: pb.GetTaskPushNotificationConfigRequest, context: ServerCallContext
    ) -> pb.TaskPushNotificationConfig:
        """GetTaskPushNotificationConfig."""
        return await self._answer(Operations.get_push_config, params, context)

    async def on_list_task_push_notification_configs(
        self, params: pb.ListTaskPushNotificationConfigsRequest, context: ServerCallContext
    ) -> pb.ListTaskPushNotificationConfigsResponse:
        """ListTaskPushNotificationConfigs."""
        return await self._answer(Operations.list_push_configs, params, context)

    async def on_delete_task_push_notification_config(
        self, params: pb.DeleteTaskPushNotificationConfigRequest, context: ServerCallContext
    ) -> None:
        """DeleteTaskPushNotificationConfig."""
        await self._answer(Operations.delete_push_config, params, context)

    async def on_get_extended_agent_card(
        self, params: pb.GetExtendedAgentCardRequest, context: ServerCallContext
    ) -> pb.AgentCard:
        """GetExtendedAgentCard."""
        return await self._answer(Operations.get_extended_card, params, context)

    async def _answer(
        self,
        operation: Callable[[Operations, str, Any, Call], Awaitable[T]],
        params: Any,
        context: ServerCallContext,
    ) -> T:
        exchange = exchange_of(context)
        try:
            call = call_of(context)
            async with self._callers.use(caller_of(context, params.tenant)) as operations:
                await self._activate(exchange, operations, call)
                answer = await operation(operations, self.agent, params, call)
                exchange.answered = True
                return answer
        except Exception as error:  # noqa: BLE001 - the edge: everything is answered, and nothing internal leaves
            self._refuse(error, exchange)

    def _open_stream(
        self, begin: Callable[[Operations, Call], _Numbered], tenant: str, context: ServerCallContext
    ) -> AsyncGenerator[Event, None]:
        exchange = exchange_of(context)
        exchange.stream = self._stream(begin, tenant, context, exchange)
        return exchange.stream

    async def _stream(
        self,
        begin: Callable[[Operations, Call], _Numbered],
        tenant: str,
        context: ServerCallContext,
        exchange: Exchange,
    ) -> AsyncGenerator[Event, None]:
        try:
            call = call_of(context)
            async with self._callers.use(caller_of(context, tenant)) as operations:
                await self._activate(exchange, operations, call)
                async with aclosing(begin(operations, call)) as events:
                    async for number, event in events:
                        exchange.number = number
                        exchange.answered = True
                        yield _payload(event)
        except Exception as error:  # noqa: BLE001 - the edge: everything is answered, and nothing internal leaves
            self._refuse(error, exchange)

    async def _activate(self, exchange: Exchange, operations: Operations, call: Call) -> None:
        if call.extensions:
            card = await operations.cards.card(self.agent)
            exchange.activated = call.extensions & {extension.uri for extension in card.capabilities.extensions}

    def _refuse(self, error: Exception, exchange: Exchange) -> NoReturn:
        seen = for_clients(error)
        if isinstance(seen, InternalError) and not isinstance(error, WeftError):
            incident = uuid.uuid4().hex[:12]
            log.error("request to %s failed, incident %s", self.agent, incident, exc_info=error)
            seen = InternalError(f"internal error {incident}: the gateway's log has it under this number")
        exchange.error = seen
        raise to_sdk(seen) from error


def _payload(event: pb.StreamResponse) -> Event:
    match event.WhichOneof("payload"):
        case "status_update":
            return event.status_update
        case "artifact_update":
            return event.artifact_update
        case "task":
            return event.task
        case "message":
            return event.message
        case _:
            raise InvalidAgentResponse("an event of the task is empty")
