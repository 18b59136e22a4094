"""One task on one replica, under one claim: what is shared between the handler's view and the replica's.

`Run` knows how the task may stop and writes the event that says so; it decides nothing about deliveries.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol
from weakref import WeakKeyDictionary

from a2a.types import a2a_pb2 as pb

from weft.client import content
from weft.core import blobs
from weft.host.circuits import Circuits
from weft.host.fence import Fence
from weft.host.held import Granting, Holding
from weft.host.journal import Journal
from weft.host.log import EventLog
from weft.host.rollback import Rollback
from weft.host.slots import SlotHold
from weft.host.waits import Waits
from weft_protocols import a2a, records, subjects
from weft_protocols import headers as h
from weft_protocols.errors import A2AError, BrokerError, Fenced
from weft_protocols.parts import Message, Part
from weft_protocols.records import Claim
from weft_protocols.states import State

if TYPE_CHECKING:
    from weft.client.mesh import Mesh
    from weft.core.pull import Delivery
    from weft.host.agent import Agent


TURN_KEY: Final = "_turn"
SAID_KEY: Final = "_note-said"


def sequence_in(ack: str) -> int:
    """Stream sequence in an acknowledgement subject, 0 where there is none."""
    tokens = ack.split(".")
    return int(tokens[5]) if len(tokens) > 5 else 0


class Stop(enum.Enum):
    """Why a handler is being stopped from outside."""

    CANCEL = "cancel"
    FENCED = "fenced"
    BROKEN = "broken"
    DRAIN = "drain"
    SUSPEND = "suspend"


@dataclass(frozen=True, slots=True)
class Awaited:
    """What a task waits for between two turns, as its claim says it (`Claim.waiting`)."""

    turn: int
    """Number of the turn that the next message begins."""
    snapshot: str
    """Step key of the task as it is until then."""
    attempt: int
    """Of the claim that let go of it: what was lost in earlier turns does not count against later ones."""

    def __str__(self) -> str:
        return f"{turn_key(self.turn)} {self.snapshot} {self.attempt}"

    @staticmethod
    def parse(waiting: str) -> Awaited | None:
        """What `waiting` says; None where the task waits for nothing, or for the answer to a question."""
        key, _, rest = waiting.partition(" ")
        snapshot, _, attempt = rest.partition(" ")
        name, _, number = key.rpartition("-")
        if name != TURN_KEY or not number.isdigit() or not attempt.isdigit():
            return None
        return Awaited(int(number), snapshot, int(attempt))


def turn_key(number: int) -> str:
    """Step key of the record that says which message a turn answers."""
    return f"{TURN_KEY}-{number}"


@dataclass(slots=True)
class Input:
    """A follow-up message that was delivered to the owner of its task."""

    sequence: int
    request: pb.SendMessageRequest
    delivery: Delivery
    headers: dict[str, str]

    @property
    def proto(self) -> pb.Message:
        """The message as A2A has it."""
        return self.request.message

    @property
    def message(self) -> Message:
        """The message as a plain value."""
        return a2a.message_from_proto(self.proto)


@dataclass(slots=True)
class Child:
    """A task this one delegated."""

    agent: str
    context: str
    message_id: str
    done: bool = False
    left: bool = False
    """Whether this task stopped waiting for it and cancelled it: a later attempt sends another one in its place."""


@dataclass(slots=True)
class Work:
    """The message a run works on, and what its headers say."""

    agent: str
    task_id: str
    caller: str
    origin: str
    slice: str
    request: pb.SendMessageRequest
    headers: dict[str, str]
    raw: bytes
    """The stored request, kept for a resume."""
    raw_headers: bytes
    sequence: int

    @property
    def context_id(self) -> str:
        """The conversation; the task's own id where the caller named none."""
        return self.request.message.context_id or self.task_id

    @property
    def accept(self) -> str:
        """Content type of the events the caller wants."""
        return h.JSON if self.headers.get("accept", "").startswith(h.JSON) else h.PROTOBUF

    @property
    def deadline(self) -> float | None:
        """Unix seconds, or None."""
        value = self.headers.get("weft-deadline", "")
        return int(value) / 1000 if value.isdigit() else None


class Told(Protocol):
    """An agent that answers message by message, and is told when its task is ended from outside."""

    @property
    def cancellable(self) -> bool:
        """Whether a turn runs, and the agent wants to be told."""
        ...

    async def cancelled(self, grace: float) -> None:
        """Tell it that its task is cancelled, then stop the turn that runs."""
        ...

    async def over(self, grace: float) -> None:
        """Tell it that its task has ended."""
        ...


