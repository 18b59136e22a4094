"""A server with the tools, prompts and resources that the official conformance suite asks for, in both eras.

    python everything.py --port PORT     streamable HTTP on 127.0.0.1, `ready` on standard error when it serves
    python everything.py                 standard input and output

Every answer is written out as MCP has it, so that what a gateway changes on the way is seen.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import hmac
import json
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any

import uvicorn
from mcp import MCPError
from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8DwHwAFBQIAX8jx0gAAAABJRU5ErkJggg=="
SILENT = "UklGRiYAAABXQVZFZm10IBAAAAABAAEAQB8AAAB9AAACABAAZGF0YQIAAAA="
MODERN = "2026-07-28"
META = "io.modelcontextprotocol/"
SECRET = b"what seals the request states of this fixture"
CHANGES = {"toolsListChanged": "tools", "promptsListChanged": "prompts", "resourcesListChanged": "resources"}

Context = ServerRequestContext[Any, Any]
Answer = dict[str, Any]


def text(words: str) -> Answer:
    return {"type": "text", "text": words}


def picture() -> Answer:
    return {"type": "image", "data": PIXEL, "mimeType": "image/png"}


def embedded(uri: str, words: str, kind: str = "text/plain") -> Answer:
    return {"type": "resource", "resource": {"uri": uri, "mimeType": kind, "text": words}}


def content(*blocks: Answer) -> Answer:
    return {"content": list(blocks), "isError": False}


def form(message: str, **properties: str) -> Answer:
    """An elicitation request for these fields, each with a type."""
    schema = {
        "type": "object",
        "properties": {name: {"type": kind} for name, kind in properties.items()},
        "required": list(properties),
    }
    return {
        "method": "elicitation/create",
        "params": {"mode": "form", "message": message, "requestedSchema": schema},
    }


def sample(question: str) -> Answer:
    messages = [{"role": "user", "content": text(question)}]
    return {"method": "sampling/createMessage", "params": {"messages": messages, "maxTokens": 50}}


ROOTS: Answer = {"method": "roots/list"}


def asks(state: str | None = None, **requests: Answer) -> Answer:
    """A result that says what is needed first."""
    made: Answer = {"resultType": "input_required", "inputRequests": requests}
    return {**made, "requestState": sealed(state)} if state is not None else made


def sealed(state: str) -> str:
    return f"{state}.{hmac.digest(SECRET, state.encode(), hashlib.sha256).hex()}"


def opened(found: Any) -> str | None:
    if found is None:
        return None
    state, _, mac = str(found).rpartition(".")
    if not hmac.compare_digest(mac, hmac.digest(SECRET, state.encode(), hashlib.sha256).hex()):
        raise MCPError(-32602, "Invalid requestState")
    return state


def answered(params: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What was answered in a form; empty if it was not."""
    responses = params.get("inputResponses")
    found = responses.get(name) if isinstance(responses, dict) else None
    filled = found.get("content") if isinstance(found, dict) else None
    return filled if isinstance(filled, dict) else {}


def responded(params: Mapping[str, Any], *names: str) -> bool:
    responses = params.get("inputResponses")
    return isinstance(responses, dict) and all(name in responses for name in names)


# Tools that ask first ------------------------------------------------------------------------------


def multi_round(params: Mapping[str, Any]) -> Answer:
    state = json.loads(opened(params.get("requestState")) or "{}")
    if state.get("round") == 1 and answered(params, "step1"):
        after = json.dumps({"round": 2, "name": answered(params, "step1").get("name")})
        return asks(after, step2=form("Step 2: What is your favorite color?", color="string"))
    if state.get("round") == 2 and answered(params, "step2"):
        return content(text(f"{state['name']} likes {answered(params, 'step2').get('color')}."))
    return asks(json.dumps({"round": 1}), step1=form("Step 1: What is your name?", name="string"))


def with_state(nonce: str) -> Callable[[Mapping[str, Any]], Answer]:
    def tool(params: Mapping[str, Any]) -> Answer:
        if opened(params.get("requestState")) == nonce and responded(params, "confirm"):
            return content(text("state-ok: confirmation received"))
        return asks(nonce, confirm=form("Please confirm", ok="boolean"))

    return tool


def once(name: str, request: Answer) -> Callable[[Mapping[str, Any]], Answer]:
    def tool(params: Mapping[str, Any]) -> Answer:
        return content(text("thank you")) if responded(params, name) else asks(None, **{name: request})

    return tool


