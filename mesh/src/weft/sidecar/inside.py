"""What a built-in server may ask of the plane it is part of: other tools, in the name of whoever called it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from weft.sidecar import owed
from weft.sidecar.backend import Request
from weft.sidecar.link import Heard
from weft.sidecar.pipeline import Call, Outcome
from weft.sidecar.session import OWN_META
from weft_protocols.mcp import META_FENCE, META_STEP


class Within(Protocol):
    """The tools, as they are for the caller of one call."""

    def servers(self) -> Sequence[str]:
        """Names of the servers that are enabled."""
        ...

    async def offered(self, server: str) -> Sequence[Mapping[str, Any]]:
        """Definitions of a server's tools that the caller may see. Raises ToolError if it cannot be reached."""
        ...

    async def call(self, server: str, tool: str, arguments: Mapping[str, Any], *, step: str) -> Outcome:
        """Call a tool, through everything that a call of the caller passes. `step` tells the call from others."""
        ...


@runtime_checkable
class Inside(Protocol):
    """A link whose server is in this process, and gets the call as the stages left it."""

    async def perform(self, call: Call, within: Within) -> dict[str, Any]:
        """The result of a tool call. Raises ToolError, `pipeline.Refused` for what the caller can act on."""
        ...


class Asked(Protocol):
    """A plane."""

    @property
    def servers(self) -> Mapping[str, Any]:
        """By name."""
        ...

    async def one(self, request: Request, heard: Heard) -> dict[str, Any]:
        """A request to one server."""
        ...

    async def outcome(self, request: Request, facts: Mapping[str, Any]) -> Outcome:
        """How a tool call ended."""
        ...


@dataclass(frozen=True, slots=True)
class InName:
    """`Within` on a plane, for one call."""

    plane: Asked
    outer: Call

    def servers(self) -> Sequence[str]:
        """See `Within`."""
        return [name for name in self.plane.servers if name != self.outer.server]

    async def offered(self, server: str) -> Sequence[Mapping[str, Any]]:
        """See `Within`."""
        told = await self.plane.one(self._request(server, "tools/list", {}), _unheard)
        found = told.get("tools")
        return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []

    async def call(self, server: str, tool: str, arguments: Mapping[str, Any], *, step: str) -> Outcome:
        """See `Within`."""
        params: dict[str, Any] = {"name": tool, "arguments": dict(arguments)}
        meta: dict[str, Any] = {META_STEP: step}
        if META_FENCE in self.outer.meta:
            meta[META_FENCE] = self.outer.meta[META_FENCE]
        request = self._request(server, "tools/call", params, meta)
        return await self.plane.outcome(request, {owed.WITHIN: self.outer.facts.get(owed.CALL, "")})

    def _request(
        self, server: str, method: str, params: Mapping[str, Any], meta: Mapping[str, Any] | None = None
    ) -> Request:
        outer = self.outer
        return Request(
            caller=outer.caller,
            server=server,
            method=method,
            params={**params, "_meta": {**OWN_META, **(meta or {})}},
            front=outer.front,
            token=outer.request,
            task=outer.task,
            chain=outer.chain,
            agent_version=outer.agent_version,
            skill=outer.skill,
            sender=outer.sender,
            deadline=outer.deadline,
        )


def _unheard(method: str, params: dict[str, Any]) -> None:
    """Nobody listens to what a tool says meanwhile."""
