"""What a client of the earlier era keeps in its session, and a server of the later one is told with each request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from weft.core.supervise import Tasks
from weft.sidecar.link import Heard
from weft.sidecar.served import CHANGES
from weft_protocols.errors import ToolError
from weft_protocols.mcp import META_SUBSCRIPTION

log = logging.getLogger("weft.sidecar")

LOG_LEVEL: Final = "io.modelcontextprotocol/logLevel"
SUBSCRIPTIONS: Final = 64
"""Resources one client may watch."""

Say = Callable[[str, Mapping[str, Any]], Coroutine[Any, Any, None]]
"""Sends a notification on the client's own stream."""
Listen = Callable[[Mapping[str, Any], Heard], Awaitable[Any]]
"""Holds a subscription with these `notifications` until it is cancelled."""


@dataclass(eq=False, slots=True)
class LegacyClient:
    """One session."""

    say: Say
    listen: Listen
    level: str = ""
    """What `logging/setLevel` said."""
    _tasks: Tasks = field(default_factory=lambda: Tasks("session of a client"))
    _watched: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    def begin(self) -> None:
        """The handshake is done: tell of changes from now on."""
        self._tasks.start(self._hold(dict.fromkeys(CHANGES.values(), True)))

    def answer(self, method: str, params: Mapping[str, Any]) -> dict[str, Any] | None:
        """The answer to what concerns the session alone; None for everything else. Raises ToolError."""
        if method == "logging/setLevel":
            self.level = str(params.get("level", ""))
            return {}
        uri = str(params.get("uri", ""))
        if method == "resources/subscribe":
            if len(self._watched) >= SUBSCRIPTIONS:
                raise ToolError(f"a session may watch {SUBSCRIPTIONS} resources")
            if uri not in self._watched:
                self._watched[uri] = self._tasks.start(self._hold({"resourceSubscriptions": [uri]}))
            return {}
        if method == "resources/unsubscribe":
            task = self._watched.pop(uri, None)
            if task is not None:
                task.cancel()
            return {}
        return None

    def params(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """A request's params with what the session says in them."""
        if not self.level:
            return dict(params)
        meta = params.get("_meta")
        return {**params, "_meta": {**(meta if isinstance(meta, dict) else {}), LOG_LEVEL: self.level}}

    async def aclose(self) -> None:
        """The session is over."""
        await self._tasks.aclose()

    async def _hold(self, wanted: Mapping[str, Any]) -> None:
        def heard(method: str, params: dict[str, Any]) -> None:
            if method != "notifications/subscriptions/acknowledged":
                self._tasks.start(self.say(method, _plain(params)))

        try:
            await self.listen(wanted, heard)
        except ToolError as error:
            log.debug("a client hears of no changes: %s", error)


def _plain(params: Mapping[str, Any]) -> dict[str, Any]:
    """Params without the id of the subscription, which the earlier era does not know."""
    meta = params.get("_meta")
    kept = {key: value for key, value in meta.items() if key != META_SUBSCRIPTION} if isinstance(meta, dict) else {}
    made = {key: value for key, value in params.items() if key != "_meta"}
    return {**made, "_meta": kept} if kept else made