def several(params: Mapping[str, Any]) -> Answer:
    if responded(params, "user_name", "greeting", "client_roots"):
        return content(text("All inputs received."))
    return asks(
        "several", user_name=form("What is your name?", name="string"), greeting=sample("Greet"), client_roots=ROOTS
    )


def by_capability(params: Mapping[str, Any]) -> Answer:
    declared = params.get("_meta", {}).get(f"{META}clientCapabilities", {})
    requests = {}
    if "sampling" in declared:
        requests["sample"] = sample("Say hello")
    if "elicitation" in declared:
        requests["ask"] = form("What is your name?", name="string")
    return asks("capability", **requests)


ASKING: dict[str, Callable[[Mapping[str, Any]], Answer]] = {
    "test_input_required_result_elicitation": once("user_name", form("What is your name?", name="string")),
    "test_input_required_result_sampling": once("capital_question", sample("What is the capital of France?")),
    "test_input_required_result_list_roots": once("client_roots", ROOTS),
    "test_input_required_result_request_state": with_state("nonce"),
    "test_input_required_result_multiple_inputs": several,
    "test_input_required_result_multi_round": multi_round,
    "test_input_required_result_tampered_state": with_state("round-1"),
    "test_input_required_result_capabilities": by_capability,
    "test_streaming_elicitation": once("user_name", form("What is your name?", name="string")),
}

# Tools that answer ---------------------------------------------------------------------------------

PLAIN: dict[str, Answer] = {
    "test_simple_text": content(text("This is a simple text response for testing.")),
    "test_image_content": content(picture()),
    "test_audio_content": content({"type": "audio", "data": SILENT, "mimeType": "audio/wav"}),
    "test_embedded_resource": content(embedded("test://embedded-resource", "This is an embedded resource content.")),
    "test_multiple_content_types": content(
        text("Multiple content types test:"),
        picture(),
        embedded("test://mixed-content-resource", '{"test": "data", "value": 123}', "application/json"),
    ),
    "test_error_handling": {
        "content": [text("This tool intentionally returns an error for testing")],
        "isError": True,
    },
    "json_schema_2020_12_tool": content(text("json_schema_2020_12_tool")),
}
SCHEMAS: dict[str, Answer] = {
    "test_x_mcp_header": {"type": "object", "properties": {"region": {"type": "string", "x-mcp-header": "Region"}}},
    "test_sampling": {"type": "object", "properties": {"prompt": {"type": "string"}}, "required": ["prompt"]},
    "test_elicitation": {"type": "object", "properties": {"message": {"type": "string"}}, "required": ["message"]},
    "json_schema_2020_12_tool": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "$defs": {
            "address": {
                "$anchor": "addressDef",
                "type": "object",
                "properties": {"street": {"type": "string"}, "city": {"type": "string"}},
            }
        },
        "properties": {
            "name": {"type": "string"},
            "address": {"$ref": "#/$defs/address"},
            "contactMethod": {"type": "string", "enum": ["phone", "email"]},
            "phone": {"type": "string"},
            "email": {"type": "string"},
        },
        "allOf": [{"anyOf": [{"required": ["phone"]}, {"required": ["email"]}]}],
        "if": {"properties": {"contactMethod": {"const": "phone"}}, "required": ["contactMethod"]},
        "then": {"required": ["phone"]},
        "else": {"required": ["email"]},
        "additionalProperties": False,
    },
}
OTHERS = (
    "test_tool_with_logging", "test_tool_with_progress", "test_missing_capability", "test_x_mcp_header",
    "test_sampling", "test_elicitation", "test_elicitation_sep1034_defaults", "test_elicitation_sep1330_enums",
    "test_reconnection", "test_trigger_tool_change", "test_trigger_prompt_change",
    "test_logging_tool",
)  # fmt: skip
TOOLS = [
    {"name": name, "description": f"{name} of the suite", "inputSchema": SCHEMAS.get(name, {"type": "object"})}
    for name in (*PLAIN, *ASKING, *OTHERS)
]

# Prompts and resources -----------------------------------------------------------------------------


def said(*blocks: Answer) -> Answer:
    return {"messages": [{"role": "user", "content": block} for block in blocks]}


