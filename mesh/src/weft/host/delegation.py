"""What a handler has other agents do."""

from __future__ import annotations

from collections.abc import Awaitable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from a2a.types import a2a_pb2 as pb

from weft.host import gathering
from weft.host.child import Delegation, Order
from weft.host.run import Run
from weft_protocols import budgets, records
from weft_protocols.errors import UsageError
from weft_protocols.parts import Part, TaskView


class Delegating:
    """The part of `Task` that delegates."""

    _run: Run

    if TYPE_CHECKING:

        async def _question(
            self, key: str, parts: Sequence[Part], auth: bool, metadata: dict[str, Any], timeout: float | None = None
        ) -> pb.Message:
            """Ask the caller, under a journal key; `Waiting` has it."""
            ...

    @property
    def budget(self) -> dict[str, float]:
        """What this task and everything it delegates may spend, by name: `tokens`, `usd`, ..."""
        told = self._run.work.headers.get("weft-budget", "")
        return {name: float(limit) for name, limit in budgets.parse(told).items()} if told else {}

    def delegate(  # noqa: PLR0913 - each option of a delegation, with its default
        self,
        agent: str | None = None,
        message: Any = None,
        *,
        skill: str | None = None,
        fallback: Sequence[str] = (),
        relay: bool = True,
        key: str | None = None,
        deadline: float | None = None,
        budget: Mapping[str, float] | None = None,
        context_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Coroutine[Any, Any, TaskView]:
        """Have another agent do something, durably, and wait for its result without holding a slot.

        The child is the same on every attempt; cancelling this task cancels it.

        Args:
            agent: its name. Without one, the coordinator chooses among the agents that have `skill`.
            message: text, bytes, a part, several parts, or any JSON value.
            skill: the skill to run.
            fallback: agents to try in turn where the one before does not exist, its circuit is open, or its task
                left a dead letter.
            relay: whether what the child asks is asked of this task's caller, and the answer sent to the child.
            key: names the delegation in the journal; by default its agent, or skill, and an ordinal.
            deadline: seconds; never later than this task's own.
            budget: limits by name, such as `{"tokens": 1000}`. They only lower those this task has.
            context_id: the conversation; this task's by default.
            metadata: of the message.

        Raises:
            TaskFailed, TaskRejected, TaskCanceled: the child ended so.
            TaskInterrupted: the child waits for input, and `relay` is False.
            DeadlineExceeded: it did not end in time.
            DelegationLoop: the chain of delegations would be too long, or go in circles.
            CircuitOpen: too many calls of the agent failed; `retry_after` says when it is tried again.
            AgentNotFound, Unavailable: no agent has the skill; none that has it is ready.
        """
        if not agent and not skill:
            raise UsageError("delegate needs the name of an agent, or a skill: task.delegate(skill='translate', ...)")
        if message is None:
            raise UsageError(f"delegate to {agent or skill} needs a message")
        name = f"delegate-{agent}" if agent else f"delegate-skill-{skill}"
        order = Order(
            key=self._run.journal.key(key or name, explicit=key is not None),
            agent=agent or "",
            skill=skill,
            message=message,
            fallback=tuple(fallback),
            relay=relay,
            deadline=deadline,
            budget=budget,
            context_id=context_id or self._run.work.context_id,
            metadata=metadata,
        )
        work = Delegation(self._run, order, ask=self._question).result()
        self._run.name(work, order.key)
        return work

    def gather(self, *work: Awaitable[Any], wait: gathering.Wait = "all") -> Coroutine[Any, Any, list[Any]]:
        """Wait for several steps or delegations together, as many as `wait` says; their results, in their order.

        With `all`, every one has to succeed, and the first error cancels the rest. With `first`, or a number, that
        many have to succeed: the rest is cancelled, with the children it has. Which ones counted is recorded.

        Raises:
            UsageError: `wait` is not possible.
            the first error that happened, once too many failed; all of them are in its `__cause__`.
        """
        run = self._run
        try:
            need = gathering.needed(wait, len(work))
        except UsageError:
            gathering.close(run, work)
            raise
        if need == len(work):
            made = gathering.together(run, work)
        else:
            made = gathering.enough(run, run.journal.own_key(records.GATHER_KEY), work, need=need)
        run.name(made, work)
        return made

    async def first(self, *work: Awaitable[Any]) -> Any:
        """The result of the first of several steps or delegations that succeeds; see `gather`."""
        (result,) = await self.gather(*work, wait="first")
        return result
