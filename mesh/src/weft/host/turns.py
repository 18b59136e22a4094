"""What an agent sees that answers with A2A events of its own: executors of the A2A SDK, bridges to other agents.

Such an agent registers one handler (`Agent.on_turn`), which is called once for each message: for the one that creates
the task, and again for each follow-up. One call is a turn. A turn that leaves its task in an interrupted state and
returns lets go of it: nothing stays in memory until the next message, which any replica may answer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeAlias

from a2a.types import a2a_pb2 as pb

from weft_protocols.states import State

if TYPE_CHECKING:
    from weft.client.mesh import Mesh

A2AEvent: TypeAlias = pb.Message | pb.Task | pb.TaskStatusUpdateEvent | pb.TaskArtifactUpdateEvent
"""What a handler may emit."""


@dataclass(slots=True, eq=False)
class Turn:
    """One message and what answers it. Good until the handler returns.

    When a replica dies, another one runs the turn again from its beginning: with the same number, request and task,
    and with what `remember` stored. What was emitted before stays in the log.
    """

    number: int
    """1 for the message that created the task."""
    request: pb.SendMessageRequest
    """With `message.task_id` and `message.context_id` filled in, and large parts put back."""
    headers: Mapping[str, str]
    """Headers of the stored message, names in lower case: `traceparent`, `authorization`, …"""
    task: pb.Task | None
    """The task as it was when this turn began, the messages of both sides in its history; None in the first."""
    agent: str
    """Name of the agent."""
    task_id: str
    context_id: str
    """The conversation it belongs to."""
    caller: str
    """Who sent the message, as the broker stamped it."""
    origin: str
    """The client process the task's events go to."""
    replica: str
    """Id of the replica that runs the turn."""
    attempt: int
    """Number of this attempt at the task, from 1: greater where a replica was lost on the way."""
    deadline: float | None
    """Unix seconds after which the task is failed, or None."""
    mesh: Mesh
    """The agent as a caller of other agents."""
    _writer: Writer = field(repr=False)

    @property
    def extensions(self) -> frozenset[str]:
        """URIs of the extensions the sender of this message asked for."""
        return extensions_in(self.headers)

    @property
    def tenant(self) -> str:
        """`tenant` of the request."""
        return self.request.tenant

    @property
    def state(self) -> State:
        """State the last event left the task in; UNSPECIFIED before the first one."""
        return self._writer.state

    @property
    def ended(self) -> bool:
        """Whether the task has ended. What is emitted then is dropped."""
        return self._writer.ended

    @property
    def cancel_reason(self) -> str:
        """In the cancel hook: why the task is cancelled, where its caller said so."""
        return self._writer.cancel_reason

    def now(self) -> pb.Task:
        """The task as its log describes it now: a copy."""
        return self._writer.now()

    async def emit(self, event: A2AEvent) -> None:
        """Append an event to the task's log, as it is; empty task and context ids are filled in.

        Returns at once, or once it is stored where the event ends the task. A `Task` is taken as the status, artifacts
        and messages in it that the log does not have. After the end, and while the replica leaves, events are dropped.

        Raises:
            InvalidAgentResponse: the event cannot follow, or is of another task.
            TooLarge: the broker does not take an event of that size.
            Fenced: another replica owns the task now; stop.
        """
        await self._writer.write(event)

    async def remember(self, key: str, value: bytes) -> bytes:
        """Store `value` under a key of this task, unless there is one; the stored value, whoever was first.

        Durable when this returns, and refused (`Fenced`) once another replica owns the task. Keys belong to the task,
        not to the turn; they must not begin with `_`.
        """
        return await self._writer.remember(key, value)

    async def note(self, key: str, value: bytes) -> None:
        """Store `value` under a key of this task in place of the one before, once all that was emitted is stored.

        A turn that is being stopped notes nothing more.
        """
        await self._writer.note(key, value)

    async def recall(self, key: str) -> bytes | None:
        """The value remembered or noted under a key of this task, also in an earlier turn or by another replica."""
        return await self._writer.recall(key)


@dataclass(frozen=True, slots=True)
class Turns:
    """How an agent answers messages itself; see `Agent.on_turn`."""

    answer: Callable[[Turn], Awaitable[None]]
    cancel: Callable[[Turn], Awaitable[None]] | None = None
    """Called when a task is cancelled or its deadline passes, while its turn still runs or between two turns."""
    retry: bool = False
    """Whether a turn that raised is tried again, as a skill is; else the task fails at once."""
    source: str = ""
    """File with the agent's code."""


class Writer(Protocol):
    """What a turn needs of whoever runs it."""

    @property
    def state(self) -> State:
        """State the last event left the task in."""
        ...

    @property
    def ended(self) -> bool:
        """Whether the task has ended."""
        ...

    @property
    def cancel_reason(self) -> str:
        """Why the task is cancelled."""
        ...

    def now(self) -> pb.Task:
        """The task as its log describes it."""
        ...

    async def write(self, event: A2AEvent) -> None:
        """Append an event."""
        ...

    async def remember(self, key: str, value: bytes) -> bytes:
        """Store a value; the first one."""
        ...

    async def note(self, key: str, value: bytes) -> None:
        """Store a value; the last one, after the events before it."""
        ...

    async def recall(self, key: str) -> bytes | None:
        """Read a value."""
        ...


def extensions_in(headers: Mapping[str, str]) -> frozenset[str]:
    """URIs in `A2A-Extensions`."""
    return frozenset(uri for item in headers.get("a2a-extensions", "").split(",") if (uri := item.strip()))


__all__ = ["A2AEvent", "Turn", "Turns", "Writer", "extensions_in"]
