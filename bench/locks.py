"""What locks cost and how soon a deadlock is found: agents, coordinator and broker are processes of their own."""

from __future__ import annotations

import asyncio
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

from a2a.types import a2a_pb2 as pb
from bench.processes import ROOT, Children
from bench.side_weft import replica

import weft
from weft.client import coordinator
from weft.core.broker import Broker
from weft.testing.broker import start_test_mesh
from weft_protocols import headers as h
from weft_protocols import ids, subjects

AGENT: Final = ROOT / "bench" / "lock_agent.py"
LOADED: Final = "loaded"
"""The agent whose tasks fill the graph."""
SPREAD: Final = "spread"
"""The agent that has several replicas."""
REPLICAS: Final = 4
WAITERS: Final = 64
PAIRS: Final = 200
TREE: Final = 1000
"""Tasks of one tree of delegations."""
AT_ONCE: Final = 500
"""Waits of one message, and tasks sent at a time."""


async def run(*, cycles: int = 2000, tasks: int = 100_000, edges: int = 120_000) -> dict[str, Any]:
    """Measure `cycles` locks alone, as many by 64 tasks on one name, of one replica and of several, and deadlocks.

    Those are found with nothing else, and in a graph of that size.
    """
    async with AsyncExitStack() as stack:
        mesh = await stack.enter_async_context(await start_test_mesh(["locker", LOADED, SPREAD]))
        children = await stack.enter_async_context(Children())
        await _coordinator(children, mesh.home)
        await replica(children, mesh.home, target=AGENT, agent="locker")
        for _ in range(REPLICAS):
            await replica(children, mesh.home, target=AGENT, agent=SPREAD)
        caller = await stack.enter_async_context(weft.connect("local", home=mesh.home))
        await _cycles(caller, "warm", tasks=1, each=200)
        alone = await _cycles(caller, "alone", tasks=1, each=cycles)
        together = await _cycles(caller, "together", tasks=WAITERS, each=max(1, cycles // WAITERS))
        apart = await _cycles(caller, "apart", tasks=WAITERS, each=max(1, cycles // WAITERS), agent=SPREAD)
        before = await _deadlocks(caller, PAIRS // 4)
        loaded, sender, operator = [await mesh.connect(name) for name in (LOADED, "local", "operator")]
        for broker in (loaded, sender, operator):
            stack.push_async_callback(broker.close)
        names = await _sent(sender, tasks)
        await coordinator.call(operator, "status", timeout=60.0)  # they are in the index
        async with _graph(loaded, names, edges=edges) as told:
            full = await _deadlocks(caller, PAIRS)
            found = (await coordinator.call(operator, "graph", timeout=20.0))["deadlocks"]["count"]
    return {
        "alone": alone,
        "together": {**together, "waiters": WAITERS},
        "apart": {**apart, "replicas": REPLICAS},
        "deadlock_empty": before,
        "deadlock_full": {**full, **told},
        "found": found,
    }


async def _coordinator(children: Children, home: Path) -> None:
    env = {"WEFT_HOME": str(home), "WEFT_IDENTITY": "coordinator", "WEFT_LOG": "ERROR"}
    child = await children.python(
        "coordinator", "weft_coordinator.service", env=env, stdout=False, stderr=subprocess.PIPE
    )
    await children.said(child, b"ready")


async def _cycles(caller: weft.Mesh, name: str, *, tasks: int, each: int, agent: str = "locker") -> dict[str, Any]:
    message = {"name": name, "count": each}
    handles = [await caller.submit(agent, message, skill="cycle") for _ in range(tasks)]
    told = [(await handle.result()).data for handle in handles]
    took = sorted(one for task in told for one in task["took"])
    seconds = max(task["ended"] for task in told) - min(task["begun"] for task in told)
    return {"count": len(took), "rate": len(took) / seconds, **_percentiles(took)}


async def _deadlocks(caller: weft.Mesh, count: int) -> dict[str, Any]:
    """One after the other: milliseconds from the wait that closed the circle until one of the two was told."""
    took: list[float] = []
    for _ in range(count):
        pair = uuid.uuid4().hex[:12]
        handles = [
            await caller.submit("locker", {"pair": pair, "mine": mine, "other": other}, skill="cross")
            for mine, other in (("a", "b"), ("b", "a"))
        ]
        told = [(await handle.result()).data for handle in handles]
        took += [one["told"] - max(other["asked"] for other in told) for one in told if one["told"]]
    return {"count": len(took), **_percentiles(sorted(took))}


def _percentiles(took: Sequence[float]) -> dict[str, float]:
    at = {"p50_ms": 0.5, "p99_ms": 0.99}
    return {
        **{name: took[min(len(took) - 1, int(len(took) * part))] * 1e3 for name, part in at.items()},
        "max_ms": took[-1] * 1e3,
    }


@asynccontextmanager
async def _graph(loaded: Broker, names: Sequence[str], *, edges: int) -> AsyncIterator[dict[str, Any]]:
    """Tasks in trees of delegations, some of which also wait for their turn behind others; told as a replica tells."""
    tasks = len(names)
    waits: list[list[Any]] = []
    made = 0
    for at, name in enumerate(names):
        base, place = at - at % TREE, at % TREE
        below = [base + child for child in (2 * place + 1, 2 * place + 2) if child < TREE and base + child < tasks]
        targets = [["child", names[one]] for one in below]
        if not below and at + TREE < tasks and made + (tasks - at) < edges:
            targets = [["order", names[at + TREE]]]
        if targets:
            waits.append([name, f"w{at}", len(targets), targets])
            made += len(targets)
    start = time.monotonic()
    session = {"replica": "loader", "held": [], "waiting": [], "waits": len(waits)}
    for at in range(0, len(waits), AT_ONCE):
        body = {"replica": "loader", "set": waits[at : at + AT_ONCE], "clear": []}
        await coordinator.call(loaded, "waits", body, timeout=20.0)
    told = await coordinator.call(loaded, "session", session)
    if told["resync"]:
        raise RuntimeError(f"not all of {len(waits)} waits arrived")
    yield {"tasks": tasks, "edges": made, "loaded_s": time.monotonic() - start}


async def _sent(sender: Broker, count: int) -> list[str]:
    """So many tasks for an agent that is not there; their ids."""
    block = h.block(h.fields({h.EXPECTED_SEQUENCE: "0", h.VERSION: h.A2A_VERSION, h.ORIGIN: "bench"}))
    names: list[str] = []
    for at in range(0, count, AT_ONCE):
        async with asyncio.TaskGroup() as group:
            for _ in range(min(AT_ONCE, count - at)):
                message_id = uuid.uuid4().hex
                names.append(ids.task_id("local", LOADED, message_id))
                message = pb.Message(message_id=message_id, role=pb.ROLE_USER, parts=[pb.Part(text="wait")])
                body = pb.SendMessageRequest(message=message).SerializeToString()
                subject = subjects.task(LOADED, ids.slice_of(names[-1]), "local", names[-1])
                group.create_task(sender.publish(subject, body, headers=block))
    return names
