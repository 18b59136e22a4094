"""One delegation: an agent is chosen, the child is sent and followed to its end, and its questions are passed on.

All of it can be done again by a later attempt: the child's id is derived, the choice and the answers are recorded.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from a2a.types import a2a_pb2 as pb

from weft.client import content
from weft.client.mesh import Handle
from weft.core import blobs
from weft.host import chain, values
from weft.host.choice import Choice
from weft.host.run import Child, Run
from weft_protocols import a2a, budgets, ids, records
from weft_protocols import headers as h
from weft_protocols.errors import (
    A2AError,
    AgentNotFound,
    CircuitOpen,
    DeadlineExceeded,
    DeadlockError,
    DelegationLoop,
    StepChanged,
    TaskCanceled,
    TaskEnded,
    TaskFailed,
    TaskInterrupted,
    TaskRejected,
    WeftError,
)
from weft_protocols.parts import Part, TaskView
from weft_protocols.records import StepRecord
from weft_protocols.states import State

LEFT: Final = "its parent does not wait for it any more"
"""Why a child is cancelled."""
PATIENCE: Final = 5.0
"""Seconds a child has beyond its deadline for its host's own word on it."""
ASKED_BY: Final = "weft.asked_by"
"""Metadata of a question that is passed on: `agent/task` of who asked it first."""
PATH: Final = "weft.path"
"""The `agent/task` items from the child of the task that passes it on down to who asked."""
_ENDED: Final[dict[State, type[TaskEnded]]] = {
    State.FAILED: TaskFailed,
    State.REJECTED: TaskRejected,
    State.CANCELED: TaskCanceled,
    State.INPUT_REQUIRED: TaskInterrupted,
    State.AUTH_REQUIRED: TaskInterrupted,
}
Asker = Callable[[str, Sequence[Part], bool, dict[str, Any]], Awaitable[pb.Message]]
"""Asks this task's caller: under a journal key, these parts, for authorisation or not, with metadata."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is to be done, by whom, and how."""

    key: str
    """Journal key."""
    agent: str
    """Empty where any agent with the skill will do."""
    skill: str | None
    message: Any
    fallback: tuple[str, ...]
    relay: bool
    deadline: float | None
    """Seconds."""
    budget: Mapping[str, float] | None
    context_id: str
    metadata: Mapping[str, Any] | None

    @property
    def digest(self) -> str:
        """Of the input, which must be the same on every attempt."""
        return values.digest((self.agent or f"skill {self.skill}", a2a.parts_of(self.message)), {})


