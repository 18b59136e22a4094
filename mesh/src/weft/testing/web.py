"""HTTP servers that answer each request as a test likes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

Answer = Callable[[dict[str, Any], dict[str, str], asyncio.StreamWriter], Awaitable[None]]
"""Gets the body, the headers by lower-case name, and where to write."""


class Web:
    """Such servers, until `stack` is closed, and the head of everything that reached them."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self.heads: list[str] = []

    async def start(self, answer: Answer) -> str:
        """Another one; its address."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                    self.heads.append(head)
                    lines = [line.partition(":") for line in head.split("\r\n")[1:] if ":" in line]
                    headers = {key.lower(): value.strip() for key, _, value in lines}
                    data = await reader.readexactly(int(headers.get("content-length", 0)))
                    await answer(json.loads(data or b"{}"), headers, writer)
                    await writer.drain()
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            finally:
                writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        self._stack.callback(server.close)
        return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/mcp"
