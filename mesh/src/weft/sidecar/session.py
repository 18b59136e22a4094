"""A link whose server has said who it is: the era it speaks, and how a request of either era becomes one of that.

Nothing of the caller's is replaced by something of ours: its capabilities go up as they are to a server of its own
era, and to one of the other era go none, since what a server would ask then cannot reach it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from weft.sidecar.http import HttpLink
from weft.sidecar.link import Heard, Link, LinkEnded
from weft_protocols.errors import ToolError
from weft_protocols.mcp import (
    META_CAPABILITIES,
    META_CLIENT,
    META_RESERVED,
    META_VERSION,
    METHOD_HEADER,
    METHOD_NOT_FOUND,
    NAME_HEADER,
    NAMED,
    UNSUPPORTED_VERSION,
    UPSTREAM_FAILED,
    VERSION,
    VERSION_HEADER,
    encode_value,
    name_of,
)

log = logging.getLogger("weft.sidecar")

HANDSHAKES: Final = ("2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05")
"""Revisions of the earlier era, the latest first."""
PROBE: Final = 5.0
"""Seconds a server has to answer a question of the later era, before it is asked as one of the earlier."""
CLIENT: Final = {"name": "weft-sidecar", "version": "1"}
CACHEABLE: Final = (
    "server/discover", "tools/list", "prompts/list", "resources/list", "resources/templates/list", "resources/read",
)  # fmt: skip
"""Methods whose results of the later era say how long they hold, and for whom."""
OWN_META: Final = {META_VERSION: VERSION, META_CLIENT: CLIENT, META_CAPABILITIES: {}}
"""What the sidecar's own requests say about their sender."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a server says about itself."""

    modern: bool
    version: str
    capabilities: Mapping[str, Any]
    info: Mapping[str, Any]
    instructions: str


class Session:
    """One link with a known era. `open_session` makes one."""

    def __init__(self, link: Link, identity: Identity) -> None:
        self.link = link
        self.identity = identity
        self.busy = 0
        """How many have borrowed it."""

    async def call(
        self,
        method: str,
        params: Mapping[str, Any],
        *,
        modern: bool = True,
        heard: Heard | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Forward a request of one era and return the server's result as one of that era.

        `headers` are what HTTP servers get besides the usual ones. Raises LinkEnded and ToolError.
        """
        if self.identity.modern:
            return await self._to_modern(method, params, modern=modern, heard=heard, headers=headers or {})
        return await self._to_legacy(method, params, modern=modern, heard=heard)

    async def alive(self) -> bool:
        """Whether the server answers at all."""
        method = "server/discover" if self.identity.modern else "ping"
        try:
            async with asyncio.timeout(PROBE):
                await self.call(method, {"_meta": dict(OWN_META)}, modern=self.identity.modern)
        except LinkEnded:
            return False
        except ToolError:
            return True
        except TimeoutError:
            return False
        return True

    async def _to_modern(
        self, method: str, params: Mapping[str, Any], *, modern: bool, heard: Heard | None, headers: Mapping[str, str]
    ) -> dict[str, Any]:
        if not modern:
            if method == "ping":
                return {}
            meta = params.get("_meta")
            params = {**params, "_meta": {**(meta if isinstance(meta, dict) else {}), **OWN_META}}
        lines = {VERSION_HEADER: VERSION, METHOD_HEADER: method}
        if method in NAMED:
            lines[NAME_HEADER] = encode_value(name_of(method, params))
        return await self.link.request(method, params, heard=heard, headers={**lines, **headers})

    async def _to_legacy(
        self, method: str, params: Mapping[str, Any], *, modern: bool, heard: Heard | None
    ) -> dict[str, Any]:
        if modern:
            if method in ("subscriptions/listen", "server/discover"):
                raise ToolError(f"this server speaks MCP {self.identity.version}, without {method}", code=-32601)
            params = _without_reserved(params)
        result = await self.link.request(method, params, heard=heard, headers={})
        return as_modern(method, result) if modern else result


def as_modern(method: str, result: dict[str, Any]) -> dict[str, Any]:
    """A result of the earlier era with what the later one requires in it."""
    made = {"resultType": "complete", **result}
    if method in CACHEABLE:
        made = {"ttlMs": 0, "cacheScope": "private", **made}
    return made


def _without_reserved(params: Mapping[str, Any]) -> dict[str, Any]:
    """Params without what only the later era knows."""
    made = {key: value for key, value in params.items() if key not in ("_meta", "inputResponses", "requestState")}
    meta = params.get("_meta")
    kept = {key: value for key, value in meta.items() if not key.startswith(META_RESERVED)} if meta else {}
    return {**made, "_meta": kept} if kept else made


async def open_session(link: Link, era: str) -> Session:
    """Find out who is at the other end and which era it speaks.

    Raises:
        LinkEnded: it went away meanwhile; some servers of the earlier era do when they are asked as of the later.
        ToolError: it speaks no revision known here.
        TimeoutError: as `asyncio.timeout` around this decides.
    """
    if era != "legacy":
        found = await _discover(link, patient=era == "modern")
        if found is not None:
            return Session(link, found)
        if era == "modern":
            raise ToolError(f"the server does not speak MCP {VERSION}", code=UPSTREAM_FAILED)
    try:
        return Session(link, await _initialize(link))
    except ToolError as error:
        # One that started slowly took the question of the later era after all, and that settled its era.
        found = await _discover(link, patient=True) if era == "auto" and error.code == UNSUPPORTED_VERSION else None
        if found is None:
            raise
        return Session(link, found)


async def _discover(link: Link, *, patient: bool) -> Identity | None:
    lines = {VERSION_HEADER: VERSION, METHOD_HEADER: "server/discover"}
    try:
        async with asyncio.timeout(None if patient else PROBE):
            told = await link.request("server/discover", {"_meta": dict(OWN_META)}, headers=lines)
    except TimeoutError:
        return None
    except LinkEnded:
        raise
    except ToolError as error:
        log.debug("a server does not know server/discover: %s", error)
        return None
    versions = told.get("supportedVersions")
    if not isinstance(versions, list) or VERSION not in versions:
        return None
    meta = told.get("_meta")
    info = meta.get("io.modelcontextprotocol/serverInfo", {}) if isinstance(meta, dict) else {}
    return Identity(True, VERSION, _mapping(told.get("capabilities")), _mapping(info), _text(told.get("instructions")))


async def _initialize(link: Link) -> Identity:
    asked = {"protocolVersion": HANDSHAKES[0], "capabilities": {}, "clientInfo": CLIENT}
    told = await link.request("initialize", asked, headers={})
    version = told.get("protocolVersion")
    if version not in HANDSHAKES:
        raise ToolError(
            f"the server speaks MCP {str(version)[:40]!r}, which is not known here", code=UNSUPPORTED_VERSION
        )
    if isinstance(link, HttpLink):
        link.speak(str(version))
    await link.notify("notifications/initialized", {})
    await link.handshaken()
    return Identity(
        False,
        str(version),
        _mapping(told.get("capabilities")),
        _mapping(told.get("serverInfo")),
        _text(told.get("instructions")),
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


__all__ = ["CACHEABLE", "METHOD_NOT_FOUND", "OWN_META", "Identity", "Session", "as_modern", "open_session"]
