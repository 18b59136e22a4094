"""All servers as one: names carry their server, lists are merged, and a server that fails does not take the others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final, Protocol

from weft.sidecar.backend import Request
from weft.sidecar.events import Events
from weft.sidecar.link import Heard
from weft.sidecar.pins import oneline
from weft.sidecar.session import as_modern
from weft_protocols.errors import ToolError
from weft_protocols.mcp import (
    EVERY,
    INVALID_PARAMS,
    META_SUBSCRIPTION,
    METHOD_NOT_FOUND,
    VERSION,
    joined,
    joined_uri,
    split,
    split_uri,
)

log = logging.getLogger("weft.sidecar")

LIST_WITHIN: Final = 15.0
"""Seconds for one server's part of a list; one that takes longer is left out of it."""
NAME: Final = {"name": "weft", "title": "Tools of this mesh", "version": "1"}
MERGED: Final = {
    "tools/list": "tools",
    "prompts/list": "prompts",
    "resources/list": "resources",
    "resources/templates/list": "resourceTemplates",
}


class Servers(Protocol):
    """What is aggregated."""

    events: Events

    def shown(self, request: Request) -> Mapping[str, Any]:
        """Those that whoever asks may see, by name."""
        ...

    async def one(self, request: Request, heard: Heard) -> dict[str, Any]:
        """A request to one of them."""
        ...


class Aggregate:
    """The view of a plane in which it is one server."""

    def __init__(self, plane: Servers) -> None:
        self._plane = plane

    async def handle(self, request: Request, heard: Heard) -> dict[str, Any]:
        """A request whose names carry their server."""
        method, params = request.method, request.params
        if method == "ping":
            return {}
        if method == "server/discover":
            return self._discover()
        if method in MERGED:
            return await self._merged(request, MERGED[method])
        if method in ("tools/call", "prompts/get"):
            server, name = split(str(params.get("name", "")))
            result = await self._one(request, server, {**params, "name": name}, heard)
            return with_server(server, result)
        if method == "resources/read":
            server, uri = split_uri(str(params.get("uri", "")))
            return with_server(server, await self._one(request, server, {**params, "uri": uri}, heard))
        if method == "completion/complete":
            server, params = _completed(params)
            return await self._one(request, server, params, heard)
        if method == "subscriptions/listen":
            await self._plane.events.listen(
                (EVERY,),
                params.get("notifications"),
                ident=request.id,
                heard=heard,
                may=lambda server: server in self._plane.shown(request),
            )
            return {"resultType": "complete", "_meta": {META_SUBSCRIPTION: request.id}}
        raise ToolError(f"{method} is not served here", code=METHOD_NOT_FOUND)

    async def _one(self, request: Request, server: str, params: Mapping[str, Any], heard: Heard) -> dict[str, Any]:
        return await self._plane.one(replace(request, server=server, params=params), heard)

    def _discover(self) -> dict[str, Any]:
        changes = {"listChanged": True}
        made = {
            "supportedVersions": [VERSION],
            "capabilities": {
                "tools": changes,
                "prompts": changes,
                "resources": changes,
                "completions": {},
            },
            "instructions": "Names of tools and prompts are server__name, URIs of resources server+uri.",
            "_meta": {"io.modelcontextprotocol/serverInfo": NAME},
        }
        return as_modern("server/discover", made)

    async def _merged(self, request: Request, part: str) -> dict[str, Any]:
        """The lists of all servers as one, in the order of their names."""
        if request.params.get("cursor") is not None:
            raise ToolError("this list has one page only", code=INVALID_PARAMS)
        names = list(self._plane.shown(request))
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(self._part(request, name, part)) for name in names]
        merged = [item for task in asked for item in task.result()]
        made: dict[str, Any] = {part: merged}
        return as_modern(request.method, made) if request.modern else made

    async def _part(self, request: Request, server: str, part: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        params: Mapping[str, Any] = request.params
        rename = _renamed(part, server)
        try:
            async with asyncio.timeout(LIST_WITHIN):
                for _ in range(100):
                    told = await self._one(request, server, params, lambda *_: None)
                    found += [rename(item) for item in told.get(part, ()) if isinstance(item, dict)]
                    if not isinstance(told.get("nextCursor"), str):
                        break
                    params = {**params, "cursor": told["nextCursor"]}
        except (ToolError, TimeoutError) as error:
            if not (isinstance(error, ToolError) and error.code == METHOD_NOT_FOUND):
                why = oneline(str(error)) or "it takes too long"
                log.warning("%s is left out of %s: %s", server, request.method, why)
        return found


def _renamed(part: str, server: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    if part == "resources":
        return lambda item: {**item, "uri": joined_uri(server, str(item.get("uri", "")))}
    if part == "resourceTemplates":
        return lambda item: {**item, "uriTemplate": joined_uri(server, str(item.get("uriTemplate", "")))}
    return lambda item: {**item, "name": joined(server, str(item.get("name", "")))}


def _completed(params: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Server and own params of a completion."""
    ref = params.get("ref")
    if not isinstance(ref, dict):
        raise ToolError("a completion has a ref", code=INVALID_PARAMS)
    if "uri" in ref:
        server, uri = split_uri(str(ref["uri"]))
        return server, {**params, "ref": {**ref, "uri": uri}}
    server, name = split(str(ref.get("name", "")))
    return server, {**params, "ref": {**ref, "name": name}}


def with_server(server: str, result: dict[str, Any]) -> dict[str, Any]:
    """A result whose references to the server's resources can be read through the aggregate."""
    made = dict(result)
    if isinstance(made.get("content"), list):
        made["content"] = [_content(server, one) for one in made["content"]]
    if isinstance(made.get("contents"), list):
        made["contents"] = [_uri(server, one) for one in made["contents"]]
    if isinstance(made.get("messages"), list):
        made["messages"] = [
            {**one, "content": _content(server, one["content"])} if isinstance(one, dict) and "content" in one else one
            for one in made["messages"]
        ]
    return made


def _content(server: str, block: Any) -> Any:
    if isinstance(block, dict) and block.get("type") == "resource_link":
        return _uri(server, block)
    if isinstance(block, dict) and block.get("type") == "resource" and isinstance(block.get("resource"), dict):
        return {**block, "resource": _uri(server, block["resource"])}
    return block


def _uri(server: str, item: Any) -> Any:
    if isinstance(item, dict) and isinstance(item.get("uri"), str):
        return {**item, "uri": joined_uri(server, item["uri"])}
    return item
