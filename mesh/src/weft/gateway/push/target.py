"""Where notifications may go, and going there: one HTTP client that connects to addresses it has checked.

A name is resolved once for a connection, its addresses are checked, and the connection is made to one of them, so
that no second answer of a name server can lead elsewhere. `Host` and the name in the TLS handshake stay those of the
URL. No redirect is followed and no proxy of the environment used.
"""

from __future__ import annotations

import asyncio
import email.utils
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

import httpcore
import httpx

from weft.policy import egress
from weft.policy.egress import Refused as Refused
from weft.policy.egress import is_public as is_public

Resolver = Callable[[str, int], Awaitable[list[str]]]
"""The addresses of a host; OSError if it has none."""

CONNECTIONS: Final = 128
KEEP_OPEN: Final = 30.0
"""Seconds an unused connection is kept."""
ANSWER: Final = 64 * 1024
"""Bytes of an answer that are read; nothing is made of them."""
LOOKUPS: Final = 8
"""Names that are resolved at a time."""
LONGEST_WAIT: Final = 3600.0
"""Seconds of a `Retry-After` that are heeded at most."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one attempt."""

    ok: bool
    reason: str = ""
    """Why it failed, for people; free of secrets."""
    final: bool = False
    """Whether no other attempt can help."""
    wait: float = 0.0
    """Seconds the receiver asked to be left alone."""


def check_url(url: str, *, allow_private: bool) -> str:
    """The host of a webhook's URL. Refused if the URL alone shows that it is not to be called."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme not in ("http", "https") or not host:
        raise Refused("the URL is not one of http or https", final=True)
    if allow_private:
        return host
    if parts.scheme != "https":
        raise Refused("the URL is not https, and this mesh pushes only over TLS (push.allow_private)", final=True)
    if egress.address(host) is not None and not is_public(host):
        raise Refused(f"{host} is not a public address (push.allow_private)", final=True)
    return host


class SystemResolver:
    """The system's resolver, in threads of its own: a slow name server delays nothing else."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(LOOKUPS, thread_name_prefix="push-resolver")

    async def __call__(self, host: str, port: int) -> list[str]:
        """The host's addresses, each once, in the system's order."""

        def look_up() -> list[str]:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            return list(dict.fromkeys(str(info[4][0]) for info in found))

        return await asyncio.get_running_loop().run_in_executor(self._threads, look_up)

    def close(self) -> None:
        """Start no further look-up."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class CheckedBackend(httpcore.AsyncNetworkBackend):
    """Connects to addresses that were checked, and to nothing else."""

    def __init__(self, resolve: Resolver, *, allow_private: bool) -> None:
        self._resolve = resolve
        self._allow_private = allow_private
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """A connection to one of the host's addresses. Refused if any of them may not be called."""
        try:
            addresses = await self._resolve(host, port)
        except OSError as error:
            raise httpcore.ConnectError(f"{host} cannot be resolved: {error.strerror or error}") from error
        if not addresses:
            raise httpcore.ConnectError(f"{host} has no address")
        if not self._allow_private and (hidden := [one for one in addresses if not is_public(one)]):
            raise Refused(f"{host} resolves to {hidden[0]}, which is not a public address", final=False)
        failure: Exception | None = None
        for address in addresses:
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure or httpcore.ConnectError(f"{host} cannot be reached")

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None
    ) -> httpcore.AsyncNetworkStream:
        """Never: notifications go over the network."""
        raise Refused("sockets of this machine are not called", final=True)

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await self._inner.sleep(seconds)


class CheckedTransport(httpx.AsyncBaseTransport):
    """httpx over a connection pool that uses a `CheckedBackend`."""

    def __init__(self, backend: httpcore.AsyncNetworkBackend, tls: ssl.SSLContext) -> None:
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=tls,
            max_connections=CONNECTIONS,
            max_keepalive_connections=CONNECTIONS // 4,
            keepalive_expiry=KEEP_OPEN,
            network_backend=backend,
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """One request, one response; transport errors are httpx's."""
        with _as_httpx():
            response = await self._pool.handle_async_request(
                httpcore.Request(
                    method=request.method,
                    url=httpcore.URL(
                        scheme=request.url.raw_scheme,
                        host=request.url.raw_host,
                        port=request.url.port,
                        target=request.url.raw_path,
                    ),
                    headers=request.headers.raw,
                    content=request.stream,
                    extensions=request.extensions,
                )
            )
        return httpx.Response(
            response.status,
            headers=response.headers,
            stream=_Body(response),
            extensions=response.extensions,
        )

    async def aclose(self) -> None:
        """Close the connections."""
        await self._pool.aclose()


