"""Running an agent that answers message by message (`weft.host.turns`) on a task's log.

Which message a turn answers is recorded before it begins, in step `_turn-{n}` (the first turn answers the message
that created the task). So whoever takes the task over runs the same turn again. Between turns the task is suspended:
its claim waits on the next turn (`Awaited`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Self

import msgpack
from a2a.types import a2a_pb2 as pb

from weft.client import content
from weft.core import blobs
from weft.host.run import Awaited, Input, Run, Stop, turn_key
from weft.host.turns import A2AEvent, Turn, Turns
from weft_protocols import a2a, records, subjects
from weft_protocols import headers as h
from weft_protocols.errors import A2AError, Fenced, InvalidAgentResponse
from weft_protocols.states import State

log = logging.getLogger("weft.host")

NOTE_KEY: Final = "_note"
"""Of records whose last version counts."""
PARTIAL: Final = "-partial"
"""End of the key of a snapshot that lacks what a lost attempt emitted."""
LARGE_KEY: Final = "_base"
"""Of a record that names the blob of a snapshot too large for a record of its own."""
_ROOM: Final = 2 * blobs.LIMIT


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """Which message a turn answers, and what its task was before."""

    number: int
    request: pb.SendMessageRequest
    headers: Mapping[str, str] = field(default_factory=dict)
    known: tuple[str, ...] = ()
    """Ids of the messages that earlier turns answered, so that none is answered twice."""
    snapshot: str = ""
    """Step key of the task before the turn."""

    def encode(self) -> bytes:
        """The record's bytes."""
        return bytes(
            msgpack.packb(
                {
                    "number": self.number,
                    "request": self.request.SerializeToString(),
                    "headers": dict(self.headers),
                    "known": list(self.known),
                    "snapshot": self.snapshot,
                }
            )
        )

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """The record in `data`."""
        found = msgpack.unpackb(data)
        return cls(
            found["number"],
            pb.SendMessageRequest.FromString(found["request"]),
            headers=found["headers"],
            known=tuple(found["known"]),
            snapshot=found["snapshot"],
        )


