"""Between the SDK's dispatchers and the network: what they leave out, and what they would let out.

Around every endpoint: content types are checked before bodies are parsed, a client that goes away ends its work,
errors have A2A's form with nothing internal in them, streams have ids and keep-alive, extensions are echoed.
"""

from __future__ import annotations

import asyncio
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, Final

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from weft.gateway import errors
from weft.gateway.context import EXCHANGE, EXTENSIONS, Exchange
from weft.gateway.sse import EventStream, Presence, Streams, last_event
from weft_protocols.errors import (
    A2A_ERRORS,
    A2AError,
    ContentTypeNotSupported,
    FieldViolation,
    InternalError,
    InvalidParams,
    InvalidRequest,
    ParseError,
    Unavailable,
    WeftError,
)

log = logging.getLogger("weft.gateway")
Endpoint = Callable[[Request], Awaitable[Response]]
JSON: Final = "application/json"
A2A_JSON: Final = "application/a2a+json"
CLIENT_CLOSED: Final = 499
"""Status nobody reads."""
PROMPT: Final = 1.0
"""Seconds after which a stream begins although there is no event yet."""
_REQUEST_ID: Final = "weft.request_id"
_STREAMING: Final = (b"SendStreamingMessage", b"SubscribeToTask", b"message/stream", b"tasks/resubscribe")
_WITH_BODY: Final = ("/message:send", "/message:stream", "/pushNotificationConfigs")
_Opened = tuple[Response, AsyncIterator[Any] | None]
_INTERNAL: Final = b'"code":-32603'
_REASONS: Final = {spec.code: reason for reason, spec in reversed(A2A_ERRORS.items())}
_UTF8: Final = ("", "utf-8", "utf8", '"utf-8"')


class _Shield(ABC):
    """What both bindings have in common."""

    def __init__(self, endpoint: Endpoint, streams: Streams) -> None:
        self._endpoint = endpoint
        self._streams = streams

    @abstractmethod
    def error_body(self, error: A2AError, request_id: Any) -> dict[str, Any]:
        """An error in the form of the binding."""

    async def answer(self, request: Request, exchange: Exchange, *, streaming: bool) -> Response:
        """The dispatcher's answer; a stream in our own form. Raises ClientDisconnect."""
        async with Presence(request.receive, self._streams.watchers):
            if not streaming:
                return await self._endpoint(request)
            # The SDK says nothing before the first event, which may be long in coming: clients must hear sooner.
            opening = self._streams.watchers.start(self._open(request, exchange), name="opening of a stream")
            try:
                await asyncio.wait({opening}, timeout=PROMPT)
            except asyncio.CancelledError:
                await _abandon(opening, exchange)
                raise
        if not opening.done():
            return self._stream(_late(opening, exchange), request, exchange)
        response, items = opening.result()
        return response if items is None else self._stream(items, request, exchange)

    async def _open(self, request: Request, exchange: Exchange) -> _Opened:
        response = await self._endpoint(request)
        items: AsyncIterator[Any] | None = getattr(response, "body_iterator", None)
        if items is not None and exchange.compatible:
            # Its dispatchers answer before they know whether there is a stream.
            items = await _begun(items, exchange)
        return response, items

    def _stream(self, items: AsyncIterator[Any], request: Request, exchange: Exchange) -> EventStream:
        request_id = request.scope.get(_REQUEST_ID)
        return EventStream(
            items,
            exchange=exchange,
            streams=self._streams,
            error_body=lambda error: self.error_body(error, request_id),
            headers=_echo(exchange),
        )


