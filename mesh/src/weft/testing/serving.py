"""An ASGI application on a port of this process, for tests of what speaks HTTP. Needs the extra `gateway`."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

import uvicorn

from weft.core.supervise import Tasks

END: Final = 10.0
"""Seconds the server and its requests have to end."""


class QuietServer(uvicorn.Server):
    """uvicorn that leaves signals to the test, and no request behind when it ends."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave them alone."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn does, then end the requests it gave up waiting for."""
        await super().shutdown(sockets)
        left = [task for task in self.server_state.tasks if not task.done()]
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=END)


@asynccontextmanager
async def served(app: Any, *, http: Any = "httptools") -> AsyncIterator[int]:
    """Serve `app`; yields the port. At the end every connection is dropped."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = QuietServer(uvicorn.Config(app, log_config=None, lifespan="off", ws="none", http=http))
    tasks = Tasks("server of a test")
    tasks.start(server.serve(sockets=[listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        async with asyncio.timeout(2 * END):
            await tasks.idle()
        listener.close()
