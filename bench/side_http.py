"""A caller that speaks JSON-RPC with as little of its own as possible, so that what answers is what is measured.

The A2A SDK's own client costs several milliseconds a call; it would hide every difference between servers.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def client(url: str) -> AsyncIterator[Callable[[str], Awaitable[str]]]:
    """A caller that keeps one connection for each task in flight."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or 80
    head = (
        f"POST {parts.path or '/'} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        "A2A-Version: 1.0\r\nContent-Length: "
    )
    idle: list[Connection] = []

    async def one(text: str) -> str:
        reader, writer = idle.pop() if idle else await asyncio.open_connection(host, port)
        message = {"messageId": uuid.uuid4().hex, "role": "ROLE_USER", "parts": [{"text": text}]}
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "SendMessage", "params": {"message": message}}).encode()
        writer.write(f"{head}{len(body)}\r\n\r\n".encode() + body)
        answer = json.loads(await _body(reader))
        idle.append((reader, writer))
        if "error" in answer:
            raise RuntimeError(answer["error"])
        artifacts = answer["result"]["task"]["artifacts"]
        return "".join(part["text"] for artifact in artifacts for part in artifact["parts"])

    try:
        yield one
    finally:
        for _, writer in idle:
            writer.close()


async def _body(reader: asyncio.StreamReader) -> bytes:
    """The body of a response that says its length."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if not head.startswith(b"http/1.1 200"):
        raise RuntimeError(head.decode())
    at = head.index(b"content-length:") + 15
    return await reader.readexactly(int(head[at : head.index(b"\r\n", at)]))
