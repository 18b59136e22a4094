"""A caller of a tool over NATS, as an agent calls it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from weft.client.tools import ToolClient, ToolRequest
from weft.core.broker import Broker
from weft.core.config import load_settings


@asynccontextmanager
async def client(home: str) -> AsyncIterator[Callable[[str], Awaitable[str]]]:
    """A caller named `local` in the mesh at `home`."""
    broker = await Broker.connect(load_settings("local", home=Path(home)), name="bench")
    try:
        caller = await ToolClient(broker).start()

        async def one(text: str) -> str:
            params = {"name": "echo", "arguments": {"text": text}}
            result = await caller.request(ToolRequest("echo", "tools/call", params))
            return str(result["content"][0]["text"])

        yield one
        await caller.aclose()
    finally:
        await broker.close()
