"""A web server in a process of the mesh: uvicorn on a socket of our own, without its signals. Needs an extra."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import uvicorn
from starlette.applications import Starlette

from weft_protocols.errors import Unavailable

KEEP_ALIVE: Final = 75
"""Seconds for which a connection without requests stays open."""


class WebServer(uvicorn.Server):
    """Serves one application.

    Args:
        app: what is served.
        name: what the server is part of, as errors say it.
        options: of uvicorn, besides ours.
    """

    def __init__(self, app: Starlette, *, name: str, **options: Any) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                ws="none",
                loop="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE,
                **options,
            )
        )
        self._name = name
        self._listening = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them alone: the process has its own."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self._listening.set()

    async def ready(self, serving: asyncio.Task[None]) -> None:
        """Return when connections are accepted. Raises Unavailable if the server ended instead."""
        async with asyncio.TaskGroup() as group:
            wait = group.create_task(self._listening.wait())
            await asyncio.wait((wait, serving), return_when=asyncio.FIRST_COMPLETED)
            wait.cancel()
        if serving.done():
            raise Unavailable(f"the HTTP server of the {self._name} did not start; its log says why")


def bound(host: str, port: int, *, backlog: int) -> socket.socket:
    """A socket that listens there; 0 is a free port. Raises OSError."""
    family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
        0
    ]
    sock = socket.socket(family, kind, number)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(AttributeError, OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.bind(address)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock
