"""An A2A agent outside of the mesh, as a client sees it: its card, calls to it, and what their errors mean."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import httpx
from a2a.client.card_resolver import parse_agent_card
from a2a.client.client import Client, ClientCallContext, ClientConfig
from a2a.client.client_factory import ClientFactory
from a2a.client.errors import A2AClientError
from a2a.types import a2a_pb2 as pb
from a2a.utils import errors as sdk
from google.protobuf import json_format
from google.protobuf.message import DecodeError

from weft_protocols.errors import A2AError, Fail, InvalidAgentResponse, InvalidConfig

if TYPE_CHECKING:
    import grpc.aio

log = logging.getLogger("weft.host")

CARD_LIMIT: Final = 1024 * 1024
"""Bytes of a card."""
CARD_TIMEOUT: Final = 10.0
"""Seconds for fetching it."""
SILENCE: Final = 60.0
"""Seconds without a byte after which a call or a stream is taken for dead."""
_LATER: Final = frozenset({408, 425, 429})
"""HTTP statuses below 500 of a refusal that passes."""
_NOT_TAKEN: Final = frozenset({429, 503})
"""HTTP statuses that say that nothing was done."""


class Away(Exception):
    """The agent could not be asked, or did not answer: trying again may help.

    `taken` says whether it may have taken the request nevertheless.
    """

    def __init__(self, message: str, *, taken: bool) -> None:
        super().__init__(message)
        self.taken = taken


class Remote:
    """An outside agent.

    Args:
        url: of its card.
        headers: sent with every request to the host of `url`, and to no other.
    """

    def __init__(self, url: str, *, headers: Mapping[str, str]) -> None:
        self.url = url
        self.host = _host(url)
        self._headers = _Headers(self.host, headers)
        self._card: pb.AgentCard | None = None
        self._http: httpx.AsyncClient | None = None
        self._client: Client | None = None
        self._rpc = False
        """Whether calls go by gRPC."""

    async def fetch_card(self) -> pb.AgentCard:
        """Its card as it is now, v0.3 translated; calls go where it says from now on.

        Raises:
            Away: it cannot be fetched at the moment.
            InvalidConfig: what is there is no card, or one that names no protocol spoken here.
        """
        card = _parsed(await self._fetch(), self.url)
        if card != self._card:
            self._choose(card)
            await self._drop()
            self._card = card
        return card

    async def _fetch(self) -> bytes:
        body = bytearray()
        http = httpx.AsyncClient(auth=self._headers, timeout=CARD_TIMEOUT)
        try:
            async with http, http.stream("GET", self.url, headers={"Accept": "application/json"}) as response:
                if response.status_code != 200:
                    raise _refused(f"{self.url} answered {response.status_code}", response.status_code)
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > CARD_LIMIT:
                        raise InvalidConfig(f"{self.url} is longer than {CARD_LIMIT} bytes; that is no agent card")
        except httpx.HTTPError as error:
            raise Away(f"{self.url}: {_words(error)}", taken=False) from error
        return bytes(body)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._drop()
        if self._http is not None:
            await self._http.aclose()

    async def _drop(self) -> None:
        if self._client is not None and self._rpc:
            await self._client.close()
        self._client = None

    def _choose(self, card: pb.AgentCard) -> pb.AgentInterface:
        """Where calls go: the first interface that speaks what is spoken here, as the SDK's factory chooses."""
        bindings = _bindings()
        chosen = next((i for i in card.supported_interfaces if i.protocol_binding in bindings), None)
        if chosen is None:
            spoken = ", ".join(sorted({i.protocol_binding for i in card.supported_interfaces})) or "nothing"
            raise InvalidConfig(f"{self.url}: the agent speaks {spoken}; a bridge speaks {', '.join(bindings)}")
        return chosen

    def _connect(self, card: pb.AgentCard) -> Client:
        if self._http is None:
            timeout = httpx.Timeout(SILENCE, connect=CARD_TIMEOUT)
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
            self._http = httpx.AsyncClient(auth=self._headers, timeout=timeout, limits=limits)
        chosen = self._choose(card)
        self._rpc = chosen.protocol_binding == "GRPC"
        if _host(chosen.url) != self.host and self._headers.values:
            log.warning(
                "the card at %s names the address %s: headers are sent to %s only", self.url, chosen.url, self.host
            )
        config = ClientConfig(
            httpx_client=self._http,
            grpc_channel_factory=_channels(),
            supported_protocol_bindings=_bindings(),
            polling=not card.capabilities.streaming,
        )
        try:
            return ClientFactory(config).create(card)
        except ValueError as error:
            raise InvalidConfig(f"{self.url}: {error}") from error

    # Calls -----------------------------------------------------------------------------------------

    @property
    def streaming(self) -> bool:
        """Whether it streams."""
        return self._card is not None and self._card.capabilities.streaming

    async def send(
        self, request: pb.SendMessageRequest, parameters: Mapping[str, str]
    ) -> AsyncGenerator[pb.StreamResponse, None]:
        """Send a message; what answers it, as far as the connection lasts. Raises as `call` does."""
        async with self._calling() as client:
            async with _closing(client.send_message(request, context=self._context(parameters))) as events:
                async for event in events:
                    yield event

    async def subscribe(self, task_id: str) -> AsyncGenerator[pb.StreamResponse, None]:
        """A task as it is, and what happens to it. Raises as `call` does."""
        async with self._calling() as client:
            request = pb.SubscribeToTaskRequest(id=task_id)
            async with _closing(client.subscribe(request, context=self._context({}))) as events:
                async for event in events:
                    yield event

    async def get(self, task_id: str) -> pb.Task:
        """A task with its history."""
        async with self._calling() as client:
            return await client.get_task(pb.GetTaskRequest(id=task_id), context=self._context({}))

    async def cancel(self, task_id: str) -> pb.Task:
        """Cancel a task; what it is then."""
        async with self._calling() as client:
            return await client.cancel_task(pb.CancelTaskRequest(id=task_id), context=self._context({}))

    async def find(self, context_id: str, message_id: str) -> pb.Task | None:
        """The task that a message began, where the agent can say."""
        request = pb.ListTasksRequest(context_id=context_id, page_size=50, history_length=50)
        try:
            async with self._calling() as client:
                found = await client.list_tasks(request, context=self._context({}))
        except (A2AError, Fail, NotImplementedError):
            return None  # 0.3 has no list, and not every 1.0 agent has one
        for task in found.tasks:
            if any(message.message_id == message_id for message in task.history):
                return task
        return None

    @asynccontextmanager
    async def _calling(self) -> AsyncIterator[Client]:
        """The client for one call, with errors as they are meant.

        Raises:
            Away: trying again may help.
            A2AError: the agent's answer.
            Fail: it will not answer otherwise, whoever tries.
        """
        card = self._card if self._card is not None else await self.fetch_card()
        client = self._client = self._client or self._connect(card)
        try:
            yield client
        except (sdk.A2AError, httpx.HTTPError, json_format.ParseError, DecodeError) as error:
            raise _translated(error, self.host) from error
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidAgentResponse(
                f"{self.host} answered with something that is not A2A ({_words(error)})"
            ) from error

    def _context(self, parameters: Mapping[str, str]) -> ClientCallContext:
        sent = dict(parameters)
        if self._rpc and self._card is not None and _host(self._choose(self._card).url) == self.host:
            sent |= {name.lower(): value for name, value in self._headers.values.items()}
        return ClientCallContext(service_parameters=sent)


