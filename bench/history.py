"""Finished tasks, written fast: what a stream holds after 100,000 of them."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Final

from a2a.types import a2a_pb2 as pb

from weft.core.broker import Broker
from weft.core.pull import Delivery, PullLoop
from weft.testing.broker import BrokerMesh
from weft_protocols import headers as h
from weft_protocols import ids, subjects
from weft_protocols.records import Claim
from weft_protocols.resources import STREAM

CHUNK: Final = 100
"""Tasks between two acknowledgements: the broker queues 10,000 messages of a stream and drops more."""
CALLER: Final = "local"
ORIGIN: Final = "history"


def messages(agent: str, number: int) -> list[tuple[str, bytes, bytes]]:
    """Subject, headers and body of everything a task leaves: message, claim, working, artifact, completed."""
    message_id = f"history-{number}"
    task = ids.task_id(CALLER, agent, message_id)
    sent = pb.Message(message_id=message_id, context_id=task, role=pb.ROLE_USER, parts=[pb.Part(text="x" * 256)])
    claim = Claim("1-history", "1.0.0", 1, caller=CALLER, origin=ORIGIN, context=task, slice="00", message=1)
    status, artifact = pb.StreamResponse(), pb.StreamResponse()
    artifact.artifact_update.task_id = status.status_update.task_id = task
    artifact.artifact_update.context_id = status.status_update.context_id = task
    artifact.artifact_update.artifact.parts.extend(sent.parts)
    event = subjects.event(agent, task, CALLER, ORIGIN)

    def numbered(n: int, state: str = "") -> bytes:
        return h.block(h.fields({h.EVENT: str(n), **({h.STATE: state} if state else {})}))

    made = [
        (
            subjects.task(agent, ids.slice_of(task), CALLER, task),
            h.block(h.fields({h.VERSION: h.A2A_VERSION, h.ORIGIN: ORIGIN})),
            pb.SendMessageRequest(message=sent).SerializeToString(),
        ),
        (subjects.claim(agent, task), h.block(), claim.encode()),
    ]
    status.status_update.status.state = pb.TASK_STATE_WORKING
    made.append((event, numbered(1, "working"), status.SerializeToString()))
    made.append((event, numbered(2), artifact.SerializeToString()))
    status.status_update.status.state = pb.TASK_STATE_COMPLETED
    made.append((event, numbered(3, "completed"), status.SerializeToString()))
    return made


async def write(mesh: BrokerMesh, agent: str, count: int) -> None:
    """Fill the stream with `count` finished tasks, delivered and acknowledged."""
    broker = await mesh.connect("coordinator")
    started = time.monotonic()
    try:
        for number in range(count):
            *most, (subject, headers, body) = messages(agent, number)
            for one, lines, data in most:
                broker.send(one, data, headers=lines)
            if number % CHUNK == CHUNK - 1 or number == count - 1:
                await broker.publish(subject, body, headers=headers)
                sys.stderr.write(f"\rwriting {count:,} finished tasks: {number + 1:,} ")
            else:
                broker.send(subject, body, headers=headers)
        info = await broker.api(f"STREAM.INFO.{STREAM}")
        if info["state"]["messages"] != 5 * count:
            raise RuntimeError(f"the stream holds {info['state']['messages']} messages instead of {5 * count}")
        await _acknowledge(broker, agent, count)
    finally:
        await broker.close()
    sys.stderr.write(f"\r{count:,} finished tasks written in {time.monotonic() - started:.0f} s\n")


async def _acknowledge(broker: Broker, agent: str, count: int) -> None:
    """Take the creating messages off the agent's work lane, as its replicas did."""
    done = asyncio.Event()
    left = count

    def take(delivery: Delivery) -> None:
        nonlocal left
        broker.send(delivery.ack, b"+ACK")
        left -= 1
        if left <= 0:
            done.set()
        elif left % 1000 == 0:
            pull.want(2000)

    pull = await PullLoop(broker, stream=STREAM, consumer=subjects.consumer(agent, "work"), handler=take).start()
    try:
        pull.want(2000)
        async with asyncio.timeout(120):
            await done.wait()
        await broker.flush()
    finally:
        await pull.stop()
