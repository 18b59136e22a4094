"""What servers say by themselves, to everybody who listens: for subscriptions that no one server can serve."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from weft.sidecar.link import Heard
from weft.sidecar.served import CHANGES
from weft_protocols.mcp import EVERY, META_SUBSCRIPTION

log = logging.getLogger("weft.sidecar")

QUIET: Final = 0.2
"""Seconds in which the same is not told twice."""
BURST: Final = 500
RATE: Final = 100.0
"""Notifications of one request that are handed on at once, and a second from then on."""
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
        self._told: dict[tuple[str, str, str], float] = {}
        self._held: dict[tuple[str, str, str], asyncio.TimerHandle] = {}

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
        """A server (`_`: the mesh itself, about all of them) said something.

        What is said again and again within `QUIET` seconds is told at the end of that time, once.
        """
        if not any(_concerns(one, server, method, params) for one in self._listeners):
            return
        key, loop = (server, method, str(params.get("uri", ""))), asyncio.get_running_loop()
        if key in self._held:
            return
        left = self._told.get(key, -QUIET) + QUIET - loop.time()
        if left > 0:
            self._held[key] = loop.call_later(left, self._tell, key, params)
        else:
            self._tell(key, params)

    def _tell(self, key: tuple[str, str, str], params: dict[str, Any]) -> None:
        self._held.pop(key, None)
        now = asyncio.get_running_loop().time()
        self._told = {one: at for one, at in self._told.items() if at + QUIET > now} | {key: now}
        server, method, _ = key
        for listener in tuple(self._listeners):
            if _concerns(listener, server, method, params):
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
        for handle in self._held.values():
            handle.cancel()
        for listener in tuple(self._listeners):
            listener.over.set()


def _concerns(listener: _Listener, server: str, method: str, params: dict[str, Any]) -> bool:
    told = method in listener.wanted or (method == UPDATED and params.get("uri") in listener.resources)
    concerned = server in listener.servers or EVERY in (server, *listener.servers)
    return told and concerned and (server == EVERY or listener.may(server))


class Paced:
    """Hands on what is heard during one request, as long as it is not too much: the rest is left out."""

    def __init__(self, heard: Heard, server: str) -> None:
        self._heard = heard
        self._server = server
        self._room = float(BURST)
        self._last = time.monotonic()
        self.left_out = 0

    def __call__(self, method: str, params: dict[str, Any]) -> None:
        """A `Heard`."""
        now = time.monotonic()
        self._room = min(BURST, self._room + (now - self._last) * RATE)
        self._last = now
        if self._room < 1 and method != ACKNOWLEDGED:
            self.left_out += 1
            if self.left_out == 1:
                log.warning("%s says too much during one request; some of it is left out", self._server)
            return
        self._room -= 1
        self._heard(method, params)
