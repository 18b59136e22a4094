"""What a leader decides a second, and how long a coordinator that starts takes to read what was decided."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any

from weft.core.broker import Broker
from weft.core.history import StreamReader
from weft.testing.broker import start_test_mesh
from weft_coordinator.decide.ledger import Event, Ledgers
from weft_coordinator.shell.decided import DecidedLog
from weft_coordinator.shell.leader import Leader, Terms

IN_FLIGHT = 64
"""Decisions asked for at a time."""
TASK = "0123456789abcdef0123456789abcdef"


class Held:
    """A ledger the size of a lock table: who has which of a thousand names."""

    kinds = frozenset({"taken"})

    def __init__(self) -> None:
        self.names: dict[str, tuple[Any, ...]] = {}

    def apply(self, event: Event, *, number: int, at: int) -> None:
        self.names[event[1]] = (*event[2:], number, at)

    def dump(self) -> Any:
        return list(self.names.items())

    def load(self, dumped: Any) -> None:
        self.names = {name: tuple(value) for name, value in dumped or ()}


class Node:
    """A coordinator of which there is only the leader."""

    def __init__(self, broker: Broker) -> None:
        self.reader = StreamReader(broker)
        self.held = Held()
        self.decided = DecidedLog(broker, self.reader, Ledgers((Terms(), self.held)))
        self.decided.snapshot_after = 10**9
        self.leader = Leader(broker, self.decided, id="bench", clock=_now, lead=self._nothing, deposed=lambda: None)

    async def _nothing(self) -> None:
        return


async def run(events: int) -> dict[str, Any]:
    """Decide so many events, then read them by a coordinator that knows nothing."""
    async with await start_test_mesh([]) as mesh:
        broker = await mesh.connect("coordinator")
        node = Node(broker)
        await node.reader.open()
        await node.leader.start()
        left = iter(range(events))
        waits: list[float] = []

        async def ask() -> None:
            for n in left:
                began = time.perf_counter()
                event = ("taken", f"name-{n % 1000}", "agent", TASK, "r-1", n)
                await node.leader.decide(partial(_just, event))
                waits.append(time.perf_counter() - began)

        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(IN_FLIGHT):
                group.create_task(ask())
        decided = time.perf_counter() - began
        from_log = await _read(broker, node)
        await node.decided.snapshot()
        from_snapshot = await _read(broker, node)
        await node.leader.stop()
        await node.reader.close()
        await broker.close()
    waits.sort()
    return {
        "events": events,
        "commits": node.leader.commits,
        "per_s": events / decided,
        "p50_ms": waits[len(waits) // 2] * 1000,
        "p99_ms": waits[int(len(waits) * 0.99)] * 1000,
        "rebuild_s": from_log,
        "snapshot_s": from_snapshot,
    }


async def _read(broker: Broker, like: Node) -> float:
    node = Node(broker)
    await node.reader.open()
    began = time.perf_counter()
    await node.decided.sync()
    took = time.perf_counter() - began
    await node.reader.close()
    if node.held.names != like.held.names:
        raise RuntimeError("what was read is not what was decided")
    return took


def _just(event: Event, now: int) -> list[Event]:
    return [event]


def _now() -> int:
    return time.time_ns() // 1_000_000
