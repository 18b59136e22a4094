"""What servers say by themselves, to everybody who listens: for subscriptions that no one server can serve."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Final

from weft.sidecar.link import Heard
from weft.sidecar.served import CHANGES
from weft_protocols.mcp import EVERY, META_SUBSCRIPTION

UPDATED: Final = "notifications/resources/updated"


@dataclass(eq=False, slots=True)
class _Listener:
    servers: Collection[str]
    """Those it listens to; `_` for all."""
    wanted: frozenset[str]
    """Methods."""
    resources: frozenset[str]
    """URIs whose updates it wants."""
    ident: str | int
    heard: Heard
    over: asyncio.Event = field(default_factory=asyncio.Event)


class Events:
    """Listeners, and what they are told."""

    def __init__(self) -> None:
        self._listeners: set[_Listener] = set()

    async def listen(
        self,
        servers: Collection[str],
        wanted: Any,
        *,
        ident: str | int,
        heard: Heard,
        resources: Collection[str] = (),
    ) -> None:
        """Acknowledge a subscription (`notifications` of its params) and tell of what happens, until cancelled.

        `resources` are those of which updates are known to come.
        """
        asked = wanted if isinstance(wanted, dict) else {}
        agreed: dict[str, Any] = {name: True for name in CHANGES.values() if asked.get(name) is True}
        methods = frozenset(method for method, name in CHANGES.items() if name in agreed)
        if resources:
            agreed["resourceSubscriptions"] = sorted(resources)
        listener = _Listener(servers, methods, frozenset(resources), ident, heard)
        self._listeners.add(listener)
        try:
            told = {"notifications": agreed, "_meta": {META_SUBSCRIPTION: ident}}
            heard("notifications/subscriptions/acknowledged", told)
            await listener.over.wait()
        finally:
            self._listeners.discard(listener)

    def said(self, server: str, method: str, params: dict[str, Any]) -> None:
        """A server (`_`: the mesh itself, about all of them) said something."""
        for listener in tuple(self._listeners):
            concerned = server in listener.servers or EVERY in (server, *listener.servers)
            told = method in listener.wanted or (method == UPDATED and params.get("uri") in listener.resources)
            if told and concerned:
                meta = params.get("_meta")
                kept = meta if isinstance(meta, dict) else {}
                listener.heard(method, {**params, "_meta": {**kept, META_SUBSCRIPTION: listener.ident}})

    async def aclose(self) -> None:
        """End every subscription in order."""
        for listener in tuple(self._listeners):
            listener.over.set()
