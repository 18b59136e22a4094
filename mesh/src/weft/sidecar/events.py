"""What servers say by themselves, to everybody who listens: for subscriptions that no one server can serve."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from weft.sidecar.link import Heard
from weft.sidecar.served import CHANGES
from weft_protocols.mcp import EVERY, META_SUBSCRIPTION

ACKNOWLEDGED: Final = "notifications/subscriptions/acknowledged"
UPDATED: Final = "notifications/resources/updated"


May = Callable[[str], bool]
"""Whether a listener may hear of a server."""


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
    may: May
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
        may: May = lambda _: True,
    ) -> None:
        """Acknowledge a subscription (`notifications` of its params) and tell of what happens, until cancelled.

        `resources` are those of which updates are known to come; of servers that it `may` not hear of, nothing is told.
        """
        asked = wanted if isinstance(wanted, dict) else {}
        agreed: dict[str, Any] = {name: True for name in CHANGES.values() if asked.get(name) is True}
        methods = frozenset(method for method, name in CHANGES.items() if name in agreed)
        if resources:
            agreed["resourceSubscriptions"] = sorted(resources)
        listener = _Listener(servers, methods, frozenset(resources), ident, heard, may)
        self._listeners.add(listener)
        try:
            told = {"notifications": agreed, "_meta": {META_SUBSCRIPTION: ident}}
            heard(ACKNOWLEDGED, told)
            await listener.over.wait()
        finally:
            self._listeners.discard(listener)

    def said(self, server: str, method: str, params: dict[str, Any]) -> None:
        """A server (`_`: the mesh itself, about all of them) said something."""
        for listener in tuple(self._listeners):
            concerned = server in listener.servers or EVERY in (server, *listener.servers)
            told = method in listener.wanted or (method == UPDATED and params.get("uri") in listener.resources)
            if told and concerned and (server == EVERY or listener.may(server)):
                meta = params.get("_meta")
                kept = meta if isinstance(meta, dict) else {}
                listener.heard(method, {**params, "_meta": {**kept, META_SUBSCRIPTION: listener.ident}})

    @contextmanager
    def also(self, wanted: Any, *, ident: str | int, heard: Heard) -> Iterator[None]:
        """Inside, a subscription that a server serves itself hears as well what the mesh says of all servers."""
        asked = wanted if isinstance(wanted, dict) else {}
        methods = frozenset(method for method, name in CHANGES.items() if asked.get(name) is True)
        listener = _Listener((), methods, frozenset(), ident, heard, lambda _: True)
        self._listeners.add(listener)
        try:
            yield
        finally:
            self._listeners.discard(listener)

    async def aclose(self) -> None:
        """End every subscription in order."""
        for listener in tuple(self._listeners):
            listener.over.set()