class JsonRpcShield(_Shield):
    """Around the SDK's JSON-RPC endpoint, which also answers A2A 0.3."""

    def error_body(self, error: A2AError, request_id: Any) -> dict[str, Any]:
        """A JSON-RPC response."""
        return errors.jsonrpc_error(error, request_id)

    async def __call__(self, request: Request) -> Response:
        """The answer to one POST."""
        exchange = _begin(request)
        if not _is_json(request):
            return JSONResponse(errors.jsonrpc_error(_wrong_type(request), None))
        try:
            body = await request.body()
            streaming = any(method in body for method in _STREAMING)
            if streaming:
                request.scope[_REQUEST_ID] = _id_in(body)
                if self._streams.closing:
                    leaving = errors.for_clients(_leaving())
                    return _retry(JSONResponse(errors.jsonrpc_error(leaving, _id_in(body))), leaving)
            response = await self.answer(request, exchange, streaming=streaming)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED)
        if isinstance(response, EventStream):
            return response
        return _with_headers(await self._checked(request, response, exchange), exchange)

    async def _checked(self, request: Request, response: Response, exchange: Exchange) -> Response:
        body = bytes(response.body)
        if exchange.answered and _INTERNAL not in body[:400]:
            return response
        found = json.loads(body)
        error = found.get("error")
        if error is None:
            return response
        if exchange.compatible:
            # A2A 0.3 has other codes; they and what the handler said are right as they are.
            if error["code"] == InternalError().spec.code and exchange.error is None:
                found["error"] = {"code": error["code"], "message": InternalError().message}
                return JSONResponse(found)
            return response
        seen = exchange.error or await _of_sdk(error, request)
        made = JSONResponse(errors.jsonrpc_error(seen, found.get("id")))
        return _retry(made, seen)


class RestShield(_Shield):
    """Around one of the SDK's HTTP+JSON endpoints, of A2A 1.0 or 0.3."""

    def __init__(self, endpoint: Endpoint, streams: Streams, *, streaming: bool) -> None:
        super().__init__(endpoint, streams)
        self._streaming = streaming

    def error_body(self, error: A2AError, request_id: Any) -> dict[str, Any]:
        """`google.rpc.Status`."""
        return errors.rest_error(error)

    async def __call__(self, request: Request) -> Response:
        """The answer to one request."""
        exchange = _begin(request)
        try:
            body = await request.body()
            if body and not _is_json(request):
                return self._refusal(_wrong_type(request), request)
            needed = request.method == "POST" and request.url.path.endswith(_WITH_BODY)
            if (body or needed) and body.lstrip()[:1] != b"{":
                return self._refusal(ParseError("the body must be a JSON object"), request)
            if body and request.url.path.endswith(":cancel"):
                exchange.metadata = _metadata_in(body)
            if self._streaming and self._streams.closing:
                return self._refusal(errors.for_clients(_leaving()), request, exchange)
            response = await self.answer(request, exchange, streaming=self._streaming)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED)
        except A2AError as error:
            return self._refusal(error, request, exchange)
        if exchange.error is not None and not isinstance(response, EventStream):
            return _with_headers(self._refusal(exchange.error, request, exchange), exchange)
        if isinstance(response, EventStream):
            return response
        if response.status_code >= 400:
            told = json.loads(bytes(response.body)).get("error") or {}
            return self._refusal(await _of_sdk(told, request), request, exchange)
        if _prefers_plain(request, default=A2A_JSON):
            response.headers["content-type"] = JSON
        return _with_headers(response, exchange)

    @staticmethod
    def _refusal(error: A2AError, request: Request, exchange: Exchange | None = None) -> Response:
        compatible = exchange is not None and exchange.compatible
        body = errors.compatible_rest_error(error) if compatible else errors.rest_error(error)
        media = JSON if _prefers_plain(request, default=JSON) else A2A_JSON
        return _retry(JSONResponse(body, status_code=body["error"]["code"], media_type=media), error)


def _begin(request: Request) -> Exchange:
    exchange = Exchange(after=last_event(request.headers.get("last-event-id")))
    request.scope[EXCHANGE] = exchange
    return exchange


def _is_json(request: Request) -> bool:
    """Whether the body is announced as JSON. Anything else could come from a page in somebody's browser."""
    media, _, rest = request.headers.get("content-type", "").partition(";")
    charset = rest.lower().partition("charset=")[2].partition(";")[0].strip()
    return media.strip().lower() in (JSON, A2A_JSON) and charset in _UTF8


def _leaving() -> WeftError:
    return Unavailable("this gateway is shutting down")


def _wrong_type(request: Request) -> A2AError:
    given = request.headers.get("content-type")
    return ContentTypeNotSupported(
        f"content type {given!r} is not supported; use {A2A_JSON} or {JSON}"
        if given
        else f"the request has no content type; use {A2A_JSON} or {JSON}"
    )


