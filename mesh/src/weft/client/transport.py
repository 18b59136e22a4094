"""A2A SDK clients over NATS: the SDK's `ClientTransport` around `weft.client.operations`.

::

    factory = ClientFactory(ClientConfig(supported_protocol_bindings=[weft.a2a.BINDING]))
    weft.a2a.register(factory, mesh)
    client = factory.create(card)

From there on it is stock client code. What differs from the SDK's own transports is what a broker changes: there is
no server to connect to, a message sent again with its `message_id` is the same task, and the connection is the
mesh's, so that closing a client closes none.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from a2a.client.client import Client, ClientCallContext, ClientConfig
from a2a.client.client_factory import ClientFactory
from a2a.client.errors import A2AClientError, A2AClientTimeoutError
from a2a.client.interceptors import ClientCallInterceptor
from a2a.client.transports.base import ClientTransport
from a2a.extensions.common import get_requested_extensions
from a2a.types import a2a_pb2 as pb
from a2a.utils import errors as sdk

from weft.client.cards import CardDirectory
from weft.client.mesh import Mesh
from weft.client.operations import Call, Operations
from weft_protocols import headers as h
from weft_protocols import subjects
from weft_protocols.a2a import BINDING
from weft_protocols.errors import (
    A2AError,
    AgentNotFound,
    DeadlineExceeded,
    InvalidConfig,
    TimedOut,
    TooLarge,
    UsageError,
    WeftError,
)

SCHEMES: Final = ("nats", "tls")
"""Schemes of an interface's URL (binding, section 2)."""
TRACE: Final = ("traceparent", "tracestate")
"""Service parameters that go to the agent as headers. Others may be credentials, and what a task carries is stored."""
_KINDS: Final[dict[str, type[sdk.A2AError]]] = {**sdk.A2A_REASON_TO_ERROR, "PARSE_ERROR": sdk.JSONParseError}
R = TypeVar("R")
Q = TypeVar("Q")