class _Headers(httpx.Auth):
    """Adds headers to requests to one host: a card that names another one does not get the credentials there."""

    def __init__(self, host: str, values: Mapping[str, str]) -> None:
        self._host = host
        self.values = dict(values)

    def auth_flow(self, request: httpx.Request) -> Any:
        """One request."""
        if request.url.host.lower() == self._host:
            request.headers.update(self.values)
        yield request


@asynccontextmanager
async def _closing(events: AsyncIterator[pb.StreamResponse]) -> AsyncIterator[AsyncIterator[pb.StreamResponse]]:
    if isinstance(events, AsyncGenerator):
        async with aclosing(events):
            yield events
    else:
        yield events


def _bindings() -> list[str]:
    """Protocols spoken here."""
    return ["JSONRPC", "HTTP+JSON", *(["GRPC"] if find_spec("grpc") else [])]


def _channels() -> Callable[[str], Any] | None:
    """Makes gRPC channels, where gRPC is installed: encrypted ones unless the address says otherwise."""
    if not find_spec("grpc"):
        return None
    import grpc
    import grpc.aio

    def channel(url: str) -> grpc.aio.Channel:
        scheme, slashes, address = url.rpartition("://")
        plain = scheme in ("http", "grpc") if slashes else _host(f"//{address}") in ("localhost", "127.0.0.1", "::1")
        options = [("grpc.max_receive_message_length", -1)]
        if plain:
            return grpc.aio.insecure_channel(address, options=options)
        return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(), options=options)

    return channel


def _parsed(body: bytes, url: str) -> pb.AgentCard:
    try:
        return parse_agent_card(json.loads(body))
    except (ValueError, TypeError, AttributeError, RecursionError, json_format.ParseError) as error:
        raise InvalidConfig(f"{url} is no agent card: {_words(error)}") from error


def _translated(error: Exception, host: str) -> Exception:
    """What an error of the SDK's client means for the task."""
    cause = error.__cause__ if isinstance(error, A2AClientError) else error
    if isinstance(error, sdk.A2AError) and not isinstance(error, A2AClientError):
        reason = next(
            (sdk.A2A_ERROR_REASONS[kind] for kind in type(error).__mro__ if kind in sdk.A2A_ERROR_REASONS), ""
        )
        return A2AError.from_reason(reason, error.message)
    if isinstance(cause, httpx.HTTPStatusError):
        return _refused(f"{host} answered {cause.response.status_code}", cause.response.status_code)
    if isinstance(cause, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout):
        return Away(f"{host} cannot be reached: {_words(cause)}", taken=False)
    code = getattr(cause, "code", None)
    name = getattr(code(), "name", "") if callable(code) else ""
    if name in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        return Fail(f"{host} refuses us ({name}); check the bridge's headers_env")
    if name in ("INVALID_ARGUMENT", "UNIMPLEMENTED", "FAILED_PRECONDITION", "NOT_FOUND"):
        return Fail(f"{host} answered {name}: {_words(error)}")
    return Away(f"{host}: {_words(error)}", taken=True)


def _refused(text: str, status: int) -> Exception:
    if status in (401, 403):
        return Fail(f"{text}: it refuses us; check the bridge's headers_env")
    if status >= 500 or status in _LATER:
        return Away(text, taken=status not in _NOT_TAKEN)
    return Fail(text)


def _host(url: str) -> str:
    try:
        return (urlsplit(url if "//" in url else f"//{url}").hostname or "").lower()
    except ValueError:
        return ""


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
