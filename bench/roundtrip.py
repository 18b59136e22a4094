"""Durable round trips of Weft, of the same exchange by hand, and of the A2A SDK over HTTP, taken in turns."""

from __future__ import annotations

import statistics
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from bench import history, side_a2a, side_floor, side_weft
from bench.processes import Child, Children

from weft.testing.broker import start_test_mesh

SIDES: Final = ("weft", "floor", "a2a")
HTTP: Final = ("gateway", "server")
"""Sides of the gateway case: the same lean caller before the gateway, and before the SDK's own server."""


@dataclass(slots=True)
class Side:
    """One contestant: its caller's process and the processes behind it."""

    name: str
    client: Child
    pids: dict[str, int]

    async def measure(self, *, inflight: int, size: int, seconds: float) -> dict[str, Any]:
        """One measurement, as `bench.load.measure` gives it."""
        request = {"inflight": inflight, "size": size, "seconds": seconds, "pids": self.pids}
        return await self.client.ask(request, timeout=seconds + 60)


@asynccontextmanager
async def side(name: str, children: Children, *, finished: int = 0) -> AsyncIterator[Side]:
    """Start a contestant, a name of `SIDES` or `HTTP`; `weft` with so many finished tasks in its stream."""
    async with AsyncExitStack() as stack:
        if name == "weft":
            mesh = await stack.enter_async_context(await start_test_mesh(["echo"]))
            if finished:
                await history.write(mesh, "echo", finished)
            worker = await side_weft.replica(children, mesh.home)
            address, pids = str(mesh.home), {"broker": mesh.server.pid, "worker": worker.pid}
        elif name == "gateway":
            mesh = await stack.enter_async_context(await start_test_mesh(["echo"]))
            worker = await side_weft.replica(children, mesh.home)
            address, gateway = await side_weft.gateway(children, mesh.home, agent="echo")
            pids = {"broker": mesh.server.pid, "worker": worker.pid, "gateway": gateway.pid}
        elif name == "floor":
            address, server, worker = await stack.enter_async_context(side_floor.processes(children))
            pids = {"broker": server.pid, "worker": worker.pid}
        else:  # `a2a` or `server`: the same server, its own client or the lean one
            address, worker = await stack.enter_async_context(side_a2a.processes(children))
            pids = {"worker": worker.pid}
        module = "side_http" if name in HTTP else f"side_{name}"
        client = await children.python(f"{name} client", "bench.load", module, address)
        if await client.line() != "ready":
            raise RuntimeError(f"{client.name} did not start")
        yield Side(f"{name} after {finished:,}" if finished else name, client, pids)


@dataclass(frozen=True, slots=True)
class Load:
    """What is measured, how long and how often."""

    inflight: Sequence[int] = (1, 64)
    sizes: Sequence[int] = (256, 4096)
    """Bytes of the text that is sent and returned."""
    seconds: float = 3.0
    repetitions: int = 3


async def compare(sides: Sequence[str], load: Load) -> list[dict[str, Any]]:
    """Every side under every load, in turns."""
    async with AsyncExitStack() as stack:
        children = await stack.enter_async_context(Children())
        return await in_turns([await stack.enter_async_context(side(name, children)) for name in sides], load)


async def with_history(finished: int, load: Load) -> list[dict[str, Any]]:
    """Weft with an empty stream and Weft with `finished` tasks in it, in turns."""
    async with AsyncExitStack() as stack:
        children = await stack.enter_async_context(Children())
        full = await stack.enter_async_context(side("weft", children, finished=finished))
        empty = await stack.enter_async_context(side("weft", children))
        return await in_turns([empty, full], load)


async def in_turns(sides: Sequence[Side], load: Load) -> list[dict[str, Any]]:
    """One record per side and load, with the median of the repetitions."""
    samples: dict[tuple[int, int, str], list[dict[str, Any]]] = {}
    for repetition in range(load.repetitions):
        for size in load.sizes:
            for lanes in load.inflight:
                for one in sides:
                    said = f"{repetition + 1}/{load.repetitions}: {one.name}, {size} B, {lanes} in flight"
                    sys.stderr.write(f"\r{said:60}")
                    sample = await one.measure(inflight=lanes, size=size, seconds=load.seconds)
                    samples.setdefault((size, lanes, one.name), []).append(sample)
    sys.stderr.write("\r" + " " * 60 + "\r")
    return [
        {"side": name, "inflight": lanes, "size": size, **summary(taken), "samples": taken}
        for (size, lanes, name), taken in samples.items()
    ]


def summary(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians, the best rate, and the least CPU: what a busy machine disturbs least."""
    return {
        "rate": statistics.median(s["rate"] for s in samples),
        "best_rate": max(s["rate"] for s in samples),
        "p50_ms": statistics.median(s["p50_ms"] for s in samples),
        "best_p50_ms": min(s["p50_ms"] for s in samples),
        "p99_ms": statistics.median(s["p99_ms"] for s in samples),
        "cpu_us": {name: statistics.median(s["cpu_us"][name] for s in samples) for name in samples[0]["cpu_us"]},
        "rss_mb": {name: max(s["rss_mb"][name] for s in samples) for name in samples[0]["rss_mb"]},
        "load": max(s["load"] for s in samples),
    }
