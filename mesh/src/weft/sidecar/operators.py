"""What operators ask a sidecar: how servers are, what they offer and how that differs from what was approved."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from weft.sidecar.backend import Request
from weft.sidecar.pins import Pin, difference, hidden, set_digest
from weft.sidecar.plane import Plane
from weft.sidecar.served import Served
from weft_protocols.errors import Conflict, ToolError
from weft_protocols.mcp import DENIED, INVALID_PARAMS
from weft_protocols.subjects import OPERATOR

TRIES: Final = 8


class Operators:
    """Methods `weft/…` for identity `operator`, which only account MESH can hold."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane

    @property
    def methods(self) -> dict[str, Callable[[Request], Awaitable[dict[str, Any]]]]:
        """By name."""
        return {
            "weft/servers": self.servers,
            "weft/inspect": self.inspect,
            "weft/approve": self.approve,
            "weft/quarantine": self.quarantine,
        }

    async def servers(self, request: Request) -> dict[str, Any]:
        """`{}` to `{servers: [state]}`."""
        _check(request)
        return {"servers": self._plane.state}

    async def inspect(self, request: Request) -> dict[str, Any]:
        """`{server}` to everything it offers, each with why it is in quarantine and how it changed."""
        _check(request)
        served = self._served(request.params)
        await served.refresh()
        catalog, identity = served.catalog, served.catalog.identity
        approved: Mapping[str, Any] = served.pin.items if served.pin is not None else {}
        items = [
            {
                "key": key,
                "definition": one,
                "quarantine": catalog.why(key),
                "hidden": hidden(one),
                "difference": difference(approved.get(_origin(served, key)), one) if catalog.why(key) else [],
            }
            for key, one in catalog.listing.items.items()
        ]
        return {
            "server": served.name,
            "version": identity.version if identity is not None else "",
            "info": dict(identity.info) if identity is not None else {},
            "items": items,
            "gone": list(catalog.verdict.gone),
            "digest": set_digest(catalog.listing.items),
            "approved_by": served.pin.by if served.pin is not None else "",
            "approved_at": served.pin.at if served.pin is not None else 0.0,
            "sandbox": served.state["sandbox"],
            "degraded": served.state["degraded"],
            "unredacted": await self._plane.unredacted(served),
        }

    async def approve(self, request: Request) -> dict[str, Any]:
        """`{server, digest, keys?}`: approve what was shown, all of it or some; refused if it is not that any more."""
        _check(request)
        served = self._served(request.params)
        await served.refresh()
        items = served.catalog.listing.items
        if request.params.get("digest") != set_digest(items):
            raise ToolError(f"{served.name} does not offer what was shown any more; look again", code=INVALID_PARAMS)
        keys = _keys(request.params, items) or list(items)

        def decide(pin: Pin) -> Pin:
            kept = {key: one for key, one in pin.items.items() if key in items}
            taken = {**kept, **{key: items[key] for key in keys}}
            blocked = tuple(key for key in pin.blocked if key not in keys)
            return Pin(taken, request.caller, time.time(), blocked)

        await self._change(served, decide)
        return {"server": served.name, "approved": keys}

    async def quarantine(self, request: Request) -> dict[str, Any]:
        """`{server, keys?}`: let nobody use these, or anything of the server, until they are approved again."""
        _check(request)
        served = self._served(request.params)
        await served.known()
        items = served.catalog.listing.items
        keys = _keys(request.params, items) or list(items)
        await self._change(served, lambda pin: replace(pin, blocked=tuple(sorted({*pin.blocked, *keys}))))
        return {"server": served.name, "quarantined": keys}

    def _served(self, params: Mapping[str, Any]) -> Served:
        return self._plane.served(str(params.get("server", "")))

    async def _change(self, served: Served, decide: Callable[[Pin], Pin]) -> None:
        """Store what is made of the pin, and hold to it at once; other sidecars follow when they hear of it."""
        pins = self._plane.store.pins
        for _ in range(TRIES):
            record = await pins.get(served.name)
            pin = Pin.decode(record.data) if record is not None else served.pin or Pin()
            after = record.seq if record is not None else await pins.last_sequence(served.name)
            wanted = decide(pin)
            try:
                sequence = await pins.put(served.name, wanted.encode(), after=after)
            except Conflict:
                continue
            served.repin(wanted, sequence)
            return
        raise ToolError("others change what is approved; try again")


def _check(request: Request) -> None:
    if request.caller != OPERATOR:
        raise ToolError("this is for the operator", code=DENIED)


def _keys(params: Mapping[str, Any], items: Mapping[str, Any]) -> list[str]:
    """Keys that are named, by key or by name alone. Raises ToolError for one that is not offered."""
    asked: Any = params.get("keys") or ()
    found: list[str] = []
    for one in asked if isinstance(asked, Sequence) and not isinstance(asked, str) else (asked,):
        matching = [key for key in items if one in (key, key.partition(":")[2])]
        if not matching:
            raise ToolError(f"{one!r} is not offered; there are: {', '.join(items)}", code=INVALID_PARAMS)
        found += matching
    return found


def _origin(served: Served, key: str) -> str:
    """The key under which a renamed thing was approved; else its own."""
    return next((was for was, now in served.catalog.verdict.renamed if now == key), key)
