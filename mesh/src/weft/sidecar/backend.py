"""What a front hands over, and whoever answers it: the plane in this process, or one at the other end of the broker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from weft.sidecar.link import Heard


@dataclass(frozen=True, slots=True)
class Request:
    """A request as a front hands it over: who asks, and what, unchanged."""

    caller: str
    server: str
    """`_` for all servers together."""
    method: str
    params: Mapping[str, Any]
    modern: bool = True
    front: str = "nats"
    id: str | int = 0
    """The JSON-RPC id, which a subscription is known by."""
    token: str = ""
    """The caller's own token of this request."""
    task: str = ""
    chain: tuple[str, ...] = ()
    agent_version: str = ""
    skill: str = ""
    """The skill at work, as the agent says; empty if it is not known."""
    sender: str = ""
    """Who sent the task, as the agent says; empty if it is not known."""
    deadline: float | None = None
    """Unix seconds."""
    extra: Mapping[str, str] = field(default_factory=dict)
    """Further headers for servers at addresses."""


class Backend(Protocol):
    """Whoever answers the requests of a front."""

    async def handle(self, request: Request, heard: Heard) -> dict[str, Any]:
        """The result, as a server gave it. `heard` gets notifications meanwhile. Raises ToolError."""
        ...