def prompt(name: str, params: Mapping[str, Any]) -> Answer:
    given = params.get("arguments") or {}
    match name:
        case "test_simple_prompt":
            return said(text("This is a simple prompt for testing."))
        case "test_prompt_with_arguments":
            return said(text(f"Prompt with arguments: arg1='{given.get('arg1')}', arg2='{given.get('arg2')}'"))
        case "test_prompt_with_embedded_resource":
            uri = str(given.get("resourceUri"))
            block = embedded(uri, "Embedded resource content for testing.")
            return said(block, text("Please process the embedded resource above."))
        case "test_prompt_with_image":
            return said(picture(), text("Please analyze the image above."))
        case "test_input_required_result_prompt":
            if responded(params, "user_context"):
                return said(text(f"Use the following context: {answered(params, 'user_context').get('context')}"))
            return asks(user_context=form("What context should the prompt use?", context="string"))
    raise MCPError(-32602, f"Unknown prompt: {name}")


def arguments(*names: str) -> list[Answer]:
    return [{"name": name, "required": True} for name in names]


PROMPTS: list[Answer] = [
    {"name": "test_simple_prompt", "description": "A simple prompt"},
    {"name": "test_prompt_with_arguments", "description": "With arguments", "arguments": arguments("arg1", "arg2")},
    {"name": "test_prompt_with_embedded_resource", "description": "Embeds", "arguments": arguments("resourceUri")},
    {"name": "test_prompt_with_image", "description": "With an image"},
    {"name": "test_input_required_result_prompt", "description": "Asks first"},
]
RESOURCES: list[Answer] = [
    {"uri": "test://static-text", "name": "static_text", "description": "Static text", "mimeType": "text/plain"},
    {"uri": "test://static-binary", "name": "static_binary", "description": "An image", "mimeType": "image/png"},
    {"uri": "test://watched-resource", "name": "watched", "description": "Changes", "mimeType": "text/plain"},
]
TEMPLATES: list[Answer] = [
    {"uriTemplate": "test://template/{id}/data", "name": "template", "description": "By id", "mimeType": "text/plain"}
]


def resource(uri: str) -> Answer:
    if uri == "test://static-binary":
        return {"contents": [{"uri": uri, "mimeType": "image/png", "blob": PIXEL}]}
    words = {
        "test://static-text": "This is the content of the static text resource.",
        "test://watched-resource": "Watched resource content",
    }.get(uri)
    if words is None and uri.startswith("test://template/") and uri.endswith("/data"):
        ident = uri.removeprefix("test://template/").removesuffix("/data")
        words = json.dumps({"id": ident, "templateTest": True, "data": f"Data for ID: {ident}"})
    if words is None:
        raise MCPError(-32602, "Resource not found", {"uri": uri})
    return {"contents": [{"uri": uri, "mimeType": "text/plain", "text": words}]}


# The server ----------------------------------------------------------------------------------------


