"""An executor of the A2A SDK that tests run in processes of its own, as the agent WEFT_IDENTITY names."""

from __future__ import annotations

import os

from a2a.helpers import new_task_from_user_message
from a2a.server.agent_execution import AgentExecutor, RequestContext
from a2a.server.events import EventQueue
from a2a.server.tasks import TaskUpdater
from a2a.types import Part

from weft.a2a import agent_from_executor
from weft.testing.scratch import Scratch


class Traced(AgentExecutor):
    """Leaves a line for each call, and waits at the gate its message names."""

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        scratch, text = Scratch.here(), context.get_user_input()
        task = context.current_task
        scratch.leave("execute", text, len(task.history) if task else 0, os.getpid())
        updater = TaskUpdater(event_queue, context.task_id or "", context.context_id or "")
        if task is None and context.message is not None:
            await event_queue.enqueue_event(new_task_from_user_message(context.message))
        await updater.start_work()
        await updater.add_artifact([Part(text=text)], artifact_id=text)
        if text.startswith("gate"):
            await scratch.passed(text)
        if text == "end":
            await updater.complete()
        else:
            await updater.requires_input(updater.new_agent_message([Part(text=f"after {text}")]))

    async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
        scratch, gate = Scratch.here(), os.environ.get("AT_CANCEL")
        scratch.leave("cancel", context.task_id, os.getpid())
        if gate:
            await scratch.passed(gate)
        await TaskUpdater(event_queue, context.task_id or "", context.context_id or "").cancel()


def nobody() -> None:
    """No executor."""


executor = Traced()
agent = agent_from_executor(
    executor,
    {"name": "traced", "description": "Used by tests", "version": "1.0.0"},
    name=os.environ.get("WEFT_IDENTITY", "traced"),
)
