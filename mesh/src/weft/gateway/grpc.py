"""A2A over gRPC: every agent of the mesh on one port, in A2A 1.0 and, by the SDK's translation, 0.3.

The agent is the first segment of the request's `tenant` (`agent` or `agent/tenant`), else the metadata `weft-agent`,
else the default agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn, TypeVar
from urllib.parse import unquote

import grpc
import grpc.aio
from a2a.compat.v0_3 import a2a_v0_3_pb2, a2a_v0_3_pb2_grpc
from a2a.compat.v0_3.extension_headers import LEGACY_HTTP_EXTENSION_HEADER
from a2a.compat.v0_3.grpc_handler import CompatGrpcHandler
from a2a.extensions.common import get_requested_extensions
from a2a.server.context import ServerCallContext
from a2a.server.events import Event
from a2a.server.request_handlers.grpc_handler import GrpcHandler, GrpcServerCallContextBuilder
from a2a.server.request_handlers.request_handler import RequestHandler
from a2a.types import a2a_pb2 as pb
from a2a.types import a2a_pb2_grpc
from a2a.utils import errors as sdk
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from weft.core.gatewayconf import LimitsConfig
from weft.gateway.auth import Authenticator, Identity
from weft.gateway.callers import Callers
from weft.gateway.context import EXTENSIONS, TRACE_HEADERS, VERSION, Exchange, Parameters, make_context
from weft.gateway.errors import for_clients, http_status
from weft.gateway.grpchealth import Health
from weft.gateway.handler import MeshRequestHandler
from weft.gateway.limits import Limited, Limiter
from weft.gateway.refusal import DOMAIN, Refusal
from weft_protocols.errors import (
    A2A_DOMAIN,
    A2AError,
    AgentNotFound,
    FieldViolation,
    InternalError,
    InvalidParams,
    InvalidRequest,
    ParseError,
    Unauthenticated,
    Unavailable,
    WeftError,
)
from weft_protocols.subjects import check_name

log = logging.getLogger("weft.gateway")
AGENT: Final = "weft-agent"
"""Metadata that names the agent where the request's tenant does not."""
LAST_EVENT: Final = "last-event-id"
"""Metadata of SubscribeToTask: the number of the last event the client has; in trailers: that of the last one sent."""
SERVICES: Final = {
    pb.DESCRIPTOR.services_by_name["A2AService"].full_name: False,
    a2a_v0_3_pb2.DESCRIPTOR.services_by_name["A2AService"].full_name: True,
}
"""A2A's services by their full name, and whether it is that of 0.3."""
LONGEST_MESSAGE: Final = 1000
"""Characters of an error's message: it travels in headers, which clients limit."""
MOST_VIOLATIONS: Final = 20
CLOSING: Final = 1.0
"""Seconds in which calls that were ended take their status."""
HEAD_LIMIT: Final = 64 * 1024
"""Bytes of a call's metadata."""
_LEAVING: Final = Refusal(
    503,
    "UNAVAILABLE",
    "GATEWAY_LEAVES",
    "this gateway is shutting down; subscribe to the task, or send the same request, at another one",
)
_TOO_SLOW: Final = Refusal(
    408, "UNAVAILABLE", "SLOW_READER", "the client took nothing for too long; subscribe to the task to go on"
)
_DETAILS: Final = "grpc-status-details-bin"
_Context = Any  # of grpc.aio, whose stubs declare the blocking one for handlers
_register: Any = a2a_pb2_grpc.add_A2AServiceServicer_to_server
_register_compatible: Any = a2a_v0_3_pb2_grpc.add_A2AServiceServicer_to_server
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Rpc:
    """One call: what the SDK's handlers have no place for."""

    identity: Identity
    parameters: Parameters
    agent: str = ""
    """Of the metadata."""
    exchange: Exchange = field(default_factory=Exchange)
    write: asyncio.Future[None] | None = None
    """The message of a stream that is on its way."""

    async def close(self) -> None:
        """Stop following the task."""
        if self.exchange.stream is not None:
            await self.exchange.stream.aclose()


_current: ContextVar[_Rpc] = ContextVar("weft gRPC call")


