"""What a request carries besides its body, and what passes beside the SDK's dispatchers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from a2a.auth.user import User
from a2a.extensions.common import get_requested_extensions
from a2a.server.context import ServerCallContext
from a2a.server.routes.common import ServerCallContextBuilder
from starlette.requests import Request

from weft.client.operations import Call
from weft.gateway.auth import Identity, scoped
from weft_protocols.errors import A2AError, Unauthenticated, VersionNotSupported

IDENTITY: Final = "weft.identity"
"""Key of the ASGI scope that holds the caller's `Identity`."""
EXCHANGE: Final = "weft.exchange"
"""Key of the ASGI scope and of a context's state that holds the request's `Exchange`."""
COMPATIBLE: Final = "weft.compatible"
"""Key of a context's state: the request is one of A2A 0.3, which the SDK has translated."""
TRACE_HEADERS: Final = ("traceparent", "tracestate")
EXTENSIONS: Final = "A2A-Extensions"
VERSION: Final = "A2A-Version"


@dataclass(slots=True, eq=False)
class Exchange:
    """One request and its answer: what the SDK's dispatchers have no place for."""

    after: int | None = None
    """Number of the last event the client has (`Last-Event-ID`)."""
    metadata: Mapping[str, Any] | None = None
    """Metadata of a CancelTask over HTTP+JSON, which the SDK's dispatcher does not read."""
    number: int | None = None
    """Number of the event the handler has yielded last."""
    error: A2AError | None = None
    """What the operation raised, as a client may see it."""
    activated: frozenset[str] = frozenset()
    """Extensions that were asked for and that the agent has."""
    answered: bool = False
    """Whether the operation has answered."""
    compatible: bool = False
    """Whether it is a request of A2A 0.3."""
    stream: AsyncGenerator[Any, None] | None = None
    """The handler's stream, to be closed whatever became of the response."""


class CallerUser(User):
    """The SDK's view of an identity."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity

    @property
    def is_authenticated(self) -> bool:
        """Whether there is an identity at all: an anonymous caller has the one its gateway gives it."""
        return True

    @property
    def user_name(self) -> str:
        """The caller's name."""
        return self.identity.name


@dataclass(frozen=True, slots=True)
class Parameters:
    """A2A's service parameters of a request, from whatever carries them."""

    version: str = ""
    """`A2A-Version`; empty is 0.3."""
    extensions: frozenset[str] = frozenset()
    trace: Mapping[str, str] = field(default_factory=dict)
    """`traceparent` and `tracestate`."""
    compatible: bool = False
    """Whether it came through the SDK's translation of 0.3."""


def make_context(
    identity: Identity, parameters: Parameters, *, tenant: str = "", exchange: Exchange | None = None
) -> ServerCallContext:
    """A context for `MeshRequestHandler`, for a transport of any kind."""
    return ServerCallContext(
        user=CallerUser(identity),
        state={
            "headers": {VERSION: parameters.version, **parameters.trace},
            COMPATIBLE: parameters.compatible,
            EXCHANGE: exchange if exchange is not None else Exchange(),
        },
        tenant=tenant,
        requested_extensions=set(parameters.extensions),
    )


class ContextBuilder(ServerCallContextBuilder):
    """Contexts of HTTP requests, whose scope has an identity."""

    def build(self, request: Request) -> ServerCallContext:
        """The context of a request."""
        headers = request.headers
        # A2A v1.0.1, section 3.6: clients that cannot set headers name the version in the query.
        version = headers.get(VERSION) or request.query_params.get(VERSION) or ""
        parameters = Parameters(
            version=version.strip(),
            extensions=frozenset(get_requested_extensions(headers.getlist(EXTENSIONS))),
            trace={name: value for name in TRACE_HEADERS if (value := headers.get(name))},
            # The SDK routes by version: no other request of a 0.x gets as far as the handler.
            compatible=version == "" or version.startswith("0."),
        )
        exchange: Exchange = request.scope[EXCHANGE]
        exchange.compatible = parameters.compatible
        return make_context(request.scope[IDENTITY], parameters, exchange=exchange)


def exchange_of(context: ServerCallContext) -> Exchange:
    """The exchange a context belongs to; a new one where its transport has none."""
    found = context.state.get(EXCHANGE)
    if isinstance(found, Exchange):
        return found
    made = Exchange()
    context.state[EXCHANGE] = made
    return made


def caller_of(context: ServerCallContext, tenant: str) -> str:
    """The caller's token within a tenant. Raises Unauthenticated for a context without an identity."""
    user = context.user
    if not isinstance(user, CallerUser):
        raise Unauthenticated("the request has no identity")
    return scoped(user.identity, tenant or context.tenant)


def call_of(context: ServerCallContext) -> Call:
    """A request's service parameters.

    Raises:
        VersionNotSupported: a request of A2A 0.x that is not 0.3.
    """
    headers = context.state.get("headers") or {}
    version = str(headers.get(VERSION) or "")
    if context.state.get(COMPATIBLE):
        if version and version.split(".")[:2] != ["0", "3"]:
            raise VersionNotSupported(f"A2A version {version!r} is not supported; use 1.0 or 0.3")
        version = "1.0"
    return Call(
        version=version,
        extensions=frozenset(context.requested_extensions),
        headers={name: headers[name] for name in TRACE_HEADERS if name in headers},
    )
