"""The same exchange hand-written on nats-py: one account, no claims, no fences, no recovery.

Task published with a message id and acknowledged, pulled from a work-queue stream, three events in flight
together, task acknowledged; the caller listens to the events' subjects.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import nats
import uvloop
from bench.processes import Child, Children
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import api

from weft.core.serverproc import find_binary, free_port

NEXT = "$JS.API.CONSUMER.MSG.NEXT.TASKS.echo"
WINDOW = 256


@asynccontextmanager
async def client(url: str) -> AsyncIterator[Callable[[str], Awaitable[str]]]:
    """A caller."""
    connection = await nats.connect(url)
    js = connection.jetstream()
    loop = asyncio.get_running_loop()
    waiting: dict[str, asyncio.Future[str]] = {}
    results: dict[str, str] = {}
    number = 0

    async def on_event(message: Msg) -> None:
        task = message.subject[3:]
        state = (message.headers or {}).get("State")
        if state == "artifact":
            results[task] = message.data.decode()
        elif state == "completed":
            waiting.pop(task).set_result(results.pop(task))

    async def one(text: str) -> str:
        nonlocal number
        number += 1
        task = f"t{number}"
        done: asyncio.Future[str] = loop.create_future()
        waiting[task] = done
        await js.publish(f"task.echo.{task}", text.encode(), headers={"Nats-Msg-Id": task}, timeout=30)
        return await done

    await connection.subscribe("ev.>", cb=on_event)
    await connection.flush()
    yield one
    await connection.close()


async def worker(url: str) -> None:
    """The agent's side."""
    connection = await nats.connect(url)
    js = connection.jetstream()
    inbox = connection.new_inbox()
    pull = json.dumps({"batch": WINDOW, "expires": 60_000_000_000}).encode()
    credit = WINDOW

    async def handle(message: Msg) -> None:
        subject = f"ev.{message.subject.rsplit('.', 1)[1]}"
        acks = [
            await js.publish_async(subject, data, headers={"State": state})
            for state, data in (("working", b""), ("artifact", message.data), ("completed", b""))
        ]
        await asyncio.gather(*acks)
        await message.ack()

    async with asyncio.TaskGroup() as group:

        async def on_message(message: Msg) -> None:
            nonlocal credit
            if message.reply:
                credit -= 1
                group.create_task(handle(message))
            if credit < WINDOW // 2 or not message.reply:
                credit = WINDOW if not message.reply else credit + WINDOW
                await connection.publish(NEXT, pull, reply=inbox)

        await connection.subscribe(inbox, cb=on_message)
        await connection.publish(NEXT, pull, reply=inbox)
        await connection.flush()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)


async def _connected(url: str) -> Client:
    """A connection to a server that is about to listen."""

    async def not_yet(error: Exception) -> None:
        """Nobody listens there yet; nats-py tries again."""

    async with asyncio.timeout(15):
        return await nats.connect(url, error_cb=not_yet, max_reconnect_attempts=-1, reconnect_time_wait=0)


@asynccontextmanager
async def processes(children: Children) -> AsyncIterator[tuple[str, Child, Child]]:
    """Broker and worker: (url, broker, worker)."""
    folder = Path(tempfile.mkdtemp(prefix="weft-bench-"))
    try:
        port = free_port()
        config = folder / "nats.conf"
        config.write_text(
            f'listen: "127.0.0.1:{port}"\njetstream {{ store_dir: "{folder}/js", sync_interval: "100ms" }}\n'
        )
        server = await children.start("floor broker", find_binary(), "-c", config, "-l", folder / "log")
        url = f"nats://127.0.0.1:{port}"
        connection = await _connected(url)
        js = connection.jetstream()
        await js.add_stream(
            api.StreamConfig(name="TASKS", subjects=["task.>"], retention=api.RetentionPolicy.WORK_QUEUE)
        )
        await js.add_stream(api.StreamConfig(name="EVENTS", subjects=["ev.>"]))
        await js.add_consumer(
            "TASKS",
            api.ConsumerConfig(
                durable_name="echo", ack_policy=api.AckPolicy.EXPLICIT, ack_wait=60, max_ack_pending=10_000
            ),
        )
        await connection.close()
        child = await children.python("floor worker", "bench.side_floor", url)
        await child.line()
        yield url, server, child
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    uvloop.run(worker(sys.argv[1]))