@dataclass(slots=True)
class Run:
    """A task that this replica owns."""

    work: Work
    agent: Agent
    mesh: Mesh
    fence: Fence
    replica: str
    log: EventLog
    journal: Journal
    slot: SlotHold
    settle: Callable[[str], None]
    """Acknowledges a delivery."""
    threads: Executor
    """Where synchronous handlers and steps run."""
    session: Granting
    """Where locks are asked for."""
    waits: Waits
    """What it waits for."""
    circuits: Circuits
    """Whom it may call."""
    parts: tuple[Part, ...] = ()
    skill: str = ""
    """Id of the skill at work; empty before it is chosen, and where its agent answers message by message."""
    inbox: list[Input] = field(default_factory=list)
    history: list[pb.Message] = field(default_factory=list)
    said: list[pb.Message] = field(default_factory=list)
    """Messages that were no answers, from before the task was suspended."""
    known: set[str] = field(default_factory=set)
    """Ids of messages that earlier turns answered."""
    conversation: Told | None = None
    """Where its agent answers message by message."""
    written: list[pb.StreamResponse] = field(default_factory=list)
    """Events of this attempt, for the snapshot of an interruption."""
    base: pb.Task | None = None
    """Snapshot of what earlier attempts wrote."""
    partial: bool = False
    """Whether an earlier attempt wrote events that are known here by no snapshot."""
    children: dict[str, Child] = field(default_factory=dict)
    listed: int = 0
    """How many of them are stored."""
    listing: asyncio.Lock | None = None
    rollback: Rollback | None = None
    """What would be undone, once that is known."""
    concluding: asyncio.Lock | None = None
    """Held while its end is being written; then no cancel changes it any more."""
    calls: dict[str, int] = field(default_factory=dict)
    """How often it made each call, by the call's digest."""
    named: WeakKeyDictionary[Any, str | tuple[Any, ...]] | None = None
    """Journal key of each delegation that the handler holds, and the work of each `gather`."""
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a question waits for its answer: one at a time."""
    deliveries: list[str] = field(default_factory=list)
    """Acknowledgement subjects this run answers for; signed in progress while it runs."""
    resumed: Input | None = None
    waiting: str = ""
    """Key of what a suspended task waits on: of a question, if there is one."""
    asked: int = 0
    """Stream sequence up to which follow-ups are known to a suspended task: what was sent later wakes it."""
    claimed: int = field(init=False)
    """Sequence of the claim with which this attempt began; it may renew it."""
    locks: list[Holding] = field(default_factory=list)
    """Locks in whose blocks it is."""
    enters: bool = False
    """Whether it ever asked for a lock to be let in where it holds it, or who delegated it."""
    barred: str = ""
    """Why it must not begin."""
    stop: Stop | None = None
    stop_reason: str = ""
    cancel_sequence: int = 0
    runner: asyncio.Task[Any] | None = None
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    decided: dict[str, asyncio.Event] = field(default_factory=dict)
    """Approvals that are waited for here, or soon will be, by id: set when there may be a decision."""
    force: asyncio.TimerHandle | None = None
    last_progress: float = field(default_factory=time.time)
    steps: dict[str, float] = field(default_factory=dict)
    """Steps whose body runs, by key, and since when: unix seconds."""
    tokens: list[str] = field(default_factory=list)
    """Ids of bearer tokens that were issued to this attempt, and end with it."""
    ended: bool = False

    def __post_init__(self) -> None:
        self.claimed = self.fence.token

    @property
    def task_id(self) -> str:
        """The task's id."""
        return self.work.task_id

    @property
    def claim(self) -> Claim:
        """The claim it runs under."""
        return self.fence.claim

    @property
    def tries(self) -> int:
        """Number of this attempt since the task last waited between two turns, from 1."""
        awaited = Awaited.parse(self.claim.waiting) if self.claim.waiting else None
        return self.claim.attempt - (awaited.attempt - 1 if awaited is not None else 0)

    def interrupt(self, stop: Stop, reason: str = "", *, at_once: bool = True) -> bool:
        """Stop the handler at its next await, or leave that to the caller; False if it is being stopped already."""
        if self.log.closed or (self.stop is not None and self.stop is not Stop.DRAIN):
            return False  # the event that ends the task is on its way already
        if self.concluding is not None and stop is Stop.CANCEL:
            return False  # it is being rolled back
        self.stop, self.stop_reason = stop, reason
        self.slot.leaving = True
        if self.runner is not None and at_once:
            self.runner.cancel(f"task {self.task_id}: {stop.value}")
        return True

    def name(self, work: Any, what: str | tuple[Any, ...]) -> None:
        """Remember what a coroutine that the handler gets stands for, as long as there is one."""
        if self.named is None:
            self.named = WeakKeyDictionary()
        self.named[work] = what

    def give(self, given: Input) -> None:
        """Take a follow-up that was delivered for this task."""
        self.deliveries.append(given.delivery.ack)
        self.inbox.append(given)
        self.history.append(given.proto)
        self.arrived.set()

    def knows(self, message_id: str) -> bool:
        """Whether a message of the caller is known already: it was delivered before, or is recorded."""
        return message_id in self.known or any(message.message_id == message_id for message in self.history)

    async def remember_said(self) -> None:
        """Store the messages that a suspension acknowledges and no answer records, so that they stay history."""
        import msgpack

        new = [given.proto for given in self.inbox if given.sequence <= self.asked]
        if new:
            self.said += new
            await self.journal.replace(SAID_KEY, bytes(msgpack.packb([one.SerializeToString() for one in self.said])))

    async def recall_said(self) -> None:
        """Read them back."""
        import msgpack

        stored = await self.journal.read(SAID_KEY)
        if stored is not None:
            self.said = [pb.Message.FromString(one) for one in msgpack.unpackb(stored.data)]
            self.history += self.said

    def recall(self, answer: pb.Message) -> None:
        """An answer that an earlier attempt recorded: should it be delivered again, it is history."""
        if not self.knows(answer.message_id):
            self.history.append(answer)
        for given in [given for given in self.inbox if given.proto.message_id == answer.message_id]:
            self.inbox.remove(given)
            self.consumed(given)

    def consumed(self, given: Input) -> None:
        """A follow-up is recorded: acknowledge it, unless its delivery is the work itself."""
        if given.delivery.ack in self.deliveries[1:]:
            self.deliveries.remove(given.delivery.ack)
            self.settle(given.delivery.ack)

    def take_input(self, after: int) -> Input | None:
        """The first follow-up whose stream sequence is beyond `after`."""
        for i, given in enumerate(self.inbox):
            if given.sequence > after:
                return self.inbox.pop(i)
        return None

    async def status(
        self,
        state: State,
        parts: Sequence[Part] = (),
        *,
        metadata: dict[str, Any] | None = None,
        extra: bytes = b"",
    ) -> int:
        """Write a status event; its number."""
        event = self.status_event(state, parts, metadata=metadata)
        self.note(event)
        return await self.log.post(event, state=state, extra=extra)

    def status_event(
        self, state: State, parts: Sequence[Part] = (), *, metadata: dict[str, Any] | None = None
    ) -> pb.StreamResponse:
        """A status event of this task."""
        event = pb.StreamResponse()
        update = event.status_update
        update.task_id = self.work.task_id
        update.context_id = self.work.context_id
        update.status.state = a2a.state_to_proto(state)
        seconds, nanos = divmod(time.time_ns(), 1_000_000_000)
        update.status.timestamp.seconds = seconds
        update.status.timestamp.nanos = nanos
        if parts:
            message = update.status.message
            message.message_id = f"{self.work.task_id}-{self.log.last + 1}"
            message.task_id = self.work.task_id
            message.context_id = self.work.context_id
            message.role = pb.ROLE_AGENT
            message.parts.extend(a2a.part_to_proto(part) for part in parts)
        if metadata:
            update.metadata.update(metadata)
        return event

    def note(self, event: pb.StreamResponse) -> None:
        """Remember an event for a snapshot, and that there was progress."""
        self.written.append(event)
        self.last_progress = time.time()

    async def artifact(self, artifact: pb.Artifact, *, append: bool = False, last_chunk: bool = True) -> int:
        """Write an artifact, or a chunk of one; the event's number."""
        if artifact.ByteSize() > blobs.LIMIT:
            parts = await content.shrink(self.mesh.broker, artifact.parts)
            del artifact.parts[:]
            artifact.parts.extend(parts)
        event = pb.StreamResponse()
        update = event.artifact_update
        update.task_id = self.work.task_id
        update.context_id = self.work.context_id
        update.artifact.CopyFrom(artifact)
        update.append = append
        update.last_chunk = last_chunk
        self.note(event)
        return await self.log.post(event)

    async def finish(
        self,
        state: State,
        parts: Sequence[Part] = (),
        *,
        error: A2AError | None = None,
        dead: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Write the terminal event; returns when it is stored."""
        extra: dict[str, str] = {}
        if error is not None:
            extra[h.ERROR] = error.reason
            metadata = {**(metadata or {}), "weft.error": {"reason": error.reason, **error.metadata}}
            if error.violations:
                metadata["weft.error"]["violations"] = {v.field: v.description for v in error.violations}
        if dead:
            extra[h.DEAD_LETTER] = "1"
        event = self.status_event(state, parts, metadata=metadata)
        self.journal.closed = True
        await self.log.finish(event, label=state.label, extra=h.fields(extra) if extra else b"")
        self.ended = True

    async def answer(self, parts: Sequence[pb.Part]) -> None:
        """End the task with one message and nothing else; returns when it is stored."""
        event = pb.StreamResponse()
        message = event.message
        message.message_id = f"{self.work.task_id}-answer"
        message.task_id = self.work.task_id
        message.context_id = self.work.context_id
        message.role = pb.ROLE_AGENT
        message.parts.extend(await content.shrink(self.mesh.broker, parts))
        self.journal.closed = True
        await self.log.finish(event, label="message")
        self.ended = True

    def snapshot(self) -> pb.Task:
        """The task as its events and messages so far describe it."""
        task = a2a.fold(self.written, self.base)
        task.id = self.work.task_id
        task.context_id = self.work.context_id
        return task

    async def save_snapshot(self) -> bytes:
        """Store the folded task; header lines by which the next event names it.

        None where it is too large, or not all of it is known: readers then fold the events themselves.
        """
        if self.partial:
            return b""
        key = f"{records.SNAPSHOT_KEY}-{self.log.last + 1}"
        data = self.snapshot().SerializeToString()
        if len(data) > 2 * blobs.LIMIT:
            return b""
        await self.journal.write(key, data)
        return h.fields({h.SNAPSHOT: subjects.step_token(key)})

    async def refuse(self, error: A2AError, message_id: str) -> None:
        """Tell the sender of a follow-up that it was refused, without changing the task's state."""
        state = self.log.last_state if self.log.last_state is not State.UNSPECIFIED else State.WORKING
        event = self.status_event(state, a2a.parts_of(error.message))
        extra = h.fields({h.ERROR: error.reason, h.IN_REPLY_TO: message_id})
        await self.log.post(event, state=state, extra=extra)

    async def remember_children(self) -> None:
        """Store which tasks were delegated, so that whoever takes over can cancel them.

        The list is stored as a whole; those who wait for their turn are served by one write.
        """
        import msgpack

        wanted = len(self.children)
        self.listing = self.listing or asyncio.Lock()
        async with self.listing:
            if self.listed >= wanted:
                return
            listed = [
                [key, child.agent, child.context, child.message_id, child.left] for key, child in self.children.items()
            ]
            await self.journal.replace(records.CHILDREN_KEY, bytes(msgpack.packb(listed)))
            self.listed = len(listed)

    async def recall_children(self) -> None:
        """Read the stored list of delegated tasks."""
        import msgpack

        stored = await self.journal.read(records.CHILDREN_KEY)
        if stored is not None:
            for task_id, agent, context, message_id, *left in msgpack.unpackb(stored.data):
                self.children.setdefault(task_id, Child(agent, context, message_id, left=left == [True]))

    async def cancel_children(self, reason: str) -> None:
        """Send every unfinished child its cancel. The cancels are durable; nobody waits for their effect."""
        await self.recall_children()
        for task_id in list(self.children):
            await self.cancel_child(task_id, reason)

    async def leave_child(self, task_id: str, reason: str) -> None:
        """Stop waiting for a child for good: record that, then cancel it."""
        self.children[task_id].left = True
        self.listed = 0
        await self.remember_children()
        await self.cancel_child(task_id, reason)

    async def cancel_child(self, task_id: str, reason: str) -> None:
        """Send one child its cancel, unless it is done."""
        child = self.children[task_id]
        if not child.done:
            await self.mesh.send_cancel(
                child.agent, task_id, context_id=child.context, message_id=child.message_id, reason=reason
            )
            child.done = True

    def failed_write(self, error: BrokerError | Fenced) -> None:
        """An event could not be stored: stop the handler, whoever owns the task goes on."""
        self.interrupt(Stop.FENCED if isinstance(error, Fenced) else Stop.BROKEN, str(error))