def _prefers_plain(request: Request, *, default: str) -> bool:
    """Whether the client speaks of plain JSON, in `Accept` or else in its own content type (A2A v1.0.1, 11.1)."""
    accepted = request.headers.get("accept", "").lower()
    sent = request.headers.get("content-type", "").lower()
    for told in (accepted, sent):
        if A2A_JSON in told:
            return False
        if JSON in told:
            return True
    return default == JSON


def _echo(exchange: Exchange) -> dict[str, str]:
    if not exchange.activated:
        return {}
    value = ", ".join(sorted(exchange.activated))
    return {EXTENSIONS: value, f"X-{EXTENSIONS}": value} if exchange.compatible else {EXTENSIONS: value}


def _with_headers(response: Response, exchange: Exchange) -> Response:
    if exchange.activated:
        response.headers.update(_echo(exchange))
    return response


def _retry(response: Response, error: A2AError) -> Response:
    if errors.is_passing(error):
        response.headers["retry-after"] = str(errors.RETRY_AFTER)
    return response


async def _begun(items: AsyncIterator[Any], exchange: Exchange) -> AsyncIterator[Any] | None:
    """`items` with the first of them at hand; None where an error came instead."""
    try:
        first = await anext(items)
    except StopAsyncIteration:
        return _joined(items)
    except Exception:  # the edge: whatever it was, the client gets an error of A2A
        if exchange.error is None:
            log.exception("a stream could not be opened")
            exchange.error = InternalError("internal error")
        return None
    return _joined(items, first)


async def _abandon(opening: asyncio.Task[_Opened], exchange: Exchange) -> None:
    """Close a stream that nobody waits for any more."""
    opening.cancel()
    await asyncio.wait({opening})
    if exchange.stream is not None:
        await exchange.stream.aclose()


async def _late(opening: asyncio.Task[_Opened], exchange: Exchange) -> AsyncGenerator[Any, None]:
    """The items of a stream that is being opened; its refusal as an error."""
    _, items = await opening
    if items is None:
        raise exchange.error or InternalError("internal error")
    async for item in items:
        yield item


def _metadata_in(body: bytes) -> dict[str, Any] | None:
    """Field `metadata` of a body. Raises ParseError, InvalidParams."""
    if (broken := _broken(body)) is not None:
        raise broken
    found = json.loads(body).get("metadata")
    if found is not None and not isinstance(found, dict):
        wrong = FieldViolation("metadata", "must be an object")
        raise InvalidParams("metadata must be an object", violations=(wrong,))
    return found


def _id_in(body: bytes) -> Any:
    """The id of a JSON-RPC request that may be none."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    request_id = found.get("id") if isinstance(found, dict) else None
    return request_id if isinstance(request_id, str | int) and not isinstance(request_id, bool) else None


async def _joined(items: AsyncIterator[Any], *first: Any) -> AsyncGenerator[Any, None]:
    for item in first:
        yield item
    async for item in items:
        yield item


async def _of_sdk(error: dict[str, Any], request: Request) -> A2AError:
    """What an error that a dispatcher made itself is for clients."""
    told: list[dict[str, Any]] = error.get("data") or error.get("details") or []
    info: dict[str, Any] = next((detail for detail in told if "reason" in detail), {})
    reason = str(info.get("reason", ""))
    if reason not in A2A_ERRORS:
        reason = _REASONS.get(error.get("code", 0), "INTERNAL_ERROR")
    if (broken := _broken(await request.body())) is not None:
        return broken
    if reason == "INTERNAL_ERROR":
        return InternalError("internal error")
    message = str(error.get("message") or "")
    if why := (info.get("metadata") or {}).get("parseError"):
        message = f"{message}: {why}"
    return A2AError.from_reason(reason, message)


def _broken(body: bytes) -> A2AError | None:
    """What is wrong with a body as JSON, without the parser's own words."""
    try:
        if body:
            json.loads(body)
    except RecursionError:
        return InvalidRequest("the body nests too deeply")
    except ValueError:
        return ParseError("the body is not JSON in UTF-8")
    return None