class Delegation:
    """One delegation of a run."""

    def __init__(self, run: Run, order: Order, *, ask: Asker) -> None:
        self._run = run
        self._order = order
        self._ask = ask
        self._choice = Choice(run, order.key, agent=order.agent, skill=order.skill or "", fallback=order.fallback)
        self._digest = order.digest
        self._dead = False
        """Whether the child that ended last left a dead letter."""

    async def result(self) -> TaskView:
        """The child's result; raises what `Task.delegate` does."""
        run, key = self._run, self._order.key
        stored = await run.journal.read(key)
        if stored is not None:
            record = StepRecord.decode(stored.data)
            if record.input != self._digest:
                raise StepChanged(f"delegation {key!r} of task {run.task_id} is recorded with another input")
            task = await content.expand_task(run.mesh.broker, pb.Task.FromString(record.value))
            return _outcome(a2a.view(task, agent=await self._choice.recorded()))
        view, task = await self._done(await self._choice.first())
        if view.state.terminal and task.ByteSize() <= blobs.LIMIT * 2:
            await run.journal.write(key, StepRecord(key, self._digest, task.SerializeToString()).encode())
        run.last_progress = time.time()
        return _outcome(view)

    async def _done(self, agent: str) -> tuple[TaskView, pb.Task]:
        """The child of the agent, or of the first of the fallbacks that does it."""
        while True:
            try:
                view, task = await self._child(agent)
                if not self._dead or not self._choice.has_others(agent):
                    return view, task
                error: WeftError = TaskFailed(_said(view), task_id=view.id, agent=agent)
            except (CircuitOpen, AgentNotFound) as failed:
                error = failed
            agent = await self._choice.after(agent, error)

    async def _child(self, agent: str) -> tuple[TaskView, pb.Task]:
        """Send a child and follow it to where it stops."""
        run, order = self._run, self._order
        left = self._time_left()
        message_id, child_id = await self._identity(agent)
        headers = self._headers(agent, known=child_id in run.children)
        child = run.children.get(child_id)
        if child is None:
            await self._choice.check(agent)
            child = run.children[child_id] = Child(agent, order.context_id, message_id)
        await run.remember_children()
        until = None if left is None else time.time() + left
        try:
            view, task = await self._sent(agent, message_id, headers=headers, until=until)
        except (asyncio.CancelledError, DeadlockError):
            self._choice.nothing_learned(agent)
            if run.stop is None:
                await run.leave_child(child_id, LEFT)
            raise
        except DeadlineExceeded:
            self._choice.learned(agent, failed=True)
            raise
        except A2AError as error:
            self._choice.learned(agent, failed=False)
            child.done = True
            raise chain.loop_of(error) or error from None
        late = view.state is State.FAILED and until is not None and time.time() >= until
        self._choice.learned(agent, failed=self._dead or late)
        child.done = view.state.terminal
        return view, task

    async def _identity(self, agent: str) -> tuple[str, str]:
        """messageId and task id of the child: the same on every attempt that waits for it.

        Those before it, which were left, are told so again: who left them may have had no time to.
        """
        run = self._run
        for message_id, child_id in candidates(run, agent, self._order.key):
            known = run.children.get(child_id)
            if known is None or not known.left:
                return message_id, child_id
            await run.cancel_child(child_id, LEFT)
        raise AssertionError("there is always one more")

    async def _sent(
        self, agent: str, message_id: str, *, headers: dict[str, str], until: float | None
    ) -> tuple[TaskView, pb.Task]:
        order = self._order
        with self._run.waits.working():
            handle = await self._run.mesh.submit(
                agent,
                order.message,
                message_id=message_id,
                deadline=None if until is None else until - time.time(),
                headers=headers,
                skill=order.skill,
                context_id=order.context_id,
                metadata=order.metadata,
            )
        async with handle:
            view = await self._followed(handle, None if until is None else until + PATIENCE)
            self._dead = handle.dead_letter
            return view, handle._watched.watch.task()

    def _headers(self, agent: str, *, known: bool) -> dict[str, str]:
        """Headers of a child; a loop that can be seen from here is raised, unless the child was sent before."""
        run, own = self._run, self._run.work.headers
        call = chain.call(run.work.agent, agent, skill=self._order.skill or "", digest=self._digest)
        way = chain.Chain.of(own).through(run.work.agent, run.task_id, call=call)
        times = run.calls[call] = run.calls.get(call, 0) + 1
        if not known:
            if times > chain.BREADTH:
                raise DelegationLoop(
                    f"task {run.task_id} made the same call of {agent} more than {chain.BREADTH} times",
                    kind="repetition",
                    chain=way.told,
                )
            # Whether another agent takes part in a circle is its own word.
            way.check(agent, max_hops=run.agent.max_hops, reentrant=agent != run.work.agent or run.agent.reentrant)
        passed = way.headers()
        budget = own.get("weft-budget", "")
        if self._order.budget:
            budget = budgets.lowered(budget, self._order.budget)
        if budget:
            passed[h.BUDGET] = budget
        for name in (h.TRACEPARENT, h.TRACESTATE):
            if own.get(name):
                passed[name] = own[name]
        return passed

    def _time_left(self) -> float | None:
        run, given = self._run, self._order.deadline
        own = None if run.work.deadline is None else run.work.deadline - time.time()
        if own is not None and own <= 0:
            raise DeadlineExceeded(f"the deadline of task {run.task_id} has passed")
        return given if own is None else own if given is None else min(own, given)

    async def _followed(self, handle: Handle, until: float | None) -> TaskView:
        """The child when it ended; its questions are asked on the way, where they are to be passed on."""
        run, order = self._run, self._order
        answered: set[str] = set()
        while True:
            async with run.slot.waiting():
                with run.waits.open("child", (handle.id,), key=order.key, until=until) as wait:
                    wait.seen[handle.id] = handle.since
                    view = await handle.result(None if until is None else max(0.0, until - time.time()))
            if not view.state.interrupted or not order.relay:
                return view
            question = handle.question
            # One that was answered and is asked again comes of a takeover: the answer is on its way.
            if question not in answered:
                answered.add(question)
                await self._relay(handle, view, question=question)
            handle.go_on()

    async def _relay(self, handle: Handle, view: TaskView, *, question: str) -> None:
        """Ask this task's caller what the child asks, and send the child the answer."""
        run, key = self._run, self._order.key
        told = handle.told
        who = f"{handle.agent}/{handle.id}"
        below = [str(item) for item in told.get(PATH, ())] if isinstance(told.get(PATH), list) else []
        metadata = {**told, ASKED_BY: below[-1] if below else who, PATH: [who, *below]}
        parts = view.message.parts if view.message is not None else ()
        auth = view.state is State.AUTH_REQUIRED
        answer = await self._ask(f"{records.ANSWER_KEY}-{key}-{question}", parts, auth, metadata)
        message = pb.Message(
            message_id=ids.child_message_id(run.task_id, f"{key} {question}"), role=pb.ROLE_USER, parts=answer.parts
        )
        if answer.HasField("metadata"):
            message.metadata.CopyFrom(answer.metadata)
        with run.waits.working():
            await handle.reply(pb.SendMessageRequest(message=message))


def candidates(run: Run, agent: str, key: str) -> Iterator[tuple[str, str]]:
    """messageId and task id of a delegation's first child, of the one that is sent where that was left, and so on."""
    for number in itertools.count():
        message_id = ids.child_message_id(run.task_id, f"{key} again {number}" if number else key)
        yield message_id, ids.task_id(run.mesh.caller, agent, message_id)


def _said(view: TaskView) -> str:
    said = f": {view.message.text}" if view.message is not None and view.message.text else ""
    return f"task {view.id} of {view.agent} {view.state.label}{said}"


def _outcome(view: TaskView) -> TaskView:
    error = _ENDED.get(view.state)
    if error is None:
        return view
    raise error(_said(view), task_id=view.id, agent=view.agent)