class Conversation:
    """The turns of one task on one replica, under one claim."""

    def __init__(self, run: Run, turns: Turns) -> None:
        self._run = run
        self._turns = turns
        self._task = pb.Task(id=run.task_id, context_id=run.work.context_id)
        self._task.status.state = pb.TASK_STATE_SUBMITTED
        self._artifacts: set[str] = set()
        self._said = False
        """Whether the executor emitted something, in this attempt or an earlier turn."""
        self._emitted = 0
        """Events of the turn that runs."""
        self._whole = True
        """Whether everything in the log is known here: what a lost attempt at this turn emitted is not."""
        self._saved = (0, "")
        """Number of the last event in the stored snapshot, and its key."""
        self._memory: dict[str, bytes] = {}
        self._writing = asyncio.Lock()
        self._limit: asyncio.Timeout | None = None
        self._inside = False
        self._turn: Turn | None = None

    @property
    def state(self) -> State:
        """State the last event left the task in."""
        return self._run.log.last_state

    @property
    def ended(self) -> bool:
        """Whether the task has ended."""
        return self._run.log.closed

    @property
    def cancel_reason(self) -> str:
        """Why the task is cancelled."""
        return self._run.stop_reason

    # Turns -------------------------------------------------------------------------------------

    async def go_on(self) -> None:
        """Answer message after message until the task has ended, is being stopped, or waits for its next message.

        Raises:
            InvalidAgentResponse: a turn ended that neither ended its task nor left it waiting.
            whatever the handler raises.
        """
        run = self._run
        record: TurnRecord | None = await self._current()
        while record is not None:
            await self._answer(record)
            if run.stop is not None or run.log.closed:
                return
            await self._wait_on()
            record = await self._next(record)

    async def _current(self) -> TurnRecord:
        """The turn that was begun last, or that this run begins."""
        run = self._run
        record = first = TurnRecord(1, run.work.request, headers=run.work.headers)
        if run.journal.fresh:
            await self._begin_from(record)
            return record
        self._whole = False
        awaited = Awaited.parse(run.claim.waiting)
        given = run.resumed
        if awaited is not None:
            stored = await run.journal.read(turn_key(awaited.turn))
            if stored is None:
                before = await self._recorded(awaited.turn - 1) if awaited.turn > 2 else first
                if given is None:
                    raise Fenced(f"task {run.task_id} waits for a message, and none was delivered")
                record = await self._open(before, given, snapshot=awaited.snapshot)
                self._whole = not awaited.snapshot.endswith(PARTIAL)
            else:
                record = TurnRecord.decode(stored.data)
        while (stored := await run.journal.read(turn_key(record.number + 1))) is not None:
            record, self._whole = TurnRecord.decode(stored.data), False
        await self._begin_from(record)
        if given is not None and not run.knows(given.proto.message_id):
            run.inbox.insert(0, given)
        run.resumed = None
        return record

    async def _recorded(self, number: int) -> TurnRecord:
        stored = await self._run.journal.read(turn_key(number))
        if stored is None:
            raise Fenced(f"turn {number} of task {self._run.task_id} is not recorded")
        return TurnRecord.decode(stored.data)

    async def _begin_from(self, record: TurnRecord) -> None:
        """Take up the task as it was when a turn began."""
        run = self._run
        run.known.update((*record.known, record.request.message.message_id))
        if record.snapshot:
            self._task = await self._read_snapshot(record.snapshot)
        self._artifacts = {artifact.artifact_id for artifact in self._task.artifacts}
        self._said = record.number > 1
        self._before = self._copy() if record.number > 1 else None
        for event in run.written:
            a2a.apply(self._task, event)
        run.written.clear()

    async def _next(self, record: TurnRecord) -> TurnRecord | None:
        """The turn that answers the next message; where none is here, None, and the run is told to suspend."""
        run = self._run
        key = await self._save()
        if run.stop is not None:
            return None
        if not run.inbox:
            run.waiting, run.asked = str(Awaited(record.number + 1, key, run.claim.attempt)), 0
            run.stop = Stop.SUSPEND
            return None
        self._before = self._copy()
        opened = await self._open(record, run.inbox.pop(0), snapshot=key)
        await self._post(run.status_event(State.WORKING))
        return opened

    async def _open(self, before: TurnRecord, given: Input, *, snapshot: str) -> TurnRecord:
        """Record which message the next turn answers, and acknowledge its delivery."""
        run = self._run
        wanted = TurnRecord(
            before.number + 1,
            given.request,
            headers={name: value for name, value in given.headers.items() if not name.startswith("nats-")},
            known=(*before.known, before.request.message.message_id),
            snapshot=snapshot,
        )
        _, stored = await run.journal.write(turn_key(wanted.number), wanted.encode())
        record = TurnRecord.decode(stored)
        if record.request.message.message_id == given.proto.message_id:
            run.known.add(given.proto.message_id)
            run.consumed(given)
        elif given is not run.resumed:
            run.inbox.insert(0, given)
        return record

    async def _answer(self, record: TurnRecord) -> None:
        """Run the handler on one message."""
        run = self._run
        self._said_by_caller(record.request.message)
        self._emitted = 0
        try:
            turn = self._turn = await self._made(record)
        except A2AError as error:
            if record.number == 1:
                raise
            await run.refuse(error, record.request.message.message_id)
            return
        deadline = run.work.deadline
        self._inside = True
        try:
            async with asyncio.timeout(None if deadline is None else max(0.0, deadline - time.time())) as self._limit:
                await self._handled(turn)
                if run.stop is Stop.CANCEL and not run.log.closed:
                    await asyncio.Event().wait()  # the cancel hook is still at work; its end stops this
        finally:
            self._inside = False
            if run.log.closed and not run.ended:
                await run.log.settle()
                run.ended = True

    async def _handled(self, turn: Turn) -> None:
        try:
            await self._turns.answer(turn)
        except SystemExit as error:
            raise RuntimeError(f"the handler called sys.exit({error.code!r})") from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if self._run.stop is None and task is not None and not task.cancelling():
                raise RuntimeError(
                    "the handler awaited something that was cancelled, and nobody cancelled it"
                ) from error
            raise

    async def _made(self, record: TurnRecord) -> Turn:
        """The turn as its handler sees it; A2AError where a large part cannot be read."""
        run = self._run
        request = pb.SendMessageRequest()
        request.CopyFrom(record.request)
        message = request.message
        message.task_id, message.context_id = run.task_id, run.work.context_id
        if any(part.url.startswith(blobs.SCHEME) for part in message.parts):
            parts = await content.expand(run.mesh.broker, message.parts)
            del message.parts[:]
            message.parts.extend(parts)
        task: pb.Task | None = None
        if self._before is not None:
            task = pb.Task()
            task.CopyFrom(self._before)
            await content.expand_task(run.mesh.broker, task)
        return Turn(
            number=record.number,
            request=request,
            headers=record.headers,
            task=task,
            agent=run.work.agent,
            task_id=run.task_id,
            context_id=run.work.context_id,
            caller=run.work.caller,
            origin=run.claim.origin,
            replica=run.replica,
            attempt=run.claim.attempt,
            deadline=run.work.deadline,
            mesh=run.mesh,
            _writer=self,
        )

    async def _wait_on(self) -> None:
        """After a turn: the task must wait. One that waited before and was told nothing new waits on."""
        state = self._run.log.last_state
        before = self._before.status if self._before is not None else pb.TaskStatus()
        if not state.interrupted and self._emitted == 0 and State(before.state).interrupted:
            event = pb.StreamResponse()
            event.status_update.task_id, event.status_update.context_id = self._task.id, self._task.context_id
            event.status_update.status.CopyFrom(before)
            state = State(before.state)
            await self._interrupt(event, state)
        if not state.interrupted and not self._run.inbox:
            raise InvalidAgentResponse(
                f"the agent returned and left the task {state.label}: it must end it (completed, failed, rejected), or "
                "ask for something (input-required, auth-required)"
            )

    # Cancelling --------------------------------------------------------------------------------

    @property
    def cancellable(self) -> bool:
        """Whether a running turn has somebody to tell about a cancel."""
        return self._turns.cancel is not None and self._inside

    async def cancelled(self, grace: float) -> None:
        """Tell the agent that its task is cancelled, then stop the turn that runs."""
        try:
            await self._tell(grace)
        finally:
            if self._inside and self._run.runner is not None:
                self._run.runner.cancel(f"task {self._run.task_id}: cancel")

    async def over(self, grace: float) -> None:
        """Tell the agent that its task was ended from outside, by its deadline."""
        if self._turns.cancel is not None and self._turn is not None:
            await self._tell(grace)

    async def parted(self, reason: str, *, grace: float) -> None:
        """Tell the agent that a task is cancelled that waits between two turns."""
        run = self._run
        if self._turns.cancel is None:
            return
        awaited = Awaited.parse(run.claim.waiting)
        if awaited is None:
            return
        record = TurnRecord(1, run.work.request, headers=run.work.headers)
        if awaited.turn > 2 and (stored := await run.journal.read(turn_key(awaited.turn - 1))) is not None:
            record = TurnRecord.decode(stored.data)
        try:
            self._task = await self._read_snapshot(awaited.snapshot)
            self._artifacts = {artifact.artifact_id for artifact in self._task.artifacts}
            self._said, self._before = True, self._copy()
            self._turn = await self._made(record)
        except A2AError as error:
            log.warning("task %s: its agent cannot be told that it is cancelled: %s", run.task_id, error)
            return
        run.stop, run.stop_reason = Stop.CANCEL, reason
        await self._tell(grace)

    async def _tell(self, grace: float) -> None:
        if self._turn is None or self._turns.cancel is None:
            return
        try:
            async with asyncio.timeout(grace):
                await self._turns.cancel(self._turn)
        except Fenced as error:
            log.info("task %s: %s", self._run.task_id, error)
        except Exception as error:  # noqa: BLE001 - the agent cannot cancel: its turn is stopped without it
            log.warning("task %s: cancelling it raised %r; it is stopped", self._run.task_id, error)

    # Events ------------------------------------------------------------------------------------

    def now(self) -> pb.Task:
        """The task as its log describes it: a copy."""
        return self._copy()

    async def write(self, event: A2AEvent) -> None:
        """Append what the handler emits; see `Turn.emit`."""
        async with self._writing:
            if self._silenced(event):
                return
            if isinstance(event, pb.Message):
                await self._message(event)
            elif isinstance(event, pb.Task):
                await self._task_event(event)
            elif isinstance(event, pb.TaskStatusUpdateEvent):
                self._check_ids(event.task_id, event.context_id)
                await self._status(event)
            elif isinstance(event, pb.TaskArtifactUpdateEvent):
                self._check_ids(event.task_id, event.context_id)
                await self._artifact(event)
            else:
                raise InvalidAgentResponse(f"a {type(event).__name__} is no event of A2A")

    def _silenced(self, event: A2AEvent) -> bool:
        """Whether nothing more counts: the task has ended, or its turn is being stopped and will be run again."""
        run = self._run
        late = self._limit is not None and self._limit.expired()
        if run.log.closed or late:
            log.warning("task %s: a %s after its end was dropped", run.task_id, type(event).__name__)
            return True
        if run.stop not in (None, Stop.CANCEL):
            log.info("task %s: a %s was dropped: the turn is stopped", run.task_id, type(event).__name__)
            return True
        return False

    def _check_ids(self, task_id: str, context_id: str) -> None:
        work = self._run.work
        if task_id not in ("", work.task_id):
            raise InvalidAgentResponse(f"the agent answered task {work.task_id} with an event of task {task_id}")
        if context_id not in ("", work.context_id):
            raise InvalidAgentResponse(
                f"the agent answered a task of context {work.context_id} with an event of context {context_id}"
            )

    async def _message(self, given: pb.Message) -> None:
        if self._said:
            raise InvalidAgentResponse(
                "the agent sent a message after events of its task; put it into a status, or send nothing else"
            )
        run = self._run
        event = pb.StreamResponse(message=given)
        event.message.context_id = given.context_id or run.work.context_id
        event.message.message_id = given.message_id or f"{run.task_id}-answer"
        await content.shrink_message(run.mesh.broker, event.message)
        await self._finish(event, label="message")

    async def _task_event(self, task: pb.Task) -> None:
        """What a whole task says beyond the log. Only the first one of a task counts, and one that ends it."""
        self._check_ids(task.id, task.context_id)
        state = State(task.status.state)
        if self._said and not state.terminal:
            return
        known = {message.message_id for message in self._task.history}
        for message in task.history:
            if message.role == pb.ROLE_AGENT and message.message_id not in known | {task.status.message.message_id}:
                said = pb.TaskStatusUpdateEvent(status=pb.TaskStatus(state=pb.TASK_STATE_WORKING, message=message))
                await self._status(said)
        for artifact in task.artifacts:
            if artifact.artifact_id not in self._artifacts:
                await self._artifact(pb.TaskArtifactUpdateEvent(artifact=artifact, last_chunk=True))
        self._said = True
        told = task.status.HasField("message") or task.HasField("metadata")
        if told or state not in (State.UNSPECIFIED, State.SUBMITTED):
            update = pb.TaskStatusUpdateEvent(status=task.status)
            if task.HasField("metadata"):
                update.metadata.CopyFrom(task.metadata)
            if state is State.UNSPECIFIED:
                update.status.state = pb.TASK_STATE_SUBMITTED
            await self._status(update)

    async def _status(self, given: pb.TaskStatusUpdateEvent) -> None:
        run = self._run
        state = State(given.status.state)
        if state is State.UNSPECIFIED:
            raise InvalidAgentResponse("the agent sent a status without a state")
        event = pb.StreamResponse(status_update=given)
        update = event.status_update
        update.task_id, update.context_id = run.task_id, run.work.context_id
        if not update.status.HasField("timestamp"):
            update.status.timestamp.seconds, update.status.timestamp.nanos = divmod(time.time_ns(), 1_000_000_000)
        if state is State.SUBMITTED and run.log.last_state is not State.UNSPECIFIED:
            # The task is further already: another attempt or an earlier turn said so.
            self._said = True
            if not (update.status.HasField("message") or update.HasField("metadata")):
                return
            state, update.status.state = State.WORKING, pb.TASK_STATE_WORKING
        if update.status.HasField("message"):
            await content.shrink_message(run.mesh.broker, update.status.message)
        if state.terminal:
            await self._finish(event, label=state.label)
        elif state.interrupted:
            await self._interrupt(event, state)
        else:
            await self._post(event, state=state)

    async def _artifact(self, given: pb.TaskArtifactUpdateEvent) -> None:
        run = self._run
        key = given.artifact.artifact_id
        if given.append and self._whole and key not in self._artifacts:
            raise InvalidAgentResponse(f"the agent appended to artifact {key!r}, which it has not sent; send it first")
        event = pb.StreamResponse(artifact_update=given)
        update = event.artifact_update
        update.task_id, update.context_id = run.task_id, run.work.context_id
        if update.artifact.ByteSize() > blobs.LIMIT:
            parts = await content.shrink(run.mesh.broker, update.artifact.parts)
            del update.artifact.parts[:]
            update.artifact.parts.extend(parts)
        await self._post(event)
        self._artifacts.add(key)

    async def _post(self, event: pb.StreamResponse, *, state: State | None = None, extra: bytes = b"") -> None:
        run = self._run
        if event.HasField("status_update"):
            state = State(event.status_update.status.state)
        if run.log.last == 0:
            extra += _begins(run)
        await run.log.post(event, state=state, extra=extra)
        self._count(event)

    async def _interrupt(self, event: pb.StreamResponse, state: State) -> None:
        """Write that the task waits, naming the snapshot that includes it."""
        run = self._run
        after = self._copy()
        a2a.apply(after, event)
        key = await self._store(after, number=run.log.last + 1)
        readable = self._whole and not key.startswith(LARGE_KEY)  # else readers fold the events themselves
        named = h.fields({h.SNAPSHOT: subjects.step_token(key)}) if readable else b""
        await self._post(event, state=state, extra=named)
        self._saved = (run.log.last, key)

    async def _finish(self, event: pb.StreamResponse, *, label: str) -> None:
        run = self._run
        run.journal.closed = True
        try:
            await run.log.finish(event, label=label, extra=_begins(run) if run.log.last == 0 else b"")
        finally:
            run.journal.closed = run.log.closed
        run.ended = True
        self._count(event)

    def _count(self, event: pb.StreamResponse) -> None:
        a2a.apply(self._task, event)
        self._said = True
        self._emitted += 1
        self._run.last_progress = time.time()

    # What is stored ----------------------------------------------------------------------------

    async def remember(self, key: str, value: bytes) -> bytes:
        """Store a value under a key of the task; the first one."""
        journal = self._run.journal
        name = journal.key(key, explicit=True)
        known = await self.recall(key)
        if known is None:
            _, known = await journal.write(name, value)
            self._memory[key] = known
        return known

    async def note(self, key: str, value: bytes) -> None:
        """Store a value under a key of the task in place of the one before; see `Turn.note`."""
        run = self._run
        if run.stop is None and not run.log.closed:
            await run.log.settle()
            await run.journal.replace(_note_key(run.journal.key(key, explicit=True)), value)
            self._memory[key] = value

    async def recall(self, key: str) -> bytes | None:
        """The value under a key of the task."""
        if key not in self._memory:
            journal = self._run.journal
            name = journal.key(key, explicit=True)
            stored = await journal.read(name) or await journal.read(_note_key(name))
            if stored is None:
                return None
            self._memory[key] = stored.data
        return self._memory[key]

    async def _save(self) -> str:
        """Key of a snapshot that includes every event so far."""
        last = self._run.log.last
        if self._saved[0] != last:
            self._saved = (last, await self._store(self._copy(), number=last))
        return self._saved[1]

    async def _store(self, task: pb.Task, *, number: int) -> str:
        """Store the task as it is after event `number`; the record's key."""
        run = self._run
        data = task.SerializeToString()
        kind, suffix = records.SNAPSHOT_KEY, "" if self._whole else PARTIAL
        if len(data) > _ROOM:
            kind, data = LARGE_KEY, (await blobs.put(run.mesh.broker, data)).url.encode()
        key = f"{kind}-{number}{suffix}"
        _, stored = await run.journal.write(key, data)
        if stored != data:
            # A replica that was lost stored its own before the event it was for.
            key = f"{kind}-{number}-{run.claim.attempt}{suffix}"
            await run.journal.write(key, data)
        return key

    async def _read_snapshot(self, key: str) -> pb.Task:
        stored = await self._run.journal.read(key)
        if stored is None:
            raise Fenced(f"the snapshot {key} of task {self._run.task_id} is not there")
        data = stored.data
        if key.startswith(LARGE_KEY):
            data = await blobs.get(self._run.mesh.broker, blobs.BlobRef.parse(data.decode()))
        return pb.Task.FromString(data)

    def _said_by_caller(self, message: pb.Message) -> None:
        """The caller's message is part of the history from its turn on."""
        if not _knows(self._task.history, message.message_id):
            said = self._task.history.add()
            said.CopyFrom(message)
            said.task_id, said.context_id = self._task.id, self._task.context_id

    def _copy(self) -> pb.Task:
        copied = pb.Task()
        copied.CopyFrom(self._task)
        return copied

    _before: pb.Task | None = None
    """The task before the turn that runs; None in the first."""


def _begins(run: Run) -> bytes:
    """Header lines of a task's first event."""
    return b"Weft-Replica: %b\r\nWeft-Attempt: %d\r\n" % (run.replica.encode(), run.claim.attempt)


def _note_key(key: str) -> str:
    return f"{NOTE_KEY}-{subjects.step_token(key)}"


def _knows(messages: Iterable[pb.Message], message_id: str) -> bool:
    return any(message.message_id == message_id for message in messages)


__all__ = ["Conversation", "TurnRecord"]
