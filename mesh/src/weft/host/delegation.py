"""What a handler has other agents do."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Coroutine, Mapping
from typing import Any, Final

from a2a.types import a2a_pb2 as pb

from weft.core import blobs
from weft.host import values
from weft.host.run import Child, Run
from weft_protocols import a2a, ids
from weft_protocols import headers as h
from weft_protocols.errors import (
    DeadlineExceeded,
    DeadlockError,
    StepChanged,
    TaskCanceled,
    TaskEnded,
    TaskFailed,
    TaskInterrupted,
    TaskRejected,
)
from weft_protocols.parts import TaskView
from weft_protocols.records import StepRecord
from weft_protocols.states import State

_ENDED: Final[dict[State, type[TaskEnded]]] = {
    State.FAILED: TaskFailed,
    State.REJECTED: TaskRejected,
    State.CANCELED: TaskCanceled,
    State.INPUT_REQUIRED: TaskInterrupted,
    State.AUTH_REQUIRED: TaskInterrupted,
}


class Delegating:
    """The part of `Task` that delegates."""

    _run: Run

    def delegate(
        self,
        agent: str,
        message: Any,
        *,
        skill: str | None = None,
        key: str | None = None,
        deadline: float | None = None,
        context_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Coroutine[Any, Any, TaskView]:
        """Have another agent do something, durably, and wait for its result without holding a slot.

        The child is the same on every attempt; its deadline is the earlier of the given one (seconds) and this
        task's; cancelling this task cancels it.

        Raises:
            TaskFailed, TaskRejected, TaskCanceled: the child ended so.
            TaskInterrupted: the child waits for input.
            DeadlineExceeded: it did not end in time.
        """
        journal_key = self._run.journal.key(key or f"delegate-{agent}", explicit=key is not None)
        options = {"skill": skill, "context_id": context_id or self._run.work.context_id, "metadata": metadata}
        return self._delegate(journal_key, agent, message=message, deadline=deadline, options=options)

    async def _delegate(
        self, key: str, agent: str, *, message: Any, deadline: float | None, options: dict[str, Any]
    ) -> TaskView:
        run = self._run
        digest = values.digest((agent, a2a.parts_of(message)), {})
        stored = await run.journal.read(key)
        if stored is not None:
            record = StepRecord.decode(stored.data)
            if record.input != digest:
                raise StepChanged(f"delegation {key!r} of task {self._run.task_id} is recorded with another input")
            return _outcome(a2a.view(pb.Task.FromString(record.value), agent=agent))
        message_id = ids.child_message_id(self._run.task_id, key)
        child_id = ids.task_id(run.mesh.caller, agent, message_id)
        child = run.children[child_id] = Child(agent, options["context_id"], message_id)
        await run.remember_children()
        left = self._time_left(deadline)
        try:
            with run.waits.working():
                handle = await run.mesh.submit(
                    agent,
                    message,
                    message_id=message_id,
                    deadline=left,
                    headers=self._passed_on(),
                    **options,
                )
            until = None if left is None else time.time() + left + 5.0
            async with handle, run.slot.waiting():
                with run.waits.open("child", (child_id,), key=key, until=until):
                    view = await handle.result(None if left is None else left + 5.0)
                    task = handle._watched.watch.task()
        except (asyncio.CancelledError, DeadlockError):
            if run.stop is None:
                await run.cancel_child(child_id, "its parent does not wait for it any more")
            raise
        if view.state.terminal:
            child.done = True
            if task.ByteSize() <= blobs.LIMIT * 2:
                await run.journal.write(key, StepRecord(key, digest, task.SerializeToString()).encode())
        run.last_progress = time.time()
        return _outcome(view)

    async def gather(self, *work: Awaitable[Any]) -> list[Any]:
        """Wait for several steps or delegations together; their results in order. The first error cancels the rest."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(_awaited(item)) for item in work]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        finally:
            for item in work:
                if inspect.iscoroutine(item):
                    item.close()  # one that was cancelled before it began would complain
        return [task.result() for task in tasks]

    def _time_left(self, given: float | None) -> float | None:
        own = None if self._run.work.deadline is None else self._run.work.deadline - time.time()
        if own is not None and own <= 0:
            raise DeadlineExceeded(f"the deadline of task {self._run.task_id} has passed")
        return given if own is None else own if given is None else min(own, given)

    def _passed_on(self) -> dict[str, str]:
        """Headers of a child: the delegation chain with this task at its end, and the trace it belongs to."""
        own = self._run.work.headers
        before, this = own.get("weft-chain", ""), f"{self._run.work.agent}/{self._run.task_id}"
        passed = {h.CHAIN: f"{before},{this}" if before else this}
        for name in (h.TRACEPARENT, h.TRACESTATE):
            if own.get(name):
                passed[name] = own[name]
        return passed


async def _awaited(item: Awaitable[Any]) -> Any:
    return await item


def _outcome(view: TaskView) -> TaskView:
    error = _ENDED.get(view.state)
    if error is None:
        return view
    said = f": {view.message.text}" if view.message is not None and view.message.text else ""
    raise error(f"task {view.id} of {view.agent} {view.state.label}{said}", task_id=view.id, agent=view.agent)
