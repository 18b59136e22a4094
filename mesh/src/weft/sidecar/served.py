"""A registered server as the plane serves it: its sessions, its definitions, and what of them is approved."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from weft.core.supervise import Tasks
from weft.core.toolsconf import ToolServer
from weft.sidecar.link import Heard, LinkEnded
from weft.sidecar.pins import Listing, Pin, Verdict, compare, digest, oneline, suspicious
from weft.sidecar.session import OWN_META, Identity, Session
from weft.sidecar.upstream import Connect, Upstream
from weft.sidecar.weight import measured
from weft_protocols.errors import ToolError
from weft_protocols.mcp import LATE, METHOD_NOT_FOUND, UPSTREAM_FAILED

log = logging.getLogger("weft.sidecar")

PAGES: Final = 100
"""Pages of a listing that are read; a server with more is cut off."""
DEFINITION: Final = 256 * 1024
"""Bytes of one definition."""
LISTING: Final = 2 * 1024 * 1024
"""Bytes of all of one kind."""
DEEPEST: Final = 64
"""Levels of lists and objects in a definition."""
REST: Final = 10.0
"""Times as long as it took to judge definitions, a server that says they changed is not asked again."""
SETTLES: Final = 0.2
"""Seconds in which what was just read is not read again, however often a server says that it changed."""
CHANGES: Final = {
    "notifications/tools/list_changed": "toolsListChanged",
    "notifications/prompts/list_changed": "promptsListChanged",
    "notifications/resources/list_changed": "resourcesListChanged",
}
"""What a server says when its definitions change, and how a subscription to it is called."""
LISTED: Final = (
    ("tools", "tools/list", "tools"),
    ("prompts", "prompts/list", "prompts"),
    ("resources", "resources/templates/list", "resourceTemplates"),
)
"""Capability, method and field of each listing."""

Remember = Callable[[str, Pin], Awaitable[tuple[Pin, int]]]
"""Stores the first pin of a server; the one that holds, and its sequence."""


@dataclass(frozen=True, slots=True)
class Catalog:
    """What a server said about itself, last."""

    listing: Listing = field(default_factory=Listing)
    verdict: Verdict = field(default_factory=Verdict)
    identity: Identity | None = None
    read: float = 0.0
    """Monotonic seconds of when."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Of every definition, by key."""

    def approved(self, kind: str) -> list[Mapping[str, Any]]:
        """The definitions of a kind (`tool`, `prompt`, `template`) that are not in quarantine."""
        return [one for key, one in self.listing.items.items() if key.startswith(f"{kind}:") and not self.why(key)]

    def why(self, key: str) -> str:
        """Why a key is in quarantine; empty if it is not."""
        return self.verdict.why(key)


