"""A caller of a tool by streamable HTTP, with the client of MCP's own SDK. The address is JSON: url, tool, token."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx2
from mcp import Client
from mcp.client.streamable_http import streamable_http_client


@asynccontextmanager
async def client(address: str) -> AsyncIterator[Callable[[str], Awaitable[str]]]:
    """A caller with one client, as a framework has it."""
    logging.disable(logging.CRITICAL)
    told = json.loads(address)
    headers = {"Authorization": f"Bearer {told['token']}"} if told.get("token") else {}
    limits = httpx2.Limits(max_connections=64, max_keepalive_connections=64)
    async with (
        httpx2.AsyncClient(headers=headers, limits=limits, timeout=60) as connections,
        Client(streamable_http_client(told["url"], http_client=connections)) as caller,
    ):

        async def one(text: str) -> str:
            result = await caller.call_tool(told["tool"], {"text": text})
            [content] = result.content
            return getattr(content, "text", "")

        yield one
