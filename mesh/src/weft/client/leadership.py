"""Which coordinators there are and which one leads, for operators."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from weft.client.coordinator import call
from weft.core.broker import Broker, Delivered
from weft_protocols import subjects
from weft_protocols.errors import Unavailable

TIMEOUT: Final = 2.0
"""Seconds the first coordinator has to answer."""
QUIET: Final = 0.3
"""Seconds after the last answer in which no other came, until that was all of them."""


@dataclass(frozen=True, slots=True)
class CoordinatorInfo:
    """One coordinator, by its own word. Times are unix milliseconds."""

    id: str
    role: str
    """`leader` or `standby`."""
    leader: str
    """Id of the coordinator it takes for the leader; empty if it knows none."""
    epoch: int
    """Number of the reign."""
    since: int
    """When the leader began to lead."""
    decided: int
    """Number of the last decision it has read or made."""
    started: int
    pid: int = 0
    host: str = ""
    projection: Mapping[str, Any] = field(default_factory=dict)
    """What it tells of its read model, such as `position` and `lag`."""

    @staticmethod
    def of(told: Mapping[str, Any]) -> CoordinatorInfo:
        """The coordinator in an answer."""
        return CoordinatorInfo(
            str(told["coordinator"]),
            str(told.get("role", "")),
            str(told.get("leader", "")),
            int(told.get("epoch", 0)),
            int(told.get("since", 0)),
            int(told.get("decided", 0)),
            int(told.get("started", 0)),
            int(told.get("pid", 0)),
            str(told.get("host", "")),
            told.get("projection") or {},
        )


async def coordinators(
    broker: Broker, *, timeout: float = TIMEOUT, quiet: float = QUIET
) -> tuple[CoordinatorInfo, ...]:
    """All coordinators that answer, the leader first, then by age. Operator only.

    Raises Unavailable where none does within `timeout` seconds.
    """
    answers: asyncio.Queue[Delivered] = asyncio.Queue()
    inbox = broker.new_inbox()
    listening = await broker.subscribe(inbox, answers.put_nowait)
    found: dict[str, CoordinatorInfo] = {}
    try:
        broker.send(subjects.coord("coordinators", subjects.OPERATOR), b"{}", reply=inbox)
        try:
            while True:
                async with asyncio.timeout(quiet if found else timeout):
                    told = json.loads((await answers.get()).data or b"null")
                if not isinstance(told, dict) or "coordinator" not in told:
                    break  # nobody listens
                found[told["coordinator"]] = CoordinatorInfo.of(told)
        except (TimeoutError, ValueError):
            pass
    finally:
        await listening.close()
    if not found:
        raise Unavailable("no coordinator is running or reachable; see: mesh ps")
    return tuple(sorted(found.values(), key=lambda one: (one.role != "leader", one.started, one.id)))


async def rebuild(broker: Broker) -> dict[str, Any]:
    """Have every coordinator make its read model anew from the broker's log: {started, coordinators}. Operator only."""
    return await call(broker, "rebuild")
