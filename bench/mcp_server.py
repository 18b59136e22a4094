"""The tool server behind every side of `tools`: one tool that returns its text. `python -m bench.mcp_server PORT`."""

from __future__ import annotations

import logging
import sys
from typing import Any

import mcp.types as t
import uvicorn
from mcp.server.lowlevel import Server

ECHO = t.Tool(
    name="echo",
    description="Returns its text",
    input_schema={"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
)


async def listed(_: Any, __: Any) -> t.ListToolsResult:
    """The one tool."""
    return t.ListToolsResult(tools=[ECHO], ttl_ms=60_000, cache_scope="public")


async def called(_: Any, params: t.CallToolRequestParams) -> t.CallToolResult:
    """Its text."""
    return t.CallToolResult(content=[t.TextContent(type="text", text=str((params.arguments or {})["text"]))])


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    server: Server[Any] = Server(
        "echo",
        on_list_tools=listed,
        on_call_tool=called,
        get_tool_input_schema=lambda name: ECHO.input_schema if name == ECHO.name else None,
    )
    uvicorn.run(
        server.streamable_http_app(), host="127.0.0.1", port=int(sys.argv[1]), log_level="critical", access_log=False
    )