class NatsTransport(ClientTransport):
    """One agent, over the connection of a mesh.

    A call's timeout (`ClientCallContext.timeout`, seconds) bounds a call that returns once, and in a stream the wait
    for each next event. Without one, a call that waits for its task waits 300 s.

    Args:
        operations: the caller's.
        agent_card: the agent's card, as the client knows it.
        agent: its name in the mesh.
    """

    def __init__(self, operations: Operations, agent_card: pb.AgentCard, agent: str) -> None:
        self.agent_card = agent_card
        self.agent = subjects.check_name(agent)
        self._operations = operations
        self._waiting: set[asyncio.Timeout] = set()
        self._idle: set[AsyncGenerator[pb.StreamResponse, None]] = set()
        self._ended: set[AsyncGenerator[pb.StreamResponse, None]] = set()
        self._closed = False

    async def send_message(
        self, request: pb.SendMessageRequest, *, context: ClientCallContext | None = None
    ) -> pb.SendMessageResponse:
        """The task once it ended or waits, or at once if so asked, or the message that is the answer."""
        return await self._call(self._operations.send_message, request, context)

    def send_message_streaming(
        self, request: pb.SendMessageRequest, *, context: ClientCallContext | None = None
    ) -> AsyncGenerator[pb.StreamResponse, None]:
        """The task, then its events until it ends or waits; or the message that is the answer."""
        return self._stream(self._operations.send_streaming_message, request, context)

    def subscribe(
        self, request: pb.SubscribeToTaskRequest, *, context: ClientCallContext | None = None
    ) -> AsyncGenerator[pb.StreamResponse, None]:
        """The task as it is, then its events until it ends or waits."""
        return self._stream(self._operations.subscribe_to_task, request, context)

    async def get_task(self, request: pb.GetTaskRequest, *, context: ClientCallContext | None = None) -> pb.Task:
        """A task as it is now."""
        return await self._call(self._operations.get_task, request, context)

    async def list_tasks(
        self, request: pb.ListTasksRequest, *, context: ClientCallContext | None = None
    ) -> pb.ListTasksResponse:
        """One page of the caller's tasks with this agent."""
        return await self._call(self._operations.list_tasks, request, context)

    async def cancel_task(self, request: pb.CancelTaskRequest, *, context: ClientCallContext | None = None) -> pb.Task:
        """The task, once it ended."""
        return await self._call(self._operations.cancel_task, request, context)

    async def create_task_push_notification_config(
        self, request: pb.TaskPushNotificationConfig, *, context: ClientCallContext | None = None
    ) -> pb.TaskPushNotificationConfig:
        """The configuration with its id."""
        return await self._call(self._operations.create_push_config, request, context)

    async def get_task_push_notification_config(
        self, request: pb.GetTaskPushNotificationConfigRequest, *, context: ClientCallContext | None = None
    ) -> pb.TaskPushNotificationConfig:
        """One configuration."""
        return await self._call(self._operations.get_push_config, request, context)

    async def list_task_push_notification_configs(
        self, request: pb.ListTaskPushNotificationConfigsRequest, *, context: ClientCallContext | None = None
    ) -> pb.ListTaskPushNotificationConfigsResponse:
        """The configurations of a task."""
        return await self._call(self._operations.list_push_configs, request, context)

    async def delete_task_push_notification_config(
        self, request: pb.DeleteTaskPushNotificationConfigRequest, *, context: ClientCallContext | None = None
    ) -> None:
        """Remove a configuration; removing it twice is no error."""
        await self._call(self._operations.delete_push_config, request, context)

    async def get_extended_agent_card(
        self, request: pb.GetExtendedAgentCardRequest, *, context: ClientCallContext | None = None
    ) -> pb.AgentCard:
        """The extended card; the card the client has where that declares no other."""
        if not self.agent_card.capabilities.extended_agent_card:
            return self.agent_card
        return await self._call(self._operations.get_extended_card, request, context)

    async def close(self) -> None:
        """End what this client waits for and follows. Tasks go on, and so does the mesh's connection. Idempotent."""
        self._closed = True
        now = asyncio.get_running_loop().time()
        for waiting in self._waiting:
            if not waiting.expired():
                waiting.reschedule(now)
        while self._idle:
            events = self._idle.pop()
            self._ended.add(events)
            await events.aclose()

    async def _call(
        self, operation: Callable[[str, Q, Call], Awaitable[R]], request: Q, context: ClientCallContext | None
    ) -> R:
        self._check(request)
        return await self._within(context, operation(self.agent, request, call_of(context)))

    async def _stream(
        self,
        operation: Callable[[str, Q, Call], AsyncGenerator[pb.StreamResponse, None]],
        request: Q,
        context: ClientCallContext | None,
    ) -> AsyncGenerator[pb.StreamResponse, None]:
        self._check(request)
        events = operation(self.agent, request, call_of(context))
        try:
            while (event := await self._within(context, anext(events, None))) is not None:
                self._idle.add(events)
                try:
                    yield event
                finally:
                    self._idle.discard(events)
                self._check()
        finally:
            if events not in self._ended:  # a generator must not be closed twice at the same time
                await events.aclose()

    async def _within(self, context: ClientCallContext | None, work: Awaitable[R]) -> R:
        """The outcome of `work` within the call's timeout, its errors as the SDK's transports raise them."""
        try:
            async with asyncio.timeout(context.timeout if context is not None else None) as waiting:
                self._waiting.add(waiting)
                try:
                    return await work
                finally:
                    self._waiting.discard(waiting)
        except WeftError as error:
            raise client_error(error) from error
        except TimeoutError as error:
            self._check()
            raise A2AClientTimeoutError("Client Request timed out") from error

    def _check(self, request: Any = None) -> None:
        if self._closed:
            raise A2AClientError(f"the client of agent {self.agent} is closed")
        if request is not None and request.tenant:
            raise sdk.InvalidParamsError(
                "tenant: a mesh is one tenant, leave it empty",
                data={"errors": [{"field": "tenant", "message": "a mesh is one tenant, leave it empty"}]},
            )


