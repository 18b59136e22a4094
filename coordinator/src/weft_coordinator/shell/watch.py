"""Looks at what only the broker knows: queues, streams, and who owns a task."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from weft.core.broker import Broker
from weft.core.history import StreamReader
from weft_coordinator.decide.index import Entry, nanoseconds
from weft_coordinator.decide.watchdog import StreamSeen
from weft_protocols import subjects
from weft_protocols.errors import A2AError
from weft_protocols.records import HELD, Claim
from weft_protocols.resources import STREAM

REMEMBERED: Final = 200_000
LOOKED_AT: Final = 100
"""Claims that are read at one look."""


class BrokerLook:
    """Reads the broker's own figures."""

    def __init__(self, broker: Broker, reader: StreamReader) -> None:
        self._broker = broker
        self._reader = reader
        self._let_go: dict[tuple[str, str], int] = {}
        """Tasks that were found to be nobody's, by agent and id: the last event they had then."""

    async def queues(self) -> dict[str, tuple[int, int]]:
        """By agent: how many tasks were never given to a replica, and how many were and are not done."""
        found: dict[str, tuple[int, int]] = {}
        for info in await self._pages(f"CONSUMER.LIST.{STREAM}", "consumers"):
            agent, _, lane = str(info["name"]).partition("=")
            if lane == "work":
                found[agent] = int(info.get("num_pending", 0)), int(info.get("num_ack_pending", 0))
        return found

    async def streams(self) -> tuple[StreamSeen, ...]:
        """The streams that have a limit."""
        return tuple(
            StreamSeen(info["config"]["name"], int(info["state"]["bytes"]), int(limit))
            for info in await self._pages("STREAM.LIST", "streams")
            if (limit := info["config"].get("max_bytes", -1)) > 0
        )

    async def _pages(self, operation: str, field: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while True:
            page = await self._broker.api(operation, {"offset": len(found)})
            items = page.get(field) or []
            found += items
            if not items or len(found) >= int(page.get("total", 0)):
                return found

    async def held(self, suspects: Iterable[Entry]) -> list[tuple[Entry, int]]:
        """Of tasks in work, those still owned by the replica that began them, and when they were last heard of.

        In unix milliseconds. Their claims decide: a task that waits or was handed back is nobody's, and not stuck.
        """
        found: list[tuple[Entry, int]] = []
        looked = 0
        for entry in suspects:
            if self._let_go.get((entry.agent, entry.task)) == entry.last:
                continue  # nothing happened since it was found to be waiting
            if looked >= LOOKED_AT:
                break
            looked += 1
            stored = await self._reader.last(STREAM, subjects.claim(entry.agent, entry.task))
            try:
                claim = Claim.decode(stored.data) if stored is not None else None
            except A2AError:
                claim = None
            if claim is None or claim.state != HELD or claim.replica != begun_by(entry):
                self._let_go[entry.agent, entry.task] = entry.last
                continue
            last = await self._reader.message(STREAM, entry.last)
            found.append((entry, nanoseconds(last.time) // 1_000_000 if last is not None else 0))
        while len(self._let_go) > REMEMBERED:
            del self._let_go[next(iter(self._let_go))]
        return found


def begun_by(entry: Entry) -> str:
    """The replica that began a task's last attempt; empty where that is not known."""
    return str(getattr(entry.detail, "replica", ""))