class _Body(httpx.AsyncByteStream):
    def __init__(self, response: httpcore.Response) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _as_httpx():
            async for chunk in self._response.aiter_stream():
                yield chunk

    async def aclose(self) -> None:
        await self._response.aclose()


@contextmanager
def _as_httpx() -> Iterator[None]:
    """Errors of the connection pool as those of httpx."""
    try:
        yield
    except httpcore.TimeoutException as error:
        raise httpx.ReadTimeout(str(error)) from error
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol, OSError) as error:
        raise httpx.TransportError(str(error) or type(error).__name__) from error


class Poster:
    """Posts notifications: the one HTTP client of a process.

    Nothing of a URL but its host, and no header, is written to any log.

    Args:
        allow_private: Whether private addresses and plain HTTP are called.
        timeout: Seconds a receiver has for its answer, connection included.
        resolve: Resolves names; the system's resolver if None.
        tls: What certificates are checked against; the usual authorities if None.
    """

    def __init__(
        self,
        *,
        allow_private: bool,
        timeout: float,
        resolve: Resolver | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._allow_private = allow_private
        self._timeout = timeout
        self._system = SystemResolver() if resolve is None else None
        backend = CheckedBackend(resolve or self._system or SystemResolver(), allow_private=allow_private)
        # Without httpx's client, which follows redirects, uses proxies, and writes whole URLs into the log.
        self._transport = CheckedTransport(backend, tls or httpx.create_ssl_context())

    async def aclose(self) -> None:
        """Close all connections."""
        await self._transport.aclose()
        if self._system is not None:
            self._system.close()

    def host(self, url: str) -> str:
        """The host a URL names. Refused if it is not to be called."""
        return check_url(url, allow_private=self._allow_private)

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """One attempt. Never raises for what the network or the receiver does."""
        answer: Answer | None = None
        try:
            self.host(url)
            request = httpx.Request(
                "POST",
                url,
                headers=dict(headers),
                content=body,
                extensions={"timeout": httpx.Timeout(self._timeout).as_dict()},
            )
            async with asyncio.timeout(self._timeout):
                response = await self._transport.handle_async_request(request)
                try:
                    answer = judge(response)
                    await _drain(response)
                finally:
                    await response.aclose()
        except Refused as error:
            return Answer(False, str(error), final=error.final)
        except (TimeoutError, httpx.TimeoutException):
            answer = answer or Answer(False, f"no answer within {self._timeout:g} s")
        except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError, OSError, ValueError) as error:
            answer = answer or Answer(False, f"{type(error).__name__}: {error}"[:300])
        return answer


def judge(response: httpx.Response) -> Answer:
    """What the status of a response means; its body says nothing."""
    status = response.status_code
    if 200 <= status < 300:
        return Answer(True)
    if status == 410:
        return Answer(False, "410: the receiver is gone for good", final=True)
    wait = retry_after(response.headers.get("retry-after", ""), now=time.time())
    if 300 <= status < 400:
        return Answer(False, f"{status}: redirects are not followed", wait=wait)
    return Answer(False, f"the receiver answered {status}", wait=wait)


async def _drain(response: httpx.Response) -> None:
    """Read a short answer to its end, so that the connection can be used again."""
    size = 0
    async for chunk in response.aiter_raw():
        size += len(chunk)
        if size > ANSWER:
            return


def retry_after(value: str, *, now: float) -> float:
    """Seconds of a `Retry-After`, in either of its forms; 0 where there is none."""
    value = value.strip()
    if value.isascii() and value.isdigit():
        return min(float(value[:9]), LONGEST_WAIT)
    try:
        at = email.utils.parsedate_to_datetime(value).timestamp()
    except (ValueError, OverflowError):
        return 0.0
    return min(max(0.0, at - now), LONGEST_WAIT)