def call_of(context: ClientCallContext | None) -> Call:
    """What a client's context says of a call. Names of service parameters are compared without case."""
    if context is None:
        return Call()
    given = {name.lower(): value for name, value in (context.service_parameters or {}).items()}
    call = Call(
        version=given.get(h.VERSION.lower(), h.A2A_VERSION),
        extensions=frozenset(get_requested_extensions([given.get(h.EXTENSIONS.lower(), "")])),
        headers={name: given[name] for name in TRACE if name in given},
    )
    return call if context.timeout is None else replace(call, wait=context.timeout)


def client_error(error: WeftError) -> sdk.A2AError:
    """The error as an SDK client expects it: by its reason, or A2AClientError for what is none of A2A's."""
    if isinstance(error, A2AError):
        kind = _KINDS.get(error.reason)
        return A2AClientError(str(error)) if kind is None else kind(str(error), data=_data(error))
    if isinstance(error, DeadlineExceeded | TimedOut):
        return A2AClientTimeoutError(str(error))
    if isinstance(error, AgentNotFound):
        return sdk.InvalidRequestError(str(error))
    if isinstance(error, UsageError | TooLarge):
        return sdk.InvalidParamsError(str(error))
    return A2AClientError(str(error))


def _data(error: A2AError) -> dict[str, Any] | None:
    data: dict[str, Any] = dict(error.metadata)
    if error.violations:
        data["errors"] = [{"field": one.field, "message": one.description} for one in error.violations]
    return data or None


def agent_of(url: str) -> str:
    """The agent an interface's URL names: `nats://mesh.example.com/analyst`. Raises InvalidConfig, InvalidName."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise InvalidConfig(f"{url!r} is no address of an agent over NATS; it must be nats://MESH/AGENT")
    return subjects.check_name(parts.path.strip("/"))


class _Cards:
    """The cards of a mesh for who only reads them: uncopied, so that it can be seen whether one has changed."""

    def __init__(self, mesh: Mesh) -> None:
        self._directory = CardDirectory(mesh.broker, mesh.caller)

    async def card(self, agent: str) -> pb.AgentCard:
        return (await self._directory.known(agent)).card


def register(factory: ClientFactory, mesh: Mesh) -> None:
    """Have a factory make clients over this mesh for agents whose card lists the NATS binding.

    `ClientConfig.supported_protocol_bindings` must hold `BINDING` for the factory to choose it.
    """
    operations = Operations(mesh, _Cards(mesh))

    def produce(card: pb.AgentCard, url: str, config: ClientConfig) -> ClientTransport:
        return NatsTransport(operations, card, agent_of(url))

    factory.register(BINDING, produce)


async def resolve(agent: str, mesh: Mesh) -> pb.AgentCard:
    """The signed card of an agent, by its name. Raises AgentNotFound; Unavailable if nobody knows the agents."""
    return await CardDirectory(mesh.broker, mesh.caller).card(agent)


async def client(
    agent: str | pb.AgentCard,
    mesh: Mesh,
    config: ClientConfig | None = None,
    *,
    interceptors: list[ClientCallInterceptor] | None = None,
) -> Client:
    """An SDK client of an agent, named or by its card, over this mesh.

    Raises:
        AgentNotFound, Unavailable: as `resolve`.
        ValueError: the card lists no interface over NATS.
    """
    card = await resolve(agent, mesh) if isinstance(agent, str) else agent
    chosen = config or ClientConfig()
    bindings = [BINDING, *(one for one in chosen.supported_protocol_bindings if one != BINDING)]
    chosen = replace(chosen, supported_protocol_bindings=bindings, use_client_preference=True)
    factory = ClientFactory(chosen)
    register(factory, mesh)
    return factory.create(card, interceptors)


__all__ = ["BINDING", "NatsTransport", "agent_of", "call_of", "client", "client_error", "register", "resolve"]