class GrpcGateway:
    """The gRPC server of one gateway.

    Args:
        callers: operations of every caller.
        authenticator: says who calls.
        limiter: counts what is taken on, for all protocols of the gateway.
        default_agent: the agent of requests that name none.
        serving: whether the gateway can serve, for the health service.
    """

    def __init__(
        self,
        callers: Callers,
        authenticator: Authenticator,
        *,
        limiter: Limiter | None = None,
        default_agent: str = "",
        serving: Callable[[], bool] = lambda: True,
    ) -> None:
        limiter = limiter or Limiter(LimitsConfig())
        self._edge = Edge(authenticator, limiter)
        self._health = Health(serving, services=SERVICES)
        self._server = grpc.aio.server(
            interceptors=(self._edge,),
            options=(
                ("grpc.max_receive_message_length", limiter.limits.body),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_metadata_size", HEAD_LIMIT),
                ("grpc.absolute_max_metadata_size", HEAD_LIMIT),
                ("grpc.max_concurrent_streams", limiter.limits.streams + limiter.limits.requests),
                # A port that another gateway listens on is taken.
                ("grpc.so_reuseport", 0),
            ),
        )
        router = AgentRouter(callers, default_agent)
        _register(_Handler(router, _Builder()), self._server)
        _register_compatible(_CompatHandler(router, _Builder()), self._server)
        self._server.add_generic_rpc_handlers((self._health.handlers(),))

    def bind(self, address: str) -> int:
        """Listen on `host:port`; the port. Raises OSError if it is taken."""
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: {error}") from None
        if port == 0:
            raise OSError(f"cannot listen on {address}")
        return port

    async def start(self) -> None:
        """Serve."""
        await self._server.start()

    async def stop(self, grace: float) -> None:
        """Take no more calls, let those under way end within `grace` seconds, then end them so that clients retry."""
        self._health.leave()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._server.stop(grace + CLOSING))
            group.create_task(self._edge.drain(grace))

    @property
    def active(self) -> int:
        """Number of calls under way."""
        return self._edge.active


# Agents ----------------------------------------------------------------------------------------------


class AgentRouter(RequestHandler):
    """The request handler of every agent: it finds out which one a request is for."""

    def __init__(self, callers: Callers, default_agent: str = "") -> None:
        self._callers = callers
        self._default = default_agent

    async def on_message_send(self, params: pb.SendMessageRequest, context: ServerCallContext) -> pb.Task | pb.Message:
        """SendMessage."""
        return await (await self._route(params, context)).on_message_send(params, context)

    async def on_message_send_stream(
        self, params: pb.SendMessageRequest, context: ServerCallContext
    ) -> AsyncGenerator[Event, None]:
        """SendStreamingMessage."""
        handler = await self._route(params, context)
        async with aclosing(handler.on_message_send_stream(params, context)) as events:
            async for event in events:
                yield event

    async def on_subscribe_to_task(
        self, params: pb.SubscribeToTaskRequest, context: ServerCallContext
    ) -> AsyncGenerator[Event, None]:
        """SubscribeToTask."""
        handler = await self._route(params, context)
        async with aclosing(handler.on_subscribe_to_task(params, context)) as events:
            async for event in events:
                yield event

    async def on_get_task(self, params: pb.GetTaskRequest, context: ServerCallContext) -> pb.Task:
        """GetTask."""
        return await (await self._route(params, context)).on_get_task(params, context)

    async def on_list_tasks(self, params: pb.ListTasksRequest, context: ServerCallContext) -> pb.ListTasksResponse:
        """ListTasks."""
        return await (await self._route(params, context)).on_list_tasks(params, context)

    async def on_cancel_task(self, params: pb.CancelTaskRequest, context: ServerCallContext) -> pb.Task:
        """CancelTask."""
        return await (await self._route(params, context)).on_cancel_task(params, context)

    async def on_create_task_push_notification_config(
        self, params: pb.TaskPushNotificationConfig, context: ServerCallContext
    ) -> pb.TaskPushNotificationConfig:
        """CreateTaskPushNotificationConfig."""
        tenant = params.tenant
        handler = await self._route(params, context)
        return _for_tenant(await handler.on_create_task_push_notification_config(params, context), tenant)

    async def on_get_task_push_notification_config(
        self, params: pb.GetTaskPushNotificationConfigRequest, context: ServerCallContext
    ) -> pb.TaskPushNotificationConfig:
        """GetTaskPushNotificationConfig."""
        tenant = params.tenant
        handler = await self._route(params, context)
        return _for_tenant(await handler.on_get_task_push_notification_config(params, context), tenant)

    async def on_list_task_push_notification_configs(
        self, params: pb.ListTaskPushNotificationConfigsRequest, context: ServerCallContext
    ) -> pb.ListTaskPushNotificationConfigsResponse:
        """ListTaskPushNotificationConfigs."""
        tenant = params.tenant
        handler = await self._route(params, context)
        page = await handler.on_list_task_push_notification_configs(params, context)
        for config in page.configs:
            _for_tenant(config, tenant)
        return page

    async def on_delete_task_push_notification_config(
        self, params: pb.DeleteTaskPushNotificationConfigRequest, context: ServerCallContext
    ) -> None:
        """DeleteTaskPushNotificationConfig."""
        await (await self._route(params, context)).on_delete_task_push_notification_config(params, context)

    async def on_get_extended_agent_card(
        self, params: pb.GetExtendedAgentCardRequest, context: ServerCallContext
    ) -> pb.AgentCard:
        """GetExtendedAgentCard."""
        return await (await self._route(params, context)).on_get_extended_agent_card(params, context)

    async def _route(self, params: Any, context: ServerCallContext) -> MeshRequestHandler:
        """The handler of the agent a request is for; its name is taken out of the request's tenant.

        Raises:
            InvalidParams: no agent is named, or not by a name.
            AgentNotFound: there is no such agent.
        """
        first, _, rest = params.tenant.partition("/")
        agent = first or _current.get().agent or self._default
        if not agent:
            raise InvalidParams(
                "the request names no agent: set `tenant` to the agent's name (or agent/tenant), "
                f"or the metadata {AGENT}",
                violations=(FieldViolation("tenant", "must begin with the name of an agent"),),
            )
        check_name(agent, "agent name")
        with contextlib.suppress(Unavailable):  # who is known may still be asked
            await self._callers.cards.card(agent)
        params.tenant = context.tenant = rest
        return MeshRequestHandler(agent, self._callers)