class Served:
    """One server.

    Args:
        server: its registration.
        connect: opens links.
        pin: what was approved; None if nothing ever was.
        pin_sequence: of the message that says so.
        remember: stores a first pin, where the registration lets what is seen first be approved.
        on_event: gets the server's name, and what it says that belongs to no request.
        on_pinned: called when something else is approved.
    """

    def __init__(
        self,
        server: ToolServer,
        connect: Connect,
        *,
        pin: Pin | None,
        pin_sequence: int,
        remember: Remember,
        on_event: Callable[[str, str, dict[str, Any]], None],
        on_pinned: Callable[[], None],
    ) -> None:
        self.server = server
        self.pin = pin
        self.pin_sequence = pin_sequence
        """Of the message that has the pin: what was read earlier is not taken for newer."""
        self.catalog = Catalog()
        self.upstream = Upstream(server, connect, opened=self._opened, on_event=self._heard)
        self._remember = remember
        self._on_event = on_event
        self._on_pinned = on_pinned
        self._items: dict[str, Any] = {}
        self._reading = asyncio.Lock()
        self._stale = False
        self._settles = SETTLES
        self._tasks = Tasks(f"catalog of {server.name}")

    @property
    def name(self) -> str:
        """Of the server."""
        return self.server.name

    def repin(self, pin: Pin, sequence: int) -> None:
        """Something else was approved, by the message with this sequence; an older one is left alone."""
        if sequence <= self.pin_sequence:
            return
        self.pin, self.pin_sequence = pin, sequence
        self._on_pinned()
        self._judge(self.catalog.listing, self.catalog.identity, self.catalog.read)

    def definition(self, kind: str, name: str) -> tuple[Mapping[str, Any] | None, str, str]:
        """What the server says about one thing, the digest of that, and why it is in quarantine."""
        key = f"{kind}:{name}"
        return self._items.get(key), self.catalog.digests.get(key, ""), self.catalog.why(key)

    async def known(self) -> Catalog:
        """The catalog, read if it never was, and read again in the background when it is old.

        Raises ToolError if the server cannot be reached and was never.
        """
        catalog = self.catalog
        age = time.monotonic() - catalog.read
        if catalog.identity is None or (self._stale and age > self._settles):
            await self.refresh()
        elif age > self.upstream.limits.refresh and not self._reading.locked():
            self._tasks.start(self._refresh_quietly(), name=f"reading what {self.name} offers")
        return self.catalog

    async def look_again(self) -> None:
        """Somebody asks for what is not known: read the definitions again, unless that was just done."""
        if time.monotonic() - self.catalog.read > self._settles:
            await self.refresh()

    async def refresh(self) -> None:
        """Read what the server offers now. Raises ToolError if it cannot be."""
        asked = time.monotonic()
        async with self._reading:
            if self.catalog.read >= asked:
                return
            async with self.upstream.borrowed() as session:
                if self.catalog.read >= asked:  # a new session reads it as it opens
                    return
                try:
                    async with asyncio.timeout(self.upstream.limits.timeout):
                        await self._read(session)
                except TimeoutError:
                    raise ToolError(f"{self.name} did not list what it offers in time", code=LATE) from None

    async def aclose(self) -> None:
        """End its processes and connections."""
        await self._tasks.aclose()
        await self.upstream.aclose()

    async def _refresh_quietly(self) -> None:
        try:
            await self.refresh()
        except ToolError as error:
            log.debug("what %s offers cannot be read: %s", self.name, error)

    async def _opened(self, session: Session) -> None:
        await self._read(session)
        if session.identity.modern:
            self._tasks.start(self._listen(session), name=f"changes of {self.name}")

    async def _read(self, session: Session) -> None:
        self._stale = False
        found: dict[str, tuple[Mapping[str, Any], ...]] = {}
        for capability, method, part in LISTED:
            offered = capability in session.identity.capabilities
            found[part] = tuple([one async for one in pages(session, method, part)]) if offered else ()
        listing = Listing(found["tools"], found["prompts"], found["resourceTemplates"], session.identity.instructions)
        if self.pin is None and self.server.trust == "first-use":
            await self._pin_first(listing)
        self._judge(listing, session.identity, time.monotonic())

    async def _pin_first(self, listing: Listing) -> None:
        """Approve what is seen first, but for what has characters that nobody sees."""
        odd = suspicious(listing.items)
        for key, why in sorted(odd.items()):
            log.warning("%s: %s has %s and is not approved by itself", self.name, oneline(key), why)
        items = {key: one for key, one in listing.items.items() if key not in odd}
        self.pin, self.pin_sequence = await self._remember(self.name, Pin(items, "first-use", time.time()))
        self._on_pinned()

    def _judge(self, listing: Listing, identity: Identity | None, read: float) -> None:
        begun = time.monotonic()
        verdict = compare(self.pin, listing) if identity is not None else Verdict()
        self._items = listing.items
        digests = {key: digest(one) for key, one in self._items.items()}
        self._settles = max(SETTLES, REST * (time.monotonic() - begun))
        before, self.catalog = self.catalog, Catalog(listing, verdict, identity, read, digests)
        if verdict != before.verdict and not verdict.clean:
            held = [key for key in self._items if verdict.why(key)]
            log.warning("%s: in quarantine until approved: %s", self.name, oneline(", ".join(held[:20])))

    async def _listen(self, session: Session) -> None:
        """Hear of changes as long as the session lasts; a server that tells of none is read again by age."""
        wanted = {"notifications": dict.fromkeys(CHANGES.values(), True), "_meta": dict(OWN_META)}
        try:
            await session.call("subscriptions/listen", wanted, heard=self._heard)
        except LinkEnded:
            return
        except ToolError as error:
            log.debug("%s tells of no changes: %s", self.name, error)

    def _heard(self, method: str, params: dict[str, Any]) -> None:
        if method in CHANGES:
            self._stale = True
            if not self._reading.locked() and time.monotonic() - self.catalog.read > self._settles:
                self._tasks.start(self._refresh_quietly(), name=f"reading what {self.name} offers")
        self._on_event(self.name, method, params)

    @property
    def state(self) -> dict[str, Any]:
        """For operators."""
        verdict = self.catalog.verdict
        return {
            "name": self.name,
            "transport": self.server.transport,
            "where": self.server.where,
            "enabled": self.server.enabled,
            **self.upstream.state,
            "tools": len(self.catalog.listing.tools),
            "quarantined": [key for key in self._items if verdict.why(key)],
        }


async def pages(session: Session, method: str, part: str) -> AsyncIterator[Mapping[str, Any]]:
    """Every item of a listing, page by page. A method the server does not know after all lists nothing.

    What is too large or nests too deep to be a definition is left out. Raises ToolError if it is too much altogether.
    """
    cursor: str | None = None
    room = LISTING
    for _ in range(PAGES):
        params: dict[str, Any] = {"_meta": dict(OWN_META)}
        if cursor is not None:
            params["cursor"] = cursor
        try:
            told = await session.call(method, params)
        except LinkEnded:
            raise
        except ToolError as error:
            if error.code == METHOD_NOT_FOUND:
                return
            raise
        found = told.get(part)
        for one in found if isinstance(found, list) else ():
            size = measured(one, DEEPEST) if isinstance(one, dict) else None
            if size is None or size > DEFINITION:
                log.warning("an item of %s is left out: it is too large, too deep or no object", method)
                continue
            room -= size
            if room < 0:
                raise ToolError(f"{method} has more than {LISTING} bytes", code=UPSTREAM_FAILED)
            yield one
        cursor = told.get("nextCursor")
        if not isinstance(cursor, str):
            return
    raise ToolError(f"{method} has more than {PAGES} pages", code=UPSTREAM_FAILED)


__all__ = ["CHANGES", "LISTED", "Catalog", "Heard", "Served", "pages"]
