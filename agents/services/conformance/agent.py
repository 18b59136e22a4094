"""What the public A2A conformance kit expects of a system under test: each message id's prefix says what to do.

An executor as the A2A SDK has them, hosted unchanged. See the kit's `scenarios/*.feature`.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from a2a.helpers import new_task_from_user_message
from a2a.server.agent_execution import AgentExecutor, RequestContext
from a2a.server.events import EventQueue
from a2a.server.tasks import TaskUpdater
from a2a.types import Part
from google.protobuf import json_format
from google.protobuf.struct_pb2 import Value

from weft.a2a import agent_from_executor

STREAMING_TIMEOUT: Final = float(os.environ.get("TCK_STREAMING_TIMEOUT", "2"))
"""Seconds; the kit's own setting of that name."""


class Conformance(AgentExecutor):
    """Does what the kit's scenarios describe."""

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        """Do what the message id's prefix asks for."""
        if context.message is None or context.task_id is None or context.context_id is None:
            raise ValueError("there is no message")
        message_id = context.message.message_id
        updater = TaskUpdater(event_queue, context.task_id, context.context_id)
        if message_id.startswith("tck-message-response"):
            await event_queue.enqueue_event(updater.new_agent_message([Part(text="Direct message response")]))
            return
        if context.current_task is None:
            await event_queue.enqueue_event(new_task_from_user_message(context.message))
        for prefix, act in _SCENARIOS.items():
            if message_id.startswith(prefix):
                await act(updater)
                return
        await updater.complete(updater.new_agent_message([Part(text=f"There is no scenario for {message_id}")]))

    async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
        """Cancel the task."""
        if context.task_id is not None and context.context_id is not None:
            await TaskUpdater(event_queue, context.task_id, context.context_id).cancel()


async def _hello(updater: TaskUpdater) -> None:
    await updater.complete(updater.new_agent_message([Part(text="Hello from TCK")]))


async def _chunks(updater: TaskUpdater) -> None:
    await updater.start_work()
    await updater.add_artifact([Part(text="chunk-1 ")], artifact_id="a1", append=False)
    await updater.add_artifact([Part(text="chunk-2")], artifact_id="a1", append=True, last_chunk=True)
    await updater.complete()


async def _long(updater: TaskUpdater) -> None:
    await updater.start_work()
    await asyncio.sleep(2 * STREAMING_TIMEOUT)
    await updater.complete()


def _artifact(part: Part, *, working: bool = False) -> Callable[[TaskUpdater], Awaitable[None]]:
    async def act(updater: TaskUpdater) -> None:
        if working:
            await updater.start_work()
        await updater.add_artifact([part])
        await updater.complete()

    return act


_FILE: Final = Part(raw=b"tck", media_type="text/plain", filename="output.txt")
_URL: Final = Part(url="https://example.com/output.txt", media_type="text/plain", filename="output.txt")
_DATA: Final = Part(data=json_format.ParseDict({"key": "value", "count": 42}, Value()))
_SCENARIOS: Final[dict[str, Callable[[TaskUpdater], Awaitable[None]]]] = {
    "tck-complete-task": _hello,
    "tck-artifact-text": _artifact(Part(text="Generated text content")),
    "tck-artifact-file-url": _artifact(_URL),
    "tck-artifact-file": _artifact(_FILE),
    "tck-artifact-data": _artifact(_DATA),
    "tck-input-required": TaskUpdater.requires_input,
    "tck-reject-task": TaskUpdater.reject,
    "tck-stream-artifact-chunked": _chunks,
    "tck-stream-artifact-text": _artifact(Part(text="Streamed text content"), working=True),
    "tck-stream-artifact-file": _artifact(_FILE, working=True),
    "tck-stream-ordering-001": _artifact(Part(text="Ordered output"), working=True),
    "tck-stream-001": _artifact(Part(text="Stream hello from TCK"), working=True),
    "tck-stream-002": TaskUpdater.complete,
    "tck-stream-003": _artifact(Part(text="Stream task lifecycle"), working=True),
    "test-resubscribe-message-id": _long,
}
"""By prefix of the message id; the longer of two that fit comes first."""

CARD: Final = Path(__file__).with_name("card.json")
EXTENDED: Final = json.loads(CARD.read_text()) | {"description": "The same, as callers with an identity see it"}
agent = agent_from_executor(Conformance(), CARD, extended_card=EXTENDED)