def _for_tenant(config: pb.TaskPushNotificationConfig, tenant: str) -> pb.TaskPushNotificationConfig:
    """A configuration that names the tenant as the client does."""
    config.tenant = tenant
    return config


# The SDK's handlers ----------------------------------------------------------------------------------


class _Builder(GrpcServerCallContextBuilder):
    """Contexts of calls that the edge let in."""

    def build(self, context: _Context) -> ServerCallContext:
        rpc = _current.get()
        return make_context(rpc.identity, rpc.parameters, exchange=rpc.exchange)


class _Handler(GrpcHandler):
    async def abort_context(self, error: sdk.A2AError, context: _Context) -> None:
        await _abort(_refused(error), context)


class _CompatHandler(CompatGrpcHandler):
    async def abort_context(self, error: sdk.A2AError, context: _Context) -> None:
        # Clients of 0.3 read the error's name off the message.
        await _abort(_refused(error), context, prefix=f"{type(error).__name__}: ")


def _refused(error: sdk.A2AError) -> A2AError:
    """What the operation raised; for what the SDK itself found wrong, our error of that name."""
    known = _current.get().exchange.error
    if isinstance(known, A2AError):
        return known
    if isinstance(error, sdk.JSONParseError):
        return ParseError(str(error))
    return A2AError.from_reason(sdk.A2A_ERROR_REASONS.get(type(error), ""), str(error))


async def _abort(error: A2AError, context: _Context, *, prefix: str = "", code: str = "") -> NoReturn:
    """End a call with an error and its details (A2A v1.0.1, section 10.6)."""
    details: list[Any] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=A2A_DOMAIN, metadata=error.metadata),
    ]
    if error.violations:
        wrong = error.violations[:MOST_VIOLATIONS]
        fields = [
            error_details_pb2.BadRequest.FieldViolation(field=one.field, description=one.description[:LONGEST_MESSAGE])
            for one in wrong
        ]
        details.append(error_details_pb2.BadRequest(field_violations=fields))
    trailers = {}
    if isinstance(error, Unauthenticated):
        trailers["www-authenticate"] = error.metadata.get("challenge") or "Bearer"
    message = f"{prefix}{error.message}"[:LONGEST_MESSAGE]
    await _end(grpc.StatusCode[code or http_status(error)[1]], message, details, context, trailers=trailers)


async def _refuse(refusal: Refusal, context: _Context) -> NoReturn:
    """End a call that is not taken, or not kept."""
    info = error_details_pb2.ErrorInfo(reason=refusal.reason, domain=DOMAIN)
    code = grpc.StatusCode[refusal.status]
    await _end(code, refusal.message, [info], context, trailers=refusal.headers)


