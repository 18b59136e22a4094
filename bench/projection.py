"""How fast a coordinator projects: from a full stream, and how soon it is back with its file."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from a2a.types import a2a_pb2 as pb
from bench.processes import memory_mb

from weft.core.broker import Broker
from weft.core.history import StreamReader
from weft.testing.broker import BrokerMesh, start_test_mesh
from weft_coordinator.decide.index import TaskIndex
from weft_coordinator.shell.copies import Copies
from weft_coordinator.shell.files import StateFile
from weft_coordinator.shell.projection import Projection
from weft_coordinator.shell.store import Store
from weft_coordinator.shell.tail import Tail
from weft_protocols import events, ids, subjects
from weft_protocols import headers as h
from weft_protocols.records import Claim
from weft_protocols.resources import STREAM

AGENT: Final = "echo"
CALLER: Final = "local"
CHUNK: Final = 500
"""Messages between two acknowledgements: the broker queues 10,000 of a stream and drops more."""


def messages(number: int, *, live: bool) -> list[tuple[str, bytes, bytes]]:
    """What the data plane stores for one task: creating message, claim, one group of events; live ones do not end."""
    message_id = f"projection-{number}"
    task = ids.task_id(CALLER, AGENT, message_id)
    sent = pb.Message(message_id=message_id, context_id=task, role=pb.ROLE_USER, parts=[pb.Part(text="x" * 256)])
    claim = Claim("1-bench", "1.0.0", 1, caller=CALLER, origin="o", context=task, slice="00", message=1)
    status, artifact = pb.StreamResponse(), pb.StreamResponse()
    artifact.artifact_update.task_id = status.status_update.task_id = task
    artifact.artifact_update.context_id = status.status_update.context_id = task
    artifact.artifact_update.artifact.parts.extend(sent.parts)
    status.status_update.status.timestamp.GetCurrentTime()
    status.status_update.status.state = pb.TASK_STATE_WORKING
    begun = status.SerializeToString()
    status.status_update.status.state = pb.TASK_STATE_COMPLETED

    def numbered(n: int, state: str = "") -> bytes:
        return h.fields({h.EVENT: str(n), **({h.STATE: state} if state else {})})

    log = [(numbered(1, "working"), begun)]
    if not live:
        log += [(numbered(2), artifact.SerializeToString()), (numbered(3, "completed"), status.SerializeToString())]
    lines, body = events.group(log) if len(log) > 1 else log[0]
    create = h.block(h.fields({h.VERSION: h.A2A_VERSION, h.ORIGIN: "o"}))
    body_of_creation = pb.SendMessageRequest(message=sent).SerializeToString()
    return [
        (subjects.task(AGENT, ids.slice_of(task), CALLER, task), create, body_of_creation),
        (subjects.claim(AGENT, task), h.block(), claim.encode()),
        (subjects.event(AGENT, task, CALLER, "o"), h.block(lines), body),
    ]


async def fill(broker: Broker, begin: int, end: int, *, live: bool) -> None:
    """Store the messages of the tasks `begin` to `end`."""
    sent = 0
    for number in range(begin, end):
        for subject, headers, body in messages(number, live=live):
            sent += 1
            if sent % CHUNK:
                broker.send(subject, body, headers=headers)
            else:
                await broker.publish(subject, body, headers=headers)
    await broker.flush()


async def project(mesh: BrokerMesh, folder: Path) -> dict[str, Any]:
    """Bring the file in `folder` up to date, as a coordinator does when it starts."""
    broker = await mesh.connect("coordinator")
    reader = await StreamReader(broker).open()
    file = StateFile.take(folder)
    index = TaskIndex(10_000)
    store = Store(file)
    projection = Projection(index, store, keep=10_000)
    tail = Tail(broker, reader, projection, Copies(broker, store), dead_letter=lambda _: None)
    try:
        begun, cpu = time.monotonic(), time.process_time()
        await projection.open()
        opened, before = time.monotonic() - begun, store.position
        await tail.sync()
        seconds = time.monotonic() - begun
        return {
            "seconds": round(seconds, 2),
            "cpu": round(time.process_time() - cpu, 2),
            "opened": round(opened, 2),
            "messages": store.position - before,
            "messages_per_second": round((store.position - before) / (seconds - opened)),
            "in_memory": len(index.visible("operator")),
            "memory_mb": round(memory_mb(os.getpid())),
            "file_mb": round(file.bytes() / 2**20),
        }
    finally:
        await store.close()
        file.release()
        await reader.close()
        await broker.close()


async def run(count: int, *, live: bool) -> list[dict[str, Any]]:
    """An empty file, then the file it became; `count` tasks, all finished or all live."""
    async with await start_test_mesh([AGENT]) as mesh:
        broker = await mesh.connect("coordinator")
        try:
            begun = time.monotonic()
            await fill(broker, 0, count, live=live)
            stored = int((await broker.api(f"STREAM.INFO.{STREAM}"))["state"]["messages"])
            if stored != 3 * count:
                raise RuntimeError(f"the stream holds {stored} messages instead of {3 * count}")
            sys.stderr.write(f"{count:,} tasks written in {time.monotonic() - begun:.0f} s\n")
            with TemporaryDirectory() as folder:
                return [{"file": name, "live": live, **await project(mesh, Path(folder))} for name in ("none", "full")]
        finally:
            await broker.close()


async def main(count: int) -> None:
    for live in (False, True):
        for figures in await run(count, live=live):
            figures["tasks_per_second"] = figures["messages_per_second"] // 3
            print(json.dumps(figures))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000))
