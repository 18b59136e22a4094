"""What thousands of tasks cost that only wait, and how soon they all go on."""

from __future__ import annotations

import asyncio
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from a2a.types import a2a_pb2 as pb
from bench.processes import Children, memory_mb
from bench.side_weft import replica

from weft.client import coordinator
from weft.core.broker import Broker
from weft.testing.agents import eventually
from weft.testing.broker import start_test_mesh
from weft_protocols import headers as h
from weft_protocols import ids, subjects

AGENT: Final = "sleeper"
TARGET: Final = Path(__file__).with_name("sleep_agent.py")
AT_ONCE: Final = 64
"""Messages under way at a time."""
PATIENCE: Final = 300.0
"""Seconds until everything has to wait, or to have gone on."""


async def run(count: int, *, wait: float = 0.0) -> dict[str, Any]:
    """Let `count` tasks wait for one time, `wait` seconds from now (0: a fitting one), and go on together."""
    async with await start_test_mesh([AGENT]) as mesh, Children() as children:
        settings = {"WEFT_HOME": str(mesh.home), "WEFT_LOG": "ERROR"}
        leader = await children.python(
            "coordinator", "weft_coordinator.service", env=settings, stdout=False, stderr=subprocess.PIPE
        )
        await children.said(leader, b"ready")
        agent = await replica(children, mesh.home, target=TARGET, agent=AGENT)
        broker, operator = await mesh.connect("local"), await mesh.connect("operator")
        try:
            before = memory_mb(agent.pid), memory_mb(leader.pid)
            until = time.time() + (wait or 15.0 + count / 250)
            begun = time.monotonic()
            await _send(broker, count, until)
            sent = time.monotonic() - begun
            await _until(operator, lambda told: told["parked"] == count)
            parked = time.monotonic() - begun
            left = until - time.time()
            after = memory_mb(agent.pid), memory_mb(leader.pid)
            await asyncio.sleep(max(0.0, until - time.time()))
            await _until(operator, lambda told: told["tasks"]["states"].get("completed", 0) == count)
            woken = time.time() - until
        finally:
            await broker.close()
            await operator.close()
    return {
        "tasks": count,
        "sent_s": sent,
        "parked_s": parked,
        "left_s": left,
        "woken_s": woken,
        "agent_mb": [before[0], after[0]],
        "coordinator_mb": [before[1], after[1]],
    }


async def _send(broker: Broker, count: int, until: float) -> None:
    room = asyncio.Semaphore(AT_ONCE)

    async def one() -> None:
        message_id = uuid.uuid4().hex
        task = ids.task_id("local", AGENT, message_id)
        message = pb.Message(message_id=message_id, context_id=task, role=pb.ROLE_USER)
        message.parts.add(text=str(until))
        values = {h.EXPECTED_SEQUENCE: "0", h.VERSION: h.A2A_VERSION, h.ORIGIN: "bench"}
        async with room:
            await broker.publish(
                subjects.task(AGENT, ids.slice_of(task), "local", task),
                pb.SendMessageRequest(message=message).SerializeToString(),
                headers=h.block(h.fields(values)),
            )

    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(one())


async def _until(operator: Broker, reached: Callable[[Mapping[str, Any]], bool]) -> None:
    async def met() -> bool:
        return reached((await coordinator.status(operator)).raw)

    await eventually(met, timeout=PATIENCE)
