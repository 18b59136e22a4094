"""What the mesh recorded of calls of tools."""

from __future__ import annotations

import json
from collections import deque
from typing import Any, Final

from weft.core.broker import Broker
from weft.core.history import StreamReader
from weft_protocols.resources import AUDIT, AUDIT_RECORDS

DECIDED: Final = ("intent", "denial")
"""Kinds of records that have a decision; how a call ended is in another one."""


async def decisions(broker: Broker, *, since: float, limit: int) -> list[dict[str, Any]]:
    """Records of decisions, as `weft_protocols.audit.AuditRecord` has them, in the order in which they were stored.

    Args:
        broker: a connection of account MESH.
        since: Unix seconds; nothing that was stored before.
        limit: How many at most: the last ones.

    Raises Unreachable, TimedOut, ApiError: they cannot be read.
    """
    reader = await StreamReader(broker).open()
    found: list[tuple[int, dict[str, Any]]] = []
    try:
        for kind in DECIDED:
            found += await _last(reader, f"{AUDIT_RECORDS}.{kind}.>", since=since, limit=limit)
    finally:
        await reader.close()
    return [record for _, record in sorted(found, key=lambda one: one[0])[-limit:]]


async def _last(reader: StreamReader, subject: str, *, since: float, limit: int) -> deque[tuple[int, dict[str, Any]]]:
    kept: deque[tuple[int, dict[str, Any]]] = deque(maxlen=limit)
    start = await reader.since(AUDIT, subject, at=since)
    while start:
        batch = await reader.batch(AUDIT, subject, start=start)
        kept.extend((one.seq, json.loads(one.data)) for one in batch.messages)
        start = batch.messages[-1].seq + 1 if batch.more and batch.messages else 0
    return kept