async def _end(
    code: grpc.StatusCode,
    message: str,
    details: Sequence[Any],
    context: _Context,
    *,
    trailers: Mapping[str, str],
) -> NoReturn:
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    rpc = _current.get(None)
    if rpc is not None and rpc.write is not None and not rpc.write.done():
        await asyncio.wait((rpc.write,))
    metadata: list[tuple[str, str | bytes]] = [(_DETAILS, status.SerializeToString()), *trailers.items()]
    if rpc is not None and rpc.exchange.number is not None:
        metadata.append((LAST_EVENT, str(rpc.exchange.number)))
    context.set_trailing_metadata(tuple(metadata))
    await context.abort(code, message)
    raise AssertionError("abort returned")


class _Gone(Exception):
    """A message could not be written: nobody is there any more."""


def _noticed(write: asyncio.Future[None]) -> None:
    """The error of a write that nobody waits for any more is nobody's concern."""
    if not write.cancelled():
        write.exception()


# The edge --------------------------------------------------------------------------------------------


class Edge(grpc.aio.ServerInterceptor):
    """Around A2A's methods: who calls and with what, that nothing of it stays, and that nothing internal gets out.

    Args:
        authenticator: says who calls; started, if it has issuers.
        limiter: says how much is taken on; a stream ends whose client takes nothing for its `slow_reader` seconds.
    """

    def __init__(self, authenticator: Authenticator, limiter: Limiter) -> None:
        self._authenticator = authenticator
        self._limiter = limiter
        self._slow_reader = limiter.limits.slow_reader
        self._made: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        self._open: set[asyncio.Timeout] = set()
        self._none_open = asyncio.Event()
        self._none_open.set()
        self._closing = False

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The handler of a call, within the edge if it is one of A2A's."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        compatible = SERVICES.get(method.strip("/").partition("/")[0])
        if handler is None or compatible is None:
            return handler
        if method not in self._made:
            self._made[method] = self._around(handler, compatible=compatible)
        return self._made[method]

    async def drain(self, grace: float) -> None:
        """Let the calls under way end within `grace` seconds, then end them with UNAVAILABLE."""
        self._closing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._none_open.wait()
        now = asyncio.get_running_loop().time()
        for call in list(self._open):
            if not call.expired():
                call.reschedule(now)

    @property
    def active(self) -> int:
        """Number of calls under way."""
        return len(self._open)

    def _around(self, handler: grpc.RpcMethodHandler[Any, Any], *, compatible: bool) -> grpc.RpcMethodHandler[Any, Any]:
        read, write = handler.request_deserializer, handler.response_serializer
        inner: Any = handler.unary_stream or handler.unary_unary

        async def stream(data: bytes, context: _Context) -> None:
            async with self._call(context, compatible=compatible, stream=True):
                async with aclosing(inner(_parsed(read, data), context)) as responses:
                    await self._send(responses, context)

        async def unary(data: bytes, context: _Context) -> Any:
            async with self._call(context, compatible=compatible) as rpc:
                response = await inner(_parsed(read, data), context)
                await _echo(rpc, context)
                return response

        make: Any = (
            grpc.unary_stream_rpc_method_handler if handler.unary_stream else grpc.unary_unary_rpc_method_handler
        )
        made: grpc.RpcMethodHandler[Any, Any] = make(stream if handler.unary_stream else unary, None, write)
        return made

    async def _send(self, responses: AsyncIterator[Any], context: _Context) -> None:
        rpc, first = _current.get(), True
        async for response in responses:
            if first:
                await _echo(rpc, context)
                first = False
            # Only one message can be on its way, and it cannot be called back, so that it is never cancelled.
            write = rpc.write = asyncio.shield(context.write(response))
            write.add_done_callback(_noticed)
            await asyncio.wait((write,), timeout=self._slow_reader)
            if not write.done():
                await rpc.close()
                await asyncio.wait((write,))
                raise Limited(_TOO_SLOW)
            if write.exception() is not None:
                raise _Gone
        if rpc.exchange.number is not None:
            context.set_trailing_metadata(((LAST_EVENT, str(rpc.exchange.number)),))

    @asynccontextmanager
    async def _call(self, context: _Context, *, compatible: bool, stream: bool = False) -> AsyncIterator[_Rpc]:
        """One call: authenticated, counted, ended with an error clients understand, and cleared away."""
        until_drained = asyncio.timeout(None)
        try:
            async with until_drained:
                with self._counted(until_drained), self._limiter.admit() as slot:
                    rpc = await self._let_in(context, compatible=compatible)
                    if stream:
                        slot.become_stream(rpc.identity.caller)
                    _current.set(rpc)  # every call is a task of its own
                    try:
                        yield rpc
                    finally:
                        await rpc.close()
        except grpc.aio.AbortError:
            raise
        except _Gone:
            log.debug("the client of a gRPC stream is gone")
        except Limited as refused:
            await _refuse(refused.refusal, context)
        except TimeoutError as error:
            if until_drained.expired():
                await _refuse(_LEAVING, context)
            await self._fail(error, context)
        except AgentNotFound as error:
            await _abort(for_clients(error), context, code="NOT_FOUND")
        except WeftError as error:
            await _abort(for_clients(error), context)
        except Exception as error:  # noqa: BLE001 - the edge: everything is answered, and nothing internal leaves
            await self._fail(error, context)

    async def _let_in(self, context: _Context, *, compatible: bool) -> _Rpc:
        if self._closing:
            raise Limited(_LEAVING)
        metadata = _Metadata(context)
        if len(metadata.all("authorization")) > 1:
            raise InvalidRequest("the call has more than one authorization in its metadata")
        peer = _address(context.peer())
        identity = await self._authenticator.authenticate(metadata.one("authorization"), peer=peer)
        exchange = Exchange()
        if (after := metadata.one(LAST_EVENT)) is not None:
            if not (after.isascii() and after.isdigit() and len(after) < 19):
                raise InvalidParams(f"{LAST_EVENT} {after!r} must be the number of an event")
            exchange.after = int(after)
        names = [EXTENSIONS.lower(), *([LEGACY_HTTP_EXTENSION_HEADER.lower()] if compatible else [])]
        parameters = Parameters(
            # The SDK's client puts its own version first and then what its user asked for.
            version=(metadata.all(VERSION.lower()) or [""])[-1].strip(),
            extensions=frozenset(get_requested_extensions([text for name in names for text in metadata.all(name)])),
            trace={name: value for name in TRACE_HEADERS if (value := metadata.one(name))},
            compatible=compatible,
        )
        return _Rpc(identity, parameters, agent=(metadata.one(AGENT) or "").strip(), exchange=exchange)

    @contextlib.contextmanager
    def _counted(self, call: asyncio.Timeout) -> Iterator[None]:
        self._open.add(call)
        self._none_open.clear()
        try:
            yield
        finally:
            self._open.discard(call)
            if not self._open:
                self._none_open.set()

    async def _fail(self, error: Exception, context: _Context) -> NoReturn:
        incident = uuid.uuid4().hex[:12]
        log.error("a gRPC call failed, incident %s", incident, exc_info=error)
        await _abort(InternalError(f"internal error {incident}: the gateway's log has it under this number"), context)