class Everything:
    """All of it, in one middleware."""

    def __init__(self) -> None:
        self.listeners: set[asyncio.Queue[tuple[str, Answer]]] = set()
        self.server: Server[Any] = Server("everything", version="1", get_tool_input_schema=SCHEMAS.get)
        self.server.middleware[:] = [self.answer]

    async def answer(self, ctx: Context, call_next: CallNext) -> HandlerResult:
        if ctx.request_id is None or ctx.method == "ping":
            return await call_next(ctx)
        modern = ctx.protocol_version == MODERN
        if ctx.method == "initialize":
            return {**dict(await call_next(ctx) or {}), "capabilities": capabilities(modern)}
        made = await self.result(ctx, dict(ctx.params or {}), modern)
        if not modern:
            return made
        envelope: Answer = {"resultType": "complete"}
        if ctx.method.endswith(("/list", "/read", "/discover")):
            envelope |= {"ttlMs": 1000, "cacheScope": "public"}
        stamp = {f"{META}serverInfo": {"name": "everything", "version": "1"}}
        return {**envelope, **made, "_meta": {**stamp, **made.get("_meta", {})}}

    async def result(self, ctx: Context, params: Answer, modern: bool) -> Answer:
        match ctx.method:
            case "server/discover":
                return {"supportedVersions": [MODERN], "capabilities": capabilities(modern)}
            case "tools/list":
                return {"tools": TOOLS}
            case "prompts/list":
                return {"prompts": PROMPTS}
            case "resources/list":
                return {"resources": RESOURCES}
            case "resources/templates/list":
                return {"resourceTemplates": TEMPLATES}
            case "tools/call":
                return await self.call(ctx, str(params.get("name")), params)
            case "prompts/get":
                return prompt(str(params.get("name")), params)
            case "resources/read":
                return resource(str(params.get("uri")))
            case "completion/complete":
                return {"completion": {"values": [], "total": 0, "hasMore": False}}
            case "subscriptions/listen" if modern:
                return await self.listen(ctx, params)
            case "logging/setLevel" | "resources/subscribe" | "resources/unsubscribe" if not modern:
                return {}
        raise MCPError(-32601, "Method not found", ctx.method)

    async def call(self, ctx: Context, name: str, params: Answer) -> Answer:
        if name in PLAIN:
            return PLAIN[name]
        if name in ASKING:
            return ASKING[name](params)
        match name:
            case "test_x_mcp_header":
                return content(text(f"region={(params.get('arguments') or {}).get('region', '<none>')}"))
            case "test_tool_with_progress":
                return await progress(ctx, params)
            case "test_tool_with_logging" | "test_reconnection" | "test_logging_tool":
                return await logging_three_times(ctx, params)
            case "test_missing_capability":
                if "sampling" not in params.get("_meta", {}).get(f"{META}clientCapabilities", {}):
                    needed: Answer = {"requiredCapabilities": {"sampling": {}}}
                    raise MCPError(-32021, "This tool requires the client 'sampling' capability", needed)
                return content(text("the client can sample"))
            case "test_trigger_tool_change" | "test_trigger_prompt_change":
                self.tell(f"notifications/{'tools' if 'tool' in name else 'prompts'}/list_changed")
                return content(text("the list changed"))
            case "test_sampling" | "test_elicitation":
                return await asked_the_old_way(ctx, name, params.get("arguments") or {})
        raise MCPError(-32602, f"Unknown tool: {name}")

    def tell(self, method: str) -> None:
        for queue in self.listeners:
            queue.put_nowait((method, {}))

    async def listen(self, ctx: Context, params: Answer) -> Answer:
        asked = params.get("notifications") or {}
        agreed = {name: True for name in CHANGES if asked.get(name)}
        wanted = {f"notifications/{CHANGES[name]}/list_changed" for name in agreed}
        meta = {f"{META}subscriptionId": ctx.request_id}
        queue: asyncio.Queue[tuple[str, Answer]] = asyncio.Queue()
        self.listeners.add(queue)
        try:
            await notify(ctx, "notifications/subscriptions/acknowledged", {"notifications": agreed, "_meta": meta})
            while True:
                method, told = await queue.get()
                if method in wanted:
                    await notify(ctx, method, {**told, "_meta": meta})
        finally:
            self.listeners.discard(queue)


def capabilities(modern: bool) -> Answer:
    made: Answer = {
        "tools": {"listChanged": True},
        "prompts": {"listChanged": True},
        "resources": {"listChanged": True, "subscribe": True},
        "completions": {},
    }
    return made if modern else {**made, "logging": {}}


async def progress(ctx: Context, params: Answer) -> Answer:
    token = params.get("_meta", {}).get("progressToken", 0)
    for done in (0, 50, 100):
        told = {"progressToken": token, "progress": done, "total": 100, "message": f"Completed step {done} of 100"}
        await notify(ctx, "notifications/progress", told)
    return content(text(str(token)))


async def logging_three_times(ctx: Context, params: Answer) -> Answer:
    if ctx.protocol_version != MODERN or f"{META}logLevel" in params.get("_meta", {}):
        for words in ("Tool execution started", "Tool processing data", "Tool execution completed"):
            await notify(ctx, "notifications/message", {"level": "info", "data": words})
    return content(text("Tool with logging executed successfully"))


async def asked_the_old_way(ctx: Context, name: str, given: Answer) -> Answer:
    request = (
        sample(str(given.get("prompt"))) if name == "test_sampling" else form(str(given.get("message")), a="string")
    )
    outbound: Any = ctx.session._request_outbound
    try:
        told = await outbound.send_raw_request(request["method"], request["params"])
    except MCPError as error:
        return {"content": [text(f"not supported: {error}")], "isError": True}
    return content(text(json.dumps(told)))


async def notify(ctx: Context, method: str, params: Answer) -> None:
    outbound: Any = ctx.session._request_outbound
    await outbound.notify(method, params)


async def over_stdio() -> None:
    server = Everything().server
    async with stdio_server() as (read, write):
        await server.run(read, write, server.create_initialization_options())


async def over_http(port: int) -> None:
    app = Everything().server.streamable_http_app()
    sock = socket.create_server(("127.0.0.1", port))
    config = uvicorn.Config(app, log_level="critical", access_log=False, timeout_graceful_shutdown=1)
    sys.stderr.write(f"ready: http://127.0.0.1:{sock.getsockname()[1]}/mcp\n")
    sys.stderr.flush()
    await uvicorn.Server(config).serve(sockets=[sock])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=-1)
    chosen = parser.parse_args().port
    asyncio.run(over_stdio() if chosen < 0 else over_http(chosen))