class _Metadata:
    """What a call carries, by lower-case name."""

    def __init__(self, context: _Context) -> None:
        self._values: dict[str, list[str]] = {}
        for name, value in context.invocation_metadata() or ():
            text = value if isinstance(value, str) else value.decode("utf-8", "replace")
            self._values.setdefault(name.lower(), []).append(text)

    def all(self, name: str) -> list[str]:
        """Every value of a name."""
        return self._values.get(name, [])

    def one(self, name: str) -> str | None:
        """The first value of a name."""
        return next(iter(self.all(name)), None)


def _parsed(read: Callable[[bytes], T] | None, data: bytes) -> Any:
    """The request. Raises ParseError."""
    try:
        return read(data) if read is not None else data
    except DecodeError:
        raise ParseError("the request is not a message of this method") from None


async def _echo(rpc: _Rpc, context: _Context) -> None:
    """Tell which extensions are active (A2A v1.0.1, section 4.6)."""
    if rpc.exchange.activated:
        value = ",".join(sorted(rpc.exchange.activated))
        await context.send_initial_metadata(((EXTENSIONS.lower(), value),))


def _address(peer: str) -> str:
    """The address in a peer's name such as `ipv4:127.0.0.1:5000` or `ipv6:%5B::1%5D:5000`; empty if there is none."""
    kind, _, rest = unquote(peer).partition(":")
    return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else ""


__all__ = ["AgentRouter", "Edge", "GrpcGateway"]
